"""What the attention ops' arguments have in common: checks, bounds, slopes, the scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.core.checks import (
    NUMBER,
    check_flag,
    check_number,
    check_probability,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_unit_last_stride,
)

MAX_HEAD_DIM = 256
_UNBOUNDED = 2**31 - 1  # no sequence is longer


def check_tensors(names: Sequence[str], tensors: Sequence[Tensor], shapes: Sequence[str]) -> None:
    """Queries, keys and values, with the shapes that messages name: as many dimensions, one dtype,
    one device, unit last strides, a head width that is computed. Raises TypeError, ValueError."""
    q = tensors[0]
    for name, tensor, shape in zip(names, tensors, shapes, strict=True):
        check_tensor(name, tensor)
        if tensor.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        check_same_dtype(name, tensor, names[0], q)
        check_same_device(name, tensor, names[0], q)
        check_unit_last_stride(name, tensor)
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"q must have a head width D between 1 and {MAX_HEAD_DIM}, got {q.shape[-1]}"
        )


def check_heads(H: int, Hk: int) -> None:
    """Every key head serves as many query heads. Raises ValueError."""
    if Hk == 0 or H % Hk:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {H} and {Hk}")


def check_numbers(softmax_scale: float | None, softcap: float, dropout_p: float = 0.0) -> None:
    """Raises TypeError, ValueError."""
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
        if not abs(softmax_scale) < math.inf:
            raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    check_number("softcap", softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive, or 0 for none, got {softcap}")
    check_probability("dropout_p", dropout_p)


def scale(softmax_scale: float | None, q: Tensor) -> float:
    """What scores are multiplied by: 1 / sqrt(D) unless given."""
    return 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)


def bounds(causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """(left, right) with `causal` folded in; -1 is no bound."""
    check_flag("causal", causal)
    if window is None:
        return -1, 0 if causal else -1
    pair = tuple(window) if isinstance(window, tuple | list) else ()
    if len(pair) != 2 or not all(
        isinstance(bound, int | torch.SymInt) and not isinstance(bound, bool) for bound in pair
    ):
        raise ValueError(f"window must be a pair (left, right) of integers, got {window!r}")
    if min(pair) < -1:
        raise ValueError(
            f"window must be at least 0 on either side, or -1 for no bound, got {window!r}"
        )
    left, right = (min(bound, _UNBOUNDED) for bound in pair)
    return left, 0 if causal else right


def slopes(alibi_slopes: Tensor | Sequence[float] | None, q: Tensor, heads: int) -> Tensor | None:
    """(H,) fp32 on q's device."""
    if alibi_slopes is None:
        return None
    if isinstance(alibi_slopes, Tensor):
        check_tensor("alibi_slopes", alibi_slopes)
        check_same_device("alibi_slopes", alibi_slopes, "q", q)
        given = alibi_slopes.float()
        if given.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "alibi_slopes is not differentiable, got one that requires grad; detach it"
            )
    elif isinstance(alibi_slopes, Sequence) and all(isinstance(s, NUMBER) for s in alibi_slopes):
        floats = [float(slope) for slope in alibi_slopes]
        given = torch.tensor(floats, dtype=torch.float32, device=q.device)
    else:
        raise TypeError(f"alibi_slopes must be a tensor or floats, got {alibi_slopes!r}")
    check_shape("alibi_slopes", given, (heads,), "one slope per head of q")
    return given.contiguous()
