"""`layer_norm`: dropout, residual addition and LayerNorm as one op. Holds the registered ops,
autograd and the public function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Never

import torch
from torch import Tensor

from gptkernels.core import philox, plans
from gptkernels.core.autograd import apply, once_differentiable, requires_grad
from gptkernels.core.checks import (
    DTYPES,
    check_positive,
    check_probability,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from gptkernels.core.choice import choose
from gptkernels.core.direct import direct
from gptkernels.core.keywords import refuse, renamed, without_unknown
from gptkernels.core.plans import Plan
from gptkernels.core.registry import register
from gptkernels.core.sharding import Shards, by_shards, distributed
from gptkernels.ops.layer_norm import cpu, plan, whole
from gptkernels.ops.layer_norm.outputs import bwd_outputs, fwd_outputs


def _rows(given: Mapping[str, Any]) -> tuple[str, ...]:
    """What has rows that know nothing of each other: dropout numbers the elements, and a gradient
    of weight or bias is a sum over the rows."""
    forward = "x" in given
    summed = not forward and (given["weight_gradient"] or given["bias_gradient"])
    one_row = given["x" if forward else "s"].dim() == 1
    if given["rng"] is not None or summed or one_row:
        return ()
    return ("x", "residual") if forward else ("dy", "dsum", "s", "mean", "rstd")


@register("gptkernels.ops.layer_norm", entries=_rows)
def layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    sum_dtype: torch.dtype | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, s, mean (M,) and rstd (M,) in fp32. s is empty if sum_dtype is None: s is x
    then."""
    return fwd_outputs(x, sum_dtype)


@register("gptkernels.ops.layer_norm", entries=_rows)
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
    weight_gradient: bool,
    bias_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dresidual, dweight and dbias.

    dweight and dbias are empty where not wanted. dresidual is empty if residual_dtype is None: it
    equals dx then, or there is no residual.
    """
    return bwd_outputs(s, weight, x_dtype, residual_dtype, weight_gradient, bias_gradient)


class _LayerNorm(torch.autograd.Function):
    """Autograd for layer_norm: returns (y, s). s is empty where it would be x itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        rng: Tensor | None,
        dropout_p: float,
        eps: float,
        sum_dtype: torch.dtype | None,
        impl: str,
        backward_impl: str,
    ) -> tuple[Tensor, Tensor]:
        y, s, mean, rstd = layer_norm_fwd(
            x, weight, bias, residual, rng, dropout_p, eps, sum_dtype, impl
        )
        ctx.save_for_backward(x if sum_dtype is None else s, mean, rstd, weight, rng)
        ctx.dropout_p, ctx.x_dtype, ctx.impl = dropout_p, x.dtype, backward_impl
        # The residual's gradient differs from x's only with dropout or another dtype.
        ctx.residual_dtype = None
        if residual is not None and (dropout_p > 0 or residual.dtype != x.dtype):
            ctx.residual_dtype = residual.dtype
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Sequence[Any], dy: Tensor | None, dsum: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        s, mean, rstd, weight, rng = saved
        _, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        if dsum is not None and dsum.shape != s.shape:
            dsum = None  # torch.compile passes zeros as the gradient of an empty s
        if dy is None:  # only s was used
            dy = torch.zeros(s.shape, dtype=ctx.x_dtype, device=s.device)
        residual_dtype = ctx.residual_dtype if need_residual else None
        dx, dresidual, dweight, dbias = layer_norm_bwd(
            dy, dsum, s, mean, rstd, weight, rng, ctx.dropout_p, ctx.x_dtype, residual_dtype,
            need_weight, need_bias, ctx.impl,
        )  # fmt: skip
        if residual_dtype is None:
            dresidual = dx
        return (
            dx,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dresidual if need_residual else None,
            *(None,) * 6,
        )


_SHARDS = Shards.of("x:*C weight:C bias:C residual:*C", "*C *C", over="*")
_ONE_INPUT = "it has one input and one result: call it for each"
# What PyTorch, flash-attn and apex call arguments of theirs.
_ELSEWHERE = {
    **renamed("eps", "epsilon", "layer_norm_eps", "layer_norm_epsilon", "variance_epsilon"),
    **renamed("dropout_p", "dropout", "p"),
    **renamed("bias", "beta"),
    **renamed("prenorm", "return_residual", "return_sum", note=", and returns s too"),
    **renamed("impl", "backend", "implementation"),
    "normalized_shape": "it norms the last dimension, and gptkernels.LayerNorm several",
    "training": "it drops whenever dropout_p is greater than 0: give 0.0 outside training",
    **dict.fromkeys(("x1", "weight1", "bias1"), _ONE_INPUT),
    **dict.fromkeys(("rowscale", "layerscale", "colscale"), "scale x before the call"),
    **dict.fromkeys(("is_rms_norm", "rms_norm"), "it has no RMSNorm; torch.nn.RMSNorm is one"),
    **dict.fromkeys(("zero_centered_weight", "zero_centered_gamma"), "give it weight + 1"),
    "return_dropout_mask": "gptkernels.core.philox defines the mask",
}


@without_unknown
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    impl: str = "auto",
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of a residual sum.

        s = dropout(x) + residual, rounded to its dtype
        y = (s - mean) / sqrt(var + eps) * weight + bias

    Ba, Kiros and Hinton, "Layer Normalization", 2016. The mean and the (biased) variance of the
    rounded s are taken over C, in fp32.

    Args:
        x: Input (..., C), float32, bfloat16 or float16, with any strides.
        weight: (C,), in any of the three dtypes, not necessarily x's; or None, which means ones.
        bias: (C,) with weight's dtype, or None.
        residual: Tensor with x's shape, in any of the three dtypes, or None.
        dropout_p: Probability of dropping an element of x, rounded to a multiple of 1/65536.
            Dropout is active whenever it is greater than 0. `gptkernels.core.philox` defines the
            mask; its seed comes from PyTorch's generator of x's device.
        eps: Number added to the variance.
        prenorm: Whether to return s as well, the residual stream of a pre-norm block.
        residual_in_fp32: Whether to keep s in float32. s is float32 also where residual is;
            otherwise s has x's dtype.
        impl: "auto", "torch", "triton", "cuda" or "cpu". "auto" takes what `gptkernels tune`
            measured to be the fastest here.

    Returns:
        y with x's shape and dtype; with prenorm, (y, s). Where s would equal x, x itself is
        returned as s.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device or range is wrong.
        RuntimeError: An explicit impl cannot run on this machine or these tensors.
        NotImplementedError: impl="cuda" got rows of more than 2**30 elements.

    Differentiable once in x, weight, bias and residual; gradients have the same bits on every run.
    """
    if unknown:
        refuse(layer_norm, unknown, _ELSEWHERE)
    if type(x) is not Tensor and distributed(x):
        return by_shards(layer_norm, _SHARDS, locals())
    signature = way = None
    if impl == "auto" and not torch.compiler.is_compiling():
        signature, way = plan.known(
            x, weight, bias, residual, dropout_p, eps, prenorm, residual_in_fp32
        )
    if way is None:
        way = _plan(
            signature, x, weight, bias, residual, dropout_p, eps, prenorm, residual_in_fp32, impl
        )
    if way.whole is not None:
        try:
            y, s = whole.run(way.whole, x, weight, bias, residual, eps)
            return (y, s) if prenorm else y
        except Exception as error:
            impl = plans.instead(way.whole, error)
            way = Plan(impl, impl)
    if weight is None:
        dtype = x.dtype if bias is None else bias.dtype
        weight = torch.ones(x.shape[-1], dtype=dtype, device=x.device)
    rng = philox.draw(x.device) if dropout_p > 0 else None
    dtype = x.dtype
    if residual_in_fp32 or (residual is not None and residual.dtype == torch.float32):
        dtype = torch.float32
    is_x = residual is None and dropout_p == 0 and dtype == x.dtype
    sum_dtype = None if is_x else dtype
    tensors = (x, weight, bias, residual)
    numbers = (float(dropout_p), float(eps), sum_dtype)
    fused = way.forward == "cpu" and x.is_contiguous()
    if fused and not requires_grad(tensors) and direct(tensors):
        try:
            y, s = cpu.without_statistics(*tensors, rng, *numbers, prenorm)
        except Exception as error:
            impl = plans.instead(way.forward, error)
            y, s = apply(_LayerNorm, *tensors, rng, *numbers, impl, impl)
    else:
        y, s = apply(_LayerNorm, *tensors, rng, *numbers, way.forward, way.backward)
    if not prenorm:
        return y
    return y, x if is_x else s


def plan_of(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5) -> Plan:
    """What would run such a call of `layer_norm` with impl="auto", outside of torch.compile. Raises
    as that does."""
    signature, way = plan.known(x, weight, bias, None, 0.0, eps, False, False)
    if way is None:
        way = _plan(signature, x, weight, bias, None, 0.0, eps, False, False, "auto")
    return way


def _plan(
    signature: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    eps: float,
    prenorm: bool,
    residual_in_fp32: bool,
    impl: str,
) -> Plan:
    """Checks the arguments, and returns what runs a call of this signature, or of none."""
    given = (x, weight, bias, residual, dropout_p)
    if not _sound(*given, eps):
        _check(*given, eps)
    if impl != "auto":
        chosen = choose(impl, x)
    elif torch.compiler.is_compiling():
        chosen = plans.compiled("layer_norm", requires_grad(given), x.dtype, x.device.type)
    else:
        return plan.new(signature, *given, prenorm, residual_in_fp32)
    return Plan(chosen, chosen)


def _sound(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    eps: float,
) -> bool:
    """Whether the arguments are those of most calls, which `_check` would pass: a call of it takes
    longer than a small kernel."""
    if not (
        type(x) is Tensor
        and isinstance(weight, Tensor)
        and type(dropout_p) is float
        and type(eps) is float
    ):
        return False
    shape, device = x.shape, x.device
    last, dtype = weight.shape, weight.dtype
    return (
        len(shape) > 0
        and shape[-1] > 0
        and x.dtype in DTYPES
        and dtype in DTYPES
        and 0.0 <= dropout_p <= 1.0
        and eps > 0
        and last == shape[-1:]
        and weight.device == device
        and (
            bias is None
            or (
                isinstance(bias, Tensor)
                and bias.dtype == dtype
                and bias.shape == last
                and bias.device == device
            )
        )
        and (
            residual is None
            or (
                isinstance(residual, Tensor)
                and residual.dtype in DTYPES
                and residual.shape == shape
                and residual.device == device
            )
        )
    )


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    eps: float,
) -> None:
    check_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., C) with C >= 1, got {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_tensor(name, parameter)
            check_shape(name, parameter, (x.shape[-1],), "the last dimension of x")
            check_same_device(name, parameter, "x", x)
    if weight is not None and bias is not None:
        check_same_dtype("bias", bias, "weight", weight)
    if residual is not None:
        check_tensor("residual", residual)
        check_shape("residual", residual, tuple(x.shape), "that of x")
        check_same_device("residual", residual, "x", x)
    check_probability("dropout_p", dropout_p)
    check_positive("eps", eps)
