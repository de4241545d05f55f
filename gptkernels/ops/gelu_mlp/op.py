"""`gelu_mlp`: linear, GELU, linear as one op. Holds the registered ops, autograd and the public
function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Never

import torch
from torch import Tensor

from gptkernels.core import plans
from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.autograd import apply, once_differentiable, requires_grad
from gptkernels.core.checks import (
    DTYPES,
    check_same_device,
    check_shape,
    check_tensor,
    check_unit_last_stride,
)
from gptkernels.core.choice import choose
from gptkernels.core.flops import product
from gptkernels.core.keywords import refuse, renamed, without_unknown
from gptkernels.core.plans import Plan
from gptkernels.core.registry import register
from gptkernels.core.sharding import Shards, by_shards, distributed
from gptkernels.ops.gelu_mlp import plan, whole

# x, w1, b1, w2 and b2.
_Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]
# Those that take the transposed view of a contiguous weight; the others get a copy.
_READ_TRANSPOSED = ("torch", "cpu")


def _forward_flops(x: Tensor, w1: Tensor, *_: Any) -> int:
    return 2 * product(x.shape[0], *w1.shape)


def _backward_flops(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor | None,
    approximate: str,
    grad_mask: Sequence[bool],
    impl: str,
) -> int:
    """dh, then dx and dw1 from it; dw2."""
    dx, dw1, db1, dw2, _ = grad_mask
    return ((dx or dw1 or db1) + dx + dw1 + dw2) * product(x.shape[0], *w1.shape)


@register("gptkernels.ops.gelu_mlp", entries=lambda _: ("x",), flops=_forward_flops)
def gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    keep_h: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Returns y (M, C) of x (M, C), and the pre-activation h (M, F), which is empty unless
    `keep_h`."""
    h_shape = (x.shape[0], w1.shape[0]) if keep_h else (0,)
    return x.new_empty(x.shape), x.new_empty(h_shape)


# A compiler that saw the recomputation would find h in the forward pass, and keep it after all.
@register(
    "gptkernels.ops.gelu_mlp",
    traceable=lambda dy, x, w1, b1, w2, h, *_: h is not None,
    # The gradients of the weights are sums over the rows.
    entries=lambda given: () if any(given["grad_mask"][1:]) else ("dy", "x", "h"),
    flops=_backward_flops,
)
def gelu_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor | None,
    approximate: str,
    grad_mask: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dw1, db1, dw2 and db2, each empty where `grad_mask` is False. If h is None, it is
    recomputed."""
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    dx, dw1, db1, dw2, db2 = (
        x.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, grad_mask, strict=True)
    )
    # Laid out as the weights are.
    if grad_mask[1] and w1.stride(1) != 1:
        dw1 = x.new_empty(w1.t().shape).t()
    if grad_mask[3] and w2.stride(1) != 1:
        dw2 = x.new_empty(w2.t().shape).t()
    return dx, dw1, db1, dw2, db2


class _GeluMLP(torch.autograd.Function):
    """Autograd for gelu_mlp: returns y (M, C) of x (M, C). All tensors have one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        approximate: str,
        keep_h: bool,
        impl: str,
        backward_impl: str,
    ) -> Tensor:
        y, h = gelu_mlp_fwd(x, w1, b1, w2, b2, approximate, keep_h, impl)
        ctx.save_for_backward(x, w1, b1, w2, h if keep_h else None)
        ctx.options = (approximate, backward_impl)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, h = saved
        approximate, impl = ctx.options
        grad_mask = list(ctx.needs_input_grad[:5])
        gradients = gelu_mlp_bwd(dy, x, w1, b1, w2, h, approximate, grad_mask, impl)
        wanted = (
            gradient if want else None for gradient, want in zip(gradients, grad_mask, strict=True)
        )
        return (*wanted, None, None, None, None)


_SHARDS = Shards.of("x:*C w1:FC b1:F w2:CF b2:C", "*C", over="*")
# What PyTorch, flash-attn and transformers call arguments of theirs.
_ELSEWHERE = {
    **renamed("recompute", "checkpoint", "checkpoint_lvl", note=", True or False"),
    **renamed("impl", "backend", "implementation"),
    **dict.fromkeys(
        ("activation", "act", "hidden_act", "activation_function"),
        "its activation is GELU, exact with approximate='none', by tanh with 'tanh'",
    ),
    **dict.fromkeys(("dropout_p", "dropout", "p"), "it has no dropout: drop from its result"),
    **dict.fromkeys(("transposed", "conv1d"), "weights that are (in, out) are given as w.t()"),
    "residual": "add it to the result, which gptkernels.layer_norm does before it norms",
}


@without_unknown
def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "tanh",
    recompute: bool = False,
    impl: str = "auto",
    **unknown: Never,
) -> Tensor:
    """The feed-forward block of a transformer: y = gelu(x w1^T + b1) w2^T + b2.

    GELU is that of Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016. With
    approximate="none" it is h Phi(h), where Phi is the normal distribution function. With "tanh" it
    is the approximation 0.5 h (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3))), which GPT-2 uses.

    Args:
        x: Input (..., C), float32, bfloat16 or float16, with a last stride of 1.
        w1: Weight (F, C), as in nn.Linear(C, F), with a last stride of 1; or the transposed view of
            a contiguous (C, F), which "torch" and "cpu" read as it lies, and the others copy.
            Weights and biases may have any of the three dtypes: they are converted to x's dtype,
            and each gradient has the dtype of its own tensor.
        b1: Bias (F,), or None.
        w2: Weight (C, F), as in nn.Linear(F, C), with strides as w1.
        b2: Bias (C,), or None.
        approximate: "tanh" or "none", as in nn.GELU.
        recompute: Whether the backward pass recomputes the pre-activation x w1^T + b1, which is
            (..., F), instead of keeping it in memory. The activation is always recomputed.
        impl: "auto", "torch", "triton", "cuda" or "cpu". "auto" takes what `gptkernels tune`
            measured to be the fastest here. That may be PyTorch's own function, which keeps
            the activation for the backward pass too, (..., F).

    Returns:
        y with x's shape and dtype. Under autocast the inputs are first converted to autocast's
        dtype, as F.linear does, and y has that dtype.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device, strides or value is wrong.
        RuntimeError, NotImplementedError: An explicit impl cannot run on this machine or these
            tensors.

    Differentiable once in x, w1, b1, w2 and b2; gradients have the same bits on every run.
    """
    if unknown:
        refuse(gelu_mlp, unknown, _ELSEWHERE)
    if type(x) is not Tensor and distributed(x):
        return by_shards(gelu_mlp, _SHARDS, locals())
    tensors = (x, w1, b1, w2, b2)
    way = _plan(tensors, approximate, recompute, impl)
    if way.whole is not None:
        return whole.run(way.whole, *tensors, approximate)
    dtype = autocast_dtype(x)
    rows = x
    if x.dim() != 2:
        rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(_rows(x), x.shape[-1])
    if any(tensor is not None and tensor.dtype != dtype for tensor in tensors):
        rows, w1, w2 = rows.to(dtype), w1.to(dtype), w2.to(dtype)
        b1 = None if b1 is None else b1.to(dtype)
        b2 = None if b2 is None else b2.to(dtype)
    if not way.forward.startswith(_READ_TRANSPOSED) or not way.backward.startswith(
        _READ_TRANSPOSED
    ):
        w1, w2 = (w.contiguous() if _transposed(w) else w for w in (w1, w2))
    keep_h = not recompute and requires_grad(tensors)
    y = apply(_GeluMLP, rows, w1, b1, w2, b2, approximate, keep_h, way.forward, way.backward)
    return y if x.dim() == 2 else y.view(x.shape)


def plan_of(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "tanh",
) -> Plan:
    """What would run such a call of `gelu_mlp` with impl="auto", outside of torch.compile. Raises
    as that does."""
    return _plan((x, w1, b1, w2, b2), approximate, False, "auto")


def _plan(tensors: _Tensors, approximate: str, recompute: bool, impl: str) -> Plan:
    """Checks the arguments, and returns what runs the call. One with the signature of an earlier
    call need not be checked again."""
    signature = None
    if impl == "auto" and not torch.compiler.is_compiling():
        signature, found = plan.known(*tensors, approximate, recompute)
        if found is not None:
            return found
    if not _sound(*tensors, approximate):
        _check(*tensors, approximate)
    x = tensors[0]
    dtype = autocast_dtype(x)
    if impl != "auto":
        chosen = choose(impl, x, dtype)
    elif torch.compiler.is_compiling():
        chosen = plans.compiled("gelu_mlp", requires_grad(tensors), dtype, x.device.type)
    else:
        return plan.new(signature, *tensors, approximate, recompute)
    return Plan(chosen, chosen)


def _transposed(w: Tensor) -> bool:
    """Whether w is the transposed view of a contiguous matrix, as of Conv1D's weight."""
    return w.dim() == 2 and w.stride(1) != 1 and w.t().is_contiguous()


def _rows(x: Tensor) -> int:
    """Returns the number of rows M of an empty x (..., C). reshape cannot infer M from a -1 where C
    is 0."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def _sound(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
) -> bool:
    """Whether the arguments are those of most calls, which `_check` would pass: a call of it takes
    longer than a small product."""
    if torch.compiler.is_compiling():  # a graph should not depend on what is contiguous
        return False
    if not (type(x) is Tensor and isinstance(w1, Tensor) and isinstance(w2, Tensor)):
        return False
    shape, shape1, device = x.shape, w1.shape, x.device
    if not (len(shape) > 0 and len(shape1) == 2 and shape1[1] == shape[-1]):
        return False
    for tensor in (x, w1, b1, w2, b2):
        if tensor is not None and not (
            isinstance(tensor, Tensor)
            and tensor.dtype in DTYPES
            and tensor.device == device
            and (tensor.is_contiguous() or (tensor is not x and _transposed(tensor)))
        ):
            return False
    return (
        w2.shape == (shape1[1], shape1[0])
        and (b1 is None or b1.shape == shape1[:1])
        and (b2 is None or b2.shape == shape[-1:])
        and approximate in ("tanh", "none")
    )


def _check(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
) -> None:
    tensors = {"x": x, "w1": w1, "w2": w2}
    if b1 is not None:
        tensors["b1"] = b1
    if b2 is not None:
        tensors["b2"] = b2
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        check_same_device(name, tensor, "x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., C), got a tensor without dimensions")
    width = x.shape[-1]
    if w1.dim() != 2 or w1.shape[1] != width:
        raise ValueError(
            f"w1 must have shape (F, {width}), its columns the last dimension of x, "
            f"got {tuple(w1.shape)}"
        )
    inner = w1.shape[0]
    check_shape("w2", w2, (width, inner), "the transposed shape of w1")
    if b1 is not None:
        check_shape("b1", b1, (inner,), "the rows of w1")
    if b2 is not None:
        check_shape("b2", b2, (width,), "the rows of w2")
    for name, tensor in tensors.items():
        if not (name in ("w1", "w2") and _transposed(tensor)):
            check_unit_last_stride(name, tensor)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")
