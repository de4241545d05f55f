"""linear_cross_entropy's Triton kernels, which hold the logits of a tile: against the truth by the
parity rule, and, where results are not finite, against impl="torch"."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from harness import DEVICE, DTYPES, FP32, name_of, of
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import linear_cross_entropy_inputs as inputs
from right import assert_right, assert_same, check_op, run
from torch import Tensor

from gptkernels import linear_cross_entropy
from gptkernels.truth import reference

(needs_triton,) = of("triton").marks
pytestmark = needs_triton
by_dtype = pytest.mark.parametrize(
    ("impl", "dtype"), [of("triton", dtype, dtype=dtype, id=name_of(dtype)) for dtype in DTYPES]
)

# Numpy, which computes in the interpreter, warns of some.
of_any_number = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
# All options at once: for the public function, and as the registered ops take them.
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}
PLAIN, EVERY = (-100, 0.0, 0.0, 0.0), (-100, *OPTIONS.values())
WHOLE = [True] * 3

loss = functools.partial(linear_cross_entropy, impl="triton", reduction="none")
FWD = torch.ops.gptkernels.linear_cross_entropy_fwd
BWD = torch.ops.gptkernels.linear_cross_entropy_bwd


def launchers() -> Any:
    from gptkernels.ops.linear_cross_entropy.triton import launch

    return launch


@contextlib.contextmanager
def in_blocks() -> Iterator[None]:
    """Inside, a block has as few classes as a small call's memory allows: a tile's, or V C / N."""
    with mock.patch.multiple(launchers(), _LEAST_BYTES=0, _LEAST_CLASSES=64):
        yield


def hold(tensors: dict[str, Any], seed: int = 0, **options: Any) -> None:
    """Asserts parity of the losses of all rows, and of the gradients."""
    assert_right(linear_cross_entropy, tensors, seed, impl="triton", reduction="none", **options)


def floating(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if v is not None and v.is_floating_point()}


class TestParity:
    @by_dtype
    @settings(max_examples=5)
    @given(
        rows=st.integers(33, 100),
        width=st.integers(6, 80),
        classes=st.integers(12, 150),
        bias=st.booleans(),
        blocks=st.booleans(),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        z_loss=st.sampled_from([0.0, 1e-3, 0.5]),
        softcap=st.sampled_from([0.0, 3.0, 30.0]),
        seed=st.integers(0, 2**20),
    )
    def test_any_size(
        self,
        impl: str,
        dtype: torch.dtype,
        rows: int,
        width: int,
        classes: int,
        bias: bool,
        blocks: bool,
        seed: int,
        **options: float,
    ) -> None:
        tensors = inputs(rows, width, classes, dtype=dtype, bias=bias, seed=seed)
        with in_blocks() if blocks else contextlib.nullcontext():
            hold(tensors, seed, **options)

    @by_dtype
    @pytest.mark.parametrize("sizes", [(64, 32, 192), (2, 3, 11, 48, 129), (40, 1, 70)])
    def test_edges_of_tiles(
        self, impl: str, dtype: torch.dtype, sizes: tuple[int, ...], seed: int
    ) -> None:
        tensors = inputs(*sizes, dtype=dtype, bias=True, seed=seed)
        if sizes[-2] == 1:  # products of one term are exact, but lse of large logits is rounded
            tensors["x"] /= 8
        for options in ({}, OPTIONS):
            hold(tensors, seed, **options)

    @by_dtype
    @pytest.mark.parametrize("option", [{k: v} for k, v in OPTIONS.items()], ids=str)
    def test_one_option(
        self, impl: str, dtype: torch.dtype, option: dict[str, float], seed: int
    ) -> None:
        hold(inputs(70, 20, 45, dtype=dtype, seed=seed), seed, **option)

    def test_vocabulary(self, seed: int) -> None:
        """The last of more than 2^16 classes is a target, and there are more tiles than are
        combined at once. The interpreter needs large tiles to be quick."""
        classes = 2**16 + 5
        tensors = inputs(32, 8, classes, seed=seed)
        tensors["targets"][5] = classes - 1
        kernels = launchers()
        assert -(-classes // 4096) > kernels._COMBINED_TILES
        large = kernels._Tile(32, 4096, 16, num_warps=4, num_stages=2)
        with mock.patch.object(kernels, "_tile_for", return_value=large):
            hold(tensors, seed, label_smoothing=0.1)

    def test_every_tile(self, seed: int) -> None:
        tensors = inputs(70, 48, 130, bias=True, seed=seed)
        kernels = launchers()
        tiles = kernels.tiles(tensors["x"], tensors["weight"])["tile"]
        assert tiles[0] == kernels._tile_for(tensors["x"], tensors["weight"])
        for tile in tiles:
            assert_right(
                kernel_losses, tensors, seed, name="linear_cross_entropy", reduction="none",
                gradients=False, build=tile,
            )  # fmt: skip

    @by_dtype
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_reductions(self, impl: str, dtype: torch.dtype, reduction: str) -> None:
        tensors = inputs(70, 20, 45, dtype=dtype, bias=True)
        losses = loss(**tensors, **OPTIONS)
        count = torch.count_nonzero(tensors["targets"] != -100)
        each = torch.ones_like(losses) if reduction == "sum" else torch.ones_like(losses) / count
        of_rows = functools.partial(loss, targets=tensors["targets"], **OPTIONS)
        wanted = run(of_rows, floating(tensors), [each])
        reduced = functools.partial(of_rows, reduction=reduction)
        found = run(reduced, floating(tensors), [torch.ones((), device=DEVICE)])
        torch.testing.assert_close(found[0], (losses * each).sum())
        for a, b in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def kernel_losses(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, build: Any, reduction: str
) -> Tensor:
    options = launchers().LossOptions()
    losses, *_ = launchers().linear_cross_entropy_fwd(
        x, weight, bias, targets, None, options, [False] * 3, tile=build
    )
    return losses


class TestBlocks:
    """Blocks of classes in the backward pass."""

    @by_dtype
    # PyTorch's error on a bias of few classes is random.
    @pytest.mark.parametrize("classes", [257, 192])
    def test_several(self, impl: str, dtype: torch.dtype, classes: int, seed: int) -> None:
        tensors = inputs(70, 4, classes, dtype=dtype, bias=True, seed=seed)
        kernels = launchers()
        with in_blocks():
            assert kernels._classes_together(tensors["x"], classes, 64) == 64
            hold(tensors, seed, **OPTIONS)

    def test_how_many_classes(self) -> None:
        """GPT-2's head: what is in memory takes no more than the weight's gradient in fp32."""
        for dtype, rows, classes, columns, wanted in (
            (torch.bfloat16, 8192, 50257, 128, 8448),
            (torch.bfloat16, 1024, 50257, 128, 50304),
            (torch.float32, 8192, 50257, 64, 4608),
            (torch.bfloat16, 2**20, 50257, 128, 1024),
            (torch.bfloat16, 5, 3, 64, 64),
        ):
            x = torch.empty(rows, 768, dtype=dtype, device="meta")
            assert launchers()._classes_together(x, classes, columns) == wanted


class TestWhatIsWanted:
    @pytest.mark.parametrize("blocks", [False, True])
    def test_each_gradient_alone(self, blocks: bool) -> None:
        """It has the same bits, and those that nobody wants are empty and distinct tensors."""
        x, weight, targets, bias = inputs(70, 4, 130, bias=True).values()
        dloss = torch.rand(70, device=DEVICE)
        with in_blocks() if blocks else contextlib.nullcontext():
            losses, lse, *gradients = FWD(x, weight, bias, targets, dloss, *EVERY, WHOLE, "triton")
            for place in range(3):
                mask = [i == place for i in range(3)]
                found = FWD(x, weight, bias, targets, dloss, *EVERY, mask, "triton")
                assert_same(found[:2], [losses, lse])
                second = BWD(dloss, x, weight, bias, targets, lse, *EVERY, mask, "triton")
                for results in (found[2:], second):
                    assert_same([results[place]], [gradients[place]])
                    others = [g for i, g in enumerate(results) if i != place]
                    assert [g.shape for g in others] == [(0,), (0,)]
                    assert others[0] is not others[1]
            *_, dx, dweight, dbias = FWD(x, weight, bias, targets, None, *EVERY, WHOLE, "triton")
            assert dx.shape == dweight.shape == dbias.shape == (0,)

    @pytest.mark.parametrize("bias", [False, True])
    def test_opcheck(self, bias: bool) -> None:
        x, weight, targets, bias_ = inputs(20, 10, 30, bias=bias).values()
        mask = [True, True, bias]
        dloss = torch.rand(20, device=DEVICE)
        for given_ in (None, dloss):
            wanted = [False] * 3 if given_ is None else mask
            check_op(FWD.default, (x, weight, bias_, targets, given_, *EVERY, wanted, "triton"))
        lse = FWD(x, weight, bias_, targets, None, *PLAIN, [False] * 3, "triton")[1]
        check_op(BWD.default, (dloss, x, weight, bias_, targets, lse, *PLAIN, mask, "triton"))


class TestLayout:
    @by_dtype
    def test_strides_do_not_change_a_bit(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(40, 16, 70, dtype=dtype, bias=True)
        apart = dict(tensors)
        for name in ("x", "weight"):
            wide = torch.full((tensors[name].shape[0], 48), torch.nan, dtype=dtype, device=DEVICE)
            wide[:, 16:32] = tensors[name]
            apart[name] = wide[:, 16:32]
        apart["targets"] = torch.stack([tensors["targets"], tensors["targets"] + 1], 1)[:, 0]
        found, wanted = (
            run(functools.partial(loss, targets=given_["targets"]), floating(given_))
            for given_ in (apart, tensors)
        )
        assert_same(found, wanted)

    def test_a_row_that_is_repeated(self, seed: int) -> None:
        tensors = inputs(1, 40, 24, seed=seed)
        tensors["x"] = tensors["x"].expand(40, 40)
        tensors["targets"] = torch.arange(40, device=DEVICE) % 24
        hold(tensors, seed)

    @pytest.mark.parametrize("sizes", [(0, 8, 16), (2, 0, 8, 16), (5, 0, 16), (1, 1, 1), (1, 9, 2)])
    def test_few_or_no_numbers(self, sizes: tuple[int, ...]) -> None:
        tensors = inputs(*sizes, bias=True, ignored=False)
        found, wanted = (
            run(functools.partial(loss, targets=tensors["targets"], impl=impl), floating(tensors))
            for impl in ("triton", "torch")
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


class TestRows:
    """Which rows count."""

    def test_all_ignored(self) -> None:
        tensors = inputs(40, 10, 20, bias=True)
        tensors["targets"].fill_(-100)
        call = functools.partial(loss, targets=tensors["targets"], **OPTIONS)
        losses, *gradients = run(call, floating(tensors), [torch.ones(40, device=DEVICE)])
        assert_same([losses], [torch.zeros(40, device=DEVICE)])
        assert_same(gradients, [torch.zeros_like(t) for t in floating(tensors).values()])

    @pytest.mark.parametrize("ignored", [0, 19, -1, 20, 2**62, -(2**63)])
    def test_any_index(self, ignored: int) -> None:
        """A class too, which then is no target."""
        tensors = inputs(70, 16, 20)
        tensors["targets"][tensors["targets"] == ignored] = 7
        wanted = run(functools.partial(loss, targets=tensors["targets"]), floating(tensors))
        targets = tensors["targets"].masked_fill(tensors["targets"] == -100, ignored)
        call = functools.partial(loss, targets=targets, ignore_index=ignored)
        assert_same(run(call, floating(tensors)), wanted)

    @pytest.mark.parametrize("wrong", [70, -1, 2**40, -(2**63), 2**63 - 1])
    def test_no_class(self, wrong: int) -> None:
        """The loss is NaN. All else is as if the row did not count, whatever its gradient is."""
        x, weight, targets, bias = inputs(70, 16, 70, bias=True).values()
        rows = [0, 40, 69]
        ignored = targets.clone()
        targets[rows], ignored[rows] = wrong, -100
        dloss = torch.rand(70, device=DEVICE)
        bad = dloss.clone()
        bad[rows] = torch.tensor([torch.inf, torch.nan, -torch.inf], device=DEVICE)
        found = FWD(x, weight, bias, targets, bad, *EVERY, WHOLE, "triton")
        wanted = FWD(x, weight, bias, ignored, dloss, *EVERY, WHOLE, "triton")
        assert found[0][rows].isnan().all()
        found[0][rows] = 0.0
        assert_same(found, wanted)
        again = BWD(bad, x, weight, bias, targets, found[1], *EVERY, WHOLE, "triton")
        assert_same(again, wanted[2:])

    @of_any_number
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("row", [0, 69])
    def test_a_bad_row_stays_alone(self, row: int, value: float) -> None:
        tensors = inputs(70, 15, 145, ignored=False)
        bad = tensors | {"x": tensors["x"].clone()}
        bad["x"][row, 14] = value
        cotangent = [torch.rand(70, device=DEVICE)]
        with in_blocks():
            clean, dirty = (
                run(functools.partial(loss, targets=t["targets"]), floating(t), cotangent, ["x"])
                for t in (tensors, bad)
            )
        others = torch.arange(70, device=DEVICE) != row
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a[others], b[others])
            assert b[row].isnan().all()


def assert_alike(tensors: dict[str, Any], options: tuple[float, ...]) -> list[Tensor]:
    """Asserts that NaN and infinities are where impl="torch" has them, and that all else is near.
    Returns the losses, lse and the gradients."""
    x, weight, targets, bias = tensors.values()
    dloss = torch.rand(len(x), device=DEVICE)
    found, wanted = (
        FWD(x, weight, bias, targets, dloss, *options, [True, True, bias is not None], impl)
        for impl in ("triton", "torch")
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    return found


@of_any_number
class TestRange:
    @pytest.mark.parametrize("softcap", [0.0, 3.0, 1e4])
    def test_large_logits(self, softcap: float) -> None:
        """No exponential overflows, no power of tanh, no sum, and small numbers are not lost."""
        sizes = torch.tensor([0.0, 1e-30, 1e-4, 5.0, 90.0, 1e4, 1e19, 3e38], device=DEVICE)
        diagonal = torch.cat([sizes, -sizes])
        rows = torch.arange(16, device=DEVICE)
        x = torch.zeros(16, 3, device=DEVICE)
        x[rows, rows % 3] = diagonal
        weight, targets = torch.zeros(150, 3, device=DEVICE), (rows + 1) % 3
        weight[:3] = torch.eye(3, device=DEVICE)
        call = functools.partial(loss, targets=targets, softcap=softcap)
        truth = functools.partial(
            reference.linear_cross_entropy, targets=targets, softcap=softcap, reduction="none"
        )
        ones = torch.ones(16, device=DEVICE)
        found = run(call, {"x": x, "weight": weight}, [ones], ["x"])
        exact = {"x": x.double(), "weight": weight.double()}
        for a, b in zip(found, run(truth, exact, [ones.double()], ["x"]), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("options", [PLAIN, EVERY], ids=["plain", "every"])
    def test_scale_of_ten_thousand(self, options: tuple[float, ...]) -> None:
        tensors = inputs(40, 16, 150, bias=True)
        # Whole numbers: products are exact, whichever way they are added up.
        tensors["x"] = (tensors["x"] * 50).round()
        tensors["weight"] = (tensors["weight"] * 100).round()
        tensors["bias"] = tensors["bias"].round()
        assert all(t.isfinite().all() for t in assert_alike(tensors, options))

    @pytest.mark.parametrize("options", [PLAIN, EVERY, (-100, 0.0, 1e-2, 0.0)], ids=str)
    @pytest.mark.parametrize("masked", [[3], [*range(64, 128)]], ids=len)
    def test_classes_that_are_masked_out(
        self, masked: list[int], options: tuple[float, ...]
    ) -> None:
        """A class and a whole tile of them, one of which is a target."""
        tensors = inputs(40, 16, 150, bias=True)
        tensors["targets"][7] = masked[0]
        tensors["bias"][masked] = -torch.inf
        _, lse, *gradients = assert_alike(tensors, options)
        assert all(t.isfinite().all() for t in (lse, *gradients))

    @pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
    @pytest.mark.parametrize("options", [PLAIN, (-100, 0.1, 1e-2, 0.0)], ids=str)
    def test_no_finite_loss(self, options: tuple[float, ...], value: float) -> None:
        """A class whose logits are NaN or infinite, or none but of minus infinity: no loss that
        counts is finite, and no gradient of its row is a number."""
        x, weight, targets, bias = inputs(40, 16, 150, bias=True).values()
        bias[range(150) if value < 0 else 100] = value
        dloss = torch.rand(40, device=DEVICE) + 1
        losses, _, dx, *_ = FWD(x, weight, bias, targets, dloss, *options, WHOLE, "triton")
        counts = targets != -100
        assert not losses[counts].isfinite().any()
        assert value < 0 or losses[counts].isnan().all()
        assert dx[counts].isnan().all()
        assert torch.count_nonzero(losses[~counts]) == torch.count_nonzero(dx[~counts]) == 0

    def test_far_below_zero(self) -> None:
        """A tile of -inf beside logits of which no other number is large: nothing overflows."""
        x, weight, targets, bias = inputs(40, 16, 150, bias=True, ignored=False).values()
        bias -= 1000.0
        bias[:64] = -torch.inf
        targets.fill_(100)
        found = FWD(
            x, weight, bias, targets, torch.rand(40, device=DEVICE), *PLAIN, WHOLE, "triton"
        )
        assert all(t.isfinite().all() for t in found)

    def test_float32_only_where_asked(self) -> None:
        losses, lse, *_ = FWD(
            *(inputs(20, 10, 30)[k] for k in ("x", "weight", "bias", "targets")), None,
            *PLAIN, [False] * 3, "triton",
        )  # fmt: skip
        assert losses.dtype == lse.dtype == FP32
