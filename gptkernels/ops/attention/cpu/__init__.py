"""Attention by CPU kernels."""

from gptkernels.ops.attention.cpu.dense import attention_bwd, attention_fwd

__all__ = ["attention_bwd", "attention_fwd"]
