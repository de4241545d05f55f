"""Which rows of linear_cross_entropy count, and what a row may not touch."""

from __future__ import annotations

import functools

import pytest
import torch
from harness import DEVICE, FP32
from loss_cases import (
    BWD,
    FWD,
    OPTIONS,
    bound,
    each,
    hold,
    in_pieces,
    runnable,
)
from op_inputs import linear_cross_entropy_inputs as inputs
from right import assert_same, run
from torch import Tensor

from gptkernels import linear_cross_entropy
from gptkernels.truth import reference

LAST = 99  # of 100 rows; with `in_pieces` alone in the last chunk but for three others


def without(row: int) -> Tensor:
    return torch.arange(LAST + 1, device=DEVICE) != row


class TestIgnored:
    @runnable
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_all(self, impl: str, dtype: torch.dtype, reduction: str) -> None:
        tensors = inputs(40, 10, 20, dtype=dtype, bias=True)
        tensors["targets"].fill_(-100)
        call, floating = bound(tensors, impl=impl, reduction=reduction, **OPTIONS)
        loss, *gradients = run(call, floating, [torch.ones(loss_shape(reduction), device=DEVICE)])
        wanted = torch.full_like(loss, torch.nan if reduction == "mean" else 0.0)
        assert_same([loss.nan_to_num(7.0)], [wanted.nan_to_num(7.0)])
        assert_same(gradients, [torch.zeros_like(t) for t in floating.values()])

    @each
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_they_do_not_count(self, impl: str, reduction: str) -> None:
        """The others alone have the same mean and the same gradients."""
        tensors = inputs(100, 10, 20, bias=True)
        counts = tensors["targets"] != -100
        others = {name: tensors[name][counts] for name in ("x", "targets")}
        how = dict(impl=impl, reduction=reduction, label_smoothing=0.1, z_loss=1e-2)
        one = [torch.ones((), device=DEVICE)]
        with in_pieces():
            loss, dx, *parameters = run(*bound(tensors, **how), one)
        assert torch.count_nonzero(dx[~counts]) == 0
        assert (dx[counts] != 0).any(1).all()
        wanted = run(*bound(tensors | others, **how), one)
        for a, b in zip([loss, dx[counts], *parameters], wanted, strict=True):
            size = b.abs().max()
            torch.testing.assert_close(a / size, b / size, rtol=0, atol=2e-6)

    @runnable
    @pytest.mark.parametrize("ignored", [0, 19, -1, 20, 2**62, -(2**63)])
    def test_any_index(self, impl: str, dtype: torch.dtype, ignored: int) -> None:
        """A class too, which then is no target."""
        tensors = inputs(70, 16, 20, dtype=dtype)
        usual = bound(tensors, impl=impl, reduction="none", z_loss=1e-2)
        tensors["targets"][tensors["targets"] == ignored] = 7
        wanted = run(*bound(tensors, impl=impl, reduction="none", z_loss=1e-2))
        targets = tensors["targets"].masked_fill(tensors["targets"] == -100, ignored)
        other = bound(tensors | {"targets": targets}, impl=impl, reduction="none", z_loss=1e-2)
        assert usual[1].keys() == other[1].keys()
        assert_same(run(functools.partial(other[0], ignore_index=ignored), other[1]), wanted)

    @runnable
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_they_hold(self, impl: str, dtype: torch.dtype, value: float) -> None:
        """Of the other rows no bit changes. The gradients of the parameters are a product with x,
        in PyTorch too, where 0 times NaN is NaN."""
        tensors = inputs(100, 16, 50, dtype=dtype)
        tensors["targets"][LAST] = -100
        bad = tensors | {"x": tensors["x"].clone()}
        bad["x"][1] = bad["x"][LAST, 3] = value
        for reduction in ("none", "sum", "mean"):
            with in_pieces():
                how = dict(impl=impl, reduction=reduction, **OPTIONS)
                clean, dirty = (run(*bound(given, **how))[:2] for given in (tensors, bad))
            assert torch.count_nonzero(dirty[1][[1, LAST]]) == 0
            assert_same(dirty, clean)


def loss_shape(reduction: str) -> tuple[int, ...]:
    return (40,) if reduction == "none" else ()


class TestIsolation:
    @runnable
    @pytest.mark.parametrize("row", [5, 31, 32, LAST])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_bad_row_stays_alone(
        self, impl: str, dtype: torch.dtype, value: float, row: int
    ) -> None:
        """Of an odd number of columns and of classes."""
        tensors = inputs(LAST + 1, 15, 45, dtype=dtype, ignored=False)
        bad = tensors | {"x": tensors["x"].clone()}
        bad["x"][row, [0, 14]] = value
        cotangent = [torch.rand(LAST + 1, device=DEVICE)]
        with in_pieces():
            clean, dirty = (
                run(*bound(given, impl=impl, reduction="none"), cotangent)
                for given in (tensors, bad)
            )
            summed = run(*bound(bad, impl=impl, reduction="sum"))
        others = without(row)
        assert not dirty[0][row].isfinite()
        assert dirty[1][row].isnan().all()
        assert summed[1][row].isnan().all()
        for a, b in zip(clean[:2], dirty[:2], strict=True):  # the losses and dx
            assert torch.equal(a[others], b[others])
        assert summed[1][others].isfinite().all()

    @runnable
    def test_a_bad_gradient_stays_in_its_row(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(LAST + 1, 33, 50, dtype=dtype, ignored=False)
        clean = torch.rand(LAST + 1, device=DEVICE)
        bad = clean.clone()
        bad[64] = torch.nan
        call, floating = bound(tensors, impl=impl, reduction="none")
        wanted, found = (run(call, floating, [given])[1] for given in (clean, bad))
        assert found[64].isnan().all()
        assert torch.equal(found[without(64)], wanted[without(64)])


def diagonal(logits: list[float]) -> dict[str, Tensor]:
    """Three classes. The rows have these logits, no others: of each one class, the rest is 0."""
    x = torch.zeros(len(logits), 3, device=DEVICE)
    rows = torch.arange(len(logits), device=DEVICE)
    x[rows, rows % 3] = torch.tensor(logits, device=DEVICE)
    return {"x": x, "weight": torch.eye(3, device=DEVICE), "targets": (rows + 1) % 3}


class TestRange:
    @each
    @pytest.mark.parametrize("softcap", [0.0, 3.0, 1e4])
    def test_large_logits(self, impl: str, softcap: float) -> None:
        """No exponential overflows, no power of tanh, no sum, and small numbers are not lost."""
        values = [0.0, 1e-30, 1e-4, 5.0, 90.0, 1e4, 1e19, 3e38]
        tensors = diagonal([sign * value for value in values for sign in (1, -1)] + [0.5])
        doubles = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        call, floating = bound(tensors, impl=impl, reduction="none", softcap=softcap)
        truth = functools.partial(
            reference.linear_cross_entropy, targets=tensors["targets"], reduction="none",
            softcap=softcap,
        )  # fmt: skip
        cotangent = torch.ones(len(tensors["x"]), device=DEVICE)
        found = run(call, floating, [cotangent], ["x"])
        wanted = run(truth, {k: doubles[k] for k in floating}, [cotangent.double()], ["x"])
        for one, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), exact, rtol=1e-6, atol=1e-6)

    @each
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("offset", [1e3, 1e5, -1e5])
    def test_large_logits_lose_no_digits(self, impl: str, offset: float, reduction: str) -> None:
        """What is added to all logits of a row changes no loss and no gradient, though lse then has
        no digit left behind the point. "torch" does lose digits of the loss."""
        x = torch.ones(40, 1, device=DEVICE)
        weight = torch.arange(20.0, device=DEVICE)[:, None] / 4 % 3
        targets = torch.arange(40, device=DEVICE) % 20
        one = [torch.ones(() if reduction == "mean" else 40, device=DEVICE)]

        def call(weight: Tensor, bias: Tensor) -> Tensor:
            return linear_cross_entropy(
                x, weight, targets, bias=bias, reduction=reduction, impl=impl
            )

        bias = torch.zeros(20, device=DEVICE)
        found = run(call, {"weight": weight, "bias": bias + offset}, one)
        wanted = run(call, {"weight": weight, "bias": bias}, one)
        loss = 2 * torch.finfo(FP32).eps * abs(offset) if impl == "torch" else 1e-6
        for a, b, near in zip(found, wanted, (loss, 1e-6, 1e-6), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=near)

    @runnable
    @pytest.mark.parametrize(
        "option", [{}, {"z_loss": 1e-2}, {"softcap": 3.0}, {"softcap": 3.0, "label_smoothing": 0.1}]
    )
    def test_a_class_that_is_masked_out(
        self, impl: str, dtype: torch.dtype, option: dict[str, float], seed: int
    ) -> None:
        """With a bias of minus infinity: it has no weight, but under a softcap, and no gradient."""
        tensors = inputs(70, 20, 45, dtype=dtype, bias=True, ignored=False, seed=seed)
        masked = torch.tensor([0, 16, 44], device=DEVICE)
        tensors["targets"] %= 15
        tensors["targets"] += 1
        tensors["bias"][masked] = -torch.inf
        hold(tensors, seed, impl=impl, **option)
        call, floating = bound(tensors, impl=impl, **option)
        _, _, dweight, dbias = run(call, floating)
        assert torch.count_nonzero(dweight[masked]) == torch.count_nonzero(dbias[masked]) == 0
        if "softcap" not in option:  # the same as without them
            kept = torch.ones(45, dtype=torch.bool, device=DEVICE)
            kept[masked] = False
            fewer = {name: tensors[name][kept] for name in ("weight", "bias")}
            fewer |= {"targets": tensors["targets"] - 1}
            alone = run(*bound(tensors | fewer, impl=impl, reduction="none", **option))[0]
            whole = run(functools.partial(call, reduction="none"), floating)[0]
            torch.testing.assert_close(whole, alone)

    @each
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_a_target_that_is_masked_out(self, impl: str, reduction: str) -> None:
        """Its loss is infinite, its gradient is not."""
        tensors = inputs(40, 20, 45, bias=True, ignored=False)
        tensors["targets"].fill_(7)
        tensors["bias"][7] = -torch.inf
        loss, *gradients = run(*bound(tensors, impl=impl, reduction=reduction))
        assert (loss == torch.inf).all()
        assert all(gradient.isfinite().all() for gradient in gradients)


class TestTargets:
    """On a CPU the public function refuses wrong targets; this becomes of them elsewhere."""

    @runnable
    @pytest.mark.parametrize("wrong", [50, -1, -101, 2**40, -(2**63), 2**63 - 1])
    def test_no_class(self, impl: str, dtype: torch.dtype, wrong: int) -> None:
        x, weight, targets, bias = inputs(LAST + 1, 16, 50, dtype=dtype, bias=True).values()
        ignored = targets.clone()
        rows = [0, 40, LAST]
        targets[rows], ignored[rows] = wrong, -100
        dloss = torch.rand(LAST + 1, dtype=FP32, device=DEVICE)
        options = (-100, *OPTIONS.values())
        with in_pieces():
            found, wanted = (
                FWD(x, weight, bias, t, dloss, *options, [True] * 3, impl)
                for t in (targets, ignored)
            )
            again = BWD(dloss, x, weight, bias, targets, found[1], *options, [True] * 3, impl)
        losses = found[0]
        assert losses[rows].isnan().all()
        assert torch.equal(losses[targets == -100], torch.zeros_like(losses[targets == -100]))
        losses[rows] = 0.0
        # But for these losses, all as if the rows did not count: lse and the gradients too.
        assert_same(found, wanted)
        assert_same(again, wanted[2:])

    @each
    def test_compiled(self, impl: str) -> None:
        """There are no values to read while a graph is made."""
        tensors = inputs(10, 8, 20, ignored=False)
        call = functools.partial(linear_cross_entropy, impl=impl, reduction="none")
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        losses = call(**tensors)
        tensors["targets"][4] = 20
        found = compiled(**tensors)
        assert found[4].isnan()
        found[4] = losses[4]
        assert_same([found], [losses])
