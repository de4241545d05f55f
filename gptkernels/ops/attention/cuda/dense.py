"""Launchers of attention's CUDA C++ kernels. The formulas are in csrc/attention/fwd/kernel.h and
csrc/attention/bwd/kernel.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptkernels.core import philox
from gptkernels.core.native import call, dtype_code
from gptkernels.ops.attention import limits, widths
from gptkernels.ops.attention.options import AttentionOptions, without_keys


@widths.forward
def attention_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, Dv)
    options: AttentionOptions,
    *,
    build: int = -1,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, Dv) and lse (B, H, Tq) in fp32.

    `build` is an index into the compiled module's attention_fwd_builds(), the builds for compute
    capability 9.0; with -1 the launcher chooses. Raises NotImplementedError for what `limits`
    names, and RuntimeError where the given build cannot run this call.
    """
    limits.refuse("cuda", "attention", q, v, options)
    B, Tq, H, _ = q.shape
    if _nothing_to_see(q, k, options):
        return without_keys(q, v, options)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    call(
        "attention_fwd",
        q,
        inputs=dict(q=q, k=k, v=v, **options.vectors),
        outputs=dict(out=out, lse=lse),
        **_scalars(q, k, v, options),
        build=build,
    )
    return out, lse


@widths.backward
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
    *,
    build: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv, contiguous, the mask's gradient, which is always empty, and by_query
    (B, H, Tq) in fp32. Each is empty where `grad_mask` is False.

    Unless `deterministic`, 16-bit dq is summed in a different order on every run (by the kernels
    for any GPU only if dk or dv is wanted too). by_query never is, and dq is not where by_query is
    wanted. `build` is as above, an index into attention_bwd_builds().
    """
    dq, dk, dv, by_query = (
        torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in zip((q, k, v, lse), (*grad_mask[:3], grad_mask[4]), strict=True)
    )
    no_mask = q.new_empty(0)
    if options.cu_seqlens_q is not None:
        by_query.zero_()  # no kernel writes that of tokens that belong to no sequence
    if _nothing_to_see(q, k, options):
        return dq.zero_(), dk.zero_(), dv.zero_(), no_mask, by_query.zero_()
    if not any(grad_mask):
        return dq, dk, dv, no_mask, by_query
    if dout.stride(-1) != 1:  # such as an expanded tensor
        dout = dout.contiguous()
    call(
        "attention_bwd",
        q,
        inputs=dict(
            q=q, k=k, v=v, dout=dout, out=out, lse=lse,
            dlse=None if dlse is None else dlse.contiguous(),
            **options.vectors,
        ),
        outputs=dict(dq=dq, dk=dk, dv=dv, by_query=by_query),
        workspaces=dict(
            delta=torch.float32, total=torch.float32, dq_sum=torch.float32,
            row_stats=torch.float32, turns=torch.int32,
        ),
        **_scalars(q, k, v, options),
        dout_strides=dout.stride()[:3],
        deterministic=deterministic,
        build=build,
    )  # fmt: skip
    return dq, dk, dv, no_mask, by_query


def _lengths(q: Tensor, k: Tensor, options: AttentionOptions) -> tuple[int, int, int]:
    """Returns the number of sequences, and the most queries and keys that one of them has."""
    if options.cu_seqlens_q is None:
        return q.shape[0], q.shape[1], k.shape[1]
    longest = min(options.max_seqlen_q, q.shape[1]), min(options.max_seqlen_k, k.shape[1])
    return options.cu_seqlens_q.shape[0] - 1, *longest


def _nothing_to_see(q: Tensor, k: Tensor, options: AttentionOptions) -> bool:
    """Whether there are no queries or no keys at all."""
    return q.numel() == 0 or min(_lengths(q, k, options)) <= 0


def _scalars(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> dict[str, Any]:
    batch, Tq, Tk = _lengths(q, k, options)
    (_, total_q, H, D), (total_k, Hk) = q.shape, k.shape[1:3]
    return dict(
        dtype=dtype_code(q.dtype),
        q_strides=q.stride()[:3], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        batch=batch, Tq=Tq, Tk=Tk, H=H, Hk=Hk, D=D, **options.scores,
        alibi_stride=options.alibi_stride,
        dropout_threshold=philox.threshold(options.dropout_p),
        dropout_scale=philox.scale(options.dropout_p),
        total_q=total_q, total_k=total_k,
    )  # fmt: skip
