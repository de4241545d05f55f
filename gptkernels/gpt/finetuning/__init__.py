"""Fine-tuning a GPT on a task by input transformations, as GPT-1's paper does."""
