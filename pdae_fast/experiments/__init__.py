"""The paper's experiments: what `python -m pdae_fast.evaluate`, `encode`, `probe` and the others run."""
