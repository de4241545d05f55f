"""`attention`: softmax(q k^T) v as one op. Holds the registered ops, autograd and the public
function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Never

import torch
from torch import Tensor

from gptkernels.core import philox, plans
from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.autograd import apply, once_differentiable
from gptkernels.core.checks import (
    DTYPES,
    check_flag,
    check_same_device,
    check_shape,
    check_tensor,
    dtype_name,
)
from gptkernels.core.keywords import refuse, without_unknown
from gptkernels.core.plans import Plan
from gptkernels.core.registry import register
from gptkernels.core.sharding import Shards, by_shards, distributed
from gptkernels.core.values import readable
from gptkernels.ops.attention import elsewhere, flops, learned, plan, whole
from gptkernels.ops.attention.options import (
    MAX_HEAD_DIM,
    AttentionOptions,
    check_heads,
    check_tensors,
    complete,
    scale,
)
from gptkernels.ops.attention.torch import named
from gptkernels.ops.attention.torch.dense import fused_backend, traceable_bwd, traceable_fwd

_ENTRIES = ("dout", "dlse", "q", "k", "v", "out", "lse", "key_lengths")


def _apart(given: Mapping[str, Any]) -> tuple[str, ...]:
    """What has a batch of entries that know nothing of each other. Dropout's mask depends on an
    entry's number; the gradient of a mask that all entries share is their sum."""
    mask, slopes = given["attn_mask"], given["alibi_slopes"]
    of_mask = "grad_mask" in given and given["grad_mask"][3]
    if given["rng"] is not None or given["cu_seqlens_q"] is not None or of_mask:
        return ()
    if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
        return ()
    of_entries = slopes is not None and slopes.dim() == 2
    return tuple(name for name in _ENTRIES if name in given) + ("alibi_slopes",) * of_entries


@register(
    "gptkernels.ops.attention",
    traceable=lambda q, k, v, options: traceable_fwd(q, k, options),
    entries=_apart,
    flops=flops.forward,
)
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, impl: str
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, Dv) and lse (B, H, Tq) in fp32."""
    B, Tq, H, _ = q.shape
    return q.new_empty((B, Tq, H, v.shape[-1])), q.new_empty((B, H, Tq), dtype=torch.float32)


@register(
    "gptkernels.ops.attention",
    traceable=lambda dout, dlse, q, k, v, out, lse, options, *_: traceable_bwd(dlse, q, k, options),
    entries=_apart,
    flops=flops.backward,
)
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v and attn_mask, and of what the slopes' gradient is the sum
    (`learned.slopes_gradient`): by_query (B, H, Tq) fp32, for each query the sum over its keys of
    dS |position - key|. Each is empty where `grad_mask` is False."""
    dq, dk, dv, dmask = (
        q.new_empty(0) if x is None or not wanted else x.new_empty(x.shape)
        for x, wanted in zip((q, k, v, options.attn_mask), grad_mask, strict=False)
    )
    by_query = lse.new_empty(lse.shape if grad_mask[4] else 0)
    return dq, dk, dv, dmask, by_query


class _Attention(torch.autograd.Function):
    """Autograd for attention: returns (out, lse)."""

    @staticmethod
    def forward(
        ctx: Any,
        deterministic: bool,
        return_lse: bool,
        impl: str,
        backward_impl: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *fields: Any,
    ) -> tuple[Tensor, Tensor]:
        options = AttentionOptions(*fields)
        impl, name = _of_torch(impl)
        # The backward pass runs the backend of the forward pass, whatever the flags of
        # torch.backends.cuda are by then. torch.compile cannot trace the question: both passes ask.
        if impl == "torch" and not torch.compiler.is_compiling():
            options = options._replace(backend=_backend(name, q, k, v, options))
        run = attention_fwd
        if torch.compiler.is_exporting() and (return_lse or options.sinks is not None):
            # PyTorch's fused ops would drop the gradient of lse; the registered op refuses it.
            run = attention_fwd.op
        out, lse = run(q, k, v, *options, impl)
        ctx.save_for_backward(q, k, v, out, lse, *options.tensors)
        ctx.impl, name = _of_torch(backward_impl)
        if name >= 0 and not torch.compiler.is_compiling():
            options = options._replace(backend=_backend(name, q, k, v, options))
        ctx.numbers = options.numbers
        ctx.deterministic, ctx.return_lse = deterministic, return_lse
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Sequence[Any], dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = saved
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        # torch.compile passes zeros for an unused dlse. Fused backward passes take no dlse at all.
        if not ctx.return_lse:
            dlse = None
        needed = dict(zip(_INPUTS, ctx.needs_input_grad, strict=True))
        grad_mask = [needed[name] for name in _BY_KERNELS]
        gradients = attention_bwd(
            dout, dlse, q, k, v, out, lse, *ctx.numbers, *tensors, grad_mask, ctx.deterministic,
            ctx.impl,
        )  # fmt: skip
        found = dict(zip(_BY_KERNELS, gradients, strict=True))
        options = AttentionOptions(*ctx.numbers, *tensors)
        if needed["alibi_slopes"]:
            found["alibi_slopes"] = learned.slopes_gradient(found["alibi_slopes"], options)
        if options.sinks is not None and needed["sinks"]:
            found["sinks"] = learned.sinks_gradient(dout, out, dlse, lse, options.sinks)
        return tuple(found[name] if wanted else None for name, wanted in needed.items())


def _backend(name: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> int:
    """The backend of SDPA for both passes: the one that is named, or that SDPA would pick."""
    own = fused_backend(q, k, v, options)
    return own if name < 0 else named.chosen(name, own, q, k, v, options)


def _of_torch(impl: str) -> tuple[str, int]:
    """An implementation, and the backend of SDPA that a variant of impl="torch" names; -1: none."""
    if not impl.startswith("torch:"):
        return impl, -1
    return "torch", plans.keywords(plans.variant(impl))["backend"]


_INPUTS = (
    "deterministic", "return_lse", "impl", "backward_impl", "q", "k", "v",
    *AttentionOptions._fields,
)  # fmt: skip
_BY_KERNELS = ("q", "k", "v", "attn_mask", "alibi_slopes")
_SHARDS = Shards.of(
    "q:BTHD k:BSHD v:BSHE alibi_slopes:BH sinks:H key_lengths:B attn_mask:?BHTS",
    "BTHE BHT",
    over="BH",
    evenly="H",
)


@without_unknown
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
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention that never stores the whole score matrix: out = dropout(softmax(s)) v.

    Vaswani et al., "Attention Is All You Need", 2017, computed as in Dao, "FlashAttention-2", 2023.

    The score s of query i and key j is computed in these steps:

        position = i + Tk - Tq                  (queries and keys are aligned at their ends)
        s = softmax_scale * q.k
        s = softcap * tanh(s / softcap)         (if softcap > 0)
        s = s - slope * |position - j|          (if alibi_slopes is given)
        s = s + attn_mask                       (if attn_mask is floating)
        s = -inf                                (where causal, window, key_lengths or a bool
                                                 attn_mask hides key j from query i)

    A query that sees no key gives out 0 and lse -inf, and passes no gradient on. With sinks the
    softmax is over the scores and the sink of the head, which belongs to no key: the weights of a
    query's keys add up to less than 1, and a query that sees no key has the sink as its lse.

    Args:
        q: Queries (B, Tq, H, D), float32, bfloat16 or float16. D is at most 512, and at most 256
            with impl="triton" and "cuda". The last stride must be 1; the other strides are free.
        k: Keys (B, Tk, Hk, D), with q's dtype and device and a last stride of 1. H must be a
            multiple of Hk: query head h reads key head h // (H / Hk).
        v: Values (B, Tk, Hk, Dv), with the same requirements as k; Dv may differ from D.
        causal: Whether a query sees only the keys up to its own position.
        softmax_scale: Factor of the scores; None means 1 / sqrt(D).
        window: (left, right): a query sees the keys from position - left to position + right.
            -1 means no bound on that side. `causal` lowers right to 0.
        softcap: Bound on |s|, as in Gemma 2; 0 means no bound.
        alibi_slopes: (H,), a tensor or a sequence of floats, one slope for each query head (Press
            et al., 2022); or a tensor (B, H), others for each batch entry. Differentiable.
        sinks: (H,), any floating dtype, one score for each query head that takes part in every
            softmax (gpt-oss). Differentiable.
        key_lengths: (B,) int32. Batch entry b has only the keys j < key_lengths[b]; what k and v
            hold past that length is ignored. The lengths do not change positions. The values are
            checked on a CPU, and clamped to 0 ... Tk on a GPU.
        attn_mask: bool (True means visible) or floating (added to s), broadcastable to
            (B, H, Tq, Tk). A floating mask is differentiable. impl="torch" and "cpu" take a mask,
            and "auto" then picks one of them.
        dropout_p: Probability of dropping a weight, rounded to a multiple of 1/65536. Dropout is
            active whenever it is greater than 0. `gptkernels.core.philox` defines the mask; its
            seed comes from PyTorch's generator of q's device.
        deterministic: Whether gradients must have the same bits on every run, whatever that costs.
            None means torch.are_deterministic_algorithms_enabled(). Gradients of the Triton
            kernels always have the same bits, and so have those of the CUDA C++ kernels in
            float32. In 16 bits the CUDA C++ kernels sum dq with atomics unless `deterministic`.
        return_lse: Whether to return lse as well.
        impl: "auto", "torch", "triton", "cuda" or "cpu". "auto" takes what `gptkernels tune`
            measured to be the fastest here; without that, on a CPU, "cpu", but for float32 where
            every query sees every key and no other option is used.

    Returns:
        out (B, Tq, H, Dv) in q's dtype; with return_lse, (out, lse), where lse = log sum_j exp(s),
        the sink among the scores, is (B, H, Tq) float32 and differentiable too. Under autocast q, k
        and v are first converted to autocast's dtype, as F.scaled_dot_product_attention does, and
        out has that dtype.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device, strides or value is wrong.
        RuntimeError: An explicit impl cannot run on this machine or these tensors.
        NotImplementedError: An explicit impl lacks what the call asks for, such as attn_mask.

    Differentiable once in q, k, v, attn_mask, alibi_slopes and sinks. With the kernels, NaN and Inf
    reach only the rows and keys that see them. With impl="torch" PyTorch's own ops may spread them
    further, but never from keys past a length.
    """
    if unknown:
        refuse(attention, unknown, elsewhere.ATTENTION)
    if type(q) is not Tensor and distributed(q):
        return by_shards(attention, _SHARDS, locals())
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    elif type(deterministic) is not bool:  # a call of the check takes longer
        check_flag("deterministic", deterministic)
    seen = causal, softmax_scale, window, softcap, alibi_slopes
    others = () if key_lengths is attn_mask is sinks is None else (key_lengths, attn_mask, sinks)
    signature = way = options = None
    if impl == "auto" and not torch.compiler.is_compiling():
        signature, way = plan.known(
            "attention", q, k, v, *seen, dropout_p, bool(deterministic), return_lse, *others
        )
    given = sinks, key_lengths, attn_mask, dropout_p, bool(deterministic), return_lse
    if way is None or way.whole is None:
        way, options = _planned(signature, way, q, k, v, seen, *given, impl)
    if way.whole is not None:
        try:
            return whole.run(way.whole, q, k, v, *seen)
        except Exception as error:
            impl = plans.instead(way.whole, error)
            way, options = _planned(None, None, q, k, v, seen, *given, impl)
    assert options is not None
    out, lse = attend(q, k, v, options, deterministic, return_lse, way)
    return (out, lse) if return_lse else out


def plan_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Plan:
    """What would run such a call of `attention` with impl="auto", outside of torch.compile. Raises
    as that does."""
    seen = causal, softmax_scale, window, softcap, None
    deterministic = torch.are_deterministic_algorithms_enabled()
    others = () if key_lengths is attn_mask is sinks is None else (key_lengths, attn_mask, sinks)
    signature, way = plan.known(
        "attention", q, k, v, *seen, dropout_p, deterministic, False, *others
    )
    if way is not None:
        return way
    given = sinks, key_lengths, attn_mask, dropout_p, deterministic, False
    return _planned(signature, None, q, k, v, seen, *given, "auto")[0]


def _planned(
    signature: Any,
    way: Plan | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: tuple[Any, ...],
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    attn_mask: Tensor | None,
    dropout_p: float,
    deterministic: bool,
    return_lse: bool,
    impl: str,
) -> tuple[Plan, AttentionOptions]:
    """Checks the arguments; returns what runs the call, and the options of an implementation. With
    the plan of an earlier call of this signature only values are checked again."""
    causal, softmax_scale, window, softcap, alibi_slopes = seen
    if way is None:
        _check(q, k, v, key_lengths, attn_mask)
    elif key_lengths is not None:
        _check_length_values(key_lengths, k.shape[1])
    options = AttentionOptions(
        softmax_scale=scale(softmax_scale, q),
        softcap=softcap,
        dropout_p=dropout_p,
        key_lengths=key_lengths,
        attn_mask=attn_mask,
    )
    options = complete(
        options, q, causal=causal, window=window, alibi_slopes=alibi_slopes, sinks=sinks,
        batch=q.shape[0],
    )  # fmt: skip
    if way is None:
        sizes = (q.shape[1], k.shape[1], q.shape[0])
        way = plan.of(
            "attention", signature, (q, k, v), sizes, options, deterministic, return_lse, impl
        )
    return way, options


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    deterministic: bool,
    return_lse: bool,
    way: Plan,
) -> tuple[Tensor, Tensor]:
    """Returns the differentiable (out, lse) of a batch or of packed sequences, in autocast's
    dtype, by the implementations of a plan. Draws dropout's seed."""
    dtype = autocast_dtype(q)
    if options.dropout_p > 0:
        options = options._replace(rng=philox.draw(q.device))
    if q.dtype != dtype:  # a conversion that does nothing takes longer than the question
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    numbers = (bool(deterministic), bool(return_lse), way.forward, way.backward)
    return apply(_Attention, *numbers, q, k, v, *options)


def _check(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, attn_mask: Tensor | None
) -> None:
    if not _sound(q, k, v):
        kinds = ("(B, Tq, H, D)", "(B, Tk, Hk, D)", "(B, Tk, Hk, D)")
        check_tensors(("q", "k", "v"), (q, k, v), kinds)
        (B, Tq, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
        check_shape("k", k, (B, Tk, Hk, D), "batch and head width of q")
        check_shape("v", v, (B, Tk, Hk, v.shape[3]), "that of k but for the width")
        check_heads(H, Hk)
    if key_lengths is None and attn_mask is None:
        return
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    if key_lengths is not None:
        _check_key_lengths(key_lengths, q, Tk)
    if attn_mask is not None:
        _check_attn_mask(attn_mask, q, (B, H, Tq, Tk))


def _sound(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the tensors are those of most calls, of one shape, which the checks would pass: the
    checks take longer than a small kernel."""
    if not (type(q) is Tensor and type(k) is Tensor and type(v) is Tensor):
        return False
    shape, dtype, device = q.shape, q.dtype, q.device
    return (
        len(shape) == 4
        and dtype in DTYPES
        and 1 <= shape[3] <= MAX_HEAD_DIM
        and shape[2] > 0
        and k.shape == shape
        and v.shape == shape
        and k.dtype == dtype
        and v.dtype == dtype
        and k.device == device
        and v.device == device
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
    )


def _check_key_lengths(key_lengths: Tensor, q: Tensor, Tk: int) -> None:
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths must be a torch.Tensor, got {type(key_lengths).__name__}")
    if key_lengths.dtype != torch.int32:
        raise TypeError(f"key_lengths must be int32, got {dtype_name(key_lengths.dtype)}")
    check_shape("key_lengths", key_lengths, (q.shape[0],), "one length per batch entry of q")
    check_same_device("key_lengths", key_lengths, "q", q)
    _check_length_values(key_lengths, Tk)


def _check_length_values(key_lengths: Tensor, Tk: int) -> None:
    if key_lengths.numel() and readable(key_lengths):
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
