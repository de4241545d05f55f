"""Calls of attention's CPU kernels (csrc/cpu/attention)."""

from gptkernels.ops.attention.cpu.decode import attention_decode_fwd
from gptkernels.ops.attention.cpu.dense import attention_bwd, attention_fwd

__all__ = ["attention_bwd", "attention_decode_fwd", "attention_fwd"]
