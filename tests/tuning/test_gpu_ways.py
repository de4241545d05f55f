"""The ways that are tried on a GPU. Without one nothing is launched: CUDA C++ launchers make a dry
run, and Triton's kernels note what they are launched with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from harness import BF16, FP16, needs_dry_run, of
from torch import Tensor

import gptkernels
from gptkernels.bench import dry_run
from gptkernels.bench.dry_run import Launched
from gptkernels.core import native, plans
from gptkernels.core.tuned import EAGER, FORWARD, TRAINING, Key
from gptkernels.ops.attention import dense
from gptkernels.ops.attention import torch as torch_kernels
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import backend, named
from gptkernels.truth import baseline, reference
from gptkernels.truth.parity import assert_parity
from gptkernels.tuning import gpu_ways

(needs_triton,) = of("triton", dtype=FP16).marks
HOPPER = dry_run.MACHINES["sm90"]
Inputs = dict[str, Any]


# ---- classes of GPT-2's calls


def heads(B: int = 8, T: int = 1024, H: int = 12, D: int = 64, Hk: int = 12, **how: Any) -> Inputs:
    shapes = {"q": (B, T, H, D), "k": (B, T, Hk, D), "v": (B, T, Hk, D)}
    return {name: torch.empty(shape, **how) for name, shape in shapes.items()}


def rows(M: int = 8192, C: int = 768, residual: bool = True, **how: Any) -> Inputs:
    shapes = {"x": (M, C), "weight": (C,), "bias": (C,)} | (
        {"residual": (M, C)} if residual else {}
    )
    return {name: torch.empty(shape, **how) for name, shape in shapes.items()}


def mlp(M: int = 8192, C: int = 768, F: int = 3072, **how: Any) -> Inputs:
    shapes = {"x": (M, C), "w1": (F, C), "b1": (F,), "w2": (C, F), "b2": (C,)}
    return {name: torch.empty(shape, **how) for name, shape in shapes.items()}


def head(M: int = 8192, C: int = 768, V: int = 50257) -> Inputs:
    found = {name: torch.empty(n, C, **META) for name, n in (("x", M), ("weight", V))}
    return found | {"targets": torch.empty(M, dtype=torch.int64, device="meta")}


MAKERS: dict[str, Callable[..., Inputs]] = {"attention": heads, "layer_norm": rows, "gelu_mlp": mlp}
OPTIONS: dict[str, Inputs] = {"layer_norm": {"prenorm": True}}
META: Inputs = {"dtype": BF16, "device": "meta"}


def key_of(op: str, direction: str, inputs: Mapping[str, Any], **options: Any) -> Key:
    """The class of a call, as if its tensors were on a GPU."""
    leaves = {
        name: x.detach().requires_grad_(direction == TRAINING)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
    with plans.recording() as calls:
        getattr(gptkernels, op)(**leaves, **options)
    call = calls[-1]
    facts = dict(call.facts) | {"device": "cuda"}
    return Key.of(op, direction, EAGER, facts, call.sizes)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, where all implementations are."""
    monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm90")
    monkeypatch.setattr(gpu_ways, "unavailable", lambda impl, device, dtype: None)
    monkeypatch.setattr(gpu_ways.dry_run, "machine_here", lambda: HOPPER)


def of_gpt2(op: str, direction: str) -> gpu_ways.Ways:
    inputs = MAKERS[op](**META)
    return gpu_ways.ways(key_of(op, direction, inputs, **OPTIONS.get(op, {})), inputs)


each_op = pytest.mark.parametrize("op", MAKERS)
on_no_gpu = [needs_dry_run, needs_triton, pytest.mark.usefixtures("gpu")]


class TestEnumeration:
    pytestmark = on_no_gpu

    @each_op
    def test_of_gpt2(self, op: str) -> None:
        found = of_gpt2(op, TRAINING)
        forward = of_gpt2(op, FORWARD)
        assert (forward.forward, forward.backward) == (found.forward, [])
        for ways in found:
            assert len(set(ways)) == len(ways)
            assert {"torch", "cuda", "triton"} <= set(ways)
            variants = [way for way in ways if ":" in way]
            assert 0 < sum(way.startswith("cuda:") for way in variants) <= gpu_ways.MOST_BUILDS
            assert sum(way.startswith("triton:") for way in variants) == gpu_ways.MOST_TILES
            # The launchers' own choices come before their variants.
            for way in variants:
                assert ways.index(plans.implementation(way)) < ways.index(way)

    def test_of_a_head(self) -> None:
        inputs = head()
        found = gpu_ways.ways(key_of("linear_cross_entropy", TRAINING, inputs), inputs)
        for ways in found:
            assert ways[:2] == ["torch", "cuda"]
            kinds = [way.partition("=")[0] for way in ways[2:]]
            assert kinds[: kinds.index("triton")] == ["cuda:build"] * kinds.index("triton")
            assert "cuda:build" in kinds
            assert kinds[kinds.index("triton") + 1 :] == ["triton:tile"] * gpu_ways.MOST_TILES

    def test_of_both_kernels_of_attentions_backward_pass(self) -> None:
        backward = of_gpt2("attention", TRAINING).backward
        keywords = [way.partition("=")[0] for way in backward if way.startswith("triton:")]
        assert keywords == ["triton:queries_tile", "triton:keys_tile"]

    def test_builds_are_those_that_take_the_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_ways, "MOST_BUILDS", 100)
        for direction, ways in zip(
            dry_run.attention(8, 1024, 12, 64, BF16).directions,
            of_gpt2("attention", TRAINING),
            strict=True,
        ):
            able = {i for i, (_, made) in enumerate(direction.tried(HOPPER)) if made is not None}
            named = {int(way.partition("=")[2]) for way in ways if way.startswith("cuda:")}
            own = direction.dry_run(HOPPER).launches
            assert named == {i for i in able if direction.dry_run(HOPPER, i).launches != own}
            assert len(named) == len(able) - 1

    def test_a_mask_leaves_torch_alone(self) -> None:
        inputs = heads(B=1, T=32, **META)
        key = key_of("attention", TRAINING, inputs)
        masked = tuple(sorted((dict(key.facts) | {"mask": "bool"}).items()))
        found = gpu_ways.ways(dataclasses.replace(key, facts=masked), inputs)
        assert found == (["torch"], ["torch"])

    def test_what_is_not_here_is_not_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for absent in ("cuda", "triton"):
            monkeypatch.setattr(
                gpu_ways,
                "unavailable",
                lambda impl, *_, absent=absent: "absent" if impl == absent else None,
            )
            for op in MAKERS:
                named = {plans.implementation(way) for way in of_gpt2(op, TRAINING).forward}
                assert named == {"torch", "cuda", "triton"} - {absent}

    @pytest.mark.parametrize(
        "options",
        [
            {"softcap": 20.0},
            {"dropout_p": 0.1},
            {"window": (100, 0)},
            {"deterministic": True},
            {"return_lse": True},
            {"alibi_slopes": torch.empty(12, device="meta")},
            {"key_lengths": torch.empty(8, dtype=torch.int32, device="meta")},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_options_reach_the_launchers(
        self, options: Inputs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from gptkernels.ops.attention import cuda as kernels

        seen: list[tuple[AttentionOptions, bool, bool]] = []
        real = kernels.attention_bwd

        def note(*given: Any, **build: Any) -> Any:
            seen.append((given[7], given[1] is not None, given[9]))
            return real(*given, **build)

        monkeypatch.setattr(kernels, "attention_bwd", note)
        inputs = heads(**META)
        found = gpu_ways.ways(key_of("attention", TRAINING, inputs, **options), inputs)
        assert {"cuda", "triton"} <= set(found.backward)
        given, dlse, deterministic = seen[0]
        assert (given.softcap > 0) == ("softcap" in options)
        assert (given.dropout_p > 0) == (given.rng is not None) == ("dropout_p" in options)
        assert (given.left, given.right) == ((128 if "window" in options else -1), 0)
        assert (given.alibi_slopes is not None) == ("alibi_slopes" in options)
        assert (given.key_lengths is not None) == ("key_lengths" in options)
        assert (dlse, deterministic) == ("return_lse" in options, "deterministic" in options)

    def test_of_the_other_ops_of_attention(self) -> None:
        packed = {name: x.flatten(0, 1) for name, x in heads(B=4, T=64, **META).items()}
        ends = torch.empty(5, dtype=torch.int32, device="meta")
        lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        lengths |= {"max_seqlen_q": 64, "max_seqlen_k": 64}
        key = key_of("attention_varlen", TRAINING, packed | lengths)
        told = gpu_ways.ways(key, packed | lengths)
        assert told == gpu_ways.ways(key, packed)
        for ways in told:
            assert {"torch", "cuda", "triton"} <= set(ways)
            assert any(":" in way for way in ways)
        q, k, v = heads(B=4, T=1, Hk=4, **META).values()
        for shape, table in (((4, 512, 4, 64), None), ((64, 32, 4, 64), (4, 16))):
            k = v = torch.empty(shape, **META)
            cache: Inputs = {"q": q, "k_cache": k, "v_cache": v}
            cache["cache_lengths"] = torch.empty(4, dtype=torch.int32, device="meta")
            if table:
                cache["block_table"] = torch.empty(table, dtype=torch.int32, device="meta")
            key = key_of("attention_decode", FORWARD, cache)
            kept = {name: cache[name] for name in ("q", "k_cache", "v_cache")}
            for inputs in (cache, kept):
                found = gpu_ways.ways(key, inputs)
                assert found == (["cuda", "triton", "torch"], [])


# ---- every way through the registered ops


class Noted:
    """What Triton's kernels were to be launched with: their numbers, and warps and stages."""

    def __init__(self) -> None:
        self.launches: list[tuple[list[int], tuple[int, int]]] = []

    def has(self, tile: tuple[int, ...]) -> bool:
        """Whether a launch has the tile: its sizes side by side."""
        *sizes, warps, stages = tile
        return any(
            made == (warps, stages)
            and any(numbers[i : i + len(sizes)] == sizes for i in range(len(numbers)))
            for numbers, made in self.launches
        )


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    from triton.runtime.interpreter import InterpretedFunction

    found = Noted()

    def note(self: Any, *given: Any, grid: Any, **options: Any) -> None:
        # Names in lower case are options of the compiler.
        constants = [value for name, value in options.items() if name.isupper()]
        numbers = [int(x) for x in (*given, *constants) if isinstance(x, int)]
        made = options["num_warps"], options.get("num_stages", 3)
        found.launches.append((numbers, made))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    # PyTorch's own products would take minutes.
    monkeypatch.setattr(torch, "mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
    monkeypatch.setattr(torch, "addmm", lambda bias, a, b: a.new_empty(a.shape[0], b.shape[1]))
    return found


def run(op: str, way: str, inputs: Mapping[str, Any], direction: str, **options: Any) -> Any:
    """A call of impl="auto" whose plan is the way, and its backward pass."""
    training = direction == TRAINING
    leaves = {name: x.detach().requires_grad_(training) for name, x in inputs.items()}
    with plans.only({op: plans.of_way(way)}):
        outputs = getattr(gptkernels, op)(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if training:
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return outputs


def dry(op: str, way: str, inputs: Mapping[str, Any], direction: str) -> list[Launched]:
    made = native.dry_run(
        lambda: run(op, way, inputs, direction, **OPTIONS.get(op, {})),
        capability=HOPPER.capability,
        multiprocessors=HOPPER.multiprocessors,
    )
    return [Launched(**launch) for launch in made["launches"]]


def problem_of(op: str) -> dry_run.Problem:
    return {
        "attention": functools.partial(dry_run.attention, 8, 1024, 12, 64, BF16),
        "layer_norm": functools.partial(dry_run.layer_norm, 8192, 768, BF16, residual=True),
        "gelu_mlp": functools.partial(dry_run.gelu_mlp, 8192, 768, 3072, BF16),
    }[op]()


class TestEveryWay:
    pytestmark = on_no_gpu

    @each_op
    @pytest.mark.parametrize("direction", [FORWARD, TRAINING])
    def test_of_cuda_launches_its_build(self, op: str, direction: str) -> None:
        found, inputs = of_gpt2(op, direction), MAKERS[op](dtype=BF16)
        passes = problem_of(op).directions

        def expected(pass_: int, way: str) -> list[Launched]:
            build = int(way.partition("=")[2] or -1)
            return passes[pass_].dry_run(HOPPER, build).launches

        tried = [f"{way}+cuda" for way in found.forward if way.startswith("cuda")]
        tried += [f"cuda+{way}" for way in found.backward if way.startswith("cuda")]
        launched = []
        for way in tried:
            forward, _, backward = way.partition("+")
            wanted = expected(0, forward)
            if direction == TRAINING:
                wanted = wanted + expected(1, backward)
            launched.append(dry(op, way, inputs, direction))
            assert launched[-1] == wanted, way
        # The variants differ from the launchers' own choice.
        own = dry(op, "cuda+cuda", inputs, direction)
        for way, made in zip(tried, launched, strict=True):
            told_apart = "=" in way and (direction == TRAINING or "=" in way.partition("+")[0])
            assert (made != own) == told_apart, way

    def test_of_a_head_launches_its_tile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from gptkernels.ops.linear_cross_entropy.triton import launch

        used: list[tuple[int, ...]] = []
        real = launch._constexprs

        def note(tile: Any, width: int) -> Any:
            used.append(tuple(tile))
            return real(tile, width)

        monkeypatch.setattr(launch, "_constexprs", note)
        tensors = {"x": torch.randn(40, 16), "weight": torch.randn(70, 16)}
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        targets = torch.arange(40)
        way = "triton:tile=64x32x32x4x2+triton:tile=32x64x16x4x3"
        with plans.only({"linear_cross_entropy": plans.of_way(way)}):
            gptkernels.linear_cross_entropy(**leaves, targets=targets).backward()
        assert used == [(64, 32, 32, 4, 2), (32, 64, 16, 4, 3)]

    @each_op
    @pytest.mark.parametrize("direction", [FORWARD, TRAINING])
    def test_of_triton_launches_its_tile(self, op: str, direction: str, noted: Noted) -> None:
        found, inputs = of_gpt2(op, direction), MAKERS[op](dtype=BF16)
        options = OPTIONS.get(op, {})
        run(op, "triton", inputs, direction, **options)
        own = list(noted.launches)
        assert own
        tried = [f"{way}+triton" for way in found.forward if way.startswith("triton:")]
        tried += [f"triton+{way}" for way in found.backward if way.startswith("triton:")]
        assert len(tried) == gpu_ways.MOST_TILES * (2 if direction == TRAINING else 1)
        for way in tried:
            noted.launches.clear()
            run(op, way, inputs, direction, **options)
            variant = next(plans.variant(part) for part in way.split("+") if ":" in part)
            (tile,) = plans.keywords(variant).values()
            assert noted.has(tile), way
            assert len(noted.launches) == len(own)
            # One launch differs from the launchers' own choice; where a tile is that of fewer rows,
            # what depends on their number does too.
            same = [a == b for a, b in zip(noted.launches, own, strict=True)]
            assert not all(same), way

    def test_of_torch_runs_its_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        able = {backend.FLASH, backend.CUDNN}
        monkeypatch.setattr(named, "fused_backend", lambda *_: backend.CUDNN)
        monkeypatch.setattr(dense, "fused_backend", lambda *_: backend.CUDNN)
        monkeypatch.setattr(backend, "takes", lambda name, *_: name in able)
        cudnn, flash = (f"torch:backend={n}" for n in (backend.CUDNN, backend.FLASH))
        found = of_gpt2("attention", TRAINING)
        for ways in found:
            assert ways[:3] == ["torch", cudnn, flash]
            assert f"torch:backend={backend.EFFICIENT}" not in ways
        able.remove(backend.FLASH)  # with one alone there is nothing to name
        assert of_gpt2("attention", FORWARD).forward[:2] == ["torch", "cuda"]
        able.add(backend.FLASH)

        ran: list[int] = []
        for name in ("attention_fwd", "attention_bwd"):
            function = getattr(torch_kernels, name)

            def note(*given: Any, function: Any = function) -> Any:
                ran.extend(x.backend for x in given if isinstance(x, AttentionOptions))
                return function(*given)

            monkeypatch.setattr(torch_kernels, name, note)
        inputs = heads(B=1, T=8, H=2, D=8, Hk=2, dtype=torch.float32)

        def backends(way: str) -> list[int]:
            ran.clear()
            run("attention", way, inputs, TRAINING)
            return list(ran)

        assert backends("torch") == backends(cudnn) == [backend.CUDNN] * 2
        assert backends(flash) == backends(f"{flash}+torch") == [backend.FLASH] * 2
        assert backends(f"torch+{flash}") == [backend.CUDNN, backend.FLASH]
        # What its user has switched off does not run, whatever a table says.
        able.remove(backend.FLASH)
        assert backends(flash) == [backend.CUDNN] * 2

    def test_an_impossible_one_is_refused(self, noted: Noted) -> None:
        inputs = heads(dtype=BF16)
        wide = next(
            i
            for i, (_, made) in enumerate(problem_of("attention").directions[0].tried(HOPPER))
            if made is None
        )
        for build in (wide, 1000):
            with pytest.raises(RuntimeError, match="build"):
                dry("attention", f"cuda:build={build}+cuda", inputs, FORWARD)
        for way in ("triton:build=1", "triton:queries_tile=64x64x8x2", "cuda:tile=64x64x8x2"):
            with pytest.raises(TypeError, match="unexpected keyword"):
                run("attention", way, inputs, FORWARD)
        with pytest.raises(RuntimeError, match="build"):
            dry("gelu_mlp", "cuda:build=1000+cuda", mlp(dtype=BF16), FORWARD)
        with pytest.raises(RuntimeError, match="build"):
            dry("layer_norm", "cuda:build=1000+cuda", rows(dtype=BF16), FORWARD)
        assert not noted.launches


# ---- on a GPU


@pytest.fixture
def drawn() -> Callable[[Inputs], Inputs]:
    generator = torch.Generator("cuda").manual_seed(0)

    def fill(inputs: Inputs) -> Inputs:
        for name, x in inputs.items():
            scale = x.shape[-1] ** -0.5 if name in ("w1", "w2") else 1.0
            x.normal_(0.0, scale, generator=generator)
        return inputs

    return fill


SMALL: dict[str, Callable[..., Inputs]] = {
    "attention": functools.partial(heads, B=2, T=200, H=4, Hk=2),
    "layer_norm": functools.partial(rows, M=300),
    "gelu_mlp": functools.partial(mlp, M=300, C=256, F=1024),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("attention", {}),
        ("attention", {"softcap": 20.0, "window": (100, 0)}),
        ("layer_norm", {"prenorm": True}),
        ("gelu_mlp", {}),
    ],
)
def test_every_way_is_right_on_this_gpu(
    op: str, options: Inputs, dtype: torch.dtype, drawn: Callable[[Inputs], Inputs]
) -> None:
    """By the parity rule, each way of a pass with impl="torch" for the other."""
    inputs = drawn(SMALL[op](dtype=dtype, device="cuda"))
    found = gpu_ways.ways(key_of(op, TRAINING, inputs, **options), inputs)
    tried = [f"{way}+torch" for way in found.forward] + [f"torch+{way}" for way in found.backward]
    wrong = {}
    for way in tried:
        with plans.only({op: plans.of_way(way)}):
            try:
                assert_parity(
                    functools.partial(getattr(gptkernels, op), **options),
                    functools.partial(getattr(baseline, op), **options),
                    functools.partial(getattr(reference, op), **options),
                    inputs,
                )
            except Exception as error:
                wrong[way] = f"{type(error).__name__}: {error}"
    assert not {way: why for way, why in wrong.items() if not _does_not_fit(why)}
    assert not {"torch+torch", "cuda+torch", "triton+torch"} & wrong.keys()


def _does_not_fit(why: str) -> bool:
    """A tile that takes more than this GPU has, which the contest refuses."""
    return why.startswith(("OutOfResources", "CompilationError", "PTXASError"))
