"""`attention_varlen`: attention of sequences laid end to end. Schema, fake, autograd, choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptkernels.core import philox
from gptkernels.core.autocast import autocast_dtype, without_autocast
from gptkernels.core.checks import check_same_device, check_shape, dtype_name
from gptkernels.core.choice import choose
from gptkernels.ops.attention import options
from gptkernels.ops.attention.torch import varlen as aten

_LIBRARY = torch.library.Library("gptkernels", "FRAGMENT")
_LIBRARY.define(
    "attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? alibi_slopes, Tensor? rng, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float softmax_scale, int left, int right, float softcap, float dropout_p, str impl) "
    "-> (Tensor out, Tensor lse)"
)
_LIBRARY.define(
    "attention_varlen_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? rng, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, int left, int right, "
    "float softcap, float dropout_p, bool[3] grad_mask, bool deterministic, str impl) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)


@torch.library.impl(_LIBRARY, "attention_varlen_fwd", "CompositeExplicitAutograd")
def _attention_varlen_fwd(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, impl = arguments
    with torch.no_grad(), without_autocast(q):
        match impl:
            case "cuda":
                from gptkernels.ops.attention.cuda import varlen as cuda_kernels

                return cuda_kernels.attention_varlen_fwd(q, *given)
            case "triton":
                from gptkernels.ops.attention.triton import varlen as kernels

                return kernels.attention_varlen_fwd(q, *given)
            case "torch":
                return aten.attention_varlen_fwd(q, *given)
    raise ValueError(f"impl must be 'cuda', 'triton' or 'torch' here, got {impl!r}")


@torch.library.impl(_LIBRARY, "attention_varlen_bwd", "CompositeExplicitAutograd")
def _attention_varlen_bwd(dout: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, impl = arguments
    with torch.no_grad(), without_autocast(dout):
        match impl:
            case "cuda":
                from gptkernels.ops.attention.cuda import varlen as cuda_kernels

                return cuda_kernels.attention_varlen_bwd(dout, *given)
            case "triton":
                from gptkernels.ops.attention.triton import varlen as kernels

                return kernels.attention_varlen_bwd(dout, *given)
            case "torch":
                return aten.attention_varlen_bwd(dout, *given)
    raise ValueError(f"impl must be 'cuda', 'triton' or 'torch' here, got {impl!r}")


@torch.library.register_fake("gptkernels::attention_varlen_fwd", lib=_LIBRARY)
def _attention_varlen_fwd_fake(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("gptkernels::attention_varlen_bwd", lib=_LIBRARY)
def _attention_varlen_bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    grad_mask = arguments[13]
    return tuple(
        x.new_empty(x.shape if wanted else (0,))
        for x, wanted in zip((q, k, v), grad_mask, strict=True)
    )


_fwd = torch.ops.gptkernels.attention_varlen_fwd.default
_bwd = torch.ops.gptkernels.attention_varlen_bwd.default


class _AttentionVarlen(torch.autograd.Function):
    """(out, lse)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        alibi_slopes: Tensor | None,
        rng: Tensor | None,
        numbers: tuple[Any, ...],
        deterministic: bool,
        return_lse: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        tensors = (cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng)
        out, lse = _fwd(q, k, v, *tensors, *numbers, impl)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.numbers = numbers
        ctx.deterministic, ctx.return_lse, ctx.impl = deterministic, return_lse, impl
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if dout is None:  # only lse was used
            dout = torch.zeros_like(tensors[3])
        if not ctx.return_lse:  # torch.compile passes zeros, which would cost the fused backward
            dlse = None
        grad_mask = list(ctx.needs_input_grad[:3])
        gradients = _bwd(dout, dlse, *tensors, *ctx.numbers, grad_mask, ctx.deterministic, ctx.impl)
        wanted = (
            gradient if want else None for gradient, want in zip(gradients, grad_mask, strict=True)
        )
        return *wanted, *(None,) * 8


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
    options.check_numbers(softmax_scale, softcap, dropout_p)
    left, right = options.bounds(causal, window)
    slopes = options.slopes(alibi_slopes, q, q.shape[1])
    dtype = autocast_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    impl = choose(impl, q)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    rng = philox.draw(q.device) if dropout_p > 0 else None
    numbers = (
        max_seqlen_q, max_seqlen_k, options.scale(softmax_scale, q), left, right, float(softcap),
        float(dropout_p),
    )  # fmt: skip
    out, lse = _AttentionVarlen.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, rng, numbers, bool(deterministic),
        bool(return_lse), impl,
    )  # fmt: skip
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
    options.check_tensors(("q", "k", "v"), (q, k, v), kinds)
    (_, H, D), (total_k, Hk) = q.shape, k.shape[:2]
    check_shape("k", k, (total_k, Hk, D), "head width of q")
    check_shape("v", v, (total_k, Hk, D), "that of k")
    options.check_heads(H, Hk)
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
