"""The GELU MLP."""
