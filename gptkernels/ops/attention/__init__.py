"""Attention: of a batch, of packed sequences, and of new tokens to a cache."""
