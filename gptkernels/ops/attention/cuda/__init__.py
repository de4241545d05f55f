"""Launchers of attention's CUDA C++ kernels (csrc/attention)."""

from gptkernels.ops.attention.cuda.decode import attention_decode_fwd
from gptkernels.ops.attention.cuda.dense import attention_bwd, attention_fwd

__all__ = ["attention_bwd", "attention_decode_fwd", "attention_fwd"]
