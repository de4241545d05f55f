"""Attention by the fused ops behind F.scaled_dot_product_attention (SDPA) where they have every
option of the call; else by the formula, one block of query rows after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.core import philox
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import backend

# The most scores that the formula holds at a time, and the most elements of a mask for the fused
# op. It limits the size of a block of query rows.
_SCORES_HELD = 2**24
# Query rows of a block under causal or a window: a small block can skip most of the hidden keys.
_BAND_ROWS = 256
# PyTorch's fused backward pass for CPUs rounds the gradients of keys after each block of 256 query
# rows, and those of queries after each block of 512 keys. With twice as many rows or keys as these,
# the error can pass 2 eps.
_ROUNDED_ROWS, _ROUNDED_KEYS = 2048, 8192


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
        rows = (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.full(rows, -math.inf, dtype=torch.float32, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
    causal = _plain(options, q, k) if shift is None else None
    if causal is not None:
        fused = _fused_attention_fwd(q, k, v, causal, options)
        if fused is not None:
            return fused
    if shift is None and _only_masks(options, q):
        return _masked_attention_fwd(q, k, v, options)
    return _attention_rows_fwd(q, k, v, options, first_batch, shift)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v and an additive attn_mask, each empty where `grad_mask` is
    False.

    PyTorch's fused backward passes take no dlse. On CUDA only flash attention's backward pass is
    deterministic, and only under torch.use_deterministic_algorithms; in all other cases
    `deterministic` leads to the formula.
    """
    if q.numel() == 0 or k.numel() == 0:
        inputs = (q, k, v, options.attn_mask)
        dq, dk, dv, dmask = (
            torch.zeros_like(x) if x is not None and wanted else q.new_empty(0)
            for x, wanted in zip(inputs, grad_mask, strict=True)
        )
        return dq, dk, dv, dmask
    gradients: Sequence[Tensor] | None = None
    causal = _plain(options, q, k) if shift is None else None
    if causal is not None and dlse is None:
        gradients = _fused_attention_bwd(dout, q, k, v, out, lse, causal, options, deterministic)
    if gradients is None and shift is None and _only_masks(options, q) and dlse is None:
        gradients = _masked_attention_bwd(dout, q, k, v, out, lse, options)
    if gradients is None:
        return _attention_rows_bwd(dout, dlse, q, k, v, lse, options, grad_mask, first_batch, shift)
    dq, dk, dv = (
        gradient if wanted else q.new_empty(0)
        for gradient, wanted in zip(gradients, grad_mask, strict=False)
    )
    return dq, dk, dv, q.new_empty(0)


def fused_backend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> int:
    """Returns the backend for both passes of a call on a GPU, `backend.NONE` if PyTorch has none;
    -1 where no fused op is asked for."""
    causal = None if options.cu_seqlens_q is not None else _plain(options, q, k)
    if q.device.type != "cuda" or causal is None or q.numel() == 0 or k.numel() == 0:
        return -1
    q, k, v = (_heads_first(x) for x in (q, k, v))
    return backend.pick(q, k, v, causal, options.softmax_scale)


def _plain(options: AttentionOptions, q: Tensor, k: Tensor) -> bool | None:
    """Returns the `is_causal` flag for PyTorch's fused ops; None where they lack an option."""
    Tq, Tk = q.shape[1], k.shape[1]
    if options.costly or options.key_lengths is not None or options.attn_mask is not None:
        return None
    if options.softmax_scale <= 0 or 0 <= options.left < Tk - 1:
        return None
    if options.right < 0 or options.right >= Tq - 1:
        return False
    return True if options.right == 0 and Tq == Tk else None


def _only_masks(options: AttentionOptions, q: Tensor) -> bool:
    """Whether PyTorch's fused op for CPUs can run the call, given all of its masks as one mask.

    An additive mask and ALiBi need the formula. Only the formula gives the mask a gradient, and
    only its fp32 gradients are as accurate as those of eager PyTorch, which has no fused op there.
    """
    boolean = options.attn_mask is None or options.attn_mask.dtype == torch.bool
    return q.device.type == "cpu" and boolean and not options.costly and options.softmax_scale > 0


def _masked_rows(options: AttentionOptions, B: int, Tq: int, Tk: int) -> Iterator[slice]:
    """Returns blocks of query rows whose masks (1 or B, 1 or H, rows, keys) are not too large."""
    batches = 1 if options.key_lengths is None else B
    leading = () if options.attn_mask is None else options.attn_mask.shape[:-2]
    per_row = Tk * torch.broadcast_shapes((batches, 1), leading).numel()
    banded = options.left >= 0 or options.right >= 0
    return _row_blocks(per_row, Tq, _BAND_ROWS if banded else Tq)


def _positions(rows: slice, Tq: int, Tk: int, device: torch.device, shift: Tensor | None) -> Tensor:
    """Returns the position among the keys of each query, (rows, 1); with shift (B, 1, rows, 1)."""
    position = torch.arange(Tq, device=device)[rows, None] + Tk - Tq
    return position if shift is None else position + shift.view(-1, 1, 1, 1)


def _hidden(
    options: AttentionOptions,
    rows: slice,
    keys: slice,
    Tq: int,
    Tk: int,
    device: torch.device,
    shift: Tensor | None = None,
) -> Tensor:
    """Returns True where anything but an additive mask hides the key from the query. Broadcasts to
    (B, H, rows, keys)."""
    position = _positions(rows, Tq, Tk, device, shift)
    key = torch.arange(Tk, device=device)[keys]
    hidden = torch.zeros((1, 1), dtype=torch.bool, device=device)
    if options.left >= 0:
        hidden = hidden | (key < position - options.left)
    if options.right >= 0:
        hidden = hidden | (key > position + options.right)
    if options.key_lengths is not None:
        hidden = hidden | (key >= options.key_lengths.view(-1, 1, 1, 1))
    if options.attn_mask is not None and options.attn_mask.dtype == torch.bool:
        hidden = hidden | ~_mask_block(options.attn_mask, rows, keys)
    return hidden


def _seen_keys(
    options: AttentionOptions, rows: slice, Tq: int, Tk: int, shift: Tensor | None = None
) -> slice:
    """Returns the range of keys that at least one of these rows sees, by causal and window; all
    keys with shift, whose values the host does not read."""
    if shift is not None:
        return slice(0, Tk)
    left, right = options.left, options.right
    low = max(0, rows.start + Tk - Tq - left) if left >= 0 else 0
    high = min(Tk, rows.stop + Tk - Tq + right) if right >= 0 else Tk
    return slice(min(low, Tk), max(low, high))


def _fused_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, options: AttentionOptions
) -> tuple[Tensor, Tensor] | None:
    """Returns out and lse of the fused op that SDPA would pick; None where it would pick none."""
    D, scale = q.shape[-1], options.softmax_scale
    q, k, v = (_heads_first(x) for x in (q, k, v))
    match _backend(q, k, v, causal, options):
        case backend.CPU:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, scale=scale
            )
        case backend.FLASH:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, causal, False, scale=scale
            )
        case backend.EFFICIENT:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )
        case backend.CUDNN:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, False, scale=scale
            )
        case _:
            return None
    # Some of the ops pad lse to whole tiles, and some give lse a last dimension of 1.
    lse = lse.reshape(*lse.shape[:2], -1)[:, :, : q.shape[2]]
    return out.transpose(1, 2)[..., :D].contiguous(), lse.contiguous()


def _fused_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    options: AttentionOptions,
    deterministic: bool,
) -> tuple[Tensor, ...] | None:
    """Returns dq, dk and dv of the fused op that computed out; None where there is none, or where
    it cannot run this call."""
    (_, Tq, _, D), Tk, scale = q.shape, k.shape[1], options.softmax_scale
    dout, q, k, v, out = (_heads_first(x) for x in (dout, q, k, v, out))
    found = _backend(q, k, v, causal, options)
    if deterministic and found != backend.CPU:
        enforced = (
            torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        if found != backend.FLASH or not enforced:
            return None
    # The ops read the Philox state only with dropout, and cumulative lengths only with packed
    # sequences. Neither is used here.
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    match found:
        case backend.CPU:
            gradients = _cpu_gradients(dout, q, k, v, out, lse, causal, None, scale)
        case backend.FLASH:
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                dout, q, k, v, out, lse, None, None, Tq, Tk, 0.0, causal, unused, unused,
                scale=scale,
            )  # fmt: skip
        case backend.EFFICIENT:
            # This op wants the rows of lse to start on multiples of 32.
            lse = F.pad(lse, (0, -Tq % 32), value=math.inf)
            *gradients, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                dout, q, k, v, None, out, lse, unused, unused, 0.0, [True, True, True, False],
                causal, scale=scale,
            )  # fmt: skip
        case backend.CUDNN:
            dout, out = (backend.laid_out_like(q, x) for x in (dout, out))
            gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                dout, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None, Tq, Tk,
                0.0, causal, scale=scale,
            )  # fmt: skip
        case _:
            return None
    return tuple(g.transpose(1, 2)[..., :D].to(q.dtype).contiguous() for g in gradients)


def _backend(q: Tensor, k: Tensor, v: Tensor, causal: bool, options: AttentionOptions) -> int:
    """Returns the backend that runs (B, H, T, D) inputs: the one that was picked, or one that is
    picked now."""
    if q.device.type == "cpu":
        return backend.CPU
    if options.backend >= 0:
        return options.backend
    return backend.pick(q, k, v, causal, options.softmax_scale)


def _heads_first(x: Tensor) -> Tensor:
    """Returns x (B, T, H, D) as (B, H, T, D). On CUDA it pads D to a multiple of 8, as PyTorch's
    fused ops require."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.is_cuda and x.shape[-1] % 8:
        x = F.pad(x, (0, -x.shape[-1] % 8))
    return x.transpose(1, 2)


def _masked_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Returns out and lse of PyTorch's fused op for CPUs, called with a mask for one block of query
    rows after another."""
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    q = _heads_first(q)
    k, v = (_living_keys(_heads_first(x), options.key_lengths) for x in (k, v))
    for rows in _masked_rows(options, B, Tq, Tk):
        keys = _seen_keys(options, rows, Tq, Tk)
        if keys.start == keys.stop:
            out[:, rows], lse[:, :, rows] = 0, -math.inf
            continue
        hidden = _hidden(options, rows, keys, Tq, Tk, q.device)
        block, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, False,
            attn_mask=_bias(hidden, q.dtype), scale=options.softmax_scale,
        )  # fmt: skip
        lse[:, :, rows], out[:, rows] = block_lse, block.transpose(1, 2)
        empty = hidden.all(-1)
        # Rows that see no key: the op gives them lse 0, and lets a NaN in q reach out.
        if empty.any():
            lse[:, :, rows].masked_fill_(empty, -math.inf)
            out[:, rows].transpose(1, 2).masked_fill_(empty[..., None], 0)
    return out, lse


def _masked_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv, computed block by block as in `_masked_attention_fwd`; dk and dv are
    summed in fp32."""
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    dtype = q.dtype
    dq = torch.empty((B, Tq, H, D), dtype=dtype, device=q.device)
    dout, q, out = (_heads_first(x) for x in (dout, q, out))
    k, v = (_living_keys(_heads_first(x), options.key_lengths) for x in (k, v))
    dk, dv = (
        torch.zeros((B, Tk, x.shape[1], D), dtype=torch.float32, device=x.device).transpose(1, 2)
        for x in (k, v)
    )
    empty = (lse == -math.inf)[..., None]
    fixing = bool(empty.any())
    # With lse 0 the weights of rows without keys are exp(-inf - 0) = 0. Since 0 * NaN is NaN, their
    # dout and q become zeros too.
    if fixing:
        lse = lse.masked_fill(empty[..., 0], 0)
        dout, q = dout.masked_fill(empty, 0), q.masked_fill(empty, 0)
    for rows in _masked_rows(options, B, Tq, Tk):
        keys = _seen_keys(options, rows, Tq, Tk)
        if keys.start == keys.stop:
            dq[:, rows] = 0
            continue
        bias = _bias(_hidden(options, rows, keys, Tq, Tk, q.device), dtype)
        block, block_dk, block_dv = _cpu_gradients(
            dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
            lse[:, :, rows], False, bias, options.softmax_scale,
        )  # fmt: skip
        dq[:, rows] = block.transpose(1, 2)
        dk[:, :, keys] += block_dk
        dv[:, :, keys] += block_dv
    if fixing:
        dq.transpose(1, 2).masked_fill_(empty, 0)
    dk, dv = (x.transpose(1, 2).to(dtype) for x in (dk, dv))
    return dq, dk, dv


def _cpu_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv of PyTorch's fused op for CPUs, in q's dtype or in fp32.

    In 16 bits the op rounds dk and dv after each of the query heads that share a key head, and
    after each block of query rows; dq after each block of keys. Where that is often, it gets fp32
    copies.
    """
    grouped = q.shape[1] > k.shape[1]
    if grouped or q.shape[2] > _ROUNDED_ROWS or k.shape[2] > _ROUNDED_KEYS:
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
        bias = None if bias is None else bias.float()
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 0 where a key is visible and -inf where it is hidden, for the fused op to add to the
    scores."""
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill_(hidden, -math.inf)


def _attention_rows_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    first_batch: int,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns out and lse by the formula in fp32, one block of query rows after another."""
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    k, v = (_living_keys(x.transpose(1, 2).float(), options.key_lengths) for x in (k, v))
    for rows in _row_blocks(B * H * Tk, Tq):
        keys = _seen_keys(options, rows, Tq, Tk, shift)
        if keys.start == keys.stop:
            out[:, rows], lse[:, :, rows] = 0, -math.inf
            continue
        s, _ = _attention_scores(q, k, rows, keys, options, shift)
        highest = s.amax(-1, keepdim=True)
        highest = highest.masked_fill(highest == -math.inf, 0)
        p = s.sub_(highest).exp_()
        total = p.sum(-1, keepdim=True)
        lse[:, :, rows] = (highest + total.log()).squeeze(-1)
        p = p.div_(total.masked_fill(total == 0, 1))
        if options.dropout_p > 0:
            p = p.mul_(_attention_dropout(q, rows, keys, options, first_batch))
        product = _by_group(p, k.shape[1]) @ v[:, :, keys]
        out[:, rows] = product.view(B, H, -1, D).transpose(1, 2).to(q.dtype)
    return out, lse


def _attention_rows_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    grad_mask: Sequence[bool],
    first_batch: int,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients by the formula dS = P (dP - sum(P dP) + dlse) in fp32, one block of
    query rows after another."""
    (B, Tq, H, D), (Tk, Hk), dtype = q.shape, k.shape[1:3], q.dtype
    want_q, want_k, want_v, want_mask = grad_mask
    dq = torch.empty((B, Tq, H, D) if want_q else (0,), dtype=dtype, device=q.device)
    k, v = (_living_keys(x.transpose(1, 2).float(), options.key_lengths) for x in (k, v))
    dk, dv = (
        torch.zeros((B, Hk, Tk, D) if wanted else (0,), dtype=torch.float32, device=q.device)
        for wanted in (want_k, want_v)
    )
    mask = options.attn_mask if want_mask else None
    shape = (0,) if mask is None else mask.shape
    dmask = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for rows in _row_blocks(B * H * Tk, Tq):
        keys = _seen_keys(options, rows, Tq, Tk, shift)
        if keys.start == keys.stop:
            if want_q:
                dq[:, rows] = 0
            continue
        s, cap = _attention_scores(q, k, rows, keys, options, shift)
        # The weights of a row without keys are 0. Its q, dout and dlse may be NaN, and 0 * NaN is
        # NaN, so zeros replace them before the products.
        empty = lse[:, :, rows, None] == -math.inf
        # softmax(s) is more accurate than exp(s - lse), which adds the rounding error of lse.
        p = torch.softmax(s, -1).masked_fill_(empty, 0)
        do = dout[:, rows].transpose(1, 2).float().masked_fill(empty, 0)
        dp = (_by_group(do, Hk) @ v[:, :, keys].mT).view(p.shape)
        kept = p
        if options.dropout_p > 0:
            dropout = _attention_dropout(q, rows, keys, options, first_batch)
            kept, dp = p * dropout, dp.mul_(dropout)
        if want_v:
            dv[:, :, keys] += _sum_by_group(kept, do, Hk)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True))
        if dlse is not None:
            ds += dlse[:, :, rows, None]
        ds = ds.mul_(p).masked_fill_(empty, 0)
        if want_mask:
            _add_mask_gradient(dmask, ds, rows, keys)
        if cap is not None:
            ds = ds.mul_(cap).masked_fill_(empty, 0)
        ds = ds.mul_(options.softmax_scale)
        if want_q:
            product = _by_group(ds, Hk) @ k[:, :, keys]
            dq[:, rows] = product.view(B, H, -1, D).transpose(1, 2).to(dtype)
        if want_k:
            rows_q = q[:, rows].transpose(1, 2).float().masked_fill(empty, 0)
            dk[:, :, keys] += _sum_by_group(ds, rows_q, Hk)
    dk, dv = (
        d.transpose(1, 2).to(dtype).contiguous() if wanted else d.to(dtype)
        for d, wanted in ((dk, want_k), (dv, want_v))
    )
    return dq, dk, dv, dmask.to(dtype if mask is None else mask.dtype)


def _attention_scores(
    q: Tensor,
    k: Tensor,
    rows: slice,
    keys: slice,
    options: AttentionOptions,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the scores (B, H, rows, keys) in fp32, -inf where hidden, and the derivative of the
    softcap, None without a softcap."""
    (B, Tq, H), (Hk, Tk) = q.shape[:3], k.shape[1:3]
    rows_q = _by_group(q[:, rows].transpose(1, 2).float(), Hk)
    s = (
        (rows_q @ k[:, :, keys].mT)
        .mul_(options.softmax_scale)
        .view(B, H, -1, keys.stop - keys.start)
    )
    cap = None
    if options.softcap > 0:
        t = torch.tanh(s / options.softcap)
        s, cap = options.softcap * t, 1 - t * t
    if options.alibi_slopes is not None:
        position = _positions(rows, Tq, Tk, q.device, shift)
        key = torch.arange(Tk, device=q.device)[keys]
        s -= options.alibi_slopes[:, None, None] * (position - key).abs()
    if options.attn_mask is not None and options.attn_mask.dtype != torch.bool:
        s += _mask_block(options.attn_mask, rows, keys)
    return s.masked_fill_(_hidden(options, rows, keys, Tq, Tk, q.device, shift), -math.inf), cap


def _mask_block(mask: Tensor, rows: slice, keys: slice) -> Tensor:
    """Returns a view, with 4 dimensions, of these rows and keys of a mask that broadcasts to
    (B, H, Tq, Tk)."""
    mask = mask[(None,) * (4 - mask.dim())]
    every = slice(None)
    return mask[:, :, rows if mask.shape[2] > 1 else every, keys if mask.shape[3] > 1 else every]


def _row_blocks(scores_per_row: int, Tq: int, most: int | None = None) -> Iterator[slice]:
    step = max(1, min(most or Tq, _SCORES_HELD // scores_per_row))
    return (slice(first, min(first + step, Tq)) for first in range(0, Tq, step))


def _living_keys(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Returns x (B, H, T, D) with zeros past the lengths: what lies there may be NaN, and 0 * NaN
    is NaN."""
    if key_lengths is None:
        return x
    dead = torch.arange(x.shape[2], device=x.device) >= key_lengths[:, None]
    return x.masked_fill(dead[:, None, :, None], 0)


def _by_group(x: Tensor, key_heads: int) -> Tensor:
    """Returns x (B, H, rows, n) as (B, Hk, H / Hk * rows, n): the query heads of one key head
    become more rows."""
    return x.reshape(x.shape[0], key_heads, -1, x.shape[-1])


def _sum_by_group(x: Tensor, y: Tensor, key_heads: int) -> Tensor:
    """Returns x^T y, (B, Hk, keys, D), added up over the query heads of one key head.

    One product of all their rows would round more often: it adds up the rows one after another.
    """
    return (x.mT @ y).unflatten(1, (key_heads, -1)).sum(2)


def _attention_dropout(
    q: Tensor, rows: slice, keys: slice, options: AttentionOptions, first_batch: int
) -> Tensor:
    """Returns dropout's factor of each weight: 0 where dropped, else 1 / the keep probability."""
    count = rows.stop - rows.start
    keep = philox.attention_keep(
        options.rng, options.dropout_p, q.shape[0], q.shape[2], count, keys.stop, rows.start,
        first_batch,
    )  # fmt: skip
    return keep[..., keys.start :] * philox.scale(options.dropout_p)


def _add_mask_gradient(dmask: Tensor, ds: Tensor, rows: slice, keys: slice) -> None:
    """Adds a block of dS to the mask's gradient, summed over the mask's broadcast dimensions."""
    target = _mask_block(dmask, rows, keys)
    broadcast = [d for d in range(4) if target.shape[d] == 1 and ds.shape[d] != 1]
    if broadcast:
        ds = ds.sum(broadcast, keepdim=True)
    target += ds
