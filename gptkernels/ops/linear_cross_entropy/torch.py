"""linear_cross_entropy by PyTorch's operators, a chunk of rows at a time (chunks.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.ops.linear_cross_entropy import chunks
from gptkernels.ops.linear_cross_entropy.options import LossOptions, counted

# Bytes of the logits that are in fp32 at one time: of a CPU they should stay in its cache.
_CPU_BYTES, _BYTES = 8 << 20, 256 << 20


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor | None,
    options: LossOptions,
    grad_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the losses and lse (N,), fp32, and dx, dweight and dbias, each empty where no
    gradient is wanted. All floating tensors but dloss have one dtype."""
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    lse = torch.empty_like(losses)

    def of_rows(logits: Tensor, rows: slice) -> None:
        for some in _parts(logits):
            _forward(
                logits[some], targets[rows][some], losses[rows][some], lse[rows][some],
                None if dloss is None else dloss[rows][some], options,
            )  # fmt: skip

    gradients = chunks.run(x, weight, bias, grad_mask, of_rows, _add)
    return losses, lse, *gradients


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    options: LossOptions,
    grad_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dweight and dbias, each empty where `grad_mask` is False. A chunk has whole rows,
    of which lse is computed again: p from the softmax has more digits than exp(l - lse)."""

    def of_rows(logits: Tensor, rows: slice) -> None:
        for some in _parts(logits):
            _differentiate(logits[some], targets[rows][some], dloss[rows][some], options)

    return chunks.run(x, weight, bias, grad_mask, of_rows, _add)


def _add(total: Tensor, part: Tensor, out: Tensor | None, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total += part
    if out is not None:
        out.copy_(total)


def _parts(logits: Tensor) -> list[slice]:
    """Slices of rows that are computed in fp32 together."""
    most = _CPU_BYTES if logits.is_cpu else _BYTES
    step = max(1, most // (4 * logits.shape[1]))
    return [slice(first, first + step) for first in range(0, len(logits), step)]


def _capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """The logits (R, V) behind the softcap, and their derivative by those before it; None where it
    is 1."""
    if softcap == 0:
        return logits, None
    t = torch.tanh(logits.float() / softcap)
    return softcap * t, 1 - t * t


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p of the logits (R, V), their maximum and lse less that, in fp32. PyTorch's softmax is one
    kernel; the largest p is at least 1 / V, so its logarithm is good."""
    p = torch.softmax(logits, 1, dtype=torch.float32)
    return p, logits.amax(1).float(), p.amax(1).log_().neg_()


def _forward(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    lse: Tensor,
    dloss: Tensor | None,
    options: LossOptions,
) -> None:
    """Writes the losses and lse of some rows, and with dloss the logits' gradients over them."""
    _, smoothing, z_loss, softcap = options
    l, slope = _capped(logits, softcap)
    p, highest, rest = _softmax(l)
    torch.add(highest, rest, out=lse)
    counts, wrong = counted(targets, l.shape[1], options)
    at = torch.where(counts & ~wrong, targets, 0)[:, None]
    # From differences to the maximum: lse may be large, the loss small.
    found = (1 - smoothing) * (highest - l.gather(1, at).squeeze(1).float() + rest)
    found += z_loss * lse * lse
    if smoothing:
        found += smoothing * (highest - l.mean(1, dtype=torch.float32) + rest)
    losses.copy_(found.masked_fill_(~counts, 0).masked_fill_(wrong, float("nan")))
    if dloss is not None:
        _write(logits, p, slope, targets, lse, dloss, options)


def _differentiate(logits: Tensor, targets: Tensor, dloss: Tensor, options: LossOptions) -> None:
    """Writes the logits' gradients over those of some rows."""
    l, slope = _capped(logits, options.softcap)
    p, highest, rest = _softmax(l)
    _write(logits, p, slope, targets, highest + rest, dloss, options)


def _write(
    logits: Tensor,
    p: Tensor,
    slope: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    dloss: Tensor,
    options: LossOptions,
) -> None:
    """Writes the gradients over the logits of some rows, whose probabilities `p` are lost."""
    _, smoothing, z_loss, _ = options
    V = p.shape[1]
    counts, wrong = counted(targets, V, options)
    alive = counts & ~wrong
    p *= (dloss * (1 + 2 * z_loss * lse))[:, None]
    if smoothing:
        p -= (dloss * (smoothing / V))[:, None]
    at = torch.where(alive, targets, 0)[:, None]
    p.scatter_add_(1, at, (dloss * (smoothing - 1))[:, None])
    if slope is not None:
        p *= slope
    logits.copy_(p).masked_fill_(~alive[:, None], 0)
