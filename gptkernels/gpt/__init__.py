"""The reference GPT: configuration, model, weights, tokenizers, generation and training."""
