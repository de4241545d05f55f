"""When linear_cross_entropy computes its gradients, what it keeps, and what must not change a bit
of its results."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, DTYPES, FP16, FP32, threads
from loss_cases import (
    BWD,
    FWD,
    OPTIONS,
    at_once,
    bound,
    each,
    gradients_hold,
    in_pieces,
    runnable,
)
from op_inputs import linear_cross_entropy_inputs as inputs
from right import Calls, assert_gradients_alone, assert_same, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptkernels import linear_cross_entropy
from gptkernels.ops.linear_cross_entropy.options import LossOptions
from gptkernels.truth import baseline, reference

DLOSS, GRAD_MASK = 4, 9  # their places among the arguments of the registered forward op


def scale_of(tensors: dict[str, Any], reduction: str) -> Tensor:
    """The gradient of each loss, in fp32, when that of the sum or the mean is 1."""
    one = torch.ones((), device=DEVICE)
    return one if reduction == "sum" else one / (tensors["targets"] != -100).sum()


class TestReductions:
    @runnable
    @pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
    def test_they_are_of_the_losses(
        self, impl: str, dtype: torch.dtype, options: dict[str, float]
    ) -> None:
        call, tensors = bound(inputs(100, 16, 50, dtype=dtype), impl=impl, **options)
        losses = call(**tensors, reduction="none").double()
        for reduction, wanted in (("sum", losses.sum()), ("mean", losses.sum() / 80)):
            with torch.no_grad():
                found = call(**tensors, reduction=reduction)
            assert found.dtype == FP32
            torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
        assert torch.equal(call(**tensors), call(**tensors, reduction="mean"))

    @runnable
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
    def test_gradients_at_once_are_those_of_a_second_pass(
        self, impl: str, dtype: torch.dtype, reduction: str, options: dict[str, float]
    ) -> None:
        """Bit for bit. Of float16 both come from a second pass."""
        tensors = inputs(100, 16, 50, dtype=dtype, bias=True)
        call, floating = bound(tensors, impl=impl, **options)
        one = torch.ones((), device=DEVICE)
        dlosses = scale_of(tensors, reduction).expand(100)
        with in_pieces():
            found = run(functools.partial(call, reduction=reduction), floating, [one])
            wanted = run(functools.partial(call, reduction="none"), floating, [dlosses])
        assert_same(found[1:], wanted[1:])

    @at_once
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_the_gradient_of_the_loss(self, impl: str, dtype: torch.dtype, reduction: str) -> None:
        """A power of two changes no bit, whenever it is multiplied with; other numbers are
        multiplied with the gradients of 1."""
        tensors = inputs(100, 16, 50, dtype=dtype, bias=True)
        call, floating = bound(tensors, impl=impl, reduction=reduction)
        _, *plain = run(call, floating, [torch.ones((), device=DEVICE)])
        for factor in (0.125, -1.0, 3.0, 0.0):
            _, *found = run(lambda **t: call(**t) * factor, floating)  # noqa: B023
            by = factor * (1 + factor * call(**floating)).detach()  # `run` begins with loss + 1
            assert_same(found, [(g * by).to(dtype) for g in plain])
            _, *halved = run(call, floating, [torch.tensor(factor, device=DEVICE)])
            assert_same(halved, [(g * factor).to(dtype) for g in plain])
        eighth = scale_of(tensors, reduction).expand(100) / 8
        _, *wanted = run(functools.partial(call, reduction="none"), floating, [eighth])
        found = run(lambda **t: call(**t) / 8, floating, [torch.ones((), device=DEVICE)])
        assert_same(found[1:], wanted)

    @runnable
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_backward_twice(self, impl: str, dtype: torch.dtype, reduction: str) -> None:
        call, tensors = bound(inputs(40, 16, 50, dtype=dtype), impl=impl, reduction=reduction)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        loss = call(**leaves).sum()
        loss.backward(retain_graph=True)
        first = [leaf.grad.clone() for leaf in leaves.values()]
        loss.backward()
        assert_same([leaf.grad for leaf in leaves.values()], [2 * g for g in first])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    @each
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_a_kept_graph_keeps_its_gradients(self, impl: str, reduction: str) -> None:
        """Whatever happens to those of the leaves."""
        call, tensors = bound(inputs(40, 16, 50), impl=impl, reduction=reduction)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        loss = call(**leaves)
        loss.backward(retain_graph=True)
        first = [leaf.grad.clone() for leaf in leaves.values()]
        for leaf in leaves.values():
            leaf.grad.zero_()
        loss.backward()
        assert_same([leaf.grad for leaf in leaves.values()], first)

    @pytest.mark.parametrize("dtype", DTYPES)
    @each
    def test_when_gradients_are_computed(self, impl: str, dtype: torch.dtype) -> None:
        """In the forward pass those of a sum or a mean, and only where a backward pass will ask:
        not without one, not for each loss, and not in float16."""
        tensors = inputs(6, 10, 20, dtype=dtype, bias=True)
        call, leaves = bound(tensors, impl=impl)
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        frozen = leaves | {"weight": leaves["weight"].detach(), "bias": leaves["bias"].detach()}
        early = dtype != FP16
        with Calls(FWD) as calls:
            with torch.no_grad():
                call(**leaves)
            call(**{name: leaf.detach() for name, leaf in leaves.items()}, reduction="sum")
            call(**leaves, reduction="none")
            call(**leaves)
            call(**frozen, reduction="sum")
        assert [given[DLOSS] is not None for given in calls] == [False] * 3 + [early] * 2
        masks = [[early] * 3, [early, False, False]]
        assert [given[GRAD_MASK] for given in calls] == [[False] * 3] * 3 + masks

    @each
    def test_the_second_pass_is_left_out(self, impl: str) -> None:
        for reduction, runs in (("none", 1), ("sum", 0), ("mean", 0)):
            call, tensors = bound(inputs(6, 10, 20), impl=impl, reduction=reduction)
            with Calls(BWD) as calls:
                run(call, tensors)
            assert len(calls) == runs

    @each
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_only_gradients_that_are_wanted(self, impl: str, reduction: str) -> None:
        with in_pieces():
            call, tensors = bound(inputs(70, 16, 45, bias=True), impl=impl, reduction=reduction)
            assert_gradients_alone(call, tensors, ["x", "bias"], ["weight", "bias"])

    @each
    def test_a_loss_scale(self, impl: str) -> None:
        """Of float16: these rows are sure of their class, and without it the gradients of their
        mean would be but few units of the smallest number."""
        targets = torch.arange(512, device=DEVICE) % 16
        tensors = {
            "x": 12 * F.one_hot(targets, 16).to(FP16),
            "weight": (torch.eye(16) + torch.randn(16, 16) / 16).to(DEVICE, FP16),
            "targets": targets,
        }
        call = functools.partial(linear_cross_entropy, impl=impl)
        gradients_hold(
            lambda **t: call(**t) * 65536,
            lambda **t: baseline.linear_cross_entropy(**t) * 65536,
            lambda **t: reference.linear_cross_entropy(**t) * 65536,
            tensors,
        )

    @runnable
    def test_repeats_bit_for_bit(self, impl: str, dtype: torch.dtype) -> None:
        """On any number of threads where the kernels alone divide the rows."""
        call, tensors = bound(inputs(150, 33, 70, dtype=dtype, bias=True), impl=impl, **OPTIONS)
        first = run(call, tensors)
        for _ in range(2):
            assert_same(run(call, tensors), first)
        with threads(2):
            torch.testing.assert_close(run(call, tensors), first)


class TestTied:
    @runnable
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_the_weight_is_the_embedding(
        self, impl: str, dtype: torch.dtype, reduction: str, seed: int
    ) -> None:
        """The gradients of both uses add up."""
        tensors = inputs(100, 16, 50, dtype=dtype, seed=seed)
        tokens = torch.randint(50, (100,), device=DEVICE)
        given = {"weight": tensors["weight"], "targets": tensors["targets"]}

        def tied(op: Callable[..., Tensor], **how: Any) -> Callable[..., Tensor]:
            def call(weight: Tensor, targets: Tensor) -> Tensor:
                return op(F.embedding(tokens, weight), weight, targets, reduction=reduction, **how)

            return call

        truth = tied(reference.linear_cross_entropy)
        with in_pieces():
            gradients_hold(
                tied(linear_cross_entropy, impl=impl), tied(baseline.linear_cross_entropy), truth,
                given, seed,
            )  # fmt: skip
        # Each of the two is a large part of it, or the sum would prove nothing.
        one = {name: t.double() for name, t in tensors.items() if name in ("x", "weight")}
        one["x"] = F.embedding(tokens, one["weight"])
        head = functools.partial(reference.linear_cross_entropy, targets=tensors["targets"])
        both = run(functools.partial(truth, targets=given["targets"]), {"weight": one["weight"]})[1]
        alone = run(head, one)[2]
        assert (both - alone).abs().max() > 0.1 * alone.abs().max()

    @at_once
    def test_one_tensor_twice(self, impl: str, dtype: torch.dtype) -> None:
        """x and weight, and a graph that is kept: no gradient is added to in place."""
        x, targets = inputs(40, 16, 50, dtype=dtype)["x"], torch.arange(40, device=DEVICE)
        leaf = x.clone().requires_grad_()
        loss = linear_cross_entropy(leaf, leaf, targets, impl=impl)
        loss.backward(retain_graph=True)
        first, leaf.grad = leaf.grad, None
        loss.backward()
        call = functools.partial(linear_cross_entropy, targets=targets, impl=impl)
        dx, dweight = run(call, {"x": x, "weight": x.clone()}, [torch.ones((), device=DEVICE)])[1:]
        assert_same([first, leaf.grad], [dx + dweight] * 2)


class Sizes(TorchDispatchMode):
    """A context whose value is a list: how many elements each tensor has that an operator returns
    inside, also inside of the registered ops."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.home, self.seen = f"gptkernels.ops.linear_cross_entropy.{impl}", []

    def __enter__(self) -> Any:
        super().__enter__()
        return self.seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (FWD, BWD):
            place = 5 if func is FWD else 6
            given = (*args[:place], LossOptions(*args[place : place + 4]), *args[place + 4 : -1])
            name = func._schema.name.partition("::")[2]
            with self:
                return getattr(importlib.import_module(self.home), name)(*given)
        found = func(*args, **(kwargs or {}))
        self.seen += [t.numel() for t in tree_leaves(found) if isinstance(t, Tensor)]
        return found


class TestMemory:
    @runnable
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_the_logits_are_never_whole(
        self, impl: str, dtype: torch.dtype, reduction: str
    ) -> None:
        rows, width, classes = 500, 16, 600
        call, tensors = bound(
            inputs(rows, width, classes, dtype=dtype, bias=True), impl=impl, reduction=reduction,
            **OPTIONS,
        )  # fmt: skip
        with in_pieces(), Sizes(impl) as sizes:
            run(call, tensors)
        of_a_chunk = 32 * 608  # in rows of a multiple of 32
        assert max(sizes) == of_a_chunk

    @each
    @pytest.mark.parametrize("itemsize", [2, 4])
    @pytest.mark.parametrize("sizes", [(8192, 768, 50257), (10**6, 64, 300), (10**4, 4096, 2**17)])
    def test_how_many_rows_a_chunk_has(
        self, impl: str, sizes: tuple[int, ...], itemsize: int
    ) -> None:
        """No more than the fp32 sum of the weight's gradient takes, or 512 MiB; but 8 MiB or 256
        rows."""
        rows, width, classes = sizes
        chunks = importlib.import_module("gptkernels.ops.linear_cross_entropy.chunks")
        each = chunks.rows_together(rows, width, classes, itemsize)
        most = min(4 * width * classes, 512 * 2**20)
        most = max(most, 8 * 2**20, 256 * itemsize * classes)
        assert each % 32 == 0
        assert (each - 31) * classes * itemsize <= most

    @each
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_what_is_kept(self, impl: str, reduction: str) -> None:
        """The inputs; and the gradients, once they are known, else two numbers of each row."""
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        call, leaves = bound(inputs(2, 3, 10, 20, bias=True), impl=impl, reduction=reduction)
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call(**leaves)
        shapes = [tuple(tensor.shape) for tensor in kept]
        floating = [(6, 10), (20, 10), (20,)]
        assert shapes == [*floating, *([(6,), (6,)] if reduction == "none" else floating)]


class TestCompile:
    @each
    def test_equals_eager_for_any_number_of_rows(self, impl: str) -> None:
        def block(targets: Tensor, **leaves: Tensor) -> Any:
            call = functools.partial(linear_cross_entropy, targets=targets, impl=impl)
            losses = call(**leaves, **OPTIONS, reduction="none")
            return call(**leaves) * 2, losses * 3, call(**leaves, **OPTIONS, reduction="sum")

        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
        for number, rows in enumerate((6, 70)):
            tensors = inputs(2, rows, 10, 20, bias=True)
            targets = tensors.pop("targets")
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                found = run(functools.partial(compiled, targets), tensors)
            assert_same(found, run(functools.partial(block, targets), tensors))
