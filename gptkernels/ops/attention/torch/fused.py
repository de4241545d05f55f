"""Attention by the fused ops behind F.scaled_dot_product_attention (SDPA)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import backend
from gptkernels.ops.attention.torch.blocks import (
    hidden_keys,
    living_keys,
    one_block,
    row_blocks,
    seen_keys,
)

# Query rows of a block under causal or a window: a small block can skip most of the hidden keys.
_BAND_ROWS = 256
# PyTorch's fused backward pass for CPUs rounds the gradients of keys after each block of 256 query
# rows, and those of queries after each block of 512 keys. With twice as many rows or keys as these,
# the error can pass 2 eps.
_ROUNDED_ROWS, _ROUNDED_KEYS = 2048, 8192


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, options: AttentionOptions
) -> tuple[Tensor, Tensor] | None:
    """Returns out and lse of the fused op that SDPA would pick; None where it would pick none."""
    D, scale = q.shape[-1], options.softmax_scale
    q, k, v = (heads_first(x) for x in (q, k, v))
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


def attention_bwd(
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
    dout, q, k, v, out = (heads_first(x) for x in (dout, q, k, v, out))
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


def masked_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Returns out and lse of PyTorch's fused op for CPUs, called with a mask for one block of query
    rows after another."""
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    q = heads_first(q)
    k, v = (living_keys(heads_first(x), options.key_lengths) for x in (k, v))
    for rows in row_blocks(*_masked_rows(options, B, Tq, Tk)):
        keys = seen_keys(options, rows, Tq, Tk)
        if keys.start == keys.stop:
            out[:, rows], lse[:, :, rows] = 0, -math.inf
            continue
        hidden = hidden_keys(options, rows, keys, Tq, Tk, q.device)
        block, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, False,
            attn_mask=_bias(hidden, q.dtype), scale=options.softmax_scale,
        )  # fmt: skip
        lse[:, :, rows], out[:, rows] = block_lse, block.transpose(1, 2)
        empty = hidden.all(-1)
        # Rows that see no key: the op gives them lse 0, and lets a NaN in q reach out.
        if torch.compiler.is_compiling() or empty.any():
            lse[:, :, rows].masked_fill_(empty, -math.inf)
            out[:, rows].transpose(1, 2).masked_fill_(empty[..., None], 0)
    return out, lse


def masked_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv, computed block by block as in `masked_attention_fwd`; dk and dv are
    summed in fp32."""
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    dtype = q.dtype
    dq = torch.empty((B, Tq, H, D), dtype=dtype, device=q.device)
    dout, q, out = (heads_first(x) for x in (dout, q, out))
    k, v = (living_keys(heads_first(x), options.key_lengths) for x in (k, v))
    dk, dv = (
        torch.zeros((B, Tk, x.shape[1], D), dtype=torch.float32, device=x.device).transpose(1, 2)
        for x in (k, v)
    )
    empty = (lse == -math.inf)[..., None]
    fixing = torch.compiler.is_compiling() or bool(empty.any())
    # With lse 0 the weights of rows without keys are exp(-inf - 0) = 0. Since 0 * NaN is NaN, their
    # dout and q become zeros too.
    if fixing:
        lse = lse.masked_fill(empty[..., 0], 0)
        dout, q = dout.masked_fill(empty, 0), q.masked_fill(empty, 0)
    for rows in row_blocks(*_masked_rows(options, B, Tq, Tk)):
        keys = seen_keys(options, rows, Tq, Tk)
        if keys.start == keys.stop:
            dq[:, rows] = 0
            continue
        bias = _bias(hidden_keys(options, rows, keys, Tq, Tk, q.device), dtype)
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


def one_masked_block(options: AttentionOptions, q: Tensor, k: Tensor) -> bool:
    """Whether the functions above compute all query rows of q (B, Tq, H, D) at once."""
    return one_block(*_masked_rows(options, q.shape[0], q.shape[1], k.shape[1]))


def _masked_rows(options: AttentionOptions, B: int, Tq: int, Tk: int) -> tuple[int, int, int]:
    """Returns what `row_blocks` takes for blocks of query rows whose masks (1 or B, 1 or H, rows,
    keys) are not too large."""
    batches = 1 if options.key_lengths is None else B
    leading = () if options.attn_mask is None else options.attn_mask.shape[:-2]
    per_row = Tk * torch.broadcast_shapes((batches, 1), leading).numel()
    banded = options.left >= 0 or options.right >= 0
    return per_row, Tq, _BAND_ROWS if banded else Tq


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 0 where a key is visible and -inf where it is hidden, for the fused op to add to the
    scores."""
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill_(hidden, -math.inf)


def heads_first(x: Tensor) -> Tensor:
    """Returns x (B, T, H, D) as (B, H, T, D). On CUDA it pads D to a multiple of 8, as PyTorch's
    fused ops require."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.is_cuda and x.shape[-1] % 8:
        x = F.pad(x, (0, -x.shape[-1] % 8))
    return x.transpose(1, 2)
