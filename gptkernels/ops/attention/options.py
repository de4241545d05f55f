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

MAX_HEAD_DIM = 512
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
    alibi_slopes: Tensor | None = None  # (H,) or (B, H) fp32
    sinks: Tensor | None = None  # (H,) fp32, one more score for each query
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
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Those that may have gradients."""
        return self.attn_mask, self.alibi_slopes, self.sinks

    @property
    def alibi_stride(self) -> int:
        """Elements from one batch entry's slopes to the next one's."""
        slopes = self.alibi_slopes
        return slopes.shape[1] if slopes is not None and slopes.dim() == 2 else 0

    def entries(self, first: int, last: int) -> AttentionOptions:
        """The options with the slopes of batch entries, or sequences, first ... last - 1."""
        slopes = self.alibi_slopes
        if slopes is None or slopes.dim() == 1:
            return self
        return self._replace(alibi_slopes=slopes[first:last])

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
    sinks: Tensor | None = None,
    batch: int = 1,
) -> AttentionOptions:
    """Returns the options that the op takes, made from the user's arguments. `batch`: the number of
    batch entries, or of packed sequences.

    It checks the numbers, turns `causal` and `window` into bounds, and `alibi_slopes` and `sinks`
    into fp32 tensors. Raises TypeError, ValueError.
    """
    check_number("softcap", options.softcap)
    if not 0 <= options.softcap < math.inf:
        raise ValueError(f"softcap must be positive, or 0 for none, got {options.softcap}")
    check_probability("dropout_p", options.dropout_p)
    left, right = bounds(causal, window)
    return options._replace(
        left=left,
        right=right,
        alibi_slopes=slopes(alibi_slopes, q, batch),
        sinks=None if sinks is None else _sinks(sinks, q),
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
    for name, tensor in ((names[0], q), (names[-1], tensors[-1])):
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head width between 1 and {MAX_HEAD_DIM}, "
                f"got {tensor.shape[-1]}"
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


def slopes(alibi_slopes: Tensor | Sequence[float] | None, q: Tensor, batch: int) -> Tensor | None:
    """Returns the ALiBi slopes as (H,) or (batch, H) fp32 on q's device. Raises TypeError,
    ValueError."""
    if alibi_slopes is None:
        return None
    if isinstance(alibi_slopes, Tensor):
        check_tensor("alibi_slopes", alibi_slopes)
        check_same_device("alibi_slopes", alibi_slopes, "q", q)
        given = alibi_slopes.float()
        if given.dim() == 2:
            check_shape("alibi_slopes", given, (batch, q.shape[-2]), "one row per batch entry")
            return given.contiguous()
    elif isinstance(alibi_slopes, Sequence) and all(isinstance(s, NUMBER) for s in alibi_slopes):
        floats = [float(slope) for slope in alibi_slopes]
        given = torch.tensor(floats, dtype=torch.float32, device=q.device)
    else:
        raise TypeError(f"alibi_slopes must be a tensor or floats, got {alibi_slopes!r}")
    check_shape("alibi_slopes", given, (q.shape[-2],), "one slope per head of q")
    return given.contiguous()


def _sinks(sinks: Tensor, q: Tensor) -> Tensor:
    """Returns the sinks as (H,) fp32. Raises TypeError, ValueError."""
    check_tensor("sinks", sinks)
    check_same_device("sinks", sinks, "q", q)
    check_shape("sinks", sinks, (q.shape[-2],), "one sink per head of q")
    return sinks.float().contiguous()


def without_keys(q: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, Dv) and lse (B, H, Tq) of queries q (B, Tq, H, D) that see no key."""
    B, Tq, H, _ = q.shape
    out = torch.zeros((B, Tq, H, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.full((B, H, Tq), -math.inf, dtype=torch.float32, device=q.device)
    if options.sinks is not None:
        lse.copy_(options.sinks[:, None].expand_as(lse))
    return out, lse
