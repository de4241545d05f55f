"""LayerNorm's Triton kernels and their launchers."""
