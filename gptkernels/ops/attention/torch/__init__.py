"""Attention from PyTorch's own operators."""
