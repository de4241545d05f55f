"""What all ops have in common: torch.compile traces them, checkpointing sees them and repeats their
dropout, autocast converts their inputs, gradients arrive with any strides, and every derivative but
the first is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, each, of
from op_inputs import (
    attention_inputs,
    cache,
    draw,
    gelu_mlp_inputs,
    int32,
    layer_norm_inputs,
    linear_cross_entropy_inputs,
    varlen_inputs,
    varlen_lengths,
)
from right import Calls, assert_same, run, seeded
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gptkernels import (
    attention,
    attention_decode,
    attention_varlen,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
)
from gptkernels.core.choice import INTERPRETED

SEQUENCES = [5, 0, 4], [4, 2, 4]
TARGETS = torch.tensor([3, 19, -100, 0, 7, 7], device=DEVICE)


def head_inputs(rows: int = 6) -> dict[str, Any]:
    """linear_cross_entropy's differentiable ones."""
    tensors = linear_cross_entropy_inputs(rows, 10, 20, bias=True)
    return {name: tensor for name, tensor in tensors.items() if name != "targets"}


@dataclass(frozen=True)
class Op:
    """A small call of an op."""

    call: Callable[..., Any]
    inputs: Callable[[], dict[str, Any]]
    forward: str  # the name of its registered op


OPS = {
    "attention": Op(attention, lambda: attention_inputs(D=24), "attention_fwd"),
    "attention_varlen": Op(
        functools.partial(attention_varlen, **varlen_lengths(*SEQUENCES)),
        lambda: varlen_inputs(*SEQUENCES),
        "attention_fwd",
    ),
    "gelu_mlp": Op(gelu_mlp, lambda: gelu_mlp_inputs(6, 10, 20), "gelu_mlp_fwd"),
    "layer_norm": Op(layer_norm, lambda: layer_norm_inputs(6, 32, residual=FP32), "layer_norm_fwd"),
    "losses": Op(
        functools.partial(linear_cross_entropy, targets=TARGETS, reduction="none"),
        head_inputs,
        "linear_cross_entropy_fwd",
    ),
    # Its gradients may come in the forward pass.
    "mean loss": Op(
        functools.partial(linear_cross_entropy, targets=TARGETS),
        head_inputs,
        "linear_cross_entropy_fwd",
    ),
}
# The results of layer_norm and linear_cross_entropy have other dtypes: see their own tests.
CASTS = ("attention", "attention_varlen", "gelu_mlp")
DROPS = ("attention", "attention_varlen", "layer_norm")


def of_ops(*names: str) -> Any:
    return pytest.mark.parametrize("op", [OPS[name] for name in names], ids=names)


@each
@of_ops(*OPS)
def test_gradient_of_a_sum(op: Op, impl: str) -> None:
    """The backward pass of sum() passes on a gradient whose strides are all 0."""
    tensors = op.inputs()
    call = functools.partial(op.call, impl=impl)
    found = run(lambda **leaves: call(**leaves).sum(), tensors, [torch.ones((), device=DEVICE)])
    out = call(**tensors)
    assert_same(found[1:], run(call, tensors, [torch.ones_like(out)])[1:])


@each
@of_ops(*CASTS)
def test_autocast(op: Op, impl: str) -> None:
    dtype = FP16 if impl == "triton" and INTERPRETED else BF16
    tensors = op.inputs()
    call = functools.partial(op.call, impl=impl)

    def cast(**leaves: Any) -> Tensor:
        with torch.autocast(DEVICE, dtype=dtype):
            return call(**leaves)

    found = run(cast, tensors)
    assert found[0].dtype == dtype
    assert all(gradient.dtype == FP32 for gradient in found[1:])
    wanted = run(call, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert_same(found, [a.to(b.dtype) for a, b in zip(wanted, found, strict=True)])


@each
@of_ops(*OPS)
def test_backward_under_autocast_keeps_the_dtype(op: Op, impl: str) -> None:
    tensors = op.inputs()
    call = functools.partial(op.call, impl=impl)
    out, *wanted = run(call, tensors)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    again = call(**leaves)
    with torch.autocast(DEVICE, dtype=BF16):
        found = torch.autograd.grad(again, list(leaves.values()), 1 + out)
    assert_same(found, wanted)


@each
@of_ops(*DROPS)
def test_recomputation_replays_dropout(op: Op, impl: str) -> None:
    call, tensors = functools.partial(op.call, dropout_p=0.4, impl=impl), op.inputs()
    recomputed = functools.partial(checkpoint, call, use_reentrant=False)
    assert_same(run(seeded(recomputed), tensors), run(seeded(call), tensors))


@each
@of_ops(*OPS)
@pytest.mark.parametrize(
    ("policy", "runs"), [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)]
)
def test_selective_checkpointing_sees_the_op(
    op: Op, impl: str, policy: CheckpointPolicy, runs: int
) -> None:
    forward = getattr(torch.ops.gptkernels, op.forward).default

    def choose(_: Any, called: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        return policy if called is forward else CheckpointPolicy.PREFER_RECOMPUTE

    call, tensors = functools.partial(op.call, impl=impl), op.inputs()
    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    checkpointed = functools.partial(checkpoint, call, use_reentrant=False, context_fn=contexts)
    wanted = run(call, tensors)
    with Calls(forward) as calls:  # recomputation does not call the op where its result is saved
        assert_same(run(checkpointed, tensors), wanted)
    assert len(calls) == runs


def refused() -> Any:
    sentence = (
        "^the ops of gptkernels are differentiable once, by backpropagation: for a second deriv"
    )
    return pytest.raises(NotImplementedError, match=sentence)


@each
@of_ops(*OPS)
@pytest.mark.parametrize("reduce", [torch.sum, torch.linalg.vector_norm])
def test_a_second_derivative_is_refused(op: Op, impl: str, reduce: Callable[..., Tensor]) -> None:
    """It is not dropped, whatever else the penalty contains. That of sum() starts from a constant,
    so PyTorch's own once_differentiable would let it pass."""
    leaves = {name: tensor.requires_grad_() for name, tensor in op.inputs().items()}
    gradients = torch.autograd.grad(
        reduce(op.call(**leaves, impl=impl)), list(leaves.values()), create_graph=True
    )
    for name in leaves.keys() - {"bias", "b2"}:  # the gradients do not depend on these
        penalty = sum(x.square().sum() for x in (*gradients, leaves[name]))
        with refused():
            torch.autograd.grad(penalty, leaves[name], retain_graph=True)


@of_ops(*OPS)
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_graph_of_first_derivatives_is_allowed(op: Op) -> None:
    """Only who differentiates through an op twice gets an error, not who asks for a graph."""
    leaves = {name: tensor.requires_grad_() for name, tensor in op.inputs().items()}
    out = op.call(**leaves)
    out.backward(out.detach(), create_graph=True)
    found = [leaf.grad.detach_() for leaf in leaves.values()]  # as Module.zero_grad does
    assert_same(found, run(op.call, leaves, [out.detach()])[1:])


@each
@of_ops(*OPS)
def test_forward_mode_is_refused(op: Op, impl: str) -> None:
    (name, x), *rest = op.inputs().items()
    call = functools.partial(op.call, **dict(rest), impl=impl)

    def of(x: Tensor) -> Tensor:
        return call(**{name: x})

    with refused():
        torch.func.jvp(of, (x,), (x,))
    y = of(x.clone().requires_grad_())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with refused():
            of(dual)
        with refused():
            torch.autograd.backward(y, forward_ad.make_dual(y.detach(), y.detach()))


@each
def test_decoding_refuses_forward_mode(impl: str) -> None:
    """It has no autograd.Function. Its registered op would drop the tangent."""
    tensors, rest = cache([5, 3])
    heads = tensors["q"].shape[2]
    tensors |= {"alibi_slopes": torch.ones(heads), "sinks": torch.ones(heads)}
    tensors = {name: x.to(DEVICE) for name, x in tensors.items()}
    call = functools.partial(attention_decode, **rest, impl=impl)
    for name, tensor in tensors.items():
        with forward_ad.dual_level(), refused():
            call(**tensors | {name: forward_ad.make_dual(tensor, tensor)})
    with refused():
        torch.func.jvp(lambda q: call(**tensors | {"q": q}), (tensors["q"],), (tensors["q"],))


# Each block makes several calls, so that a test compiles only once.


def attention_block(q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor, **how: Any) -> Any:
    out, lse = attention(
        q, k, v, window=(4, 2), softcap=3.0, alibi_slopes=[0.5, 1.0], return_lse=True, **how
    )
    dropped = attention(q, k, v, key_lengths=lengths, dropout_p=0.3, **how)
    return attention(q, k, v, **how) * 2, out * 2, lse, dropped


def varlen_block(**named: Any) -> Any:
    """This must compile to one graph for any total and any longest length."""
    return attention_varlen(**named, dropout_p=0.2, return_lse=True)


def gelu_mlp_block(**named: Any) -> Any:
    return gelu_mlp(**named) * 2, gelu_mlp(**named, recompute=True) * 2


def losses_block(targets: Tensor, **named: Any) -> Any:
    losses = linear_cross_entropy(
        **named, targets=targets, label_smoothing=0.1, softcap=3.0, reduction="none"
    )
    return losses * 2, linear_cross_entropy(**named, targets=targets, z_loss=1e-2) * 2


def layer_norm_block(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, **how: Any
) -> Tensor:
    y, s = layer_norm(x, weight, bias, residual=residual, prenorm=True, **how)
    y = layer_norm(y, weight, residual=s, dropout_p=0.25, **how)
    return layer_norm(y, weight, bias, **how)  # here s is y itself, an empty tensor inside the op


# (block, function that makes its inputs in two sizes)
BLOCKS = {
    "attention": (
        attention_block,
        lambda: [(attention_inputs(2, T, T + 3), {"lengths": int32(3, T)}) for T in (9, 12)],
    ),
    "attention_varlen": (
        varlen_block,
        lambda: [
            (varlen_inputs(*sizes), varlen_lengths(*sizes))
            for sizes in (([5, 4, 3], [4, 2, 3]), ([9, 3, 4], [2, 12, 7]))
        ],
    ),
    "gelu_mlp": (
        gelu_mlp_block,
        lambda: [(gelu_mlp_inputs(2, rows, 10, 20), {}) for rows in (6, 9)],
    ),
    "layer_norm": (
        layer_norm_block,
        lambda: [(layer_norm_inputs(rows, 48, residual=FP32), {}) for rows in (3, 5)],
    ),
    "losses": (
        losses_block,
        lambda: [
            (head_inputs(rows), {"targets": torch.arange(rows).to(DEVICE)}) for rows in (6, 9)
        ],
    ),
}


def compiled_beside_eager(op: str, impl: str, backend: str) -> Any:
    """Yields (compiled, eager) results for each of the sizes, all from one graph."""
    block, inputs = BLOCKS[op]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    stances = ("default", "fail_on_recompile")
    for stance, (tensors, rest) in zip(stances, inputs(), strict=True):
        calls = (seeded(functools.partial(f, impl=impl, **rest)) for f in (compiled, block))
        with torch.compiler.set_stance(stance):
            yield tuple(run(call, tensors) for call in calls)


@pytest.mark.parametrize("impl", [of("torch"), of("cuda")])
@pytest.mark.parametrize("op", BLOCKS)
def test_compile_equals_eager(op: str, impl: str) -> None:
    """A graph holds the registered op of any kernels, so one of them is enough. Of "torch" it holds
    PyTorch's operators, in a form that reads no values, which rounds elsewhere."""
    same = torch.testing.assert_close if impl == "torch" else assert_same
    for found, wanted in compiled_beside_eager(op, impl, "aot_eager"):
        same(found, wanted)


def varlen_of_one(x: Tensor, **how: Any) -> Any:
    ends = int32(0, 5, 9)
    return attention_varlen(x, x, x, ends, ends, 5, 5, **how)


# The same tensor as several arguments of each op: (call, inputs).
TWINS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "attention": (
        lambda q, kv, **how: attention(q, kv, kv, **how),
        lambda: {"q": draw(1, 9, 2, 16), "kv": draw(1, 9, 2, 16)},
    ),
    "attention_varlen": (
        varlen_of_one,
        lambda: {"x": draw(9, 2, 16)},
    ),
    "gelu_mlp": (
        lambda x, b, **how: gelu_mlp(x, x, b, x, b, **how),
        lambda: {"x": draw(8, 8), "b": draw(8)},
    ),
    "layer_norm": (
        lambda x, w, **how: layer_norm(x, w, w, residual=x, prenorm=True, **how),
        lambda: {"x": draw(3, 32), "w": draw(32)},
    ),
    "losses": (
        lambda x, **how: linear_cross_entropy(x, x, TARGETS % 6, reduction="none", **how),
        lambda: {"x": draw(6, 10)},
    ),
}


@each
@pytest.mark.parametrize("op", TWINS)
def test_one_tensor_as_several_arguments_compiles(op: str, impl: str) -> None:
    """Dynamo refuses the same tensor twice in an autograd.Function, so the ops pass views."""
    call, inputs = TWINS[op]
    call, tensors = functools.partial(call, impl=impl), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(run(compiled, tensors), run(call, tensors), strict=True):
        torch.testing.assert_close(found, wanted)  # three gradients add up in another order


def test_inductor_takes_the_ops() -> None:
    # Inductor draws other random numbers than eager PyTorch unless this option is set.
    with torch._inductor.config.patch(fallback_random=True):
        for found, wanted in compiled_beside_eager("layer_norm", "torch", "inductor"):
            for one, other in zip(found, wanted, strict=True):
                # A sum may be small where its terms are not: what counts is the largest number.
                size = other.abs().max().clamp(min=1.0)
                torch.testing.assert_close(one / size, other / size)
