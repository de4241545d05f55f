"""Attention's Triton kernels and their launchers."""
