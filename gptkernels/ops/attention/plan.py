"""Which plan runs a call of `attention`, `attention_varlen` or `attention_decode` with
impl="auto"."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gptkernels.core import plans
from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.autograd import requires_grad
from gptkernels.core.checks import DTYPES, dtype_name
from gptkernels.core.choice import automatic, choose
from gptkernels.core.plans import TORCH, Call, Plan
from gptkernels.core.tuned import bucket, ends
from gptkernels.ops.attention import canary, limits, whole
from gptkernels.ops.attention.options import AttentionOptions

_PLAIN_TYPES = (Tensor, Parameter)
# The most new tokens that are decoded by the CPU kernel where nothing was measured. With more,
# PyTorch's products of matrices catch up, first those of bf16 on AMX and those of AVX2.
MOST_TOKENS = 4
# Heads of all batch entries, by thread of a CPU: with more the work only repeats.
_MOST_HEADS_PER_THREAD, _MOST_HEADS = 16, 1 << 12
_MOST_KEYS = {"cpu": 1 << 12, "cuda": 1 << 14}


def known(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Any,
    dropout_p: float,
    deterministic: bool,
    return_lse: bool,
    *others: Any,
) -> tuple[Any, Plan | None]:
    """The signature of a call, or None where it is of an unusual kind, and its plan where one with
    the same signature was checked before. A signature holds all that the checks look at but values
    of tensors; `others` are further arguments.

    Asked in every call, beside PyTorch's own of some microseconds: so there are few questions, and
    no calls of functions in Python.
    """
    if not (type(q) is type(k) is type(v) is Tensor and type(causal) is bool):
        return None, None
    if bool in (type(softmax_scale), type(softcap), type(dropout_p)):  # equal to numbers, but none
        return None, None
    try:
        signature = (
            op,
            q.shape,
            k.shape,
            v.shape,
            q.dtype if q.dtype is k.dtype is v.dtype else (q.dtype, k.dtype, v.dtype),
            "cpu" if q.is_cpu and k.is_cpu and v.is_cpu else (q.device, k.device, v.device),
            (q.is_contiguous() and k.is_contiguous() and v.is_contiguous())
            or (q.stride(), k.stride(), v.stride()),
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
            torch._C._is_any_autocast_enabled() and autocast_dtype(q),
            torch.get_num_threads(),
            causal,
            softmax_scale,
            window,
            softcap,
            None if alibi_slopes is None else _said(alibi_slopes),
            dropout_p,
            deterministic,
            return_lse,
            others and tuple(map(_said, others)),
        )
        choices = plans.fixed.get()
        return signature, (plans.known if choices is None else choices.known).get(signature)
    except (AttributeError, TypeError):  # something of another kind, which the checks name
        return None, None


def _said(option: Any) -> Any:
    if isinstance(option, Tensor):
        return type(option), option.shape, option.dtype, option.device, option.requires_grad
    return option


def of(
    op: str,
    signature: Any,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    options: AttentionOptions,
    deterministic: bool,
    return_lse: bool,
    impl: str,
    paged: bool = False,
) -> Plan:
    """The plan of a call that was checked. `tensors`: q, keys and values; `sizes`: queries, keys
    and batch entries, or the longest of packed sequences and their number."""
    q, v = tensors[0], tensors[-1]
    dtype = autocast_dtype(q)
    lacking = limits.lacking(op, q.shape[-1], v.shape[-1], options.attn_mask is not None)
    if impl != "auto":
        limits.check(impl, lacking)
        chosen = choose(impl, q, dtype)
        return Plan(chosen, chosen)
    if torch.compiler.is_compiling():
        training = requires_grad((*tensors, *options.differentiable))
        chosen = plans.compiled(op, training, dtype, q.device.type)
        if plans.implementation(chosen) in lacking:
            chosen = "torch"
        if chosen == "torch" and canary.on_gpu(q) and "triton" not in lacking:
            chosen = canary.compiled(op, training, tensors, options, return_lse, paged)
        return Plan(chosen, chosen)
    call = described(op, tensors, sizes, options, deterministic, return_lse, paged)
    if lacking:
        static = TORCH if call.static.forward in lacking else call.static
        call = dataclasses.replace(call, static=static, lacking=tuple(lacking))
    others = (x for x in options.tensors if x is not None)
    plannable = all(type(x) in _PLAIN_TYPES and x.numel() > 0 for x in (*tensors, *others)) and all(
        x.dtype in DTYPES for x in tensors
    )
    # A factor that is not positive is a case of its own, which nobody has.
    if not plannable or not options.softmax_scale > 0:
        return call.static
    if canary.on_gpu(q) and "triton" not in lacking:
        call, kept = canary.instead(call, tensors, options, deterministic, return_lse, paged)
        signature = signature if kept else None
    return plans.new(signature, call)


def described(
    op: str,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    options: AttentionOptions,
    deterministic: bool,
    return_lse: bool,
    paged: bool = False,
) -> Call:
    """The call's class and static plan."""
    q, k, v = tensors
    H, D = q.shape[-2:]
    device, dtype = q.device.type, autocast_dtype(q)
    Tq, Tk, batch = sizes
    threads = torch.get_num_threads() if device == "cpu" else 0
    mask = options.attn_mask
    facts = {
        "device": device,
        "threads": threads,
        "dtype": dtype_name(dtype),
        "converted": q.dtype != dtype,
        "D": D,
        "group": H // k.shape[-2],
        "causal": options.right == 0,
        "square": Tq == Tk and op != "attention_decode",
        "paged": paged,
        # How many keys on each side, up to the end of an octave; -1: all.
        "left": _octave(options.left),
        "right": 0 if options.right == 0 else _octave(options.right),
        "softcap": options.softcap > 0,
        "alibi": options.alibi_slopes is not None,
        "lengths": options.key_lengths is not None,
        "mask": "none" if mask is None else dtype_name(mask.dtype),
        "dropout": options.dropout_p > 0,
        "lse": return_lse,
        "deterministic": deterministic,
        "layout": "contiguous" if all(x.is_contiguous() for x in tensors) else "strided",
    }
    # What few calls have: the keys of all others are as they were before it was there.
    rare = {
        "Dv": v.shape[-1] if v.shape[-1] != D else 0,
        "sinks": options.sinks is not None,
        "slopes by entry": options.alibi_stride > 0,
        "learned slopes": requires_grad((options.alibi_slopes,)),
        "full": op == "attention_decode" and options.right != 0 and Tq > 1,
    }
    facts |= {name: value for name, value in rare.items() if value}
    found = axes(device, threads, Tq, Tk, batch * H)
    training = requires_grad((*tensors, *options.differentiable))
    functions = whole.takes(facts) if op == "attention" else ()
    return Call(op, training, facts, found, _static(op, options, q, Tq), functions)


def axes(device: str, threads: int, Tq: int, Tk: int, heads: int) -> dict[str, int]:
    """The sizes that a class goes by: above some, the work only repeats."""
    keys = _MOST_KEYS.get(device, 1 << 14)
    # To the end of an octave, so that all larger calls are at an end that was measured.
    most = ends(bucket(_MOST_HEADS_PER_THREAD * threads or _MOST_HEADS))[1]
    return {
        "Tq": min(max(1, Tq), keys),
        "Tk": min(max(1, Tk), keys),
        "heads": min(max(1, heads), most),
    }


def _octave(bound: int) -> int:
    return bound if bound < 0 else ends(bucket(bound))[1]


def _static(op: str, options: AttentionOptions, q: Tensor, Tq: int) -> Plan:
    chosen = automatic(q.device.type)
    if chosen == "cpu":
        if op == "attention_decode":
            slow = Tq > MOST_TOKENS
        else:
            slow = autocast_dtype(q) == torch.float32 and options.everything
        if slow:  # where impl="torch" was measured to be faster
            return TORCH
    return Plan(chosen, chosen)
