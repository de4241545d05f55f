"""Calls of attention's CPU kernels, of a batch and of packed sequences. The formulas are in
csrc/cpu/attention/params.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptkernels.core import philox
from gptkernels.core.cpu import DTYPE_CODES, address, module
from gptkernels.ops.attention.options import AttentionOptions, without_keys

# The values of `gk::cpu::MaskKind`.
_NO_MASK = (0, 0, 0, 0, 0, 0, 0)
_VISIBLE, _ADDED = 1, 2


def attention_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, Dv)
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, Dv) and lse (B, H, Tq) in fp32."""
    if options.cu_seqlens_q is not None or _nothing(q, k):  # some rows may belong to no sequence
        out, lse = without_keys(q, v, options)
        if _nothing(q, k):
            return out, lse
    else:
        B, Tq, H, _ = q.shape
        out = torch.empty((B, Tq, H, v.shape[3]), dtype=q.dtype)
        lse = torch.empty((B, H, Tq), dtype=torch.float32)
    given = _Call(q, k, v, options)
    module().attention_fwd(
        *given.arguments,
        (q.data_ptr(), k.data_ptr(), v.data_ptr()),
        (q.stride()[:3], k.stride()[:3], v.stride()[:3]),
        out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: Tensor,  # (B, Tq, H, Dv)
    dlse: Tensor | None,  # (B, H, Tq) fp32
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    grad_mask: Sequence[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v and an additive attn_mask, and by_query (B, H, Tq) in fp32,
    each empty where `grad_mask` is False. They always have the same bits, whether `deterministic`
    or not."""
    dq, dk, dv = (
        torch.empty(x.shape if wanted else (0,), dtype=x.dtype)
        for x, wanted in zip((q, k, v), grad_mask, strict=False)
    )
    by_query = torch.empty(lse.shape if grad_mask[4] else (0,), dtype=torch.float32)
    mask, dmask = options.attn_mask, None
    if mask is not None and grad_mask[3]:
        dmask = torch.zeros(mask.shape, dtype=torch.float32)
    if options.cu_seqlens_q is not None or _nothing(q, k):
        for gradient in (dq, dk, dv, by_query):
            gradient.zero_()
    if _nothing(q, k) or not any(grad_mask):
        return dq, dk, dv, _rounded(dmask, mask, q), by_query
    if dout.stride(-1) != 1:  # such as an expanded tensor
        dout = dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    given = _Call(q, k, v, options)
    module().attention_bwd(
        *given.arguments,
        (q.data_ptr(), k.data_ptr(), v.data_ptr(), dout.data_ptr()),
        (q.stride()[:3], k.stride()[:3], v.stride()[:3], dout.stride()[:3]),
        out.data_ptr(), lse.data_ptr(), address(dlse),
        (*(address(x) if wanted else 0 for x, wanted in zip((dq, dk, dv), grad_mask, strict=False)),
         address(dmask), address(by_query) if grad_mask[4] else 0),
        (0, 0, 0, 0) if dmask is None else _strides(dmask),
        torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv, _rounded(dmask, mask, q), by_query


def _rounded(dmask: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor:
    """Returns the mask's gradient in its dtype, empty where none is wanted."""
    if dmask is None or mask is None:
        return torch.empty(0, dtype=q.dtype)
    return dmask.to(mask.dtype)


def _nothing(q: Tensor, k: Tensor) -> bool:
    """Whether there are no queries or no keys at all."""
    return q.numel() == 0 or k.numel() == 0


class _Call:
    """What both passes hand over. Keeps the tensors alive whose addresses it holds."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> None:
        (B, Tq, H, D), (Tk, Hk), Dv = q.shape, k.shape[1:3], v.shape[3]
        self.tensors = options.vectors
        if options.cu_seqlens_q is not None:
            B = options.cu_seqlens_q.shape[0] - 1
        p = options.dropout_p
        self.arguments: tuple[Any, ...] = (
            (B, Tq, Tk, H, Hk, D, Dv, options.left, options.right, options.alibi_stride),
            (options.softmax_scale, options.softcap),
            tuple(address(self.tensors.get(name)) for name in _TENSORS),
            _NO_MASK if options.attn_mask is None else _mask(options.attn_mask),
            (address(self.tensors["rng"]), philox.threshold(p), philox.scale(p))
            if p
            else _KEEP_ALL,
            DTYPE_CODES[q.dtype],
        )


_KEEP_ALL = (0, 0, 1.0)  # rng's address, the threshold and the scale
_TENSORS = ("alibi_slopes", "sinks", "key_lengths", "cu_seqlens_q", "cu_seqlens_k")


def _mask(mask: Tensor) -> tuple[int, ...]:
    """Address, strides of batch, head, query and key, kind and dtype."""
    visible = mask.dtype == torch.bool
    kind, dtype = (_VISIBLE, 0) if visible else (_ADDED, DTYPE_CODES[mask.dtype])
    return (mask.data_ptr(), *_strides(mask), kind, dtype)


def _strides(mask: Tensor) -> tuple[int, ...]:
    """Strides of batch, head, query and key, 0 where the mask is broadcast."""
    sizes = zip(mask.shape, mask.stride(), strict=True)
    strides = [0 if size == 1 else stride for size, stride in sizes]
    return (0,) * (4 - mask.dim()) + tuple(strides)
