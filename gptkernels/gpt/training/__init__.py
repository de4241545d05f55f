"""Training a GPT: data, loop, checkpoints, progress."""
