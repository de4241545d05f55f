"""The GELU MLP: linear, GELU, linear."""
