"""LayerNorm's Triton kernels and their launchers."""

from gptkernels.ops.layer_norm.triton.launch import layer_norm_bwd, layer_norm_fwd

__all__ = ["layer_norm_bwd", "layer_norm_fwd"]
