"""The ops under the transforms of torch.func: gradients of each sample, vmap around and inside of
grad, vjp after its transform has ended. The truth is that of each slice, one after another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # torch.func loads it: not while torch.empty is another, which poisons
from harness import DEVICE, each, of
from op_inputs import (
    attention_inputs,
    cache,
    gelu_mlp_inputs,
    int32,
    layer_norm_inputs,
    linear_cross_entropy_inputs,
    varlen_inputs,
    varlen_lengths,
)
from right import assert_same
from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap

import gptkernels
from gptkernels.truth import baseline, parity, reference

SLICES = 3
SEQUENCES = [5, 3, 4], [4, 2, 6]
TARGETS = torch.tensor([3, 19, -100, 0, 7, 7], device=DEVICE)
# op -> the inputs of a slice, its options, and those that all samples share: the parameters.
OPS: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any], tuple[str, ...]]] = {
    "attention": (
        lambda: attention_inputs(2, 9, 11, H=2, Hk=1, seed=None),
        {"window": (6, 1), "softcap": 4.0, "return_lse": True, "key_lengths": int32(11, 7)},
        (),
    ),
    "attention_varlen": (
        lambda: varlen_inputs(*SEQUENCES),
        varlen_lengths(*SEQUENCES),
        (),
    ),
    "layer_norm": (
        lambda: layer_norm_inputs(6, 96, residual=torch.float32),
        {"prenorm": True},
        ("weight", "bias"),
    ),
    "gelu_mlp": (
        lambda: gelu_mlp_inputs(6, 96, 128, seed=int(torch.randint(2**31, ()))),
        {},
        ("w1", "b1", "w2", "b2"),
    ),
    "linear_cross_entropy": (
        lambda: {
            name: tensor
            for name, tensor in linear_cross_entropy_inputs(6, 96, 128, bias=True).items()
            if name != "targets"
        },
        {"targets": TARGETS, "reduction": "none"},
        ("weight", "bias"),
    ),
}
of_ops = pytest.mark.parametrize("name", OPS)


def stacked(inputs: Callable[[], dict[str, Any]]) -> dict[str, Tensor]:
    every = [inputs() for _ in range(SLICES)]
    return {name: torch.stack([one[name] for one in every]) for name in every[0]}


def one_by_one(call: Callable[..., Any], shared: tuple[str, ...] = ()) -> Callable[..., Any]:
    """What vmap computes, without it."""

    def function(**tensors: Tensor) -> Any:
        found = [
            call(**{k: x if k in shared else x[i] for k, x in tensors.items()})
            for i in range(SLICES)
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found)
        return tuple(torch.stack(results) for results in zip(*found, strict=True))

    return function


def vmapped(call: Callable[..., Any], shared: tuple[str, ...] = ()) -> Callable[..., Any]:
    def function(**tensors: Tensor) -> Any:
        dims = tuple(None if name in shared else 0 for name in tensors)
        return vmap(lambda *given: call(**dict(zip(tensors, given, strict=True))), dims)(
            *tensors.values()
        )

    return function


def total(found: Any) -> Tensor:
    """A number to which every result contributes, and each of their elements differently."""
    results = found if isinstance(found, tuple) else (found,)
    return sum((x.square() * torch.arange(x.numel(), device=x.device).view_as(x).cos()).sum()
               for x in results)  # fmt: skip


def plain_gradients(call: Callable[..., Any]) -> Callable[..., Any]:
    def function(**tensors: Tensor) -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        named = dict(zip(tensors, leaves, strict=True))
        return torch.autograd.grad(total(call(**named)), leaves)

    return function


def transformed_gradients(call: Callable[..., Any]) -> Callable[..., Any]:
    def function(**tensors: Tensor) -> Any:
        def of(*given: Tensor) -> Tensor:
            return total(call(**dict(zip(tensors, given, strict=True))))

        return grad(of, tuple(range(len(tensors))))(*tensors.values())

    return function


def calls(name: str, impl: str) -> tuple[Callable[..., Any], ...]:
    """The op, the yardstick and the truth."""
    _, options, _ = OPS[name]
    return (
        functools.partial(getattr(gptkernels, name), **options, impl=impl),
        functools.partial(getattr(baseline, name), **options),
        functools.partial(getattr(reference, name), **options),
    )


@of_ops
@each
def test_gradients_of_each_sample(name: str, impl: str) -> None:
    """vmap around grad. The parameters are those of all samples, their gradients are not."""
    inputs, _, shared = OPS[name]
    tensors = stacked(inputs) | {k: v for k, v in inputs().items() if k in shared}
    op, yardstick, truth = calls(name, impl)
    parity.assert_parity(
        vmapped(transformed_gradients(op), shared),
        *(one_by_one(plain_gradients(call), shared) for call in (yardstick, truth)),
        tensors,
        gradients=False,
        k_forward=parity.K_GRADIENT,
        names=list(tensors),
    )


@of_ops
@pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
def test_vmap_is_differentiable(name: str, impl: str) -> None:
    """Every argument has a dimension for the slices: the last one, so that no slice has a last
    stride of 1."""
    op, *right = calls(name, impl)
    inputs, _, _ = OPS[name]

    def inner(**tensors: Tensor) -> Any:
        last = [tensor.movedim(0, -1).contiguous() for tensor in tensors.values()]
        return vmap(lambda *given: op(**dict(zip(tensors, given, strict=True))), -1)(*last)

    parity.assert_parity(inner, *map(one_by_one, right), stacked(inputs))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
def test_a_mask_of_each_sample(impl: str, rows: int) -> None:
    """One that all entries share has a gradient that is their sum, in each sample its own."""
    mask = torch.randn(rows, 2, 9, 11, device=DEVICE)
    tensors = stacked(OPS["attention"][0]) | {"attn_mask": mask}
    call = functools.partial(gptkernels.attention, causal=False, impl=impl)
    parity.assert_parity(
        vmapped(transformed_gradients(call), ("attn_mask",)),
        *(
            one_by_one(plain_gradients(functools.partial(f, causal=False)), ("attn_mask",))
            for f in (baseline.attention, reference.attention)
        ),
        tensors,
        gradients=False,
        k_forward=parity.K_GRADIENT,
    )


@pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
def test_a_mean_loss_of_each_sample(impl: str) -> None:
    """Its gradients are those of the forward pass, times that of the loss."""
    made = linear_cross_entropy_inputs(SLICES, 12, 48, 64, ignored=False)
    weight, targets = made["weight"], made["targets"]
    call = functools.partial(gptkernels.linear_cross_entropy, impl=impl)
    found = vmap(grad(lambda x, t: call(x, weight, t) * 3))(made["x"], targets)
    for i in range(SLICES):
        x = made["x"][i].requires_grad_()
        (call(x, weight, targets[i]) * 3).backward()
        assert_same([found[i]], [x.grad])


@pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
def test_what_vjp_returns_is_called_later(impl: str) -> None:
    tensors = attention_inputs()
    call = functools.partial(gptkernels.attention, impl=impl)
    out, pull = vjp(call, *tensors.values())
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    wanted = torch.autograd.grad(call(*leaves), leaves, out)
    for _ in range(2):
        assert_same(pull(out), wanted)


@pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
def test_a_single_row_in_each_slice(impl: str) -> None:
    """It is no batch that another could be folded into."""
    x, weight = torch.randn(3, 300, device=DEVICE), torch.randn(300, device=DEVICE)
    call = functools.partial(gptkernels.layer_norm, weight=weight, impl=impl)
    parity.assert_parity(
        lambda x: vmap(call)(x),
        functools.partial(baseline.layer_norm, weight=weight, bias=None),
        functools.partial(reference.layer_norm, weight=weight.double(), bias=None),
        {"x": x},
    )


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
def test_vmap_of_decoding(impl: str, page: int | None) -> None:
    tensors, rest = cache([5, 3], page=page)
    q = torch.stack([tensors.pop("q"), torch.randn(2, 1, 2, 16, device=DEVICE)])
    call = functools.partial(gptkernels.attention_decode, **tensors, **rest, impl=impl)
    assert_same([vmap(call)(q)], [torch.stack([call(one) for one in q])])


@pytest.mark.parametrize(("randomness", "same"), [("same", True), ("different", False)])
@pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
def test_dropout_of_each_sample(impl: str, randomness: str, same: bool) -> None:
    """vmap's own option decides; a mask depends on the place in the batch, which must not."""
    x = torch.randn(1, 64, device=DEVICE).expand(2, 3, 64)
    weight = torch.ones(64, device=DEVICE)
    heads = x.view(2, 1, 3, 4, 16)
    for call, given in (
        (lambda x: gptkernels.layer_norm(x, weight, dropout_p=0.5, impl=impl), x),
        (lambda x: gptkernels.attention(x, x, x, dropout_p=0.5, impl=impl), heads),
    ):
        one, other = vmap(call, randomness=randomness)(given)
        assert torch.equal(one, other) == same
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(heads)


@pytest.mark.parametrize("reduce", [torch.sum, torch.linalg.vector_norm])
@of_ops
def test_a_second_derivative_is_refused(name: str, reduce: Callable[..., Tensor]) -> None:
    op, *_ = calls(name, "torch")
    inputs, _, _ = OPS[name]
    (first, x), *rest = inputs().items()

    def of(x: Tensor) -> Tensor:
        found = op(**{first: x}, **dict(rest))
        return reduce(found[0] if isinstance(found, tuple) else found)

    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad(lambda x: grad(of)(x).sum() + x.sum())(x)


def square(x: Tensor, weight: Tensor) -> Tensor:
    return gptkernels.layer_norm(x, weight).square().sum()


@pytest.mark.parametrize("transform", [vmap, grad, lambda call: vmap(grad(call))])
def test_the_compiler_leaves_them_alone(transform: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    call, given = transform(square), (torch.randn(3, 8), torch.randn(3, 8))
    if transform is grad:
        given = tuple(x[0] for x in given)
    found = torch.compile(call, backend="eager")(*given)
    torch.testing.assert_close(found, call(*given))  # in eager mode other kernels may run
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"torch\.compile cannot trace the ops of gptkernels under"):
        torch.compile(call, backend="eager", fullgraph=True)(*given)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradients_of_each_sample_of_a_gpt(norm: str) -> None:
    """functional_call puts other parameters in a model, here for one text at a time. The head is
    the embedding, so there is one parameter for both."""
    config = gptkernels.GPTConfig(
        n_layer=2, n_head=2, n_embd=32, vocab_size=40, block_size=16, norm=norm
    )
    model = gptkernels.GPT(config, device=DEVICE)
    texts = torch.randint(40, (SLICES, 9), device=DEVICE)
    parameters = {name: 1.5 * p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], text: Tensor) -> Tensor:
        return functional_call(model, parameters, (text[None, :-1], text[None, 1:]))

    found = vmap(grad(loss), (None, 0))(parameters, texts)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    for i, text in enumerate(texts):
        model.zero_grad()
        model(text[None, :-1], text[None, 1:]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad)
