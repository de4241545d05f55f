"""Attention of a batch: by PyTorch's fused ops where they have every option of the call, else by
the formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.ops.attention.learned import with_sinks
from gptkernels.ops.attention.options import AttentionOptions, without_keys
from gptkernels.ops.attention.torch import backend, formula, fused
from gptkernels.ops.attention.torch.blocks import one_block
from gptkernels.ops.attention.widths import widened


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    first_batch: int = 0,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, D) and lse (B, H, Tq) in fp32; the formula is that of
    `gptkernels.truth.reference.attention`.

    `first_batch` is the number that q's first entry has in the whole batch: dropout's mask depends
    on it. `shift` (B,) is added to the positions of each entry's queries, which are those of
    `attention` without it. Only the formula takes it.
    """
    if q.numel() == 0 or k.numel() == 0:
        return without_keys(q, v, options)
    found = _fused_fwd(q, k, v, options) if shift is None else None
    if found is not None:
        return found
    return formula.attention_fwd(q, k, v, options, first_batch, shift)


def _fused_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor] | None:
    """Returns out and lse by a fused op; None where none has all that the call asks for."""
    causal, masks, found = _plain(options, q, k), _only_masks(options, q), None
    if _exact(options, q) or (causal is None and not masks):
        return None
    Dv = v.shape[-1]
    q, k, v = widened(q, k, v)
    if causal is not None:
        found = fused.attention_fwd(q, k, v, causal, options)
    if found is None and masks:
        found = fused.masked_attention_fwd(q, k, v, options)
    if found is None:
        return None
    out, lse = found
    return with_sinks(out[..., :Dv].contiguous(), lse, options.sinks)


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
    first_batch: int = 0,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v and an additive attn_mask, and by_query, each empty where
    `grad_mask` is False.

    PyTorch's fused backward passes take no dlse. On CUDA only flash attention's backward pass is
    deterministic, and only under torch.use_deterministic_algorithms; in all other cases
    `deterministic` leads to the formula.
    """
    if q.numel() == 0 or k.numel() == 0:
        mask = options.attn_mask if grad_mask[3] else None
        inputs = (q, k, v, q if mask is None else mask, lse)
        dq, dk, dv, dmask, by_query = (
            torch.zeros_like(x) if wanted else x.new_empty(0)
            for x, wanted in zip(inputs, grad_mask, strict=True)
        )
        return dq, dk, dv, dmask, by_query
    gradients = None
    if shift is None and dlse is None:
        gradients = _fused_bwd(dout, q, k, v, out, lse, options, deterministic)
    if gradients is None:
        return formula.attention_bwd(
            dout, dlse, q, k, v, lse, options, grad_mask, first_batch, shift
        )
    dq, dk, dv = (
        gradient if wanted else q.new_empty(0)
        for gradient, wanted in zip(gradients, grad_mask, strict=False)
    )
    return dq, dk, dv, q.new_empty(0), lse.new_empty(0)


def _fused_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    deterministic: bool,
) -> Sequence[Tensor] | None:
    """Returns dq, dk and dv by a fused op; None where none has all that the call asks for."""
    causal, masks, found = _plain(options, q, k), _masks_bwd(options, q), None
    if causal is None and not masks:
        return None
    sizes = [x.shape[-1] for x in (q, k, v)]
    dout, q, k, v, out = widened(dout, q, k, v, out)
    if causal is not None:
        found = fused.attention_bwd(dout, q, k, v, out, lse, causal, options, deterministic)
    if found is None and masks:
        found = fused.masked_attention_bwd(dout, q, k, v, out, lse, options)
    if found is None:
        return None
    return [x[..., :size].contiguous() for x, size in zip(found, sizes, strict=True)]


def fused_backend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> int:
    """Returns the backend for both passes of a call on a GPU, `backend.NONE` if PyTorch has none;
    -1 where no fused op is asked for."""
    causal = None if options.cu_seqlens_q is not None else _plain(options, q, k)
    if q.device.type != "cuda" or causal is None or q.numel() == 0 or k.numel() == 0:
        return -1
    q, k, v = (fused.heads_first(x) for x in widened(q, k, v))  # as they will run
    return backend.pick(q, k, v, causal, options.softmax_scale)


def traceable_fwd(q: Tensor, k: Tensor, options: AttentionOptions) -> bool:
    """Whether torch.compile can trace a forward pass.

    Not packed sequences: the host reads their lengths. Not what PyTorch's fused ops run on a GPU:
    which of them does is a question that cannot be traced. And not a loop over blocks of rows,
    which would be as long a graph. torch.export gets what has a derivative, and asks no sizes.
    """
    if options.cu_seqlens_q is not None:
        return False
    if torch.compiler.is_exporting():
        return q.device.type == "cpu" and _always_plain(options, q, k)
    if _plain(options, q, k) is not None and (q.device.type == "cuda" or not _exact(options, q)):
        return q.device.type != "cuda"
    if _only_masks(options, q) and not _exact(options, q):
        return fused.one_masked_block(options, q, k)
    return one_block(q.shape[0] * q.shape[2] * k.shape[1], q.shape[1])


def traceable_bwd(dlse: Tensor | None, q: Tensor, k: Tensor, options: AttentionOptions) -> bool:
    """Whether torch.compile can trace a backward pass, and may.

    The formula's is for itself: it computes the scores again, and a compiler that saw this would
    find them in the forward pass, and keep them all.
    """
    by_fused_op = _plain(options, q, k) is not None or _masks_bwd(options, q)
    return dlse is None and by_fused_op and traceable_fwd(q, k, options)


def _plain(options: AttentionOptions, q: Tensor, k: Tensor) -> bool | None:
    """Returns the `is_causal` flag for PyTorch's fused ops; None where they lack an option."""
    Tq, Tk = q.shape[1], k.shape[1]
    if not _plain_scores(options) or 0 <= options.left < Tk - 1:
        return None
    if options.right < 0 or options.right >= Tq - 1:
        return False
    return True if options.right == 0 and Tq == Tk else None


def _always_plain(options: AttentionOptions, q: Tensor, k: Tensor) -> bool:
    """Whether `_plain` finds a flag, whatever the sizes are that torch.export leaves open."""
    if not _plain_scores(options) or options.left >= 0 or options.right > 0:
        return False
    # Loaded by then: importing it takes long.
    known = torch.fx.experimental.symbolic_shapes.guard_or_false
    return options.right < 0 or known(q.shape[1] == k.shape[1])


def _plain_scores(options: AttentionOptions) -> bool:
    """Whether PyTorch's fused ops know everything that the scores depend on, but for the window."""
    masked = options.key_lengths is not None or options.attn_mask is not None
    return not (options.costly or masked) and options.softmax_scale > 0


def _exact(options: AttentionOptions, q: Tensor) -> bool:
    """Whether the forward pass is the formula's: the sinks' gradient is made of out, which the
    fused op for CPUs sums up less exactly."""
    return options.sinks is not None and q.dtype == torch.float32


def _only_masks(options: AttentionOptions, q: Tensor) -> bool:
    """Whether PyTorch's fused op for CPUs can run the call, given all of its masks as one mask.

    An additive mask and ALiBi need the formula. Only the formula gives the mask a gradient, and
    only its fp32 gradients are as accurate as those of eager PyTorch, which has no fused op there.
    """
    boolean = options.attn_mask is None or options.attn_mask.dtype == torch.bool
    return q.device.type == "cpu" and boolean and not options.costly and options.softmax_scale > 0


def _masks_bwd(options: AttentionOptions, q: Tensor) -> bool:
    """The same of the backward pass. It tells rows without keys by their lse, which with sinks is
    finite."""
    return _only_masks(options, q) and options.sinks is None
