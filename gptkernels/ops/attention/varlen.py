"""`attention_varlen`: attention of packed sequences, by the op of `attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.core.checks import check_same_device, check_shape, dtype_name
from gptkernels.core.choice import choose
from gptkernels.ops.attention.dense import attend
from gptkernels.ops.attention.options import (
    AttentionOptions,
    check_heads,
    check_tensors,
    complete,
    scale,
)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | Sequence[float] | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of a batch of sequences of different lengths, laid end to end without padding.

    Each sequence attends to itself alone, and everything is as `gptkernels.attention` would do it
    for that sequence: alignment at the ends, windows and ALiBi by the positions within it. The mask
    of dropout is that of the contract with b the sequence's number, and positions within it.

    Args:
        q: (total_q, H, D), float32, bfloat16 or float16, D <= 256, any strides with a unit last
            one.
        k, v: (total_k, Hk, D), of q's dtype and device; H is a multiple of Hk.
        cu_seqlens_q: (B + 1,) int32: sequence b has queries cu_seqlens_q[b] up to, not with,
            cu_seqlens_q[b + 1]; from 0 to total_q, never falling. On a CPU that is checked.
        cu_seqlens_k: (B + 1,) int32, likewise for keys, from 0 to total_k.
        max_seqlen_q, max_seqlen_k: of the longest sequence, or more.
        causal, softmax_scale, window, softcap, alibi_slopes, dropout_p, deterministic, return_lse:
            as for `gptkernels.attention`.
        impl: "auto", "torch", "triton" or "cuda".

    Returns:
        out (total_q, H, D) in q's dtype, or (out, lse), lse (H, total_q) fp32, differentiable too.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, strides or value is wrong.
        RuntimeError: an explicit impl cannot run here.

    Differentiable once in q, k and v.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    impl = choose(impl, q)
    options = AttentionOptions(
        softmax_scale=scale(softmax_scale, q),
        softcap=softcap,
        dropout_p=dropout_p,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    options = complete(options, q, causal=causal, window=window, alibi_slopes=alibi_slopes)
    out, lse = attend(q[None], k[None], v[None], options, deterministic, return_lse, impl)
    return (out[0], lse[0]) if return_lse else out[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    kinds = ("(total_q, H, D)", "(total_k, Hk, D)", "(total_k, Hk, D)")
    check_tensors(("q", "k", "v"), (q, k, v), kinds)
    (_, H, D), (total_k, Hk) = q.shape, k.shape[:2]
    check_shape("k", k, (total_k, Hk, D), "head width of q")
    check_shape("v", v, (total_k, Hk, D), "that of k")
    check_heads(H, Hk)
    for name, lengths, longest, x in (
        ("q", cu_seqlens_q, max_seqlen_q, q),
        ("k", cu_seqlens_k, max_seqlen_k, k),
    ):
        _check_lengths(name, lengths, longest, x)
    check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "that of cu_seqlens_q")


def _check_lengths(name: str, cu_seqlens: Tensor, longest: int, x: Tensor) -> None:
    argument = f"cu_seqlens_{name}"
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{argument} must be int32, got {dtype_name(cu_seqlens.dtype)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{argument} must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    check_same_device(argument, cu_seqlens, "q", x)
    if not isinstance(longest, int | torch.SymInt) or isinstance(longest, bool):
        raise TypeError(f"max_seqlen_{name} must be an int, got {longest!r}")
    # On a GPU reading the values would synchronise; under compile there are none yet.
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != x.shape[0]:
        raise ValueError(
            f"{argument} must go from 0 to the {x.shape[0]} tokens of {name}, "
            f"got {ends[0]} to {ends[-1]}"
        )
    lengths = cu_seqlens.diff()
    if lengths.numel() and int(lengths.min()) < 0:
        b = int(lengths.argmin())
        raise ValueError(f"{argument} must never fall, got {ends[b]} and then {ends[b + 1]}")
    if lengths.numel() and int(lengths.max()) > longest:
        raise ValueError(
            f"max_seqlen_{name} must be at least the longest length {int(lengths.max())}, "
            f"got {longest}"
        )
