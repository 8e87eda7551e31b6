"""A model repository for an inference server: its writer, and the two programs that are copied into it."""
