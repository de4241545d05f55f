"""Triton in place of impl="torch" where nothing was measured.

On a GPU impl="torch" computes attention by its formula, which writes all scores to memory, wherever
PyTorch's fused ops lack an option of the call. No measurement is needed to know that a kernel is
faster than that; only that it is right here. So once for each kind of call, head width, dtype and
device a canary runs Triton's kernels on a small case with the same options: outputs and gradients
have to pass the parity rule against fp64, with all memory that the launchers get poisoned, and to
have the same bits twice. Where they do not, or anything raises, calls of the kind run as before,
and one warning says why.

The canary waits for the device. It does not run while a CUDA graph is captured, or where anything
watches PyTorch's calls: calls then run as before, and the next one asks again.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gptkernels.core import choice, plans
from gptkernels.core.autocast import autocast_dtype, without_autocast
from gptkernels.core.autograd import requires_grad
from gptkernels.core.checks import dtype_name
from gptkernels.core.errors import in_a_line
from gptkernels.core.plans import Call, Plan
from gptkernels.core.tuned import COMPILED, FORWARD, TRAINING
from gptkernels.ops.attention import canary_case
from gptkernels.ops.attention.canary_case import Kind
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import backend
from gptkernels.ops.attention.torch.dense import fused_backend

# Kind -> whether its canary passed.
_verdicts: dict[Hashable, bool] = {}
_one_at_a_time = threading.Lock()


def on_gpu(q: Tensor) -> bool:
    """Whether the canary is for calls with q at all. Never on a CPU."""
    return q.is_cuda


def instead(
    call: Call,
    tensors: Sequence[Tensor],
    options: AttentionOptions,
    deterministic: bool,
    return_lse: bool,
    paged: bool,
) -> tuple[Call, bool]:
    """The call, with a static plan by Triton where impl="torch" would be the formula and the canary
    passes; and whether that may be kept, or should be asked again.

    A table decides before a static plan does, and so does an engine: no canary runs then.
    """
    q, v = tensors[0], tensors[-1]
    if not _is_candidate(q) or choice.switched_off():
        return call, True
    fixed = plans.fixed.get()
    measured = plans.table(str(call.facts["device"])).get(call.key) is not None
    if measured if fixed is None else call.op in fixed:
        return call, True
    if not _formula_alone(call.op, tensors, options, deterministic and call.training):
        return call, True
    kind = _kind(call.op, call.training, tensors, options, return_lse, paged)
    passed = verdict(kind, q, v, options)
    if not passed:
        return call, passed is not None
    way = plans.Way("triton")  # where its launch fails, impl="torch" runs the call
    way.key = call.key
    return dataclasses.replace(call, static=Plan(way, way)), True


def compiled(
    op: str,
    training: bool,
    tensors: Sequence[Tensor],
    options: AttentionOptions,
    return_lse: bool,
    paged: bool,
) -> str:
    """The implementation inside a graph of torch.compile where the tables have none for it: Triton
    in place of the formula if the canary has passed before, else "torch". It is traced."""
    lacking = options.costly or options.key_lengths is not None or options.left >= 0
    if options.attn_mask is not None or not (lacking or op != "attention"):
        return "torch"
    if not _is_candidate(tensors[0]):
        return "torch"
    return _compiled(*_kind(op, training, tensors, options, return_lse, paged))


def _compiled(*fields: Any) -> str:
    kind = Kind(*fields)
    if choice.switched_off():
        return "torch"
    direction, facts = TRAINING if kind.training else FORWARD, {"dtype": dtype_name(kind.dtype)}
    found = plans.table(kind.device[0]).unanimous(kind.op, direction, COMPILED, facts)
    return "triton" if found is None and _verdicts.get(kind) else "torch"


# torch.compile takes the answer as a constant.
_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def verdict(kind: Kind, q: Tensor, v: Tensor, options: AttentionOptions) -> bool | None:
    """Whether Triton is right for a kind of calls, found out once on q's device; None where that
    cannot be found out now."""
    known = _verdicts.get(kind)
    if known is not None or _watched(q):
        return known
    with _one_at_a_time:
        if kind in _verdicts:
            return _verdicts[kind]
        try:
            with without_autocast(q), torch.no_grad():
                reason = canary_case.wrong(kind, q, v, options)
        except torch.OutOfMemoryError:
            return None
        except Exception as error:  # whatever a compiler or a driver raises
            reason = in_a_line(error)
        _verdicts[kind] = reason is None
    if reason is not None:
        warnings.warn(
            f"Triton's {kind.op} in {dtype_name(kind.dtype)} with heads of up to {kind.width} is "
            f"not used on {q.device} ({reason}): impl='auto' runs such calls with impl='torch'",
            stacklevel=5,
        )
    return reason is None


def _is_candidate(q: Tensor) -> bool:
    """Whether q is where and what the canary is for."""
    dtype = autocast_dtype(q)
    half = dtype is torch.bfloat16 or dtype is torch.float16
    return on_gpu(q) and half and choice.unavailable("triton", q.device.type, dtype) is None


def _formula_alone(
    op: str, tensors: Sequence[Tensor], options: AttentionOptions, deterministic: bool
) -> bool:
    """Whether impl="torch" computes a pass by the formula; `deterministic`: with gradients that
    have to be."""
    if options.attn_mask is not None:
        return False  # which Triton does not take
    if op != "attention":  # sequences are padded, and caches gathered, for it
        return True
    q, k, v = tensors
    found = fused_backend(q, k, v, options)
    if found < 0 or not deterministic:
        return found < 0
    enforced = (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    return not (enforced and found == backend.FLASH)


def _kind(
    op: str,
    training: bool,
    tensors: Sequence[Tensor],
    options: AttentionOptions,
    return_lse: bool,
    paged: bool,
) -> Kind:
    q, k, v = tensors
    D, Dv = q.shape[-1], v.shape[-1]
    return Kind(
        op,
        training,
        autocast_dtype(q),
        _width(max(D, Dv)),
        (q.device.type, q.device.index),
        q.shape[-2] != k.shape[-2],
        paged,
        op == "attention_decode" and q.shape[1] == 1,
        return_lse and training,
        options.left >= 0,
        -1 if options.right < 0 else min(options.right, 1),
        options.softcap > 0,
        options.alibi_slopes is not None,
        options.alibi_stride > 0,
        requires_grad((options.alibi_slopes,)),
        options.sinks is not None,
        options.dropout_p > 0,
        options.key_lengths is not None,
        Dv != D,
    )


def _width(D: int) -> int:
    """The width of a kernel's tile for heads of D columns."""
    width = 16
    while width < D:
        width *= 2
    return width


def _watched(q: Tensor) -> bool:
    """Whether a canary's calls would be seen, or would disturb, what is going on."""
    return (
        torch.compiler.is_compiling()
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (on_gpu(q) and torch.cuda.is_current_stream_capturing())
    )
