"""linear_cross_entropy's CUDA C++ kernels, those for any GPU and those for Hopper: against the
truth by the parity rule, and, where results are not finite, against impl="torch"."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from harness import BF16, DEVICE, DTYPES, FP16, FP32, emulated, name_of, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import linear_cross_entropy_inputs as inputs
from right import assert_gradients_alone, assert_right, assert_same, check_op, run
from torch import Tensor

from gptkernels import linear_cross_entropy
from gptkernels.core import native
from gptkernels.ops.linear_cross_entropy import cuda as kernels
from gptkernels.ops.linear_cross_entropy.options import LossOptions

pytestmark = needs_cuda
# All options at once: for the public function, and as the registered ops take them.
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}
PLAIN, EVERY = (-100, 0.0, 0.0, 0.0), (-100, *OPTIONS.values())
WHOLE = [True] * 3
BUILDS = range(3)  # of Hopper's kernels

loss = functools.partial(linear_cross_entropy, impl="cuda", reduction="none")
FWD = torch.ops.gptkernels.linear_cross_entropy_fwd.default
BWD = torch.ops.gptkernels.linear_cross_entropy_bwd.default


@pytest.fixture(params=native.ARCHITECTURES)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The GPU: each that the emulator imitates, or the one that is here."""
    if native.EMULATED:
        monkeypatch.setenv(native.ARCH_VARIABLE, request.param)
    elif (request.param == "sm90") is not (torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("this GPU is another one")
    return str(request.param)


# Hopper's kernels take no fp32: there the kernels for any GPU run.
by_gpu = pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        pytest.param(arch, dtype, id=f"{arch}-{name_of(dtype)}")
        for arch in native.ARCHITECTURES
        for dtype in DTYPES
        if (arch, dtype) != ("sm90", FP32)
    ],
    indirect=["arch"],
)


@contextlib.contextmanager
def in_blocks() -> Iterator[None]:
    """Inside, a block has 64 classes."""
    with mock.patch.object(kernels, "classes_together", return_value=64):
        yield


def hold(tensors: dict[str, Any], seed: int = 0, **options: Any) -> None:
    """Asserts parity of the losses of all rows, and of the gradients."""
    assert_right(linear_cross_entropy, tensors, seed, impl="cuda", reduction="none", **options)


def floating(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if v is not None and v.is_floating_point()}


def results(tensors: dict[str, Any], **options: Any) -> list[Tensor]:
    """The losses, dx, dweight and dbias."""
    return run(functools.partial(loss, targets=tensors["targets"], **options), floating(tensors))


def direct(tensors: dict[str, Any], dloss: Tensor, impl: str, options: Any = PLAIN) -> list[Tensor]:
    """The losses, lse, dx, dweight and dbias, of targets that nobody looks at."""
    x, weight, targets, bias = tensors.values()
    return list(FWD(x, weight, bias, targets, dloss, *options, WHOLE, impl))


def launched(run: Any) -> list[str]:
    return [launch["kernel"] for launch in native.record(run)["launches"]]


class TestParity:
    @by_gpu
    @settings(max_examples=3)
    @given(
        rows=st.integers(33, 90),
        width=st.integers(1, 6),
        aligned=st.booleans(),
        classes=st.integers(12, 200),
        bias=st.booleans(),
        blocks=st.booleans(),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        z_loss=st.sampled_from([0.0, 1e-3, 0.5]),
        softcap=st.sampled_from([0.0, 3.0, 30.0]),
        seed=st.integers(0, 2**20),
    )
    def test_any_size(
        self,
        arch: str,
        dtype: torch.dtype,
        rows: int,
        width: int,
        aligned: bool,
        classes: int,
        bias: bool,
        blocks: bool,
        seed: int,
        **options: float,
    ) -> None:
        """Hopper's kernels take those whose rows are a multiple of 16 bytes."""
        width = 8 * width if aligned else width + 5
        tensors = inputs(rows, width, classes, dtype=dtype, bias=bias, seed=seed)
        with in_blocks() if blocks else contextlib.nullcontext():
            hold(tensors, seed, **options)

    @by_gpu
    @pytest.mark.parametrize("sizes", [(64, 16, 64), (129, 8, 129), (40, 1, 40)])
    def test_edges_of_tiles(
        self, arch: str, dtype: torch.dtype, sizes: tuple[int, ...], seed: int
    ) -> None:
        tensors = inputs(*sizes, dtype=dtype, bias=True, seed=seed)
        if sizes[-2] == 1:  # products of one term are exact, but lse of large logits is rounded
            tensors["x"] /= 8
        for options in ({}, OPTIONS):
            hold(tensors, seed, **options)

    @pytest.mark.parametrize("option", [{k: v} for k, v in OPTIONS.items()], ids=str)
    def test_one_option(self, arch: str, option: dict[str, float], seed: int) -> None:
        for bias in (False, True):
            hold(inputs(70, 16, 45, dtype=FP16, bias=bias, seed=seed), seed, **option)

    @by_gpu
    def test_more_tiles_than_are_summed_at_once(
        self, arch: str, dtype: torch.dtype, seed: int
    ) -> None:
        """The last class, which is alone in its tile, is a target."""
        tiles = 12 if dtype == FP32 else 24  # the emulator takes long for fp32
        tensors = inputs(33, 8, tiles * 64 + 1, dtype=dtype, seed=seed)
        tensors["targets"][5] = tiles * 64
        hold(tensors, seed, label_smoothing=0.1)

    @by_gpu
    @pytest.mark.parametrize("classes", [128, 133, 200])
    def test_blocks_of_classes(self, arch: str, dtype: torch.dtype, classes: int) -> None:
        """Two, three and four, the last one of any size."""
        tensors = inputs(70, 24, classes, dtype=dtype, bias=True)
        with in_blocks():
            hold(tensors, **OPTIONS)
            kernel = launched(lambda: results(tensors))
        gradients = [name for name in kernel if "linear_cross_entropy_bwd" in name]
        assert len(gradients) == -(-classes // 64)

    @by_gpu
    def test_one_row(self, arch: str, dtype: torch.dtype) -> None:
        """PyTorch's error of one number is random, so the number is compared with a fixed bound."""
        tensors = inputs(1, 16, 70, dtype=dtype, ignored=False)
        wanted = run(
            functools.partial(
                linear_cross_entropy, impl="torch", targets=tensors["targets"], reduction="none"
            ),
            {k: t.float() for k, t in floating(tensors).items()},
        )
        for found, right in zip(results(tensors), wanted, strict=True):
            bound = 4 * torch.finfo(found.dtype).eps * max(1, right.abs().max().item())
            assert (found.float() - right).abs().max() <= bound


class TestRows:
    @by_gpu
    def test_all_are_ignored(self, arch: str, dtype: torch.dtype) -> None:
        tensors = inputs(40, 16, 20, dtype=dtype, bias=True)
        tensors["targets"].fill_(-100)
        for found in results(tensors, **OPTIONS):
            assert torch.count_nonzero(found) == 0

    def test_a_class_is_ignored(self, arch: str, seed: int) -> None:
        tensors = inputs(40, 16, 20, dtype=BF16, ignored=False, seed=seed)
        tensors["targets"][::3] = 7
        hold(tensors, seed, ignore_index=7)

    @pytest.mark.parametrize("options", [PLAIN, EVERY], ids=["plain", "options"])
    def test_targets_that_are_no_class(self, arch: str, options: Any) -> None:
        """Their losses are NaN. They have no gradient, as ignored rows, whatever dloss is."""
        tensors = inputs(70, 16, 50, dtype=BF16, bias=True)
        wrong = torch.tensor([-1, 50, 2**40, -(2**63), 2**63 - 1], device=DEVICE)
        rows = [0, 14, 33, 63, 69]
        dloss = torch.rand(70, device=DEVICE)
        dloss[1] = torch.inf  # of an ignored row
        dloss[rows] = torch.tensor([torch.inf, torch.nan, 1, 2, 3], device=DEVICE)
        ignored = tensors | {"targets": tensors["targets"].clone()}
        ignored["targets"][rows] = -100
        tensors["targets"][rows] = wrong
        for impl in ("cuda", "torch"):
            losses, *rest = direct(tensors, dloss, impl, options)
            other, *wanted = direct(ignored, dloss, impl, options)
            assert losses[rows].isnan().all()
            losses[rows] = 0.0
            assert_same([losses, *rest], [other, *wanted])
            assert torch.count_nonzero(rest[1][rows]) == 0

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_bad_row_stays_alone(self, arch: str, value: float) -> None:
        tensors = inputs(70, 16, 45, dtype=BF16, ignored=False)
        bad = tensors | {"x": tensors["x"].clone()}
        bad["x"][65, 14] = value
        dloss = torch.rand(70, device=DEVICE)
        options = (-100, 0.1, 1e-2, 0.0)  # a softcap would make it finite
        clean, dirty = (direct(these, dloss, "cuda", options) for these in (tensors, bad))
        others = torch.arange(70, device=DEVICE) != 65
        assert not dirty[0][65].isfinite()
        for a, b in zip(clean[:3], dirty[:3], strict=True):  # losses, lse, dx
            assert torch.equal(a[others], b[others])


class TestRange:
    @by_gpu
    def test_large_logits(self, arch: str, dtype: torch.dtype, seed: int) -> None:
        """No exponential overflows. In fp32 few rows have two logits that are so near to each other
        that their rounding shows in a gradient, so PyTorch's error of the gradients is random."""
        tensors = inputs(40, 16, 150, dtype=dtype, bias=True, seed=seed)
        tensors["weight"] *= 1e3 if dtype == FP16 else 1e4  # float16 ends at 65504
        hold(tensors, seed, z_loss=1e-6, gradients=dtype != FP32)
        if dtype != FP16:  # there such gradients of such losses are infinite
            assert all(found.isfinite().all() for found in results(tensors))

    @pytest.mark.parametrize("masked", [slice(0, 128), slice(1, None, 2), slice(20, 300)])
    def test_classes_that_are_masked_out(self, arch: str, masked: slice, seed: int) -> None:
        """With a bias of minus infinity: a whole tile's too."""
        tensors = inputs(40, 16, 300, dtype=BF16, bias=True, ignored=False, seed=seed)
        tensors["bias"][masked] = -torch.inf
        left = torch.arange(300, device=DEVICE)[tensors["bias"].isfinite()]
        tensors["targets"] = left[tensors["targets"] % len(left)]
        hold(tensors, seed)
        _, _, dweight, dbias = results(tensors)
        assert torch.count_nonzero(dweight[masked]) == torch.count_nonzero(dbias[masked]) == 0

    def test_infinite_logits(self, arch: str) -> None:
        """lse is infinite where a logit is, and where no class is left."""
        for value in (torch.inf, -torch.inf):
            tensors = inputs(40, 16, 150, dtype=FP32, bias=True, ignored=False)
            tensors["bias"].fill_(value)
            losses, lse, *_ = direct(tensors, torch.ones(40, device=DEVICE), "cuda")
            assert (lse == value).all()
            assert losses.isnan().all()


class TestStrides:
    @by_gpu
    def test_rows_apart(self, arch: str, dtype: torch.dtype) -> None:
        """Gaps between rows do not change a bit."""
        tensors = inputs(40, 24, 50, dtype=dtype)
        strided = dict(tensors)
        for name in ("x", "weight"):
            rows, cols = tensors[name].shape
            padded = torch.full((rows, cols + 16), torch.nan, dtype=dtype, device=DEVICE)
            padded[:, 8 : 8 + cols] = tensors[name]
            strided[name] = padded[:, 8 : 8 + cols]
        strided["targets"] = tensors["targets"].repeat_interleave(3)[::3]
        assert_same(results(strided, **OPTIONS), results(tensors, **OPTIONS))

    @by_gpu
    def test_a_broadcast_row_and_odd_addresses(self, arch: str, dtype: torch.dtype) -> None:
        tensors = inputs(40, 24, 50, dtype=dtype, bias=True)
        tensors["x"] = tensors["x"][:1].expand(40, 24)
        wide = torch.full((50, 29), torch.nan, dtype=dtype, device=DEVICE)
        wide[:, 3:27] = tensors["weight"]
        hold(tensors | {"weight": wide[:, 3:27]})

    @pytest.mark.parametrize("sizes", [(0, 8, 16), (40, 0, 16)], ids=str)
    def test_nothing_to_multiply(self, sizes: tuple[int, ...]) -> None:
        tensors = inputs(*sizes, bias=True)
        assert launched(lambda: results(tensors)) == []
        hold(tensors)


class TestBits:
    @emulated
    @pytest.mark.parametrize(
        ("variable", "value"), [("SCHEDULE", "reverse"), ("SCHEDULE", "1"), ("COPIES", "early")]
    )
    def test_order_of_threads_and_copies_changes_none(
        self, arch: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = inputs(150, 24, 200, dtype=BF16, bias=True)
        with in_blocks():
            wanted = results(tensors, **OPTIONS)
            monkeypatch.setenv(f"GPTKERNELS_EMULATE_{variable}", value)
            assert_same(results(tensors, **OPTIONS), wanted)

    def test_only_what_is_wanted(self, arch: str) -> None:
        tensors = inputs(40, 16, 150, dtype=BF16, bias=True)
        call = functools.partial(loss, targets=tensors["targets"])
        with in_blocks():
            assert_gradients_alone(call, floating(tensors), ["x", "bias"])
        _, lse, *empty = FWD(*taken(tensors), None, *PLAIN, WHOLE, "cuda")
        assert [t.shape for t in empty] == [(0,)] * 3
        backward = functools.partial(
            BWD, torch.ones_like(lse), *taken(tensors), lse, *PLAIN, impl="cuda"
        )
        assert launched(lambda: backward(grad_mask=[False] * 3)) == []
        for mask, launches in (([True, False, False], 2), ([False, False, True], 3)):
            assert len(launched(lambda mask=mask: backward(grad_mask=mask))) == launches

    def test_gradients_of_the_forward_pass(self, arch: str) -> None:
        tensors = inputs(40, 16, 150, dtype=BF16, bias=True)
        dloss = torch.rand(40, device=DEVICE)
        _, lse, *found = direct(tensors, dloss, "cuda", EVERY)
        assert_same(found, BWD(dloss, *taken(tensors), lse, *EVERY, WHOLE, "cuda"))


def taken(tensors: dict[str, Any]) -> tuple[Any, ...]:
    """As the registered ops take them."""
    return tuple(tensors[name] for name in ("x", "weight", "bias", "targets"))


class TestRegistration:
    @pytest.mark.parametrize("bias", [False, True])
    def test_opcheck(self, bias: bool) -> None:
        tensors = inputs(6, 10, 20, bias=bias, ignored=False)
        dloss = torch.rand(6, device=DEVICE)
        for arriving, mask in ((None, [False] * 3), (dloss, [True, True, bias])):
            check_op(FWD, (*taken(tensors), arriving, *EVERY, mask, "cuda"))
        _, lse, *_ = FWD(*taken(tensors), None, *EVERY, [False] * 3, "cuda")
        for mask in ([True, True, bias], [True, False, False], [False, True, False]):
            check_op(BWD, (dloss, *taken(tensors), lse, *EVERY, mask, "cuda"))


@pytest.mark.usefixtures("hopper")
class TestHopper:
    @pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
    @pytest.mark.parametrize("build", BUILDS)
    def test_each_build(
        self, build: int, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With more tiles than CTAs, the last of which have few rows and columns."""
        for name in ("linear_cross_entropy_fwd", "linear_cross_entropy_bwd"):
            launcher = functools.partial(getattr(kernels, name), build=build)
            monkeypatch.setattr(kernels, name, launcher)
        tensors = inputs(135, 24, 517, dtype=dtype, bias=True, seed=seed)
        for options in ({}, OPTIONS):
            hold(tensors, seed, **options)
        names = launched(lambda: results(tensors))
        assert all("sm90" in name for name in names if "losses" not in name and "sums" not in name)

    def test_the_rule_takes_them(self) -> None:
        made = native.record(lambda: results(inputs(200, 72, 264, dtype=BF16)))["launches"]
        assert [launch["built"] is not None for launch in made] == [True, False, True, True, True]

    @pytest.mark.parametrize(
        ("width", "dtype", "reason"),
        [(8, FP32, "no products in full precision"), (12, BF16, "a: a stride is not a multiple")],
    )
    def test_what_they_cannot_take(self, width: int, dtype: torch.dtype, reason: str) -> None:
        tensors = inputs(40, width, 50, dtype=dtype)
        call = functools.partial(FWD, *taken(tensors), None, *PLAIN, WHOLE, "cuda")
        found = native.record(call)
        assert [launch["built"] for launch in found["launches"]] == [None, None]
        ((kernel, why),) = found["refusals"]
        assert kernel == "linear_cross_entropy_fwd for sm90"
        assert reason in why
        with pytest.raises(RuntimeError, match=f"build 0 cannot .*{reason}"):
            kernels.linear_cross_entropy_fwd(*taken(tensors), None, LossOptions(), WHOLE, build=0)

    def test_there_is_no_other_build(self) -> None:
        tensors = inputs(40, 8, 50, dtype=BF16)
        with pytest.raises(RuntimeError, match=r"build 3 cannot .*there are 3"):
            kernels.linear_cross_entropy_fwd(*taken(tensors), None, LossOptions(), WHOLE, build=3)


@pytest.mark.parametrize(
    ("rows", "width", "classes", "itemsize", "together"),
    [
        (8192, 768, 50257, 2, 8448),  # 132 of 147 MiB
        (64, 768, 50257, 2, 50257),
        (1, 8, 10, 4, 10),
        (2**20, 64, 50257, 2, 768),  # no less, though it takes more than the weight's gradient
        (2**20, 64, 512, 2, 512),
    ],
)
def test_memory_of_a_block(
    rows: int, width: int, classes: int, itemsize: int, together: int
) -> None:
    assert kernels.classes_together(rows, width, classes, itemsize) == together
