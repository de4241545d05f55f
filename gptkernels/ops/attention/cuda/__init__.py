"""Launchers of attention's CUDA C++ kernels."""
