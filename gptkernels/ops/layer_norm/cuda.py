"""Launchers of LayerNorm's CUDA C++ kernels. The formulas are in csrc/layer_norm/params.h."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core import native, philox
from gptkernels.core.native import call, dtype_code
from gptkernels.ops.layer_norm.outputs import bwd_outputs, fwd_outputs, matrix

_WIDEST = 2**30  # the kernels count columns in 32 bits


def layer_norm_fwd(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor | None,  # (..., C)
    rng: Tensor | None,  # (2,) int64
    dropout_p: float,
    eps: float,
    sum_dtype: torch.dtype | None,
    build: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, s, mean and rstd. s is empty if sum_dtype is None: s is x then.

    `build` is an index into the compiled module's layer_norm_fwd_builds(), the builds for compute
    capability 9.0; with -1 the launcher chooses. Raises NotImplementedError for rows of more than
    2**30 elements, and RuntimeError where the given build cannot run this call.
    """
    C = x.shape[-1]
    if C > _WIDEST:
        raise NotImplementedError(f"layer_norm has CUDA kernels for up to 2**30 columns, got {C}")
    rows, residual_rows = matrix(x), None if residual is None else matrix(residual)
    M = rows.shape[0]
    y, s, mean, rstd = fwd_outputs(x, sum_dtype)
    if x.numel() == 0:
        return y, s, mean, rstd
    call(
        "layer_norm_fwd",
        x,
        inputs=dict(
            x=rows,
            residual=residual_rows,
            bias=None if bias is None else bias.contiguous(),
            weight=weight.contiguous(),
            rng=rng if dropout_p > 0 else None,
        ),
        outputs=dict(y=y, sum=s, mean=mean, rstd=rstd),
        rows=M,
        cols=C,
        dropout_threshold=philox.threshold(dropout_p),
        dropout_scale=philox.scale(dropout_p),
        x_dtype=dtype_code(x.dtype),
        residual_dtype=dtype_code(x.dtype if residual is None else residual.dtype),
        weight_dtype=dtype_code(weight.dtype),
        sum_dtype=dtype_code(sum_dtype or x.dtype),
        x_stride=rows.stride(0),
        residual_stride=0 if residual_rows is None else residual_rows.stride(0),
        eps=eps,
        build=build,
    )
    return y, s, mean, rstd


def layer_norm_bwd(
    dy: Tensor,  # (..., C)
    dsum: Tensor | None,  # (..., C)
    s: Tensor,  # (..., C)
    mean: Tensor,  # (M,)
    rstd: Tensor,  # (M,)
    weight: Tensor,  # (C,)
    rng: Tensor | None,  # (2,) int64
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_gradient: bool,
    bias_gradient: bool,
    build: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dresidual, dweight and dbias, each empty as in `op.layer_norm_bwd`. `build` is as
    above, an index into layer_norm_bwd_builds()."""
    C = s.shape[-1]
    rows = matrix(s)
    M = rows.shape[0]
    dx, dresidual, dweight, dbias = bwd_outputs(
        s, weight, x_dtype, residual_dtype, weight_gradient, bias_gradient
    )
    if s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    partials = native.module().layer_norm_bwd_partials(M, C, max(s.get_device(), 0), build)
    partial_dweight, partial_dbias = (
        torch.empty((partials if wanted else 0, C), dtype=torch.float32, device=s.device)
        for wanted in (weight_gradient, bias_gradient)
    )
    call(
        "layer_norm_bwd",
        s,
        inputs=dict(
            dy=dy.to(x_dtype).contiguous(),
            dsum=None if dsum is None else dsum.to(s.dtype).contiguous(),
            sum=rows,
            mean=mean,
            rstd=rstd,
            weight=weight.contiguous(),
            rng=rng if dropout_p > 0 else None,
        ),
        outputs=dict(
            dx=dx,
            dresidual=dresidual,
            partial_dweight=partial_dweight,
            partial_dbias=partial_dbias,
            dweight=dweight,
            dbias=dbias,
        ),
        rows=M,
        cols=C,
        dropout_threshold=philox.threshold(dropout_p),
        dropout_scale=philox.scale(dropout_p),
        x_dtype=dtype_code(x_dtype),
        residual_dtype=dtype_code(residual_dtype or x_dtype),
        weight_dtype=dtype_code(weight.dtype),
        sum_dtype=dtype_code(s.dtype),
        sum_stride=rows.stride(0),
        partials=partials,
        build=build,
    )
    return dx, dresidual, dweight, dbias
