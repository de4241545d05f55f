"""`attention_varlen`: attention of packed sequences. It calls the registered op of `attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Never

import torch
from torch import Tensor

from gptkernels.core.checks import check_flag, check_same_device, check_shape, dtype_name
from gptkernels.core.keywords import refuse, without_unknown
from gptkernels.core.sharding import Shards, by_shards, distributed
from gptkernels.core.values import readable
from gptkernels.ops.attention import elsewhere, plan
from gptkernels.ops.attention.dense import attend
from gptkernels.ops.attention.options import (
    AttentionOptions,
    check_heads,
    check_tensors,
    complete,
    scale,
)

_SHARDS = Shards.of(
    "q:NHD k:MHD v:MHE cu_seqlens_q:S cu_seqlens_k:S alibi_slopes:BH sinks:H",
    "NHE HN",
    over="H",
    evenly="H",
)


@without_unknown
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
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of B sequences of different lengths, packed end to end without padding.

    Each sequence attends only to itself, as if `gptkernels.attention` were called for that sequence
    alone: queries and keys are aligned at the sequence's end, and windows and ALiBi count positions
    within the sequence. The dropout mask (`gptkernels.core.philox`) takes the sequence's number as
    its batch entry b, and positions within the sequence.

    Args:
        q: Queries (total_q, H, D), float32, bfloat16 or float16. D is at most 512, and at most 256
            with impl="triton" and "cuda". The last stride must be 1; the other strides are free.
        k, v: Keys (total_k, Hk, D) and values (total_k, Hk, Dv), with q's dtype and device and a
            last stride of 1. H must be a multiple of Hk.
        cu_seqlens_q: (B + 1,) int32. Sequence b has the queries from cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] - 1. The values begin with 0, never decrease, and end with total_q;
            this is checked on a CPU only.
        cu_seqlens_k: (B + 1,) int32, the same for keys; the values end with total_k.
        max_seqlen_q, max_seqlen_k: Length of the longest sequence, or any larger number.
        causal, softmax_scale, window, softcap, alibi_slopes, sinks, dropout_p, deterministic,
        return_lse: As for `gptkernels.attention`.
        impl: As for `gptkernels.attention`.

    Returns:
        out (total_q, H, Dv) in q's dtype; with return_lse, (out, lse), where lse is (H, total_q)
        float32 and differentiable too.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device, strides or value is wrong.
        RuntimeError: An explicit impl cannot run on this machine or these tensors.
        NotImplementedError: An explicit impl lacks what the call asks for.

    Differentiable once in q, k, v, alibi_slopes and sinks. Autocast works as for
    `gptkernels.attention`.
    """
    if unknown:
        refuse(attention_varlen, unknown, elsewhere.VARLEN)
    if type(q) is not Tensor and distributed(q):
        return by_shards(attention_varlen, _SHARDS, locals())
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = AttentionOptions(
        softmax_scale=scale(softmax_scale, q),
        softcap=softcap,
        dropout_p=dropout_p,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    options = complete(
        options, q, causal=causal, window=window, alibi_slopes=alibi_slopes, sinks=sinks,
        batch=cu_seqlens_q.shape[0] - 1,
    )  # fmt: skip
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    elif type(deterministic) is not bool:  # a call of the check takes longer
        check_flag("deterministic", deterministic)
    signature = way = None
    if impl == "auto" and not torch.compiler.is_compiling():
        signature, way = plan.known(
            "attention_varlen", q, k, v, causal, softmax_scale, window, softcap, alibi_slopes,
            dropout_p, bool(deterministic), return_lse, cu_seqlens_q.shape, max_seqlen_q,
            max_seqlen_k, sinks,
        )  # fmt: skip
    if way is None:
        sizes = (max_seqlen_q, max_seqlen_k, cu_seqlens_q.shape[0] - 1)
        way = plan.of(
            "attention_varlen", signature, (q, k, v), sizes, options, bool(deterministic),
            return_lse, impl,
        )  # fmt: skip
    out, lse = attend(q[None], k[None], v[None], options, deterministic, return_lse, way)
    out, lse = out.squeeze(0), lse.squeeze(0)  # whose backward is a view, unlike that of out[0]
    return (out, lse) if return_lse else out


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
    check_shape("v", v, (total_k, Hk, v.shape[2]), "that of k but for the width")
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
    if not readable(cu_seqlens):
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
