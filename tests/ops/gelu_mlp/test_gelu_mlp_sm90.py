"""The products of csrc/gelu_mlp/sm90, on a Hopper GPU or in the emulator, which imitates one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, emulated, needs_cuda
from op_inputs import gelu_mlp_inputs as inputs
from right import assert_right, assert_same
from torch import Tensor

from gptkernels import gelu_mlp
from gptkernels.core import cuda_products as products
from gptkernels.core import native
from gptkernels.ops.gelu_mlp import cuda as kernels

pytestmark = [needs_cuda, pytest.mark.usefixtures("hopper")]
RULE, BUILDS = range(3), range(7)  # the rule's builds are compiled for all dtypes, others for bf16
SPLIT_SUM = "gelu_mlp partial sums"


both_dtypes = pytest.mark.parametrize("dtype", [BF16, FP16])
every_build = pytest.mark.parametrize("build", BUILDS)


def integers(*shape: int, dtype: torch.dtype = BF16, span: int = 2) -> Tensor:
    """Returns whole numbers. Their products and sums are exact in fp32, in any order."""
    return torch.randint(-span, span + 1, shape).to(device=DEVICE, dtype=dtype)


def filled(*shape: int, dtype: torch.dtype) -> Tensor:
    """Returns an output filled with NaN, so that elements that are not written show."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def exact(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.double() @ b.double()).to(dtype)


def launched(run: Callable[[], Any]) -> list[dict[str, Any]]:
    return native.record(run)["launches"]


# (m, n, k): exactly one tile; a corner of one tile; more tiles than CTAs, some incomplete, with
# more steps along k than stages; one row; one step after a full round of stages.
SIZES = [(128, 256, 64), (40, 24, 8), (300, 520, 392), (1, 264, 72), (200, 136, 320)]


class TestProducts:
    """Inputs are whole numbers, so every product has exactly one right answer, bit for bit."""

    @every_build
    @pytest.mark.parametrize("sizes", SIZES)
    def test_forward(self, build: int, sizes: tuple[int, int, int], seed: int) -> None:
        m, n, k = sizes
        a, b, bias = integers(m, k), integers(n, k), integers(n)
        out, activation = filled(m, n, dtype=BF16), filled(m, n, dtype=BF16)
        products.linear_fwd(a, b, bias, out=out, activation=activation, build=build)
        assert torch.equal(out, (a.double() @ b.double().T + bias.double()).to(BF16))
        assert torch.equal(activation, self.gelu_of(out))

    @every_build
    @pytest.mark.parametrize("sizes", SIZES)
    def test_backward(self, build: int, sizes: tuple[int, int, int], seed: int) -> None:
        m, n, k = sizes
        a, b = integers(m, k), integers(k, n)
        out = filled(m, n, dtype=BF16)
        products.linear_bwd(a, b, out=out, build=build)
        assert torch.equal(out, exact(a, b, BF16))

    @pytest.mark.parametrize("build", [*BUILDS, "any GPU"])
    @pytest.mark.parametrize("sizes", SIZES[1:3])
    def test_sum_of_products(
        self,
        build: Any,
        sizes: tuple[int, int, int],
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """In fp32, as linear_cross_entropy adds up dx."""
        if build == "any GPU":
            monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm80")
        number = build if build in BUILDS else -1
        m, n, k = sizes
        wanted, addend = torch.zeros(m, n).to(DEVICE), None
        for _ in range(2):
            a, b, total = integers(m, k), integers(k, n), filled(m, n, dtype=FP32)
            products.linear_bwd(a, b, addend=addend, total=total, build=number)
            wanted += exact(a, b, FP32)
            assert torch.equal(total, wanted)
            addend = total

    @every_build
    @pytest.mark.parametrize("sizes", SIZES)
    def test_weight(self, build: int, sizes: tuple[int, int, int], seed: int) -> None:
        m, n, k = sizes
        m = -(-m // 8) * 8  # TMA needs rows of a multiple of 16 bytes
        a, b = integers(k, m), integers(k, n)
        out = products.weight_grad(a, b, build=build)
        assert torch.equal(out, exact(a.T, b, BF16))

    @every_build
    @pytest.mark.parametrize("splits", [2, 5])
    def test_parts_of_k(self, build: int, splits: int, seed: int) -> None:
        """Each split of k is the product of its own rows. Splits have the same number of steps of
        64 rows, or one step more."""
        m, n, k = 136, 264, 5 * 64 + 8
        a, b = integers(k, m), integers(k, n)
        partial = filled(splits, m * n, dtype=FP32)
        weight = products.MADE, products.WEIGHT
        products.product(*weight, a, b, partial=partial, splits=splits, build=build)
        ends = [6 * part // splits * 64 for part in range(splits)] + [k]
        for part, (first, last) in enumerate(itertools.pairwise(ends)):
            wanted = exact(a[first:last].T, b[first:last], FP32)
            assert torch.equal(partial[part].view(m, n), wanted), part

    @every_build
    @pytest.mark.parametrize("approximate", ["tanh", "none"])
    def test_slope(
        self, build: int, approximate: str, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The results have the same bits as those of the kernel for any GPU, whose products are
        exact too."""
        m, n, k = 150, 328, 72
        dy, w2 = integers(m, k), integers(k, n)
        h = torch.randn(m, n).to(device=DEVICE, dtype=BF16) * 2
        options = (dy, w2, h, approximate, True, True)
        dh, a, partial = kernels.linear_gelu_bwd(*options, build=build)
        assert partial.shape == (3, n)  # each sum is over 64 rows
        for part, rows in zip(partial.double(), dh.double().split(64), strict=True):
            bound = 64 * 2.0**-24 * rows.abs().sum(0)  # holds for any order of an fp32 sum
            assert ((part - rows.sum(0)).abs() <= bound).all()
        monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm80")
        if native.EMULATED:
            wanted_dh, wanted_a, _ = kernels.linear_gelu_bwd(*options)
            assert torch.equal(dh, wanted_dh)
            assert torch.equal(a, wanted_a)

    @both_dtypes
    @pytest.mark.parametrize("build", RULE)
    @pytest.mark.parametrize("outputs", ["out", "activation", "both"])
    def test_outputs_left_out(
        self, dtype: torch.dtype, build: int, outputs: str, seed: int
    ) -> None:
        a, b = integers(70, 40, dtype=dtype), integers(328, 40, dtype=dtype)
        out, activation = (filled(70, 328, dtype=dtype) for _ in range(2))
        products.linear_fwd(
            a,
            b,
            None,
            out=out if outputs != "activation" else out[:0],
            activation=activation if outputs != "out" else None,
            build=build,
        )
        wanted = exact(a, b.T, dtype)
        if outputs != "activation":
            assert torch.equal(out, wanted)
        if outputs != "out":
            assert torch.equal(activation, self.gelu_of(wanted))

    @staticmethod
    def gelu_of(h: Tensor) -> Tensor:
        """Returns gelu(h), computed by the kernel for any GPU from an exact product with 1. Each
        distinct value is computed once, so that all of them fit in one row."""
        values, place = h.unique(return_inverse=True)
        row = torch.zeros(1, -(-len(values) // 8) * 8, dtype=h.dtype, device=h.device)
        row[0, : len(values)] = values
        activation = torch.empty_like(row)
        products.linear_fwd(
            torch.ones(1, 1, dtype=FP32, device=DEVICE).to(h.dtype),
            row.T.contiguous(),
            None,
            out=row.new_empty(row.shape),
            activation=activation,
        )
        return activation[0][place]


@pytest.fixture
def build_for_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that makes one build compute every product of the public op."""

    def choose(build: int) -> None:
        for name in ("gelu_mlp_fwd", "gelu_mlp_bwd"):
            launcher = functools.partial(getattr(kernels, name), build=build)
            monkeypatch.setattr(kernels, name, launcher)

    return choose


class TestParity:
    @both_dtypes
    @pytest.mark.parametrize("build", [-1, *RULE])
    @pytest.mark.parametrize(
        ("approximate", "biases", "recompute"),
        [("tanh", True, False), ("none", False, True)],
    )
    def test_against_the_truth(
        self,
        dtype: torch.dtype,
        build: int,
        approximate: str,
        biases: bool,
        recompute: bool,
        seed: int,
        build_for_all: Callable[[int], None],
    ) -> None:
        build_for_all(build)
        tensors = inputs(200, 72, 264, dtype=dtype, biases=biases, seed=seed)
        how = {"recompute": recompute, "impl": "cuda"}
        assert_right(gelu_mlp, tensors, seed, approximate=approximate, **how)

    def test_the_rule_takes_hopper_kernels(self) -> None:
        """With build -1 Hopper's kernels run. Otherwise the tests above would not test them."""
        x, w1, b1, w2, b2 = inputs(200, 72, 264, dtype=BF16).values()
        found = launched(lambda: kernels.gelu_mlp_fwd(x, w1, b1, w2, b2, "tanh", True))
        assert len(found) == 2
        assert all("sm90" in launch["kernel"] and launch["built"] for launch in found)


def everything(dtype: torch.dtype, build: int, *sizes: int, **changed: Tensor) -> list[Tensor]:
    """Returns all results of one MLP, forward and backward: y, h, dx, dw1, db1, dw2, db2."""
    x, w1, b1, w2, b2, dy = (
        inputs(*sizes, dtype=dtype) | {"dy": torch.ones(sizes[:2]).to(DEVICE, dtype)} | changed
    ).values()
    y, h = kernels.gelu_mlp_fwd(x, w1, b1, w2, b2, "tanh", True, build=build)
    grads = kernels.gelu_mlp_bwd(dy, x, w1, b1, w2, h, "tanh", [True] * 5, build=build)
    return [y, h, *grads]


@functools.cache
def as_scheduled(build: int, *sizes: int) -> list[Tensor]:
    """By the default schedule. Those of other schedules are compared with it."""
    return everything(BF16, build, *sizes)


class TestBits:
    @emulated
    @every_build
    @pytest.mark.parametrize(
        ("variable", "value"),
        [("SCHEDULE", "reverse"), ("SCHEDULE", "1"), ("COPIES", "early")],
    )
    def test_order_of_threads_and_copies_changes_none(
        self, build: int, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = (200, 72, 264) if build in RULE else (136, 40, 264)
        wanted = as_scheduled(build, *sizes)
        monkeypatch.setenv(f"GPTKERNELS_EMULATE_{variable}", value)
        assert_same(everything(BF16, build, *sizes), wanted)

    @both_dtypes
    @pytest.mark.parametrize("approximate", ["tanh", "none"])
    @pytest.mark.parametrize("build", RULE)
    def test_activation_is_rebuilt_bit_for_bit(
        self, dtype: torch.dtype, approximate: str, build: int
    ) -> None:
        x, w1, b1, w2, _ = inputs(70, 48, 136, dtype=dtype).values()
        h, a = (filled(70, 136, dtype=dtype) for _ in range(2))
        options: dict[str, Any] = {"approximate": approximate, "build": build}
        products.linear_fwd(x, w1, b1, out=h, activation=a, **options)
        _, rebuilt, _ = kernels.linear_gelu_bwd(x, w2, h, approximate, True, False, build=build)
        assert torch.equal(a, rebuilt)


class TestIsolation:
    @pytest.mark.parametrize("build", RULE)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_bad_row_stays_alone(self, build: int, value: float) -> None:
        clean = everything(BF16, build, 150, 72, 136)
        x = inputs(150, 72, 136, dtype=BF16)["x"]
        x[149, 7] = value  # a row of the last, incomplete tile
        dirty = everything(BF16, build, 150, 72, 136, x=x)
        for a, b in zip(clean[:3], dirty[:3], strict=True):  # y, h, dx
            assert torch.equal(a[:149], b[:149])
            assert not torch.isfinite(b[149]).all()

    @pytest.mark.parametrize("build", RULE)
    def test_nothing_beside_the_operands_reaches_the_result(self, build: int) -> None:
        """The operands are parts of larger tensors that hold NaN, along k and along n."""
        clean = everything(BF16, build, 150, 72, 136)
        tensors = inputs(150, 72, 136, dtype=BF16)
        tensors["dy"] = torch.ones_like(tensors["x"])
        for name in ("x", "w1", "w2", "dy"):
            rows, cols = tensors[name].shape
            padded = filled(rows + 64, cols + 64, dtype=BF16)
            padded[:rows, :cols] = tensors[name]
            tensors[name] = padded[:rows, :cols]
        assert_same(everything(BF16, build, 150, 72, 136, **tensors), clean)


class TestChoice:
    def test_what_tma_cannot_address_goes_to_the_kernel_for_any_device(self) -> None:
        x = inputs(70, 40, 64, dtype=BF16)["x"]
        shifted = torch.empty(70 * 48 + 1, dtype=BF16, device=DEVICE)[1:].view(70, 48)[:, :40]
        shifted.copy_(x)
        w = integers(64, 40)
        for a, why in ((shifted, "a: the tensor does not start"), (x[:, :39], "")):
            b = w[:, : a.shape[1]]
            found = native.record(
                functools.partial(products.linear_fwd, a, b, None, out=filled(70, 64, dtype=BF16))
            )
            (launch,) = found["launches"]
            refused = [reason for kernel, reason in found["refusals"] if "sm90" in kernel]
            assert ("sm90" in launch["kernel"]) is not bool(why)
            assert [why in reason for reason in refused] == [True] * bool(why)

    @pytest.mark.parametrize("first", [0, 1])
    def test_a_bias_that_pairs_cannot_be_read_from_goes_there_too(self, first: int) -> None:
        a, b = integers(70, 40), integers(64, 40)
        flat = integers(1, 65).view(-1)  # like parameters that are views of one flat tensor
        bias = flat[first : first + 64]
        out = filled(70, 64, dtype=BF16)
        found = native.record(functools.partial(products.linear_fwd, a, b, bias, out=out))
        (launch,) = found["launches"]
        assert ("sm90" in launch["kernel"]) is (first == 0)
        products.linear_fwd(a, b, bias, out=out)
        assert torch.equal(out, a @ b.T + bias)

    @pytest.mark.parametrize(
        ("dtype", "n", "reason"),
        [
            (FP32, 64, "no products in full precision"),
            (BF16, 60, "no multiple of 16 bytes"),
            (FP16, 64, "not built for fp16"),
        ],
    )
    def test_a_build_says_why_it_cannot(self, dtype: torch.dtype, n: int, reason: str) -> None:
        a, b = integers(70, 40, dtype=dtype), integers(n, 40, dtype=dtype)
        with pytest.raises(RuntimeError, match=f"build 3 cannot .*{reason}"):
            products.linear_fwd(a, b, None, out=filled(70, n, dtype=dtype), build=3)

    def test_more_parts_of_k_than_steps(self) -> None:
        a, b = integers(72, 40), integers(72, 64)
        partial = filled(3, 40 * 64, dtype=FP32)
        weight = products.MADE, products.WEIGHT
        with pytest.raises(RuntimeError, match="fewer steps along k than splits, 3"):
            products.product(*weight, a, b, partial=partial, splits=3, build=0)

    def test_there_is_no_other_build(self) -> None:
        a, b = integers(70, 40), integers(64, 40)
        with pytest.raises(RuntimeError, match=r"build 7 cannot .*there are 7"):
            products.linear_fwd(a, b, None, out=filled(70, 64, dtype=BF16), build=7)

    @emulated
    def test_other_devices_have_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm80")
        a, b = integers(70, 40), integers(64, 40)
        with pytest.raises(RuntimeError, match=r"for compute capability 9\.0 alone"):
            products.linear_fwd(a, b, None, out=filled(70, 64, dtype=BF16), build=0)

    def test_few_tiles_of_a_weight_gradient_are_made_in_parts_of_k(self) -> None:
        """A dry run for an H200: 9 tiles of 128 x 128 would leave most of its 132 multiprocessors
        idle, so k is split."""
        a, b = (torch.empty(16384, 384, dtype=BF16, device="meta") for _ in range(2))
        launches = native.dry_run(
            lambda: products.weight_grad(a, b), capability=90, multiprocessors=132
        )["launches"]
        assert [launch["kernel"] for launch in launches[1:]] == [SPLIT_SUM]
        assert launches[0]["tiles"] > 9

    @pytest.mark.parametrize(("m", "n", "k"), [(8192, 3072, 768), (8192, 768, 3072)])
    def test_gpt2_takes_hopper_kernels(self, m: int, n: int, k: int) -> None:
        a = torch.empty(m, k, dtype=BF16, device="meta")
        b = torch.empty(n, k, dtype=BF16, device="meta")
        out = torch.empty(m, n, dtype=BF16, device="meta")
        (launch,) = native.dry_run(
            lambda: products.linear_fwd(a, b, None, out=out), capability=90, multiprocessors=132
        )["launches"]
        assert "sm90" in launch["kernel"]
