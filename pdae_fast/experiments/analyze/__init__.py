"""The paper's analyses: what the shift does at every t, when guidance matters, and what an inferred x_T is worth."""
