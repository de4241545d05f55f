"""flash-attn's arguments as those of this package's functions, and its results of ours."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptkernels.core.checks import check_is_tensor, check_number
from gptkernels.core.values import readable

Window = Sequence[int] | Tensor


def scores(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The options that say what the scores are. A bound below 0 is none, and so is a softcap.
    Raises TypeError, ValueError."""
    check_number("softcap", softcap)
    return {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window": _window(window_size),
        "softcap": max(softcap, 0.0),
        "alibi_slopes": alibi_slopes,
    }


def _window(window_size: Window) -> tuple[int, int] | None:
    """(left, right) with -1 for no bound, None without any. Raises ValueError."""
    try:
        left, right = (max(operator.index(bound), -1) for bound in window_size)
    except (TypeError, ValueError):
        raise ValueError(
            f"window_size must be a pair (left, right) of integers, got {window_size!r}"
        ) from None
    return None if left == right == -1 else (left, right)


def integer(name: str, number: Any) -> int:
    """A number as an int: flash-attn also takes integers in tensors. Raises TypeError."""
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {number!r}") from None


def check_range(name: str, numbers: Tensor, most: int | Tensor, why: str = "") -> None:
    """Checks, on a CPU, that numbers (n,) lie in 0...most, an int or (n,). Raises ValueError."""
    if not readable(numbers):
        return
    wrong = ((numbers < 0) | (numbers > most)).nonzero()
    if len(wrong):
        b = int(wrong[0])
        limit = most if isinstance(most, int) else int(most[b])
        raise ValueError(
            f"{name} must lie between 0 and {limit}{why}, got {int(numbers[b])} for entry {b}"
        )


def unit_stride(x: Any) -> Any:
    """A tensor whose last stride is 1, copied where it has to be."""
    strided = isinstance(x, Tensor) and x.dim() > 0 and x.stride(-1) != 1
    return x.contiguous() if strided else x


def unpacked(name: str, packed: Tensor, dim: int, count: int) -> tuple[Tensor, ...]:
    """The `count` tensors that lie packed along `dim`. Raises TypeError, ValueError."""
    check_is_tensor(name, packed)
    if packed.dim() != dim + 3 or packed.shape[dim] != count:
        raise ValueError(
            f"{name} must have {dim + 3} dimensions with {count} in dimension {dim}, "
            f"got {tuple(packed.shape)}"
        )
    return packed.unbind(dim)


def determinism(deterministic: bool) -> bool | None:
    """Whether gradients must repeat their bits: asked for here, or by PyTorch's own switch."""
    return deterministic or None


def logsumexp(lse: Tensor) -> Tensor:
    """lse as flash-attn returns it: +inf, and not -inf, where a query sees no key."""
    return lse.masked_fill(lse == -math.inf, math.inf)
