"""Triton in place of the formula where nothing was measured. CPU tensors play those of a GPU, and
Triton's interpreter the kernels."""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import BF16, FP16, FP32, of
from torch import Tensor

import gptkernels
from gptkernels.core import plans
from gptkernels.core.tuned import Entry, Table
from gptkernels.ops.attention import canary, canary_case
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import backend
from gptkernels.truth import baseline, reference
from gptkernels.truth.parity import assert_parity

(needs_triton,) = of("triton", dtype=FP16).marks
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU plays a GPU")
pytestmark = [needs_triton]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No verdict and no plan of another test."""
    canary._verdicts.clear()
    plans.use("cpu", Table())
    yield
    canary._verdicts.clear()
    plans.use("cpu", None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU count as those of a GPU, which has no fused op for any call. The small
    case is smaller, since the interpreter is slow."""
    monkeypatch.setattr(canary, "on_gpu", lambda q: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(canary, "fused_backend", lambda *_: -1)
    monkeypatch.setattr(canary_case, "_QUERIES", 37)
    monkeypatch.setattr(canary_case, "_KEYS", 70)
    monkeypatch.setattr(canary_case, "_LEFT", 20)
    monkeypatch.setattr(canary_case, "_CACHE", 300)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launchers that ran."""
    from gptkernels.ops.attention import triton as launchers

    found: list[str] = []
    for name in ("attention_fwd", "attention_bwd", "attention_decode_fwd"):
        real = getattr(launchers, name)

        def note(*given: Any, name: str = name, real: Any = real, **how: Any) -> Any:
            found.append(name)
            return real(*given, **how)

        monkeypatch.setattr(launchers, name, note)
    return found


def draw(*sizes: int, dtype: torch.dtype = FP16) -> Tensor:
    return torch.randn(sizes).to(dtype)


def heads(
    T: int = 9,
    Hk: int = 2,
    D: int = 16,
    Dv: int = 0,
    dtype: torch.dtype = FP16,
    training: bool = False,
) -> dict[str, Any]:
    shapes = {"q": (2, T, 2, D), "k": (2, T + 4, Hk, D), "v": (2, T + 4, Hk, Dv or D)}
    return {
        name: draw(*shape, dtype=dtype).requires_grad_(training) for name, shape in shapes.items()
    }


def packed(training: bool = False) -> dict[str, Any]:
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    tensors = {name: draw(9, 2, 16).requires_grad_(training) for name in ("q", "k", "v")}
    lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 5, "max_seqlen_k": 5}
    return {**tensors, **lengths}


def cached(paged: bool = False, Tq: int = 1) -> dict[str, Any]:
    found = {"q": draw(2, Tq, 2, 16), "cache_lengths": torch.tensor([9, 3], dtype=torch.int32)}
    shape = (6, 4, 2, 16) if paged else (2, 12, 2, 16)
    found |= {"k_cache": draw(*shape), "v_cache": draw(*shape)}
    if paged:
        found["block_table"] = torch.tensor([[5, 0, 2], [1, 3, 4]], dtype=torch.int32)
    return found


LENGTHS = torch.tensor([13, 5], dtype=torch.int32)
SLOPES = torch.tensor([0.5, 0.25])
BY_ENTRY = torch.tensor([[0.5, 0.25], [0.1, 0.7]])
SINKS = torch.tensor([0.5, -1.0])
LEARNED = SLOPES.clone().requires_grad_()
# By name: the op, its tensors and its options.
CALLS: dict[str, tuple[str, Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "causal of unequal lengths": ("attention", heads, {}),
    "softcap": ("attention", heads, {"softcap": 5.0}),
    "alibi, lengths": ("attention", heads, {"alibi_slopes": SLOPES, "key_lengths": LENGTHS}),
    "dropout": ("attention", heads, {"dropout_p": 0.2}),
    "window": ("attention", heads, {"window": (3, 0)}),
    "window of both sides, lse": (
        "attention", heads, {"window": (3, 2), "causal": False, "return_lse": True},
    ),
    "grouped heads": ("attention", functools.partial(heads, Hk=1), {"softcap": 5.0}),
    "all": (
        "attention",
        functools.partial(heads, Hk=1),
        {"window": (5, 0), "softcap": 5.0, "alibi_slopes": SLOPES, "key_lengths": LENGTHS,
         "dropout_p": 0.2, "return_lse": True},
    ),
    "sinks": ("attention", heads, {"sinks": SINKS}),
    "slopes of each entry, narrow values": (
        "attention", functools.partial(heads, Dv=8), {"alibi_slopes": BY_ENTRY},
    ),
    "learned slopes": ("attention", heads, {"alibi_slopes": LEARNED, "softcap": 5.0}),
    "packed": ("attention_varlen", packed, {}),
    "packed, sinks, slopes": (
        "attention_varlen", packed, {"sinks": SINKS, "alibi_slopes": BY_ENTRY},
    ),
    "packed, dropout": ("attention_varlen", packed, {"dropout_p": 0.2, "window": (3, 0)}),
    "cache": ("attention_decode", cached, {}),
    "cache, window": ("attention_decode", cached, {"window": (3, 0), "softcap": 5.0}),
    "cache, sinks, later keys": (
        "attention_decode",
        functools.partial(cached, Tq=3),
        {"sinks": SINKS, "causal": False, "window": (-1, 1)},
    ),
    "pages": ("attention_decode", functools.partial(cached, paged=True), {"alibi_slopes": SLOPES}),
}  # fmt: skip


def call(name: str, training: bool = False, **more: Any) -> list[Tensor]:
    """Outputs, and gradients where it is differentiated, of impl="auto"."""
    op, make, options = CALLS[name]
    inputs = make(training=training) if training else make()
    with torch.set_grad_enabled(training):
        outputs = getattr(gptkernels, op)(**inputs, **options | more)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not training:
        return outputs
    leaves = [inputs[x] for x in ("q", "k", "v")]
    return outputs + list(
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    )


def ran(*names: str) -> list[str]:
    return [f"attention_{name}" for name in names]


FORWARD, BOTH = ran("fwd"), ran("fwd", "bwd")


@on_a_cpu
@pytest.mark.usefixtures("gpu")
class TestPasses:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("name", CALLS)
    def test_and_triton_runs(self, name: str, training: bool, launched: list[str]) -> None:
        op = CALLS[name][0]
        if op == "attention_decode" and training:
            pytest.skip("it has no backward pass")
        kernels = ran("decode_fwd") if op == "attention_decode" else BOTH if training else FORWARD
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(name, training)
        assert launched == kernels * 3  # the canary twice, the call once
        (verdict,) = canary._verdicts.items()
        assert verdict[1]
        assert (verdict[0].op, verdict[0].training, verdict[0].dtype) == (op, training, FP16)  # type: ignore[attr-defined]
        # Once for all calls of the kind: also of a new signature.
        launched.clear()
        call(name, training, softmax_scale=0.3)
        assert launched == kernels

    def test_and_results_are_right(self) -> None:
        options: dict[str, Any] = {"softcap": 5.0, "window": (6, 0)}
        assert_parity(
            functools.partial(gptkernels.attention, **options),
            functools.partial(baseline.attention, **options),
            functools.partial(reference.attention, **options),
            heads(T=40),
        )
        assert list(canary._verdicts.values()) == [True]

    def test_once_for_each_kind(self, launched: list[str]) -> None:
        def kinds(name: str, training: bool = False, **options: Any) -> int:
            call(name, training, **options)
            return len(canary._verdicts)

        assert kinds("softcap") == 1
        assert kinds("softcap", softcap=7.0) == 1
        assert kinds("softcap", training=True) == 2
        assert kinds("window") == 3
        assert kinds("grouped heads") == 4
        gptkernels.attention(**heads(D=12), softcap=5.0)
        assert len(canary._verdicts) == 4
        gptkernels.attention(**heads(D=24), softcap=5.0)
        assert len(canary._verdicts) == 5
        gptkernels.attention_decode(**cached(), sinks=SINKS, causal=False, window=(-1, 1))
        assert kinds("cache, sinks, later keys") == 7

    def test_and_leaves_random_numbers_alone(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(1)
        inputs = heads()
        torch.manual_seed(3)
        gptkernels.attention(**inputs, softcap=5.0)
        assert canary._verdicts
        assert torch.equal(torch.rand(1), expected)

    def test_dropout_is_the_contracts(self) -> None:
        inputs = heads(T=30)
        torch.manual_seed(5)
        ours: Any = gptkernels.attention(**inputs, dropout_p=0.3)
        torch.manual_seed(5)
        plain: Any = gptkernels.attention(**inputs, dropout_p=0.3, impl="torch")
        assert list(canary._verdicts.values()) == [True]
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)

    def test_in_threads_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a kernel, since the interpreter takes one thread at a time."""
        cases, found = [], []

        def slow(*given: Any) -> None:
            cases.append(given)
            time.sleep(0.05)

        monkeypatch.setattr(canary_case, "wrong", slow)
        q, k, v = heads().values()
        options = AttentionOptions(0.25, softcap=5.0)
        kind = canary._kind("attention", False, (q, k, v), options, False, False)
        threads = [
            threading.Thread(target=lambda: found.append(canary.verdict(kind, q, v, options)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(cases), found) == (1, [True] * 4)

    def test_under_autocast_and_in_inference_mode(self, launched: list[str]) -> None:
        inputs = heads(dtype=FP32)
        with torch.autocast("cpu", FP16), torch.inference_mode():
            out: Any = gptkernels.attention(**inputs, softcap=5.0)
        assert out.dtype == FP16
        (kind,) = canary._verdicts
        assert kind.dtype == FP16  # type: ignore[attr-defined]
        assert launched == FORWARD * 3


class Spoiled:
    """What goes wrong in a launcher's results, out, lse, and dq, dk, dv of the backward pass."""

    @staticmethod
    def value(found: list[Tensor]) -> None:
        found[0].view(-1)[5] += 0.05

    @staticmethod
    def scale(found: list[Tensor]) -> None:
        found[0].mul_(1.02)

    @staticmethod
    def unwritten(found: list[Tensor]) -> None:
        found[0].view(-1)[-1] = torch.empty(1, dtype=found[0].dtype)[0]  # which is poisoned

    @staticmethod
    def random(found: list[Tensor]) -> None:
        found[0].view(-1)[5] += 1e-3 * torch.rand(())

    @staticmethod
    def lse(found: list[Tensor]) -> None:
        found[1].view(-1)[3] = -float("inf")

    @staticmethod
    def raises(found: list[Tensor]) -> None:
        raise RuntimeError("PassManager::run failed\nmore")


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, how: Callable[[list[Tensor]], None]) -> None:
    from gptkernels.ops.attention import triton as launchers

    real = getattr(launchers, name)

    def wrong(*given: Any, **options: Any) -> Any:
        found = real(*given, **options)
        how(list(found))
        return found

    monkeypatch.setattr(launchers, name, wrong)


@on_a_cpu
@pytest.mark.usefixtures("gpu")
class TestFails:
    @pytest.mark.parametrize(
        ("launcher", "how", "reason"),
        [
            ("attention_fwd", Spoiled.value, "out is wrong: error "),
            ("attention_fwd", Spoiled.scale, "out is wrong: error "),
            ("attention_fwd", Spoiled.unwritten, "two runs gave different bits"),  # NaN is not NaN
            ("attention_fwd", Spoiled.random, "two runs gave different bits"),
            ("attention_fwd", Spoiled.lse, "lse is wrong: error inf"),
            ("attention_fwd", Spoiled.raises, "RuntimeError: PassManager::run failed)"),
            ("attention_bwd", Spoiled.value, "dq is wrong: error "),
            ("attention_bwd", Spoiled.random, "two runs gave different bits"),
        ],
    )
    def test_and_the_formula_runs(
        self, launcher: str, how: Any, reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil(monkeypatch, launcher, how)
        with pytest.warns(UserWarning, match="is not used on cpu") as warned:
            found = call("softcap", training=True)
        assert len(warned) == 1
        assert reason in str(warned[0].message)
        assert "Triton's attention in float16 with heads of up to 16" in str(warned[0].message)
        assert all(torch.isfinite(x).all() for x in found)
        assert list(canary._verdicts.values()) == [False]
        with warnings.catch_warnings():  # once
            warnings.simplefilter("error")
            call("softcap", training=True)
            call("softcap", training=True, softmax_scale=0.3)
        assert plans.known
        assert not any("triton" in plan for plan in plans.known.values())

    @pytest.mark.parametrize("name", ["packed", "cache", "pages", "packed, dropout"])
    def test_for_the_other_ops(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        launcher = "attention_fwd" if name.startswith("packed") else "attention_decode_fwd"
        spoil(monkeypatch, launcher, Spoiled.value)
        with pytest.warns(UserWarning, match="out is wrong"):
            call(name)

    @pytest.mark.parametrize("name", ["dropout", "packed, dropout"])
    def test_where_dropout_draws_another_mask(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from gptkernels.ops.attention import triton as launchers

        real = launchers.attention_fwd

        def wrong(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Any:
            return real(q, k, v, options._replace(rng=options.rng + 1))

        monkeypatch.setattr(launchers, "attention_fwd", wrong)
        with pytest.warns(UserWarning, match="out is wrong"):
            call(name)

    def test_a_kind_costs_no_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spoil(monkeypatch, "attention_bwd", Spoiled.value)
        with pytest.warns(UserWarning, match="dq is wrong"):
            call("softcap", training=True)
        call("softcap")
        assert sorted(canary._verdicts.values()) == [False, True]

    def test_no_memory_is_no_verdict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(found: list[Tensor]) -> None:
            raise torch.OutOfMemoryError("no memory is left")

        with monkeypatch.context() as patched:
            spoil(patched, "attention_fwd", none)
            call("softcap")
        assert not canary._verdicts
        assert not plans.known
        call("softcap")
        assert list(canary._verdicts.values()) == [True]

    def test_a_launch_that_fails_later_is_pytorchs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        call("softcap")
        spoil(monkeypatch, "attention_fwd", Spoiled.raises)
        with pytest.warns(UserWarning, match="PassManager::run failed"):
            (out,) = call("softcap")
        assert torch.isfinite(out).all()


@on_a_cpu
@pytest.mark.usefixtures("gpu")
class TestDoesNotRun:
    @pytest.fixture(autouse=True)
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cases = 0
        real = canary_case.wrong

        def count(*given: Any) -> Any:
            self.cases += 1
            return real(*given)

        monkeypatch.setattr(canary_case, "wrong", count)

    def test_during_a_capture(self, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            call("softcap")
            assert (self.cases, launched) == (0, [])
        call("softcap")  # the formula was not kept
        assert (self.cases, launched) == (1, FORWARD * 3)
        launched.clear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        call("softcap", softmax_scale=0.3)
        assert (self.cases, launched) == (1, FORWARD)

    def test_inside_a_graph_of_torch_compile(self, launched: list[str]) -> None:
        inputs = heads()

        def compiled() -> None:
            torch._dynamo.reset()
            function = functools.partial(gptkernels.attention, **inputs, softcap=5.0)
            torch.compile(lambda: function(), backend="eager", fullgraph=True)()

        compiled()
        assert (self.cases, launched) == (0, [])
        call("softcap")
        launched.clear()
        compiled()
        assert (self.cases, launched) == (1, FORWARD)

    def test_where_something_watches(self, launched: list[str]) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        class Watching(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                return func(*args, **(kwargs or {}))

        with Watching():
            call("softcap")
        assert (self.cases, launched) == (0, [])
        with torch.device("cpu"):  # a default device is no watcher
            call("softcap")
        assert self.cases == 1

    @pytest.mark.parametrize("compiling", [False, True])
    def test_with_the_kill_switch(
        self, compiling: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call("softcap")
        launched.clear()
        monkeypatch.setenv("GPTKERNELS_IMPL", "torch")
        plans.use("cpu", Table())
        function: Any = gptkernels.attention
        if compiling:
            torch._dynamo.reset()
            function = torch.compile(function, backend="eager")
        function(**heads(), softcap=5.0)
        function(**heads(), window=(3, 0))
        assert (self.cases, launched) == (1, [])

    def test_where_a_table_decides(self, launched: list[str]) -> None:
        for way in ("torch", "cpu"):
            plans.use("cpu", Table())
            with plans.recording() as calls:
                gptkernels.attention(**heads(), window=(3, 0), impl="auto")
            cases = self.cases
            plans.use("cpu", Table([Entry(calls[0].key, ((1.0, way),))]))
            canary._verdicts.clear()
            launched.clear()
            gptkernels.attention(**heads(), window=(3, 0))
            assert (self.cases, launched) == (cases, [])

    def test_where_an_engine_decides(self, launched: list[str]) -> None:
        with plans.only({"attention": plans.TORCH}):
            call("softcap")
        assert (self.cases, launched) == (0, [])
        with plans.only({"gelu_mlp": plans.TORCH}):
            call("softcap")
        assert (self.cases, launched) == (1, FORWARD * 3)

    def test_for_what_fused_ops_take(
        self, launched: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(canary, "fused_backend", lambda *_: backend.FLASH)
        call("window")
        call("window", training=True)
        call("window", deterministic=True)  # forward there is nothing to order
        assert (self.cases, launched) == (0, [])
        call("window", training=True, deterministic=True)
        assert (self.cases, launched) == (1, BOTH * 3)
        launched.clear()
        # Where PyTorch is told to, flash attention's backward pass is deterministic.
        canary._verdicts.clear()
        plans.use("cpu", Table())
        torch.use_deterministic_algorithms(True)
        try:
            call("window", training=True)
            assert (self.cases, launched) == (1, [])
            monkeypatch.setattr(canary, "fused_backend", lambda *_: backend.EFFICIENT)
            call("window", training=True, softmax_scale=0.3)
            assert self.cases == 2
        finally:
            torch.use_deterministic_algorithms(False)

    def test_for_other_dtypes_and_masks(self, launched: list[str]) -> None:
        gptkernels.attention(**heads(dtype=FP32), softcap=5.0)
        gptkernels.attention(**heads(), attn_mask=torch.ones(9, 13, dtype=torch.bool))
        gptkernels.attention(**heads(dtype=BF16), softcap=5.0)  # which the interpreter has not
        assert (self.cases, launched) == (0, [])


@on_a_cpu
def test_never_on_a_cpu(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a canary on a CPU")

    for name in ("instead", "verdict", "compiled"):
        monkeypatch.setattr(canary, name, never)
    monkeypatch.setattr(canary_case, "wrong", never)
    for name, (op, _, _) in CALLS.items():
        call(name, training=op != "attention_decode")
    assert launched == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("name", CALLS)
def test_on_this_gpu(name: str, D: int, dtype: torch.dtype) -> None:
    """Every canary passes here, in both directions."""
    op, make, options = CALLS[name]
    for training in (False, True) if op != "attention_decode" else (False,):
        inputs = {
            key: _wider(x, D, dtype).requires_grad_(training and x.is_floating_point())
            if isinstance(x, Tensor)
            else x
            for key, x in make().items()
        }
        moved = {k: x.cuda() if isinstance(x, Tensor) else x for k, x in options.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(gptkernels, op)(**inputs, **moved)
    assert set(canary._verdicts.values()) == {True}


def _wider(x: Tensor, D: int, dtype: torch.dtype) -> Tensor:
    if not x.is_floating_point():
        return x.cuda()
    return torch.randn(*x.shape[:-1], D * x.shape[-1] // 16, device="cuda", dtype=dtype)
