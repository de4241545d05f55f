"""Attention by the fused ops behind F.scaled_dot_product_attention, else by the formula in rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from gptkernels import philox

# Scores that the written-out attention holds at a time: blocks of query rows keep to it.
_SCORES_HELD = 2**24


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    attn_mask: Tensor | None,
    rng: Tensor | None,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, D) and lse (B, H, Tq) fp32; see `reference.attention` for the formula."""
    if q.numel() == 0 or k.numel() == 0:
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
    options = _AttentionOptions(
        alibi_slopes, key_lengths, attn_mask, rng, softmax_scale, left, right, softcap, dropout_p
    )
    causal = options.plain(q, k)
    if causal is not None:
        fused = _fused_attention_fwd(q, k, v, causal, softmax_scale)
        if fused is not None:
            return fused
    return _attention_rows_fwd(q, k, v, options)


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    attn_mask: Tensor | None,
    rng: Tensor | None,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    mask_gradient: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradient of an additive attn_mask (empty unless `mask_gradient`).

    PyTorch's fused backward passes take no dlse, and on CUDA only flash attention's keeps its bits,
    under torch.use_deterministic_algorithms; elsewhere `deterministic` means the formula.
    """
    options = _AttentionOptions(
        alibi_slopes, key_lengths, attn_mask, rng, softmax_scale, left, right, softcap, dropout_p
    )
    nothing = torch.empty(0, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if attn_mask is None or not mask_gradient:
            return dq, dk, dv, nothing
        return dq, dk, dv, torch.zeros_like(attn_mask)
    causal = options.plain(q, k)
    if causal is not None and dlse is None:
        fused = _fused_attention_bwd(dout, q, k, v, out, lse, causal, softmax_scale, deterministic)
        if fused is not None:
            dq, dk, dv = fused
            return dq, dk, dv, nothing
    return _attention_rows_bwd(dout, dlse, q, k, v, lse, options, mask_gradient)


@dataclass(frozen=True)
class _AttentionOptions:
    alibi_slopes: Tensor | None
    key_lengths: Tensor | None
    attn_mask: Tensor | None
    rng: Tensor | None
    scale: float
    left: int
    right: int
    softcap: float
    dropout_p: float

    def plain(self, q: Tensor, k: Tensor) -> bool | None:
        """Whether PyTorch's fused ops are to be causal; None where they lack an option."""
        Tq, Tk = q.shape[1], k.shape[1]
        extras = (self.alibi_slopes, self.key_lengths, self.attn_mask)
        if any(extra is not None for extra in extras):
            return None
        if self.softcap > 0 or self.dropout_p > 0 or self.scale <= 0 or 0 <= self.left < Tk - 1:
            return None
        if self.right < 0 or self.right >= Tq - 1:
            return False
        return True if self.right == 0 and Tq == Tk else None

    def keys(self, first: int, last: int, Tq: int, Tk: int) -> slice:
        """The keys that the rows first ... last - 1 see between them, by causal and window."""
        low = max(0, first + Tk - Tq - self.left) if self.left >= 0 else 0
        high = min(Tk, last + Tk - Tq + self.right) if self.right >= 0 else Tk
        return slice(min(low, Tk), max(low, high))


def _fused_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor] | None:
    """out and lse from the fused op that SDPA would pick; None where there is none."""
    D = q.shape[-1]
    q, k, v = (_heads_first(x) for x in (q, k, v))
    match _fused_choice(q, k, v, causal, scale):
        case "cpu":
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, scale=scale
            )
        case "flash":
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, causal, False, scale=scale
            )
        case "efficient":
            out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )
        case "cudnn":
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, False, scale=scale
            )
        case _:
            return None
    # Some pad lse to whole tiles, some give it a last dimension of 1.
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
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, ...] | None:
    """dq, dk and dv from the fused op that SDPA would pick; None where none will do."""
    D, Tq, Tk = q.shape[-1], q.shape[1], k.shape[1]
    dout, q, k, v, out = (_heads_first(x) for x in (dout, q, k, v, out))
    backend = _fused_choice(q, k, v, causal, scale)
    if deterministic and backend != "cpu":
        enforced = (
            torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        if backend != "flash" or not enforced:
            return None
    # Philox state and cumulative lengths are read only with dropout and with packed sequences.
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    match backend:
        case "cpu":
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, q, k, v, out, lse, 0.0, causal, scale=scale
            )
        case "flash":
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                dout, q, k, v, out, lse, None, None, Tq, Tk, 0.0, causal, unused, unused,
                scale=scale,
            )  # fmt: skip
        case "efficient":
            # Its rows of lse start on multiples of 32.
            lse = F.pad(lse, (0, -Tq % 32), value=math.inf)
            *gradients, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                dout, q, k, v, None, out, lse, unused, unused, 0.0, [True, True, True, False],
                causal, scale=scale,
            )  # fmt: skip
        case "cudnn":
            gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                dout, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None, Tq, Tk,
                0.0, causal, scale=scale,
            )  # fmt: skip
        case _:
            return None
    return tuple(g.transpose(1, 2)[..., :D].contiguous() for g in gradients)


def _fused_choice(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> str | None:
    """The name of the fused op for (B, H, T, D) inputs; None where only the formula will do."""
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda":
        return None
    choice = torch._fused_sdp_choice(
        q, k, v, None, 0.0, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    names = {
        SDPBackend.FLASH_ATTENTION.value: "flash",
        SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
        SDPBackend.CUDNN_ATTENTION.value: "cudnn",
    }
    return names.get(choice)


def _heads_first(x: Tensor) -> Tensor:
    """(B, T, H, D) -> (B, H, T, D), on CUDA with D padded to a multiple of 8, as the ops want."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.is_cuda and x.shape[-1] % 8:
        x = F.pad(x, (0, -x.shape[-1] % 8))
    return x.transpose(1, 2)


def _attention_rows_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: _AttentionOptions
) -> tuple[Tensor, Tensor]:
    """The formula in fp32, one block of query rows after another."""
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    k, v = (_living_keys(x, options.key_lengths) for x in (k, v))
    for rows in _row_blocks(B * H * Tk, Tq):
        keys = options.keys(rows.start, rows.stop, Tq, Tk)
        if keys.start == keys.stop:
            out[:, rows], lse[:, :, rows] = 0, -math.inf
            continue
        s, _ = _attention_scores(q, k, rows, keys, options)
        highest = s.amax(-1, keepdim=True)
        highest = highest.masked_fill(highest == -math.inf, 0)
        p = s.sub_(highest).exp_()
        total = p.sum(-1, keepdim=True)
        lse[:, :, rows] = (highest + total.log()).squeeze(-1)
        p = p.div_(total.masked_fill(total == 0, 1))
        if options.dropout_p > 0:
            p = p.mul_(_attention_dropout(q, rows, keys, options))
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
    options: _AttentionOptions,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dS = P (dP - sum(P dP) + dlse), in fp32, one block of query rows after another."""
    (B, Tq, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
    dtypes = q.dtype, k.dtype, v.dtype
    dq = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    k, v = (_living_keys(x, options.key_lengths) for x in (k, v))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    mask = options.attn_mask if mask_gradient else None
    shape = (0,) if mask is None else mask.shape
    dmask = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for rows in _row_blocks(B * H * Tk, Tq):
        keys = options.keys(rows.start, rows.stop, Tq, Tk)
        if keys.start == keys.stop:
            dq[:, rows] = 0
            continue
        s, cap = _attention_scores(q, k, rows, keys, options)
        # A row without keys has lse -inf: all its weights are exp(-inf - 0) = 0. Products with them
        # are 0 only where its q, dout and dlse, which may be NaN, are left out.
        row_lse = lse[:, :, rows, None]
        empty = row_lse == -math.inf
        p = s.sub_(row_lse.masked_fill(empty, 0)).exp_()
        total = p.sum(-1, keepdim=True)  # 1, but for the rounding of lse
        p = p.div_(total.masked_fill(total == 0, 1))
        do = _by_group(dout[:, rows].transpose(1, 2).float().masked_fill(empty, 0), Hk)
        dp = (do @ v[:, :, keys].mT).view(p.shape)
        kept = p
        if options.dropout_p > 0:
            dropout = _attention_dropout(q, rows, keys, options)
            kept, dp = p * dropout, dp.mul_(dropout)
        dv[:, :, keys] += _by_group(kept, Hk).mT @ do
        ds = dp.sub_((p * dp).sum(-1, keepdim=True))
        if dlse is not None:
            ds += dlse[:, :, rows, None]
        ds = ds.mul_(p).masked_fill_(empty, 0)
        if mask_gradient:
            _add_mask_gradient(dmask, ds, rows, keys)
        if cap is not None:
            ds = ds.mul_(cap).masked_fill_(empty, 0)
        ds = _by_group(ds.mul_(options.scale), Hk)
        dq[:, rows] = (ds @ k[:, :, keys]).view(B, H, -1, D).transpose(1, 2).to(q.dtype)
        rows_q = q[:, rows].transpose(1, 2).float().masked_fill(empty, 0)
        dk[:, :, keys] += ds.mT @ _by_group(rows_q, Hk)
    dk, dv = (
        d.transpose(1, 2).to(dtype).contiguous()
        for d, dtype in zip((dk, dv), dtypes[1:], strict=True)
    )
    return dq, dk, dv, dmask.to(q.dtype if mask is None else mask.dtype)


def _attention_scores(
    q: Tensor, k: Tensor, rows: slice, keys: slice, options: _AttentionOptions
) -> tuple[Tensor, Tensor | None]:
    """Scores (B, H, rows, keys) fp32, -inf where masked, and the softcap's slope, None without."""
    (B, Tq, H), (Hk, Tk) = q.shape[:3], k.shape[1:3]
    rows_q = _by_group(q[:, rows].transpose(1, 2).float(), Hk)
    s = (rows_q @ k[:, :, keys].mT).mul_(options.scale).view(B, H, -1, keys.stop - keys.start)
    cap = None
    if options.softcap > 0:
        t = torch.tanh(s / options.softcap)
        s, cap = options.softcap * t, 1 - t * t
    position = torch.arange(Tq, device=q.device)[rows, None] + Tk - Tq
    key = torch.arange(Tk, device=q.device)[keys]
    if options.alibi_slopes is not None:
        s -= options.alibi_slopes[:, None, None] * (position - key).abs()
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if options.left >= 0:
        hidden = hidden | (key < position - options.left)
    if options.right >= 0:
        hidden = hidden | (key > position + options.right)
    if options.key_lengths is not None:
        hidden = hidden | (key >= options.key_lengths.view(-1, 1, 1, 1))
    if options.attn_mask is not None:
        mask = options.attn_mask.expand(B, H, Tq, Tk)[:, :, rows, keys]
        if mask.dtype == torch.bool:
            hidden = hidden | ~mask
        else:
            s += mask
    return s.masked_fill_(hidden, -math.inf), cap


def _row_blocks(scores_per_row: int, Tq: int) -> Iterator[slice]:
    step = max(1, _SCORES_HELD // scores_per_row)
    return (slice(first, min(first + step, Tq)) for first in range(0, Tq, step))


def _living_keys(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """(B, T, H, D) -> (B, H, T, D) fp32, zero past the lengths: 0 * NaN is NaN."""
    x = x.transpose(1, 2).float()
    if key_lengths is None:
        return x
    dead = torch.arange(x.shape[2], device=x.device) >= key_lengths[:, None]
    return x.masked_fill(dead[:, None, :, None], 0)


def _by_group(x: Tensor, key_heads: int) -> Tensor:
    """(B, H, rows, n) -> (B, Hk, H / Hk * rows, n): the query heads of one key head as rows."""
    return x.reshape(x.shape[0], key_heads, -1, x.shape[-1])


def _attention_dropout(q: Tensor, rows: slice, keys: slice, options: _AttentionOptions) -> Tensor:
    """What weights are multiplied by: 0 where dropped, else the inverse of the keep probability."""
    count = rows.stop - rows.start
    keep = philox.attention_keep(
        options.rng, options.dropout_p, q.shape[0], q.shape[2], count, keys.stop, rows.start
    )
    return keep[..., keys.start :] * philox.scale(options.dropout_p)


def _add_mask_gradient(dmask: Tensor, ds: Tensor, rows: slice, keys: slice) -> None:
    """Adds a block of dS, summed over the dimensions that the mask broadcasts."""
    shape = (1,) * (4 - dmask.dim()) + tuple(dmask.shape)
    broadcast = [d for d in range(4) if shape[d] == 1 and ds.shape[d] != 1]
    if broadcast:
        ds = ds.sum(broadcast, keepdim=True)
    target = dmask.view(shape)
    target[:, :, rows if shape[2] > 1 else slice(None), keys if shape[3] > 1 else slice(None)] += ds
