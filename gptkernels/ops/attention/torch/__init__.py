"""Attention computed with PyTorch's own operators: `dense` for a batch, `varlen` for packed
sequences, `decode` for new tokens and a cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import dense, varlen
from gptkernels.ops.attention.torch.decode import attention_decode_fwd

__all__ = ["attention_bwd", "attention_decode_fwd", "attention_fwd"]


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Returns out and lse; see `dense` and `varlen`."""
    kind = dense if options.cu_seqlens_q is None else varlen
    return kind.attention_fwd(q, k, v, options)


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    grad_mask: Sequence[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, the mask's gradient and by_query; see `dense` and `varlen`."""
    kind = dense if options.cu_seqlens_q is None else varlen
    return kind.attention_bwd(dout, dlse, q, k, v, out, lse, options, grad_mask, deterministic)
