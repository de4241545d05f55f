"""This package's kernels where PyTorch calls flash attention.

    import gptkernels.dropin.sdpa
    torch.nn.attention.activate_flash_attention_impl("gptkernels")      # the Triton kernels
    torch.nn.attention.restore_flash_attention_impl()

From then on F.scaled_dot_product_attention runs them wherever it takes its flash backend, and so
does torch.nn.attention.varlen.varlen_attn. "gptkernels-cuda" are the CUDA C++ kernels. To import
this module registers both names and activates none. The rest is PyTorch's: which backend a call
takes, padding of head widths, autograd. While one is active, PyTorch's flash attention is it, also
for impl="torch" of this package.

The functions below have the arguments and results of the operators that they stand for. What they
lack is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.attention import register_flash_attention_impl

from gptkernels.core import philox
from gptkernels.core.autograd import requires_grad
from gptkernels.core.checks import check_same_device, check_shape
from gptkernels.core.choice import choose
from gptkernels.ops.attention.decode import attention_decode
from gptkernels.ops.attention.dense import attention_bwd, attention_fwd
from gptkernels.ops.attention.options import (
    AttentionOptions,
    check_heads,
    check_tensors,
    complete,
)
from gptkernels.ops.attention.options import scale as scale_of

IMPLEMENTATIONS = {"gptkernels": "triton", "gptkernels-cuda": "cuda"}

_Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor]


def flash_attention_forward(
    impl: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> _Forward:
    """aten::_flash_attention_forward by an implementation.

    query is (B, Tq, H, D), key and value are (B, Tk, Hk, D); with cum_seq_q and cum_seq_k,
    (B + 1,) int32, they are packed, (total, heads, D). seqused_k (B,) int32 counts the keys of each
    entry, at whose end its queries are, as in `gptkernels.attention_decode`; its block_table and
    num_splits go with it. Returns out in query's layout, lse (B, H, Tq) or (H, total_q) fp32, the
    seed of dropout, and two tensors that say nothing.
    """
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask is not known: no kernel keeps the weights")
    if requires_grad((query, key, value)):
        for name, given in (("seqused_k", seqused_k), ("alibi_slopes", alibi_slopes)):
            if given is not None:
                raise NotImplementedError(
                    f"{name} has no backward pass: PyTorch's operator for it gets none"
                )
    if seqused_k is not None:
        if dropout_p > 0:
            raise NotImplementedError("dropout_p is not known together with seqused_k")
        found = _decode(
            impl, query, key, value, cum_seq_q, max_q, max_k, seqused_k, block_table,
            causal=is_causal, softmax_scale=scale, alibi_slopes=alibi_slopes,
            window=_window(window_size_left, window_size_right), num_splits=num_splits or None,
        )  # fmt: skip
        return *found, *_unsaid(query)
    if block_table is not None:
        raise NotImplementedError("block_table is known together with seqused_k only")
    if num_splits not in (None, 0, 1):  # the keys are never split
        raise NotImplementedError("num_splits is known together with seqused_k only")
    q, k, v, options = _given(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale,
        window_size_left, window_size_right, alibi_slopes,
    )  # fmt: skip
    rng, unused, mask = _unsaid(query)
    if dropout_p > 0:
        drawn = philox.draw(query.device)
        rng, options = drawn.view(torch.uint64), options._replace(rng=drawn)
    with torch.no_grad():
        out, lse = attention_fwd(q, k, v, *options, choose(impl, query))
    if cum_seq_q is not None:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return _laid_out(out, query), lse, rng, unused, mask


def flash_attention_forward_inplace(impl: str, out: Tensor, *arguments: Any, **options: Any) -> Any:
    """aten::_flash_attention_forward_no_dropout_inplace: as `flash_attention_forward`, whose first
    result is written to `out`; returns lse."""
    found, lse, *_ = flash_attention_forward(impl, *arguments, **options)
    out.copy_(found)
    return lse


def flash_attention_backward(
    impl: str,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> _Gradients:
    """aten::_flash_attention_backward by an implementation: the gradients of query, key and value,
    each in its tensor's layout. rng_state is what the forward pass returned."""
    q, k, v, options = _given(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale,
        window_size_left, window_size_right, None,
    )  # fmt: skip
    if dropout_p > 0:
        options = options._replace(rng=rng_state.view(torch.int64))
    if cum_seq_q is not None:
        grad_out, out, logsumexp = grad_out[None], out[None], logsumexp[None]
    wanted = [True, True, True, False, False]
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.no_grad():
        found = attention_bwd(
            grad_out, None, q, k, v, out, logsumexp.contiguous(), *options, wanted, deterministic,
            choose(impl, query),
        )  # fmt: skip
    dq, dk, dv = (x if cum_seq_q is None else x.squeeze(0) for x in found[:3])
    return _laid_out(dq, query), _laid_out(dk, key), _laid_out(dv, value)


def scaled_dot_product_forward(
    impl: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention: query (B, H, Tq, D), key and value (B, Hk, Tk, D).
    Returns out, lse, no ends of sequences, Tq, Tk, and the rest of `flash_attention_forward`."""
    q, k, v = _swapped(query, key, value)
    Tq, Tk = q.shape[1], k.shape[1]
    out, lse, *rest = flash_attention_forward(
        impl, q, k, v, None, None, Tq, Tk, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out.transpose(1, 2), lse, None, None, Tq, Tk, *rest


def scaled_dot_product_backward(
    impl: str,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> _Gradients:
    """aten::_scaled_dot_product_flash_attention_backward, of `scaled_dot_product_forward`, which
    has no packed sequences."""
    grad_out, query, key, value, out = _swapped(grad_out, query, key, value, out)
    dq, dk, dv = flash_attention_backward(
        impl, grad_out, query, key, value, out, logsumexp, None, None, max_q, max_k, dropout_p,
        is_causal, philox_seed, philox_offset, scale=scale,
    )  # fmt: skip
    dq, dk, dv = _swapped(dq, dk, dv)
    return dq, dk, dv


OPERATORS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": flash_attention_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_attention_forward_inplace,
    "_flash_attention_backward": flash_attention_backward,
    "_scaled_dot_product_flash_attention": scaled_dot_product_forward,
    "_scaled_dot_product_flash_attention_backward": scaled_dot_product_backward,
}


class Activation:
    """What PyTorch keeps while an implementation is active: the operators are its own again when
    the library is gone."""

    def __init__(self, impl: str, dispatch_key: str = "CUDA") -> None:
        self.library: Library | None = Library("aten", "IMPL", dispatch_key)
        for name, function in OPERATORS.items():
            if hasattr(torch.ops.aten, name):  # writing into `out` is newer than PyTorch 2.11
                self.library.impl(name, functools.partial(function, impl), dispatch_key)

    def remove(self) -> None:
        """Called by torch.nn.attention.restore_flash_attention_impl."""
        self.library = None


def _given(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    left: int | None,
    right: int | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, AttentionOptions]:
    """Checks the arguments of both passes; returns the tensors as the op takes them, and its
    options. Raises TypeError, ValueError."""
    packed, tensors = cum_seq_q is not None, (query, key, value)
    shapes = ("(total_q, H, D)", "(total_k, Hk, D)", "(total_k, Hk, D)")
    if not packed:
        shapes = ("(B, Tq, H, D)", "(B, Tk, Hk, D)", "(B, Tk, Hk, D)")
    check_tensors(("query", "key", "value"), tensors, shapes)
    q, k, v = (x[None] for x in tensors) if packed else tensors
    (B, Tk, Hk), D = (q.shape[0], *k.shape[1:3]), q.shape[3]
    check_shape("key", k, (B, Tk, Hk, D), "batch and head width of query")
    check_shape("value", v, (B, Tk, Hk, D), "that of key")
    check_heads(q.shape[2], Hk)
    options = AttentionOptions(scale_of(scale, query), dropout_p=dropout_p)
    if cum_seq_q is not None:
        B = cum_seq_q.shape[0] - 1
        for name, ends in (("cum_seq_q", cum_seq_q), ("cum_seq_k", cum_seq_k)):
            if ends is None or ends.dtype != torch.int32:
                raise TypeError(f"{name} must be an int32 tensor, got {ends}")
            check_shape(name, ends, (B + 1,), "that of cum_seq_q")
            check_same_device(name, ends, "query", query)
        options = options._replace(
            max_seqlen_q=max_q, max_seqlen_k=max_k, cu_seqlens_q=cum_seq_q, cu_seqlens_k=cum_seq_k
        )
    window = _window(left, right)
    options = complete(
        options, q, causal=is_causal, window=window, alibi_slopes=alibi_slopes, batch=B
    )
    return q, k, v, options


def _decode(
    impl: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    max_q: int,
    max_k: int,
    seqused_k: Tensor,
    block_table: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Returns out and lse of entries whose keys are caches. Packed sequences are entries where they
    have one length: no sequence is longer than max_q."""
    B, q, k, v = seqused_k.shape[0], query, key, value
    if cum_seq_q is not None:
        if query.shape[0] != B * max_q or (block_table is None and key.shape[0] != B * max_k):
            raise NotImplementedError(
                "seqused_k is known where every sequence has max_q queries and room for max_k "
                f"keys, got {query.shape[0]} queries and {key.shape[0]} keys of {B} sequences, "
                f"max_q {max_q}, max_k {max_k}"
            )
        q = q.unflatten(0, (B, max_q))
        if block_table is None:
            k, v = k.unflatten(0, (B, max_k)), v.unflatten(0, (B, max_k))
    with torch.no_grad():
        out, lse = attention_decode(
            q, k, v, seqused_k, block_table=block_table, return_lse=True, impl=impl, **options
        )
    if cum_seq_q is not None:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    return _laid_out(out, query), lse


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, -1 if right is None else right


def _swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Heads and tokens in the place of each other."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _laid_out(result: Tensor, tensor: Tensor) -> Tensor:
    """The result in the layout of a tensor, as torch.compile expects it."""
    if torch.empty_like(tensor, device="meta").stride() == result.stride():
        return result
    return torch.empty_like(tensor).copy_(result)


def _unsaid(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The seed of no dropout, what PyTorch calls unused, and no weights."""
    rng = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return rng, torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


for _name, _impl in IMPLEMENTATIONS.items():
    register_flash_attention_impl(_name, register_fn=functools.partial(Activation, _impl))
