"""`attention`: softmax(q k^T) v as one op. Schema, fake, autograd, choice, public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptkernels.core import philox
from gptkernels.core.autocast import autocast_dtype, without_autocast
from gptkernels.core.checks import check_same_device, check_shape, check_tensor, dtype_name
from gptkernels.core.choice import choose
from gptkernels.ops.attention import options
from gptkernels.ops.attention.torch import dense as aten

_LIBRARY = torch.library.Library("gptkernels", "FRAGMENT")
_LIBRARY.define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes, Tensor? key_lengths, "
    "Tensor? attn_mask, Tensor? rng, float softmax_scale, int left, int right, float softcap, "
    "float dropout_p, str impl) -> (Tensor out, Tensor lse)"
)
_LIBRARY.define(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor? alibi_slopes, Tensor? key_lengths, Tensor? attn_mask, Tensor? rng, "
    "float softmax_scale, int left, int right, float softcap, float dropout_p, "
    "bool[3] grad_mask, bool mask_gradient, bool deterministic, str impl) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)"
)


@torch.library.impl(_LIBRARY, "attention_fwd", "CompositeExplicitAutograd")
def _attention_fwd(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, impl = arguments
    with torch.no_grad(), without_autocast(q):
        match impl:
            case "cuda":
                from gptkernels.ops.attention.cuda import dense as cuda_kernels

                return cuda_kernels.attention_fwd(q, *given)
            case "triton":
                from gptkernels.ops.attention.triton import dense as kernels

                return kernels.attention_fwd(q, *given)
            case "torch":
                return aten.attention_fwd(q, *given)
    raise ValueError(f"impl must be 'cuda', 'triton' or 'torch' here, got {impl!r}")


@torch.library.impl(_LIBRARY, "attention_bwd", "CompositeExplicitAutograd")
def _attention_bwd(dout: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, impl = arguments
    with torch.no_grad(), without_autocast(dout):
        match impl:
            case "cuda":
                from gptkernels.ops.attention.cuda import dense as cuda_kernels

                return cuda_kernels.attention_bwd(dout, *given)
            case "triton":
                from gptkernels.ops.attention.triton import dense as kernels

                return kernels.attention_bwd(dout, *given)
            case "torch":
                return aten.attention_bwd(dout, *given)
    raise ValueError(f"impl must be 'cuda', 'triton' or 'torch' here, got {impl!r}")


@torch.library.register_fake("gptkernels::attention_fwd", lib=_LIBRARY)
def _attention_fwd_fake(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


@torch.library.register_fake("gptkernels::attention_bwd", lib=_LIBRARY)
def _attention_bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    attn_mask, grad_mask, mask_gradient = arguments[4], arguments[11], arguments[12]
    dmask = attn_mask.new_empty(attn_mask.shape) if mask_gradient else q.new_empty(0)
    dq, dk, dv = (
        x.new_empty(x.shape if wanted else (0,))
        for x, wanted in zip((q, k, v), grad_mask, strict=True)
    )
    return dq, dk, dv, dmask


_fwd = torch.ops.gptkernels.attention_fwd.default
_bwd = torch.ops.gptkernels.attention_bwd.default


class _Attention(torch.autograd.Function):
    """(out, lse)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        key_lengths: Tensor | None,
        attn_mask: Tensor | None,
        rng: Tensor | None,
        softmax_scale: float,
        left: int,
        right: int,
        softcap: float,
        dropout_p: float,
        deterministic: bool,
        return_lse: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        tensors = (alibi_slopes, key_lengths, attn_mask, rng)
        numbers = (softmax_scale, left, right, softcap, dropout_p)
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
        grad_mask, mask_gradient = list(ctx.needs_input_grad[:3]), ctx.needs_input_grad[5]
        *gradients, dmask = _bwd(
            dout, dlse, *tensors, *ctx.numbers, grad_mask, mask_gradient, ctx.deterministic,
            ctx.impl,
        )  # fmt: skip
        wanted = (
            gradient if want else None for gradient, want in zip(gradients, grad_mask, strict=True)
        )
        return *wanted, None, None, dmask if mask_gradient else None, *(None,) * 9


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | Sequence[float] | None = None,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention without its matrix of scores: out = dropout(softmax(s)) v.

    Vaswani et al., "Attention Is All You Need", 2017, computed as in Dao, "FlashAttention-2", 2023.
    Query i stands at position i + Tk - Tq among the keys: sequences are aligned at their ends. In
    this order, s = softmax_scale * q.k; s = softcap * tanh(s / softcap);
    s -= slope * |position - j|; then the masks. A row that sees no key gives 0, passes no gradient
    on, and has lse -inf.

    Args:
        q: (B, Tq, H, D), float32, bfloat16 or float16, D <= 256, any strides with a unit last one.
        k: (B, Tk, Hk, D), of q's dtype and device; H is a multiple of Hk, and query head h reads
            key head h // (H / Hk).
        v: (B, Tk, Hk, D), likewise.
        causal: a query sees keys up to its own position.
        softmax_scale: 1 / sqrt(D) if None.
        window: (left, right): a query sees keys from position - left to position + right; -1 is no
            bound. `causal` caps right at 0.
        softcap: bound on |s|, as in Gemma 2; 0 is none.
        alibi_slopes: (H,), a tensor or floats, one a head (Press et al., 2022); not differentiable.
        key_lengths: (B,) int32: only keys j < key_lengths[b] exist, whatever the rest of k and v
            holds; positions do not move. Values are checked on a CPU, clamped to 0 ... Tk on a GPU.
        attn_mask: bool (True: visible) or floating (added to s), broadcastable to (B, H, Tq, Tk);
            differentiable. Runs with impl="torch" only; "auto" picks that.
        dropout_p: probability of dropping a weight, rounded to a multiple of 1/65536; always active
            when > 0. The mask is that of `gptkernels.core.philox`, drawn from PyTorch's generator.
        deterministic: gradients with the same bits on every run, at whatever cost; None asks
            torch.are_deterministic_algorithms_enabled(). The Triton kernels always are, the CUDA
            C++ ones in float32; in 16 bits these add dq up by atomics otherwise.
        return_lse: also return lse.
        impl: "auto", "torch", "triton" or "cuda".

    Returns:
        out (B, Tq, H, D) in q's dtype, or (out, lse) with lse = log sum_j exp(s), (B, H, Tq) fp32,
        which is differentiable too. Under autocast q, k and v are converted to its dtype first, as
        F.scaled_dot_product_attention does.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, strides or value is wrong.
        RuntimeError, NotImplementedError: an explicit impl cannot run here, or not with attn_mask.

    Differentiable once in q, k, v and attn_mask. The Triton and CUDA C++ kernels keep NaN and Inf
    to the rows and keys that see them; with impl="torch" PyTorch's own ops let them reach others,
    but never from past a length.
    """
    _check(q, k, v, softmax_scale, softcap, key_lengths, attn_mask, dropout_p)
    left, right = options.bounds(causal, window)
    slopes = options.slopes(alibi_slopes, q, q.shape[2])
    dtype = autocast_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if attn_mask is not None and impl in ("triton", "cuda"):
        raise NotImplementedError(f"attn_mask runs with impl='torch' or 'auto' only, got {impl!r}")
    impl = "torch" if impl == "auto" and attn_mask is not None else choose(impl, q)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    rng = philox.draw(q.device) if dropout_p > 0 else None
    scale = options.scale(softmax_scale, q)
    out, lse = _Attention.apply(
        q, k, v, slopes, key_lengths, attn_mask, rng, scale, left, right, float(softcap),
        float(dropout_p), bool(deterministic), bool(return_lse), impl,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    softcap: float,
    key_lengths: Tensor | None,
    attn_mask: Tensor | None,
    dropout_p: float,
) -> None:
    kinds = ("(B, Tq, H, D)", "(B, Tk, Hk, D)", "(B, Tk, Hk, D)")
    options.check_tensors(("q", "k", "v"), (q, k, v), kinds)
    (B, Tq, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
    check_shape("k", k, (B, Tk, Hk, D), "batch and head width of q")
    check_shape("v", v, (B, Tk, Hk, D), "that of k")
    options.check_heads(H, Hk)
    options.check_numbers(softmax_scale, softcap, dropout_p)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, q, Tk)
    if attn_mask is not None:
        _check_attn_mask(attn_mask, q, (B, H, Tq, Tk))


def _check_key_lengths(key_lengths: Tensor, q: Tensor, Tk: int) -> None:
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths must be a torch.Tensor, got {type(key_lengths).__name__}")
    if key_lengths.dtype != torch.int32:
        raise TypeError(f"key_lengths must be int32, got {dtype_name(key_lengths.dtype)}")
    check_shape("key_lengths", key_lengths, (q.shape[0],), "one length per batch entry of q")
    check_same_device("key_lengths", key_lengths, "q", q)
    # On a GPU reading the values would synchronise; under compile there are none yet.
    if (
        key_lengths.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and key_lengths.numel()
    ):
        least, most = (int(x) for x in key_lengths.aminmax())
        if least < 0 or most > Tk:
            raise ValueError(
                f"key_lengths must lie between 0 and Tk = {Tk}, got {least if least < 0 else most}"
            )


def _check_attn_mask(attn_mask: Tensor, q: Tensor, shape: tuple[int, int, int, int]) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool:
        check_tensor("attn_mask that is not bool", attn_mask)
    sizes = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(sizes) != 4 or any(m not in (1, n) for m, n in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to (B, H, Tq, Tk) = {shape}, got {tuple(attn_mask.shape)}"
        )
    check_same_device("attn_mask", attn_mask, "q", q)
