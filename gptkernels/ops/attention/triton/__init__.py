"""Attention's Triton kernels and their launchers."""

from gptkernels.ops.attention.triton.decode import attention_decode_fwd
from gptkernels.ops.attention.triton.dense import attention_bwd, attention_fwd

__all__ = ["attention_bwd", "attention_decode_fwd", "attention_fwd"]
