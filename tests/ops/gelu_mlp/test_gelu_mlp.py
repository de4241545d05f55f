from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gptkernels import gelu_mlp
from gptkernels.core import native
from gptkernels.core.choice import INTERPRETED, unavailable
from gptkernels.ops.gelu_mlp import cuda as cuda_kernels
from gptkernels.ops.gelu_mlp import torch as aten
from gptkernels.truth import baseline, parity, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("x", "w1", "b1", "w2", "b2")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_CUDA = unavailable("cuda", DEVICE, FP32)
needs_cuda = pytest.mark.skipif(NO_CUDA is not None, reason=f"impl='cuda': {NO_CUDA}")
CUDA = pytest.param("cuda", marks=needs_cuda)
RUNNABLE = [
    pytest.param(
        impl,
        dtype,
        id=f"{impl}-{str(dtype).removeprefix('torch.')}",
        marks=needs_cuda if impl == "cuda" else (),
    )
    for impl in ("torch", "triton", "cuda")
    for dtype in (FP32, FP16, BF16)
    if impl == "cuda" or unavailable(impl, DEVICE, dtype) is None
]
runnable = pytest.mark.parametrize(("impl", "dtype"), RUNNABLE)
every = pytest.mark.parametrize("impl", ["torch", "triton", CUDA])
all_dtypes = pytest.mark.parametrize("dtype", [FP32, FP16, BF16])


def inputs(
    *sizes: int, dtype: torch.dtype = FP32, biases: bool = True, seed: int = 0
) -> dict[str, Any]:
    """x (..., C), weights and biases for sizes (..., C, F), scaled so that h and y are about 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(device=DEVICE, dtype=dtype)

    *_, width, inner = sizes
    drawn = {
        "x": draw(*sizes[:-1]),
        "w1": draw(inner, width, scale=max(width, 1) ** -0.5),
        "b1": draw(inner),
        "w2": draw(width, inner, scale=max(inner, 1) ** -0.5),
        "b2": draw(width),
    }
    return drawn if biases else drawn | {"b1": None, "b2": None}


def assert_right(
    tensors: dict[str, Any], *, approximate: str = "tanh", seed: int = 0, **options: Any
) -> None:
    def candidate(**leaves: Any) -> Tensor:
        with parity.poisoned_outputs():
            return gelu_mlp(**leaves, approximate=approximate, **options)

    parity.assert_parity(
        candidate,
        functools.partial(baseline.gelu_mlp, approximate=approximate),
        functools.partial(reference.gelu_mlp, approximate=approximate),
        tensors,
        seed=seed,
    )


def gradients(call: Callable[..., Tensor], tensors: dict[str, Any], dy: Tensor) -> list[Tensor]:
    """y, then the gradients of those inputs that are tensors."""
    leaves = {k: v if v is None else v.detach().requires_grad_() for k, v in tensors.items()}
    y = call(**leaves)
    return [y.detach(), *torch.autograd.grad(y, [v for v in leaves.values() if v is not None], dy)]


class TestParity:
    @runnable
    @given(
        rows=st.integers(1, 150),
        width=st.integers(12, 80),
        inner=st.integers(12, 150),
        biases=st.booleans(),
        recompute=st.booleans(),
        approximate=st.sampled_from(["tanh", "none"]),
        seed=st.integers(0, 2**20),
    )
    def test_any_size(
        self,
        impl: str,
        dtype: torch.dtype,
        rows: int,
        width: int,
        inner: int,
        biases: bool,
        recompute: bool,
        approximate: str,
        seed: int,
    ) -> None:
        tensors = inputs(rows, width, inner, dtype=dtype, biases=biases, seed=seed)
        assert_right(tensors, impl=impl, approximate=approximate, recompute=recompute, seed=seed)

    @runnable
    @pytest.mark.parametrize("sizes", [(2, 3, 64, 64), (65, 33, 129), (1, 128, 16), (0, 8, 16)])
    def test_edges_of_tiles(
        self, impl: str, dtype: torch.dtype, sizes: tuple[int, ...], seed: int
    ) -> None:
        assert_right(inputs(*sizes, dtype=dtype, seed=seed), impl=impl, seed=seed)

    @pytest.mark.parametrize("dtype", [FP16, FP32])
    @pytest.mark.parametrize("tile", [(128, 128, 64, 8, 4), (128, 128, 32, 8, 4)])
    def test_large_tiles(
        self,
        dtype: torch.dtype,
        tile: tuple[int, ...],
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Their epilogue runs in two halves; shapes that choose them are slow to interpret."""
        kernels = pytest.importorskip("gptkernels.ops.gelu_mlp.triton")
        monkeypatch.setattr(kernels, "_tile_for", lambda *_: kernels._Tile(*tile))
        assert_right(inputs(150, 70, 210, dtype=dtype, seed=seed), impl="triton", seed=seed)

    @needs_cuda
    @all_dtypes
    @pytest.mark.parametrize("alignment", [8, 1])
    @pytest.mark.parametrize(
        "sizes",
        [
            (64, 64, 64),  # one small tile, exactly
            (40, 328, 24),  # along k, more steps of small tiles than stages
            (130, 328, 40),  # the same of large tiles: two of them, one nearly empty
            (128, 40, 256),
            (136, 136, 264),  # a last row, column and step of large tiles, none whole
            (1160, 8, 136),  # more row tiles than run together
        ],
    )
    def test_tiles_of_cuda(
        self, dtype: torch.dtype, sizes: tuple[int, ...], alignment: int, seed: int
    ) -> None:
        """With rows of whole 16 bytes, and with rows that no 16-byte access fits."""
        rows, width, inner = sizes
        if alignment == 1:
            width, inner = width + 1, inner - 1
        assert_right(inputs(rows, width, inner, dtype=dtype, seed=seed), impl="cuda", seed=seed)

    @needs_cuda
    @all_dtypes
    @pytest.mark.parametrize("rows", [2048, 3125])
    def test_many_rows_in_cuda(self, dtype: torch.dtype, rows: int, seed: int) -> None:
        """The weights' gradients sum their rows in parts, the biases' in many partial sums."""
        a, b = (torch.empty(rows, cols, dtype=dtype, device=DEVICE) for cols in (12, 20))
        splits = cuda_kernels._product(cuda_kernels._PARTIALS, cuda_kernels._WEIGHT, a, b)
        assert splits == rows // 1024
        assert_right(inputs(rows, 12, 20, dtype=dtype, seed=seed), impl="cuda", seed=seed)

    @pytest.mark.parametrize("impl", ["triton", CUDA])
    @pytest.mark.parametrize("approximate", ["tanh", "none"])
    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
    def test_large_pre_activations(self, impl: str, approximate: str) -> None:
        """GELU and its slope stay finite and exact where their powers and exponentials overflow."""
        h = torch.tensor([0.0, -0.0, 1e-30, 3, -3, 6, -6, 20, -20, 1e4, -1e4, 1e13, -1e13, 3e38])
        identity = torch.eye(len(h), device=DEVICE)
        tensors = {"x": identity, "w1": torch.diag(h).to(DEVICE), "b1": None}
        tensors |= {"w2": identity, "b2": None}
        options = {"approximate": approximate}
        y, _, dw1, _ = gradients(
            functools.partial(gelu_mlp, **options, impl=impl), tensors, identity
        )
        doubles = {k: v if v is None else v.double() for k, v in tensors.items()}
        truth = gradients(
            functools.partial(reference.gelu_mlp, **options), doubles, identity.double()
        )
        for found, exact in ((y, truth[0]), (dw1, truth[2])):  # gelu(h) and gelu'(h)
            torch.testing.assert_close(
                found.diag().double(), exact.diag(), rtol=1e-6, atol=1e-6, check_dtype=False
            )

    @runnable
    @pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 5), (1, 7, 1)])
    def test_tiny_sizes(self, impl: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        """PyTorch's error on a handful of numbers is luck: the rule holds over many draws."""
        limits: dict[str, list[parity.Measurement]] = {}
        for draw in range(10):
            for measurement in parity.measure(
                functools.partial(gelu_mlp, impl=impl),
                baseline.gelu_mlp,
                reference.gelu_mlp,
                inputs(*sizes, dtype=dtype, seed=draw),
                seed=draw,
            ):
                limits.setdefault(measurement.name, []).append(measurement)
        for drawn in limits.values():
            assert max(m.error for m in drawn) <= max(m.limit for m in drawn), drawn


class TestStrides:
    @runnable
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("offset", [8, 5])
    def test_rows_apart(self, impl: str, dtype: torch.dtype, offset: int, recompute: bool) -> None:
        """Bit for bit, unless rows no longer start at multiples of 16 bytes: Hopper's kernels want
        that, and others add in another order."""
        tensors = inputs(3, 21, 40, 56, dtype=dtype)
        strided = dict(tensors)
        strided["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
        for name in ("w1", "w2"):
            rows, cols = tensors[name].shape
            padded = torch.full((rows, cols + 16), float("nan"), dtype=dtype, device=DEVICE)
            padded[:, offset : offset + cols] = tensors[name]
            strided[name] = padded[:, offset : offset + cols]
        if offset % 8:
            assert_right(strided, impl=impl, recompute=recompute)
            return
        dy = torch.randn_like(tensors["x"])
        call = functools.partial(gelu_mlp, impl=impl, recompute=recompute)
        for a, b in zip(gradients(call, tensors, dy), gradients(call, strided, dy), strict=True):
            assert torch.equal(a, b)

    @runnable
    def test_broadcast_row(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(1, 40, 24, dtype=dtype)
        tensors["x"] = tensors["x"].expand(7, 40)
        assert_right(tensors, impl=impl)

    @every
    def test_gradient_of_a_sum(self, impl: str) -> None:
        """sum() sends back a gradient whose strides are all 0."""
        tensors = inputs(9, 12, 20)
        ones = torch.ones_like(tensors["x"])
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        found = torch.autograd.grad(gelu_mlp(**leaves, impl=impl).sum(), list(leaves.values()))
        wanted = gradients(functools.partial(gelu_mlp, impl=impl), tensors, ones)[1:]
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


class TestMemory:
    @every
    @pytest.mark.parametrize(
        ("recompute", "saved"),
        [(False, ["(6, 10)", "(20, 10)", "(10, 20)", "(6, 20)"]),
         (True, ["(6, 10)", "(20, 10)", "(20,)", "(10, 20)"])],
    )  # fmt: skip
    def test_what_is_kept(self, impl: str, recompute: bool, saved: list[str]) -> None:
        """x, the weights and the pre-activation, or, recomputing, x, the weights and b1."""
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        leaves = {k: v.requires_grad_() for k, v in inputs(2, 3, 10, 20).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gelu_mlp(**leaves, impl=impl, recompute=recompute)
        assert [str(tuple(tensor.shape)) for tensor in kept] == saved
        own = {leaves[name].untyped_storage().data_ptr() for name in NAMES}
        fresh = [t for t in kept if t.untyped_storage().data_ptr() not in own]
        assert len(fresh) == (0 if recompute else 1)

    @every
    def test_inference_keeps_no_pre_activation(
        self, impl: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from gptkernels.ops.gelu_mlp import op

        asked: list[bool] = []
        registered = op.gelu_mlp_fwd

        def spy(*arguments: Any) -> Any:
            asked.append(arguments[6])
            return registered(*arguments)

        monkeypatch.setattr(op, "gelu_mlp_fwd", spy)
        leaves = {k: v.requires_grad_() for k, v in inputs(6, 10, 20).items()}
        with torch.no_grad():
            gelu_mlp(**leaves, impl=impl)
        gelu_mlp(**leaves, impl=impl)
        assert asked == [False, True]

    @runnable
    def test_recomputation_changes_no_bit(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(70, 33, 130, dtype=dtype)
        dy = torch.randn_like(tensors["x"])
        kept, rebuilt = (
            gradients(functools.partial(gelu_mlp, impl=impl, recompute=recompute), tensors, dy)
            for recompute in (False, True)
        )
        for a, b in zip(kept, rebuilt, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("dtype", [FP32, FP16])
    @pytest.mark.parametrize("approximate", ["tanh", "none"])
    def test_activation_is_rebuilt_bit_for_bit(self, dtype: torch.dtype, approximate: str) -> None:
        kernels = pytest.importorskip("gptkernels.ops.gelu_mlp.triton")
        x, w1, b1, w2, _ = inputs(70, 48, 130, dtype=dtype).values()
        h = torch.empty(70, 130, dtype=dtype, device=DEVICE)
        a = torch.empty_like(h)
        kernels._launch_linear_gelu(x, w1, b1, h, a, approximate)
        _, rebuilt, _ = kernels._launch_linear_gelu_backward(x, w2, h, approximate, True, False)
        assert torch.equal(a, rebuilt)

    @needs_cuda
    @all_dtypes
    @pytest.mark.parametrize("approximate", ["tanh", "none"])
    @pytest.mark.parametrize("inner", [130, 136])
    def test_activation_is_rebuilt_bit_for_bit_in_cuda(
        self, dtype: torch.dtype, approximate: str, inner: int
    ) -> None:
        x, w1, b1, w2, _ = inputs(70, 48, inner, dtype=dtype).values()
        h = torch.empty(70, inner, dtype=dtype, device=DEVICE)
        a = torch.empty_like(h)
        cuda_kernels.linear_fwd(x, w1, b1, out=h, activation=a, approximate=approximate)
        _, rebuilt, _ = cuda_kernels.linear_gelu_bwd(x, w2, h, approximate, True, False)
        assert torch.equal(a, rebuilt)

    @every
    @pytest.mark.parametrize("recompute", [False, True])
    def test_only_gradients_that_are_wanted(self, impl: str, recompute: bool) -> None:
        tensors = inputs(6, 10, 20)
        dy = torch.randn_like(tensors["x"])
        call = functools.partial(gelu_mlp, impl=impl, recompute=recompute)
        everything = dict(zip(NAMES, gradients(call, tensors, dy)[1:], strict=True))
        for wanted in (*((name,) for name in NAMES), ("x", "b1"), ("w1", "w2")):
            leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in tensors.items()}
            call(**leaves).backward(dy)
            for name in NAMES:
                if name in wanted:
                    assert torch.equal(leaves[name].grad, everything[name])
                else:
                    assert leaves[name].grad is None


class TestIsolation:
    @runnable
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_a_bad_row_stays_alone(self, impl: str, dtype: torch.dtype, value: float) -> None:
        tensors = inputs(70, 33, 50, dtype=dtype)
        bad = tensors | {"x": tensors["x"].clone()}
        bad["x"][5, 7] = value
        dy = torch.randn_like(tensors["x"])
        call = functools.partial(gelu_mlp, impl=impl)
        clean, dirty = gradients(call, tensors, dy), gradients(call, bad, dy)
        others = torch.arange(70, device=DEVICE) != 5
        assert not torch.isfinite(dirty[0][5]).all()
        for a, b in zip(clean[:2], dirty[:2], strict=True):  # y and dx
            assert torch.equal(a[others], b[others])

    @runnable
    def test_a_bad_gradient_row_stays_alone(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(70, 33, 50, dtype=dtype)
        dy = torch.randn_like(tensors["x"])
        bad = dy.clone()
        bad[64] = float("nan")
        call = functools.partial(gelu_mlp, impl=impl)
        clean, dirty = gradients(call, tensors, dy)[1], gradients(call, tensors, bad)[1]
        others = torch.arange(70, device=DEVICE) != 64
        assert torch.isnan(dirty[64]).all()
        assert torch.equal(clean[others], dirty[others])

    @runnable
    def test_repeats_bit_for_bit(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(150, 33, 70, dtype=dtype)
        dy = torch.randn_like(tensors["x"])
        call = functools.partial(gelu_mlp, impl=impl)
        first = gradients(call, tensors, dy)
        for _ in range(3):
            for a, b in zip(first, gradients(call, tensors, dy), strict=True):
                assert torch.equal(a, b)

    @needs_cuda
    @pytest.mark.skipif(not native.EMULATED, reason="a GPU has one schedule")
    @all_dtypes
    @pytest.mark.parametrize("schedule", ["reverse", "1", "2"])
    def test_order_of_cuda_threads_changes_no_bit(
        self, dtype: torch.dtype, schedule: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = inputs(150, 33, 70, dtype=dtype)
        dy = torch.randn_like(tensors["x"])
        call = functools.partial(gelu_mlp, impl="cuda")
        forward = gradients(call, tensors, dy)
        monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
        for a, b in zip(forward, gradients(call, tensors, dy), strict=True):
            assert torch.equal(a, b)


class TestZeroSizes:
    @runnable
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("sizes", [(0, 8, 16), (2, 0, 8, 16), (5, 0, 16), (5, 8, 0), (0, 0, 0)])
    def test_same_as_pytorch(
        self, impl: str, dtype: torch.dtype, recompute: bool, sizes: tuple[int, ...]
    ) -> None:
        tensors = inputs(*sizes, dtype=dtype)
        dy = torch.randn_like(tensors["x"])
        found = gradients(functools.partial(gelu_mlp, impl=impl, recompute=recompute), tensors, dy)
        for a, b in zip(found, gradients(baseline.gelu_mlp, tensors, dy), strict=True):
            assert torch.equal(a, b)


class TestDtypes:
    @every
    @pytest.mark.parametrize("dtype", [FP16, BF16])
    def test_weights_of_another_dtype(self, impl: str, dtype: torch.dtype) -> None:
        if reason := unavailable(impl, DEVICE, dtype):
            pytest.skip(reason)
        tensors = inputs(6, 10, 20)
        mixed = tensors | {"x": tensors["x"].to(dtype)}
        same = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        dy = torch.randn_like(mixed["x"])
        call = functools.partial(gelu_mlp, impl=impl)
        found, wanted = gradients(call, mixed, dy), gradients(call, same, dy)
        assert [t.dtype for t in found] == [dtype, dtype, FP32, FP32, FP32, FP32]
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b.to(a.dtype))

    @every
    def test_autocast(self, impl: str) -> None:
        dtype = FP16 if impl == "triton" and INTERPRETED else BF16
        tensors = inputs(6, 10, 20)
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        with torch.autocast(DEVICE, dtype=dtype):
            y = gelu_mlp(**leaves, impl=impl)
        assert y.dtype == dtype
        dy = torch.randn_like(y)
        found = [y, *torch.autograd.grad(y, list(leaves.values()), dy)]
        assert all(gradient.dtype == FP32 for gradient in found[1:])
        same = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        wanted = gradients(functools.partial(gelu_mlp, impl=impl), same, dy)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b.to(a.dtype))

    @every
    def test_backward_under_autocast_keeps_the_dtype(self, impl: str) -> None:
        tensors = inputs(6, 10, 20)
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        y = gelu_mlp(**leaves, impl=impl)
        dy = torch.randn_like(y)
        with torch.autocast(DEVICE, dtype=BF16):
            found = torch.autograd.grad(y, list(leaves.values()), dy)
        wanted = gradients(functools.partial(gelu_mlp, impl=impl), tensors, dy)[1:]
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


class TestRegistration:
    @every
    @pytest.mark.parametrize("biases", [False, True])
    @pytest.mark.parametrize("keep_h", [False, True])
    def test_opcheck(self, impl: str, biases: bool, keep_h: bool) -> None:
        x, w1, b1, w2, b2 = inputs(6, 10, 20, biases=biases).values()
        ops = torch.ops.gptkernels
        torch.library.opcheck(ops.gelu_mlp_fwd.default, (x, w1, b1, w2, b2, "tanh", keep_h, impl))
        y, h = ops.gelu_mlp_fwd(x, w1, b1, w2, b2, "tanh", True, impl)
        for grad_mask in ([True] * 5, [True, False, True, False, True]):
            arguments = (x, w1, b1, w2, h if keep_h else None, "tanh", grad_mask, impl)
            torch.library.opcheck(ops.gelu_mlp_bwd.default, (torch.randn_like(y), *arguments))

    @every
    @pytest.mark.parametrize("recompute", [False, True])
    def test_compile_equals_eager(self, impl: str, recompute: bool) -> None:
        def loss(**leaves: Any) -> Tensor:
            return gelu_mlp(**leaves, impl=impl, recompute=recompute) * 2

        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (6, 9):
            tensors = inputs(2, rows, 10, 20)
            dy = torch.randn_like(tensors["x"])
            for a, b in zip(
                gradients(loss, tensors, dy), gradients(compiled, tensors, dy), strict=True
            ):
                assert torch.equal(a, b)

    @every
    @pytest.mark.parametrize(
        ("policy", "runs"),
        [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)],
    )
    def test_selective_checkpointing_sees_the_op(
        self, impl: str, policy: CheckpointPolicy, runs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module: Any = {"torch": aten, "cuda": cuda_kernels}.get(impl)
        if impl == "triton":
            module = pytest.importorskip("gptkernels.ops.gelu_mlp.triton")
        forward, count = module.gelu_mlp_fwd, []

        def counting(*arguments: Any) -> Any:
            count.append(1)
            return forward(*arguments)

        def choose(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
            ours = op is torch.ops.gptkernels.gelu_mlp_fwd.default
            return policy if ours else CheckpointPolicy.PREFER_RECOMPUTE

        call = functools.partial(gelu_mlp, impl=impl)

        def checkpointed(**leaves: Any) -> Tensor:
            contexts = functools.partial(create_selective_checkpoint_contexts, choose)
            return checkpoint(call, **leaves, use_reentrant=False, context_fn=contexts)

        tensors = inputs(6, 10, 20)
        dy = torch.randn_like(tensors["x"])
        wanted = gradients(call, tensors, dy)
        monkeypatch.setattr(module, "gelu_mlp_fwd", counting)
        for a, b in zip(wanted, gradients(checkpointed, tensors, dy), strict=True):
            assert torch.equal(a, b)
        assert len(count) == runs


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "sentence"),
        [
            (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
            (dict(x=torch.zeros(6, 10).long()), TypeError, "x must be float32, .* got int64"),
            (dict(w2=torch.zeros(10, 20, dtype=torch.complex64)), TypeError, "w2 .* got complex64"),
            (dict(b1=torch.zeros(20, dtype=torch.float64)), TypeError, "b1 .* got float64"),
            (dict(x=torch.zeros(())), ValueError, r"x must have shape \(\.\.\., C\)"),
            (dict(x=torch.zeros(6, 9)), ValueError, r"w1 must have shape \(F, 9\).*\(20, 10\)"),
            (dict(w1=torch.zeros(20)), ValueError, r"w1 must have shape \(F, 10\).* got \(20,\)"),
            (dict(w2=torch.zeros(20, 10)), ValueError, r"w2 must have shape \(10, 20\)"),
            (dict(b1=torch.zeros(10)), ValueError, r"b1 must have shape \(20,\)"),
            (dict(b2=torch.zeros(1, 10)), ValueError, r"b2 must have shape \(10,\)"),
            (dict(w1=torch.zeros(10, 20).t()), ValueError, "w1 must have a unit stride"),
            (dict(x=torch.zeros(10, 6).t()), ValueError, "x must have a unit stride"),
            (dict(b2=torch.zeros(10, device="meta")), ValueError, "b2 must be on the device of x"),
            (dict(approximate="sigmoid"), ValueError, "approximate must be 'tanh' or 'none'"),
            (dict(impl="cublas"), ValueError, "impl must be 'auto', .* got 'cublas'"),
        ],
    )  # fmt: skip
    def test_one_sentence(
        self, change: dict[str, Any], error: type[Exception], sentence: str
    ) -> None:
        arguments = {
            k: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v
            for k, v in (inputs(6, 10, 20) | change).items()
        }
        with pytest.raises(error, match=sentence) as caught:
            gelu_mlp(**arguments)
        assert "\n" not in str(caught.value)

    @pytest.mark.skipif(not INTERPRETED, reason="Triton runs natively here")
    def test_interpreter_refuses_bfloat16(self) -> None:
        with pytest.raises(RuntimeError, match=r"impl='triton': .*bfloat16"):
            gelu_mlp(**inputs(6, 10, 20, dtype=BF16), impl="triton")
