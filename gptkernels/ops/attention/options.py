"""The options of attention, all arguments besides q, k and v, as one record. The public functions
fill it, and the launchers of every implementation read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
_UNBOUNDED = 2**31 - 1  # a bound that no sequence is long enough to reach


class AttentionOptions(NamedTuple):
    """The numbers come first, then the tensors.

    With cu_seqlens_q and cu_seqlens_k the sequences are packed end to end: q is (1, total_q, H, D),
    k and v are (1, total_k, Hk, D), and lse is (1, H, total_q).
    """

    softmax_scale: float
    left: int = -1  # the first visible key is position - left; -1: no bound
    right: int = -1  # the last visible key is position + right; -1: no bound
    softcap: float = 0.0  # 0: no softcap
    dropout_p: float = 0.0
    max_seqlen_q: int = 0  # length of the longest packed sequence, or more
    max_seqlen_k: int = 0
    backend: int = -1  # the fused op that impl="torch" runs on a GPU; -1: it asks PyTorch
    alibi_slopes: Tensor | None = None  # (H,) fp32
    key_lengths: Tensor | None = None  # (B,) int32
    attn_mask: Tensor | None = None  # bool or floating, broadcasts to (B, H, Tq, Tk)
    rng: Tensor | None = None  # (2,) int64, seed and offset; None without dropout
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (B + 1,) int32

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The leading fields, which are numbers."""
        return self[:_NUMBERS]

    @property
    def vectors(self) -> dict[str, Tensor | None]:
        """The tensors that kernels take by pointer, contiguous, by name: all but attn_mask."""
        named = zip(self._fields[_NUMBERS:], self.tensors, strict=True)
        return {
            name: None if tensor is None else tensor.contiguous()
            for name, tensor in named
            if name != "attn_mask"
        }

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The remaining fields, each a tensor or None."""
        return self[_NUMBERS:]

    @property
    def scores(self) -> dict[str, Any]:
        """The numbers that the scores depend on, by the names of the kernels' parameters."""
        return {name: getattr(self, name) for name in _SCORES}

    @property
    def everything(self) -> bool:
        """Whether every query sees every key, by one product and one exponential."""
        return not self.costly and self.left < 0 and self.right < 0 and self.tensors == _NO_TENSORS

    @property
    def costly(self) -> bool:
        """Whether a score costs more than one product and one exponential."""
        return self.softcap > 0 or self.alibi_slopes is not None or self.dropout_p > 0


_NUMBERS = AttentionOptions._fields.index("alibi_slopes")
_NO_TENSORS = (None,) * (len(AttentionOptions._fields) - _NUMBERS)
_SCORES = AttentionOptions._fields[: AttentionOptions._fields.index("dropout_p")]


def complete(
    options: AttentionOptions,
    q: Tensor,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | Sequence[float] | None,
) -> AttentionOptions:
    """Returns the options that the op takes, made from the user's arguments.

    It checks the numbers, turns `causal` and `window` into bounds, and turns `alibi_slopes` into a
    tensor. Raises TypeError, ValueError.
    """
    check_number("softcap", options.softcap)
    if not 0 <= options.softcap < math.inf:
        raise ValueError(f"softcap must be positive, or 0 for none, got {options.softcap}")
    check_probability("dropout_p", options.dropout_p)
    left, right = bounds(causal, window)
    return options._replace(
        left=left,
        right=right,
        alibi_slopes=slopes(alibi_slopes, q),
    )


def check_tensors(names: Sequence[str], tensors: Sequence[Tensor], shapes: Sequence[str]) -> None:
    """Checks queries, keys and values: the number of dimensions, one dtype, one device, last
    strides of 1 and a supported head width. `shapes` are the shapes that error messages print.
    Raises TypeError, ValueError."""
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
    """Checks that every key head serves the same number of query heads. Raises ValueError."""
    if Hk == 0 or H % Hk:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {H} and {Hk}")


def scale(softmax_scale: float | None, q: Tensor) -> float:
    """Returns the factor of the scores: 1 / sqrt(D) unless given. Raises TypeError, ValueError."""
    if softmax_scale is None:
        return 1 / math.sqrt(q.shape[-1])
    check_number("softmax_scale", softmax_scale)
    if not abs(softmax_scale) < math.inf:
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)


def bounds(causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """Returns (left, right) of the window, with right 0 if `causal`; -1 means no bound. Raises
    TypeError, ValueError."""
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


def slopes(alibi_slopes: Tensor | Sequence[float] | None, q: Tensor) -> Tensor | None:
    """Returns the ALiBi slopes as (H,) fp32 on q's device. Raises TypeError, ValueError,
    NotImplementedError."""
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
    check_shape("alibi_slopes", given, (q.shape[-2],), "one slope per head of q")
    return given.contiguous()
