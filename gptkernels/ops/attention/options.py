"""What attention is asked for besides q, k and v: one record, from the public functions to the
launchers of every implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptkernels.core import philox
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


class AttentionOptions(NamedTuple):
    """The numbers first, then the tensors.

    With cu_seqlens the sequences of the batch lie end to end in q (1, total_q, H, D) and in k and v
    (1, total_k, Hk, D), and lse is (1, H, total_q).
    """

    softmax_scale: float
    left: int = -1  # keys from position - left on; -1: from the first on
    right: int = -1  # keys up to position + right; -1: up to the last one
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0
    max_seqlen_q: int = 0  # of the longest sequence or more; with cu_seqlens alone
    max_seqlen_k: int = 0
    alibi_slopes: Tensor | None = None  # (H,) fp32
    key_lengths: Tensor | None = None  # (B,) int32
    attn_mask: Tensor | None = None  # bool or floating, broadcasts to (B, H, Tq, Tk)
    rng: Tensor | None = None  # (2,) int64, seed and offset; with dropout alone
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (B + 1,) int32

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The fields that are no tensors, which come first."""
        return self[:_NUMBERS]

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The other fields, tensors or None."""
        return self[_NUMBERS:]

    @property
    def scores(self) -> dict[str, Any]:
        """The numbers that scores depend on, as kernels take them."""
        return dict(zip(self._fields[:4], self, strict=False))

    @property
    def costly(self) -> bool:
        """Whether scores take more than a product and an exponential each."""
        return self.softcap > 0 or self.alibi_slopes is not None or self.dropout_p > 0


_NUMBERS = AttentionOptions._fields.index("alibi_slopes")


def complete(
    options: AttentionOptions,
    q: Tensor,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | Sequence[float] | None,
) -> AttentionOptions:
    """The options as the op takes them, from what a user gave: numbers are checked and converted,
    `causal` and `window` become bounds, and dropout draws its seed. Raises TypeError, ValueError.
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
        rng=philox.draw(q.device) if options.dropout_p > 0 else None,
    )


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


def scale(softmax_scale: float | None, q: Tensor) -> float:
    """What scores are multiplied by: 1 / sqrt(D) unless given. Raises TypeError, ValueError."""
    if softmax_scale is None:
        return 1 / math.sqrt(q.shape[-1])
    check_number("softmax_scale", softmax_scale)
    if not abs(softmax_scale) < math.inf:
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)


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


def slopes(alibi_slopes: Tensor | Sequence[float] | None, q: Tensor) -> Tensor | None:
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
    check_shape("alibi_slopes", given, (q.shape[-2],), "one slope per head of q")
    return given.contiguous()
