"""`linear_cross_entropy`: a linear layer and the cross-entropy of its outputs as one op. Holds the
registered ops, autograd and the public function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Never

import torch
from torch import Tensor

from gptkernels.core import plans
from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.autograd import apply, once_differentiable, requires_grad
from gptkernels.core.checks import (
    check_integer,
    check_number,
    check_probability,
    check_same_device,
    check_shape,
    check_tensor,
    check_unit_last_stride,
    dtype_name,
)
from gptkernels.core.choice import choose
from gptkernels.core.flops import product
from gptkernels.core.keywords import refuse, renamed, without_unknown
from gptkernels.core.plans import Plan
from gptkernels.core.registry import register
from gptkernels.core.sharding import Shards, by_shards, distributed
from gptkernels.core.tuned import PYTORCH
from gptkernels.core.values import readable
from gptkernels.ops.linear_cross_entropy import plan, whole
from gptkernels.ops.linear_cross_entropy.options import LossOptions

REDUCTIONS = ("none", "sum", "mean")
# Those that have a chunk's logits at hand when its losses are known, and so compute the gradients
# of a sum or a mean in the forward pass: without a second product for the logits.
_AT_ONCE = ("torch", "cpu")


# A graph that saw the loop over the chunks would be one of this number of rows alone.
def _never(*_: Any) -> bool:
    return False


def _rows(given: Mapping[str, Any]) -> tuple[str, ...]:
    """What has rows that know nothing of each other: gradients of weight and bias are sums."""
    if any(given["grad_mask"][1:]):
        return ()
    return tuple(name for name in ("dloss", "x", "targets", "lse") if name in given)


def _forward_flops(x: Tensor, weight: Tensor, *rest: Any) -> int:
    """The logits, and the gradients that are computed with them."""
    *_, (dx, dweight, _), _ = rest
    return (1 + dx + dweight) * product(x.shape[0], *weight.shape)


def _backward_flops(dloss: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    *_, (dx, dweight, _), _ = rest
    return (dx + dweight) * product(x.shape[0], *weight.shape)


@register(
    "gptkernels.ops.linear_cross_entropy", traceable=_never, entries=_rows, flops=_forward_flops
)
def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor | None,
    options: LossOptions,
    grad_mask: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the losses (N,) and lse (N,) of x (N, C), weight (V, C), bias (V,) and targets (N,)
    int64, both fp32. With the losses' gradients dloss (N,) fp32 also dx, dweight and dbias, each
    empty where `grad_mask` is False.

    A row that does not count has loss 0 and no gradient. One whose target is no class has loss NaN,
    and no gradient.
    """
    rows = x.new_empty(x.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows), *_gradients(x, weight, grad_mask)


@register(
    "gptkernels.ops.linear_cross_entropy", traceable=_never, entries=_rows, flops=_backward_flops
)
def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    options: LossOptions,
    grad_mask: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dweight and dbias, each empty where `grad_mask` is False, of the losses'
    gradients dloss (N,) fp32. The logits are computed again."""
    return _gradients(x, weight, grad_mask)


def _gradients(
    x: Tensor, weight: Tensor, grad_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (
        x.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, grad_mask, strict=True)
    )
    return dx, dweight, dbias


class _LinearCrossEntropy(torch.autograd.Function):
    """Autograd for linear_cross_entropy: returns the losses (N,), or their sum or mean, of x (N, C)
    and targets (N,). All floating tensors have one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: LossOptions,
        reduction: str,
        impl: str,
        backward_impl: str,
    ) -> Tensor:
        grad_mask = list(ctx.needs_input_grad[:3])
        scale = None
        if reduction == "mean":
            # Infinite where no row counts: nothing is multiplied with it then.
            scale = 1.0 / (targets != options.ignore_index).sum(dtype=torch.float32)
        # In float16 the gradients of a mean over many rows would be 0 before a loss's scale, which
        # the backward pass brings, has made them larger.
        at_once = (
            any(grad_mask)
            and reduction != "none"
            and impl.startswith(_AT_ONCE)
            and x.dtype != torch.float16
        )
        dloss = None
        if at_once:
            dloss = torch.ones_like(targets, dtype=torch.float32)
            dloss = dloss if scale is None else dloss * scale
        losses, lse, *gradients = linear_cross_entropy_fwd(
            x, weight, bias, targets, dloss, *options, grad_mask if at_once else [False] * 3, impl
        )
        ctx.options = (options, at_once, reduction, backward_impl)
        # The gradients depend on x and weight: so a second derivative is refused, not dropped.
        kept = gradients if at_once else (targets, lse, scale)
        ctx.save_for_backward(x, weight, bias, *kept)
        if reduction == "none":
            return losses
        return losses.sum() if scale is None else losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Any], dloss: Tensor) -> tuple[Tensor | None, ...]:
        options, at_once, reduction, impl = ctx.options
        grad_mask = list(ctx.needs_input_grad[:3])
        x, weight, bias, *kept = saved
        if at_once:
            gradients = [_scaled(g, dloss) for g in kept]
        else:
            targets, lse, scale = kept
            if reduction != "none":
                dloss = dloss if scale is None else dloss * scale
                dloss = dloss.expand(targets.shape)
            gradients = linear_cross_entropy_bwd(
                dloss.contiguous(), x, weight, bias, targets, lse, *options, grad_mask, impl
            )
        wanted = (
            gradient if want else None for gradient, want in zip(gradients, grad_mask, strict=True)
        )
        return (*wanted, None, None, None, None, None)


def _scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    """The gradient of the forward pass times that of the loss; in place, unless the graph is kept
    for another pass, as transforms keep it; itself where that is plainly 1, if nothing has to wait
    for the answer."""
    if (
        torch.compiler.is_compiling()
        or torch._C._autograd._get_current_graph_task_keep_graph()
        or torch._C._are_functorch_transforms_active()
    ):
        return (gradient * dloss).to(gradient.dtype)
    if dloss.is_cpu and dloss.item() == 1.0:
        return gradient
    return gradient.mul_(dloss)


_SHARDS = Shards.of("x:*C weight:VC targets:* bias:V", "*", over="*")
# What PyTorch, flash-attn, Liger and cut-cross-entropy call arguments of theirs.
_ELSEWHERE = {
    **renamed("ignore_index", "ignored_index"),
    **renamed("label_smoothing", "smoothing"),
    **renamed("z_loss", "lse_square_scale", "z_loss_scale", "z_loss_weight"),
    **renamed("softcap", "logit_softcapping", "final_logit_softcapping", "logits_soft_cap"),
    **renamed("reduction", "reduce", "size_average", note=", 'mean', 'sum' or 'none'"),
    **renamed("impl", "backend", "implementation"),
    **dict.fromkeys(("logit_scale", "scale", "temperature"), "scale x before the call"),
    **dict.fromkeys(("class_weight", "ce_weight"), "every class counts the same"),
    "shift": "give it x[:, :-1] and targets[:, 1:]",
    "inplace_backward": "there are no logits to write into",
}


@without_unknown
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    impl: str = "auto",
    **unknown: Never,
) -> Tensor:
    """F.cross_entropy(F.linear(x, weight, bias), targets), without the logits in memory: a language
    model's head and loss.

    With l = x weight^T + bias, or softcap tanh(l / softcap) of it, and lse = log sum exp(l), a row
    whose target is t has the loss

        lse - (1 - label_smoothing) l[t] - label_smoothing mean(l) + z_loss lse^2

    Label smoothing is that of Szegedy et al., "Rethinking the Inception Architecture for Computer
    Vision", 2016, as in F.cross_entropy; the z-loss that of Chowdhery et al., "PaLM", 2022; the
    softcap that of Gemma 2, 2024. "torch" and "cpu" hold the logits of a chunk of rows, rounded to
    x's dtype as F.linear rounds them; they compute the gradients of a sum or a mean in the forward
    pass, of all but float16. "triton" and "cuda" hold those of a tile, in fp32, and compute them
    again in the backward pass; so do the others for reduction="none".

    Args:
        x: Input (..., C), float32, bfloat16 or float16, with a last stride of 1.
        weight: Weight (V, C), as in nn.Linear(C, V), with a last stride of 1. Weight and bias may
            have any of the three dtypes: they are converted to x's dtype, and each gradient has the
            dtype of its own tensor. It may be the embedding too: gradients add up.
        targets: The classes (...), int64, each in 0...V - 1 or `ignore_index`.
        bias: Bias (V,), or None.
        ignore_index: A row with this target has loss 0 and no gradient, and does not count in the
            mean.
        label_smoothing: In 0...1.
        z_loss: The factor of lse^2, at least 0.
        softcap: At least 0; 0 means none.
        reduction: "mean" over the rows that count (NaN where there is none), "sum", or "none" for
            the losses of all rows.
        impl: "auto", "torch", "triton", "cuda" or "cpu". "auto" takes what `gptkernels tune`
            measured to be the fastest here; of few logits that may be PyTorch's own functions.

    Returns:
        The loss, fp32: a scalar, or (...) for reduction="none". Under autocast x, weight and bias
        are first converted to autocast's dtype.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device, strides or value is wrong.
            That a target is no class is said on a CPU, outside of torch.compile; elsewhere that
            row's loss is NaN, and it has no gradient.
        RuntimeError, NotImplementedError: An explicit impl cannot run on this machine or these
            tensors.

    Differentiable once in x, weight and bias; gradients have the same bits on every run.
    """
    if unknown:
        refuse(linear_cross_entropy, unknown, _ELSEWHERE)
    if type(x) is not Tensor and distributed(x):
        arguments = locals()
        if reduction != "mean":
            return by_shards(linear_cross_entropy, _SHARDS, arguments)
        total = by_shards(linear_cross_entropy, _SHARDS, arguments | {"reduction": "sum"})
        return total / (targets != ignore_index).sum()  # the rows of all ranks
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    way = _plan((x, weight, bias), targets, options, reduction, impl)
    if way.whole is None:  # PyTorch's own function looks itself
        _check_values(targets, weight.shape[0], options)
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(targets.numel(), x.shape[-1])
    if way.whole is not None:
        given = rows, weight, bias, targets.reshape(-1), options, reduction
        try:
            losses = whole.run(way.whole, *given)
        except IndexError:
            _check_values(targets, weight.shape[0], options)
            raise
    else:
        dtype = autocast_dtype(x)
        losses = apply(
            _LinearCrossEntropy, rows.to(dtype), weight.to(dtype),
            None if bias is None else bias.to(dtype), targets.reshape(-1), options, reduction,
            way.forward, way.backward,
        )  # fmt: skip
    return losses.view(targets.shape) if reduction == "none" else losses


def plan_of(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    **numbers: Any,
) -> Plan:
    """What would run such a call of `linear_cross_entropy` with impl="auto", outside of
    torch.compile. Raises as that does."""
    return _plan((x, weight, bias), targets, LossOptions(**numbers), reduction, "auto")


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    options: LossOptions,
    reduction: str,
    impl: str,
) -> Plan:
    """Checks the arguments, and returns what runs the call. One with the signature of an earlier
    call need not be checked again."""
    signature = None
    if impl == "auto" and not torch.compiler.is_compiling():
        signature, found = plan.known(*tensors, targets, options, reduction)
        if found is not None:
            return found
    _check(*tensors, targets, options, reduction)
    x = tensors[0]
    dtype = autocast_dtype(x)
    if impl != "auto":
        chosen = choose(impl, x, dtype)
    elif torch.compiler.is_compiling():
        training = requires_grad(tensors)
        device = x.device.type
        chosen = plans.compiled("linear_cross_entropy", training, dtype, device, opaque=True)
    else:
        return plan.new(signature, *tensors, targets, options, reduction)
    # A loop over chunks cannot be exported for any number of rows.
    exported = chosen == "torch" and torch.compiler.is_exporting()
    return Plan(chosen, chosen, PYTORCH if exported else None)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    reduction: str,
) -> None:
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        check_same_device(name, tensor, "x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., C), got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape (V, {x.shape[-1]}) with V >= 1, its columns the last "
            f"dimension of x, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "the rows of weight")
    for name, tensor in tensors.items():
        check_unit_last_stride(name, tensor)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a torch.Tensor, got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {dtype_name(targets.dtype)}")
    check_same_device("targets", targets, "x", x)
    check_shape("targets", targets, tuple(x.shape[:-1]), "that of x without its last dimension")
    check_integer("ignore_index", options.ignore_index)
    if not -(2**63) <= options.ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int64, got {options.ignore_index}")
    check_probability("label_smoothing", options.label_smoothing)
    for name in ("z_loss", "softcap"):
        value = getattr(options, name)
        check_number(name, value)
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")


def _check_values(targets: Tensor, classes: int, options: LossOptions) -> None:
    if targets.numel() == 0 or not readable(targets):
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low >= 0 and high < classes:
        return
    wrong = (targets != options.ignore_index) & ((targets < 0) | (targets >= classes))
    if wrong.any():
        raise ValueError(
            f"targets must lie in 0...{classes - 1} (V - 1) or be ignore_index, "
            f"{options.ignore_index}, got {int(targets[wrong][0])}"
        )
