"""LayerNorm of wide rows by clusters (csrc/layer_norm/sm90), on a GPU of compute capability 9.0 or
in the emulator, which imitates one. Builds take narrow rows too, which makes quick tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, HERE, emulated, name_of, needs_cuda
from op_inputs import layer_norm_inputs
from right import assert_right, assert_same, run

from gptkernels import layer_norm
from gptkernels.bench import dry_run
from gptkernels.cli import explain
from gptkernels.core import native
from gptkernels.ops.layer_norm import cuda as kernels

pytestmark = [needs_cuda, pytest.mark.usefixtures("hopper")]

FWD = native.module().layer_norm_fwd_builds() if "cuda" in HERE else []
BWD = native.module().layer_norm_bwd_builds() if "cuda" in HERE else []
by_builds = pytest.mark.parametrize(
    ("forward", "backward"), [(i, min(i, len(BWD) - 1)) for i in range(len(FWD))]
)
# The builds with clusters of 2, 4 and 8 CTAs.
by_cluster = pytest.mark.parametrize("build", [0, 1, 2])


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A function that makes the op take these builds."""

    def chosen(forward: int, backward: int) -> None:
        for name, build in (("layer_norm_fwd", forward), ("layer_norm_bwd", backward)):
            launcher = functools.partial(getattr(kernels, name), build=build)
            monkeypatch.setattr(kernels, name, launcher)

    return chosen


def hold(inputs: dict[str, Any], seed: int, **options: Any) -> list[dict[str, Any]]:
    """Asserts that layer_norm and its gradients pass the parity rule. Returns the launches; on a
    GPU those of the backward pass are missing."""
    call = functools.partial(assert_right, layer_norm, inputs, seed, **options, impl="cuda")
    return native.record(call)["launches"]


def clusters(launches: list[dict[str, Any]], kernel: str) -> set[tuple[int, int]]:
    """Returns (CTAs of a cluster, threads) of the launches of this kernel."""
    return {(x["cluster"], x["threads"]) for x in launches if x["kernel"] == kernel}


@by_builds
@pytest.mark.parametrize(("C", "dtype"), [(1003, FP32), (3000, FP16), (4104, BF16)])
def test_every_build(
    forward: int, backward: int, C: int, dtype: torch.dtype, choose: Any, seed: int
) -> None:
    """Rows of odd length, rows that end within a cluster, and more rows than clusters."""
    choose(forward, backward)
    hold(layer_norm_inputs(5, C, dtype=dtype), seed)
    launches = hold(
        layer_norm_inputs(5, C, dtype=dtype, residual=dtype), seed, prenorm=True, dropout_p=0.2
    )
    if native.EMULATED:
        for kernel, of in (("fwd", FWD[forward]), ("bwd", BWD[backward])):
            ((ctas, threads),) = clusters(launches, f"layer_norm_{kernel}_sm90")
            assert ctas == of["cluster"]
            assert threads <= of["threads"]


@pytest.mark.parametrize(
    ("C", "dtype", "forward", "backward"),
    [
        (8200, FP32, None, (4, 160)),  # backward: too wide for the sums of one CTA
        (16_384, BF16, (2, 256), (4, 256)),
        (16_392, FP16, (4, 160), (8, 160)),
        (16_385, FP32, (8, 160), (8, 160)),  # element by element, two groups for each thread
        (32_776, BF16, (8, 160), (8, 160)),  # backward four groups for each thread
    ],
)
def test_sizes_of_the_rule(
    C: int,
    dtype: torch.dtype,
    forward: tuple[int, int] | None,
    backward: tuple[int, int],
    seed: int,
) -> None:
    launches = hold(layer_norm_inputs(3, C, dtype=dtype, residual=dtype), seed, prenorm=True)
    if native.EMULATED:
        assert clusters(launches, "layer_norm_fwd_sm90") == ({forward} if forward else set())
        assert clusters(launches, "layer_norm_bwd_sm90") == {backward}


@pytest.mark.parametrize(
    ("C", "dtype", "forward"),
    [
        (131_072, FP32, {(8, 512)}),
        (131_080, BF16, {(8, 288)}),  # eight groups for each thread
        (131_080, FP32, set()),
        (65_536, BF16, {(8, 256)}),
        (65_537, BF16, set()),
    ],
)
def test_the_widest_rows(
    C: int, dtype: torch.dtype, forward: set[tuple[int, int]], seed: int
) -> None:
    """The widest rows that clusters take, and wider ones, which go to the kernels for any GPU.
    Backward this limit is 65,536 columns."""
    launches = hold(layer_norm_inputs(1, C, dtype=dtype), seed)
    if native.EMULATED:
        assert clusters(launches, "layer_norm_fwd_sm90") == forward
        backward = {(8, 256)} if C == 65_536 else set()
        assert clusters(launches, "layer_norm_bwd_sm90") == backward


@by_cluster
@pytest.mark.parametrize("x_dtype", [FP32, FP16, BF16], ids=name_of)
def test_mixtures_of_dtypes(build: int, x_dtype: torch.dtype, choose: Any, seed: int) -> None:
    choose(build, build)
    for residual in (FP32, FP16, BF16):
        inputs = layer_norm_inputs(4, 520, dtype=x_dtype, weight=residual, residual=residual)
        options = dict(prenorm=True, residual_in_fp32=(seed + build) % 2 == 0)
        hold(inputs, seed, dropout_p=0.3, **options)


@by_cluster
def test_strided_rows(build: int, choose: Any, seed: int) -> None:
    """Rows are aligned if the stride is a multiple of 16 elements, and not aligned with another
    stride or address."""
    choose(build, build)
    for C, wider in ((400, 416), (400, 413), (399, 416)):
        base = torch.randn(4, wider, device=DEVICE, dtype=BF16)
        inputs = layer_norm_inputs(4, C, dtype=BF16)
        hold(inputs | dict(x=base[:, :C]), seed)
        hold(inputs | dict(residual=base[:, wider - C :]), seed, prenorm=True)


@by_cluster
def test_large_mean_and_no_variance(build: int, choose: Any, seed: int) -> None:
    choose(build, build)
    inputs = layer_norm_inputs(5, 1200)
    hold(inputs | dict(x=inputs["x"] + 1000), seed)
    for C in (1200, 779):
        bias = torch.randn(C, device=DEVICE)
        x = torch.cat((torch.randn(12), torch.tensor([0.0, 1.0, 1e4 / 3, 1e15])))[:, None]
        x = x.to(DEVICE).expand(16, C)
        y = layer_norm(x, torch.ones(C, device=DEVICE), bias, eps=1e-30, impl="cuda")
        assert torch.equal(y, bias.expand(16, C))


@by_cluster
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(build: int, poison: float, choose: Any) -> None:
    choose(build, build)
    x = torch.randn(6, 1000, device=DEVICE, requires_grad=True)
    weight = torch.randn(1000, device=DEVICE)
    dirty = x.detach().clone()
    dirty[2, 997] = poison
    dirty.requires_grad_()
    clean_y, dirty_y = (layer_norm(t, weight, impl="cuda") for t in (x, dirty))
    others = torch.arange(6, device=DEVICE) != 2
    assert dirty_y[2].isnan().all()
    assert torch.equal(dirty_y[others], clean_y[others])
    clean_y.sum().backward()
    dirty_y.sum().backward()
    assert dirty.grad[2].isnan().all()
    assert torch.equal(dirty.grad[others], x.grad[others])


@by_cluster
@pytest.mark.parametrize("partials", [1, 3, 9])
def test_any_number_of_partial_sums(
    build: int, partials: int, choose: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than clusters, clusters with one row more than others, and clusters without
    rows."""
    choose(build, build)
    monkeypatch.setattr(native.module(), "layer_norm_bwd_partials", lambda *_sizes: partials)
    hold(layer_norm_inputs(7, 600), seed)


@by_cluster
def test_only_the_gradients_asked_for(build: int) -> None:
    x, dy = (torch.randn(5, 600, device=DEVICE) for _ in range(2))
    weight = torch.randn(600, device=DEVICE)
    _, _, mean, rstd = kernels.layer_norm_fwd(
        x, weight, None, None, None, 0.0, 1e-5, None, build=build
    )
    given = (dy, None, x, mean, rstd, weight, None, 0.0, x.dtype, None)
    both, dweight, dbias, neither = (
        kernels.layer_norm_bwd(*given, *wanted, build=build)
        for wanted in ((True, True), (True, False), (False, True), (False, False))
    )
    assert torch.equal(dweight[2], both[2])
    assert torch.equal(dbias[3], both[3])
    assert torch.equal(neither[0], both[0])
    assert dweight[3].numel() == dbias[2].numel() == neither[2].numel() == 0


@emulated
@by_cluster
def test_any_schedule_gives_the_same_bits(
    build: int, choose: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits do not depend on which CTA of a cluster runs first, nor on when copies arrive."""
    choose(build, build)
    inputs = layer_norm_inputs(5, 1000, residual=FP32)
    call = functools.partial(layer_norm, prenorm=True, impl="cuda")
    wanted = run(call, inputs)
    for schedule in ("forward", "reverse", str(seed)):
        monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
        for copies in ("late", "early"):
            monkeypatch.setenv("GPTKERNELS_EMULATE_COPIES", copies)
            assert_same(run(call, inputs), wanted)


@emulated
def test_what_clusters_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 9000), torch.ones(9000)
    run = functools.partial(kernels.layer_norm_fwd, x, weight, None, None, None, 0.0, 1e-5, None)
    many = f"build 9 cannot run: there are {len(FWD)} builds"
    with pytest.raises(RuntimeError, match=rf"layer_norm_fwd_sm90 on x \(1, 9000\) fp32: {many}"):
        run(build=9)
    wide = torch.zeros(1, 70_000)
    with pytest.raises(
        RuntimeError, match="70000 columns do not fit in the registers of 2 CTAs of"
    ):
        kernels.layer_norm_fwd(wide, wide[0], None, None, None, 0.0, 1e-5, None, build=0)
    ones = torch.ones(1)
    given = (wide, None, wide, ones, ones, wide[0], None, 0.0, FP32, None, True, True)
    with pytest.raises(RuntimeError, match=r"layer_norm_bwd_sm90 .*: build 2 cannot run: rows of"):
        kernels.layer_norm_bwd(*given, build=2)
    monkeypatch.setenv(native.ARCH_VARIABLE, "sm80")
    with pytest.raises(RuntimeError, match=r"cannot run: it is for compute capability 9\.0 alone"):
        run(build=0)
    assert [x["kernel"] for x in native.record(run)["launches"]] == ["layer_norm_fwd"]


def test_the_choice_is_explained() -> None:
    def found(rows: int, cols: int, arch: str) -> str:
        problem = dry_run.layer_norm(rows, cols, BF16)
        return "\n".join(explain.lines(problem, dry_run.MACHINES[arch]))

    narrow, wide = found(4096, 4096, "sm90"), found(4096, 32_768, "sm90")
    assert "not layer_norm_fwd_sm90: rows of fewer than 16384 columns need no cluster" in narrow
    assert "not layer_norm_bwd_sm90: rows of up to 8192 columns need no cluster" in narrow
    assert "build 1, 4 CTAs of 256 threads: could run" in narrow
    assert "grid 16384 in clusters of 4 of 256 threads" in wide
    assert (
        "grid 264 in clusters of 8 of 256 threads" in wide
    )  # two CTAs on each of 132 multiprocessors
    assert "2 builds cannot take it" in wide
    assert "cluster" not in found(4096, 32_768, "sm80")
