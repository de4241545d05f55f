"""impl="torch": PyTorch's own fused ops where their options allow, the formula where not.

Each function has the name and signature of its twin in `triton_kernels`; they run under no_grad,
inside the registered ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels import philox


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s (empty where s is x), mean, rstd; see `triton_kernels.layer_norm` for the formulas and
    shapes."""
    s = x
    if dropout_p > 0:
        s = _dropout(s, rng, dropout_p)
    if residual is not None:
        # Added before rounding: bf16 x and an fp32 residual meet in fp32.
        s = s + residual
    s = s.to(sum_dtype)
    dtype = _layer_norm_dtype(s, weight)
    y, mean, rstd = torch.native_layer_norm(
        s.to(dtype), (x.shape[-1],), _affine(weight, dtype), _affine(bias, dtype), eps
    )
    y = y.to(x.dtype).contiguous()
    s = torch.empty(0, dtype=sum_dtype, device=x.device) if s is x else s.contiguous()
    return y, s, mean.flatten(), rstd.flatten()


def layer_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual (empty where dx serves for it, or without a residual), dweight, dbias."""
    dtype = _layer_norm_dtype(s, weight)
    statistics = (*s.shape[:-1], 1)
    ds, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(dtype),
        s.to(dtype),
        (s.shape[-1],),
        mean.view(statistics),
        rstd.view(statistics),
        _affine(weight, dtype),
        _affine(weight, dtype) if has_bias else None,
        (True, True, has_bias),
    )
    if dsum is not None:
        ds = ds + dsum
    split = residual_dtype is not None and (dropout_p > 0 or residual_dtype != x_dtype)
    dresidual = (
        ds.to(residual_dtype).contiguous()
        if split
        else ds.new_empty(0, dtype=residual_dtype or x_dtype)
    )
    dx = _dropout(ds, rng, dropout_p) if dropout_p > 0 else ds
    dbias = dbias.to(weight.dtype) if has_bias else weight.new_empty(0)
    return dx.to(x_dtype).contiguous(), dresidual, dweight.to(weight.dtype), dbias


def _layer_norm_dtype(s: Tensor, weight: Tensor) -> torch.dtype:
    """PyTorch's LayerNorm takes one dtype, but on a CPU also 16-bit rows with fp32 weights; other
    mixtures run in fp32."""
    return s.dtype if s.dtype == weight.dtype or s.device.type == "cpu" else torch.float32


def _affine(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """On a CPU, fp32 parameters beside 16-bit rows also make PyTorch keep the statistics in fp32
    instead of 16 bits."""
    if parameter is None:
        return None
    return parameter.float() if parameter.device.type == "cpu" else parameter.to(dtype)


def _dropout(x: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    keep = philox.elementwise_keep(rng, dropout_p, x.shape)
    return torch.where(keep, x * philox.scale(dropout_p), 0)


def gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """y (M, C) and h = x w1^T + b1 (M, F), h empty unless `keep_h`; all in one dtype."""
    h = F.linear(x, w1, b1)
    y = F.linear(F.gelu(h, approximate=approximate), w2, b2)
    return y, h if keep_h else torch.empty(0, dtype=x.dtype, device=x.device)


def gelu_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor | None,
    approximate: str,
    grad_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, db1, dw2, db2, those `grad_mask` asks for, the others empty; h None: rebuilt."""
    need_x, need_w1, need_b1, need_w2, need_b2 = grad_mask
    # Five tensors: outputs of an op may not share memory, not even none.
    dx, dw1, db1, dw2, db2 = (torch.empty(0, dtype=x.dtype, device=x.device) for _ in range(5))
    if need_b2:
        db2 = dy.sum(0, dtype=torch.float32).to(dy.dtype)
    if h is None and (need_x or need_w1 or need_b1 or need_w2):
        h = F.linear(x, w1, b1)
    if need_w2:
        dw2 = torch.mm(dy.t(), F.gelu(h, approximate=approximate))
    if need_x or need_w1 or need_b1:
        dh = torch.ops.aten.gelu_backward(torch.mm(dy, w2), h, approximate=approximate)
        if need_b1:
            db1 = dh.sum(0, dtype=torch.float32).to(dh.dtype)
        if need_w1:
            dw1 = torch.mm(dh.t(), x)
        if need_x:
            dx = torch.mm(dh, w1)
    return dx, dw1, db1, dw2, db2
