"""core.plans: impl="auto" runs what a table says, where it can, and else what it would without."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from harness import BF16, FP16, FP32, threads
from op_inputs import (
    attention_inputs,
    cache,
    gelu_mlp_inputs,
    layer_norm_inputs,
    linear_cross_entropy_inputs,
    varlen_inputs,
    varlen_lengths,
)
from right import assert_right, assert_same, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from gptkernels import (
    attention,
    attention_decode,
    attention_varlen,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
)
from gptkernels.core import cpu, native, plans
from gptkernels.core.choice import automatic
from gptkernels.core.plans import Call, Plan, Way
from gptkernels.core.tuned import COMPILED, FORWARD, PYTORCH, TRAINING, Entry, Key, Table
from gptkernels.ops.attention import whole as attention_whole
from gptkernels.ops.gelu_mlp import whole as gelu_mlp_whole
from gptkernels.ops.layer_norm import whole as layer_norm_whole
from gptkernels.ops.linear_cross_entropy import whole as linear_cross_entropy_whole

CPU = "cpu"
SETS = cpu.instruction_sets() if cpu.unavailable(CPU) is None else ()
pytestmark = pytest.mark.skipif(not SETS, reason="the CPU kernels are not built")

SEQUENCES = [5, 0, 12], [4, 2, 12]


def on_cpu(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in tensors.items()}


def _cached(**how: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors, rest = cache([9, 3], H=4, Hk=2, **how)
    return on_cpu(tensors), on_cpu(rest)


def _packed(dtype: torch.dtype = FP32) -> tuple[dict[str, Any], dict[str, Any]]:
    return on_cpu(varlen_inputs(*SEQUENCES, dtype=dtype)), on_cpu(varlen_lengths(*SEQUENCES))


def _head(*sizes: int, **how: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """linear_cross_entropy's; its differentiable inputs without those that are None."""
    made = on_cpu(linear_cross_entropy_inputs(*sizes, **how))
    rest = {"targets": made.pop("targets"), "reduction": "none"}
    return {k: v for k, v in made.items() if v is not None}, rest


# op -> makes its differentiable inputs and the other arguments of a small call.
INPUTS: dict[str, Callable[..., tuple[dict[str, Any], dict[str, Any]]]] = {
    "attention": lambda **how: (on_cpu(attention_inputs(2, 12, H=4, Hk=2, **how)), {}),
    "attention_varlen": _packed,
    "attention_decode": _cached,
    "gelu_mlp": lambda **how: (on_cpu(gelu_mlp_inputs(6, 10, 20, **how)), {}),
    "layer_norm": lambda dtype=FP32: (
        on_cpu(layer_norm_inputs(6, 32, dtype=dtype, residual=dtype)),
        {"prenorm": True},
    ),
    "linear_cross_entropy": lambda **how: _head(6, 10, 20, bias=True, **how),
}
OPS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "attention_varlen": attention_varlen,
    "attention_decode": attention_decode,
    "gelu_mlp": gelu_mlp,
    "layer_norm": layer_norm,
    "linear_cross_entropy": linear_cross_entropy,
}
WHOLES: dict[str, Any] = {
    "attention": attention_whole,
    "gelu_mlp": gelu_mlp_whole,
    "layer_norm": layer_norm_whole,
    "linear_cross_entropy": linear_cross_entropy_whole,
}
TRAINED = [op for op in OPS if op != "attention_decode"]
each_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def _own_tables() -> Iterator[None]:
    """No table but the test's own."""
    plans.use(CPU, None)
    yield
    plans.use(CPU, None)


def seen_calls(function: Callable[[], Any]) -> list[Call]:
    with plans.recording() as seen:
        function()
    return seen


def table_for(function: Callable[[], Any], *ranges: tuple[float, str]) -> Table:
    """With these winners for all classes of calls of a function."""
    return Table(Entry(call.key, ranges) for call in seen_calls(function))


def install(way: str, *functions: Callable[[], Any]) -> None:
    """From now on this way wins in all classes of what these functions call."""
    entries = [e for f in functions for e in table_for(f, (1.0, way)).entries.values()]
    assert entries
    plans.use(CPU, Table(entries))


def both_directions(op: str, tensors: dict[str, Any], rest: dict[str, Any]) -> Callable[[], Any]:
    """Calls an op with and without gradients."""

    def function() -> None:
        OPS[op](**tensors, **rest)
        if op in TRAINED:
            OPS[op](**leaves(tensors), **rest)

    return function


def leaves(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v if v is None else v.detach().requires_grad_() for k, v in tensors.items()}


Ran = list[tuple[str, str, str]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """(direction, implementation, instruction set) of each call of an implementation."""
    seen: Ran = []

    def watched(direction: str, impl: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def spy(*given: Any, **named: Any) -> Any:
            isa = cpu.module().instruction_set() if impl == CPU else ""
            seen.append((direction, impl, isa))
            return function(*given, **named)

        return spy

    for home in WHOLES:
        for impl in ("cpu", "torch"):
            module = importlib.import_module(f"gptkernels.ops.{home}.{impl}")
            modules = [module]
            if home == "attention" and impl == "cpu":
                modules.append(importlib.import_module("gptkernels.ops.attention.cpu.decode"))
            for place in modules:
                for name in ("_fwd", "_bwd", "without_statistics", "without_lse"):
                    for function in [f for f in vars(place) if f.endswith(name)]:
                        direction = "backward" if name == "_bwd" else "forward"
                        spy = watched(direction, impl, getattr(place, function))
                        monkeypatch.setattr(place, function, spy)
        runs = WHOLES[home].run

        def run_whole(name: str, *given: Any, runs: Any = runs) -> Any:
            seen.append(("whole", name, ""))
            return runs(name, *given)

        monkeypatch.setattr(WHOLES[home], "run", run_whole)
    return seen


def ran_by(ran: Ran, direction: str) -> set[str]:
    """The implementations that ran in a direction, with a variant where one was asked for."""
    usual = SETS and cpu.module().instruction_set()
    return {
        impl if isa in ("", usual) else f"{impl}:{isa}"
        for way, impl, isa in ran
        if way == direction
    }


WAYS = ["torch", "cpu", "cpu+torch", "torch+cpu", PYTORCH]
WAYS += [f"cpu:{isa}" for isa in ("baseline", "v3") if isa in SETS]
WAYS += ["cpu:baseline+torch"] if "baseline" in SETS else []


@each_op
@pytest.mark.parametrize("way", WAYS)
def test_a_call_runs_by_the_way_of_the_table(op: str, way: str, ran: Ran) -> None:
    """Its results are right, and so are its gradients where the directions differ."""
    tensors, rest = INPUTS[op]()
    install(way, both_directions(op, tensors, rest))
    forward, _, backward = way.partition("+")
    whole = way == PYTORCH and op in WHOLES
    if way == PYTORCH and not whole:  # there is no such function
        forward = plans.implementation(seen_calls(lambda: OPS[op](**tensors, **rest))[0].static[0])
        backward = ""

    ran.clear()
    with torch.no_grad():
        OPS[op](**tensors, **rest)
    assert ran_by(ran, "forward") == (set() if whole else {forward})
    assert ran_by(ran, "whole") == ({PYTORCH} if whole else set())
    ran.clear()
    assert_right(OPS[op], tensors, gradients=op in TRAINED, **rest)
    assert ran_by(ran, "forward") == (set() if whole else {forward})
    assert ran_by(ran, "whole") == ({PYTORCH} if whole else set())
    wanted = {backward or forward} if op in TRAINED and not whole else set()
    assert ran_by(ran, "backward") == wanted


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("way", ["cpu+torch", "torch+cpu"])
@pytest.mark.parametrize("op", TRAINED)
def test_directions_that_differ_in_16_bits(op: str, way: str, dtype: torch.dtype) -> None:
    tensors, rest = INPUTS[op](dtype=dtype)
    install(way, both_directions(op, tensors, rest))
    assert_right(OPS[op], tensors, **rest)


NOT_HERE = [
    "nonsense", "", "+", "cpu+", "cpu:", "cpu:v9", "torch:flash", "cuda", "cuda:build=1",
    "cpu+nonsense", "nonsense+cpu", "pytorch+cpu", "cpu+torch+cpu", "external:nobody", "external:",
]  # fmt: skip


@pytest.mark.parametrize("static", ["cpu", "torch"])
@pytest.mark.parametrize("way", NOT_HERE)
def test_a_way_that_cannot_be_taken_here(
    way: str, static: str, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "EMULATED", False)
    monkeypatch.setattr(cpu, "instruction_set", lambda: "v3" if static == CPU else "baseline")
    for op in OPS:
        tensors, rest = INPUTS[op]()
        wanted = OPS[op](**tensors, **rest)
        before = ran_by(ran, "forward")
        install(way, both_directions(op, tensors, rest))
        assert plans.unavailable(way, CPU)
        ran.clear()
        found = OPS[op](**tensors, **rest)
        assert ran_by(ran, "forward") == before
        assert_same(_tuple(found), _tuple(wanted))
        ran.clear()


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def normed(rows: int, **how: Any) -> Any:
    return layer_norm(torch.ones(rows, 16), torch.ones(16), **how)


@pytest.fixture
def torch_is_static(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was measured, impl="torch" runs."""
    monkeypatch.setattr(cpu, "instruction_set", lambda: "baseline")


def test_a_window_that_hides_the_future_is_causal(ran: Ran) -> None:
    """Such a call is of the causal class, whose winner may be PyTorch's function."""
    q, k, v = (torch.randn(1, 12, 2, 16) for _ in range(3))

    def call(impl: str = "auto") -> Any:
        return attention(q, k, v, causal=False, window=(-1, 0), impl=impl)

    install(PYTORCH, call)
    ran.clear()
    assert torch.allclose(call(), call("torch"), atol=1e-5)
    assert ran_by(ran, "whole")


def test_a_plan_of_autocast_is_none_without_it() -> None:
    """With bf16 rows and fp32 weights the products are in bf16 either way."""
    x = torch.randn(6, 8, dtype=torch.bfloat16)
    w1, w2 = torch.randn(16, 8), torch.randn(8, 16)

    def call() -> Any:
        return gelu_mlp(x, w1, None, w2, None)

    def under_autocast() -> Any:
        with torch.autocast(CPU, torch.bfloat16):
            return call()

    install(PYTORCH, under_autocast)
    under_autocast()
    assert torch.equal(call(), gelu_mlp(x, w1, None, w2, None, impl=automatic(CPU)))


def test_a_bias_of_another_dtype_without_a_weight_has_the_static_plan() -> None:
    x, bias = torch.randn(4, 8), torch.randn(8, dtype=torch.bfloat16)
    assert not seen_calls(lambda: layer_norm(x, None, bias))


@pytest.mark.usefixtures("torch_is_static")
def test_a_class_with_two_winners(ran: Ran) -> None:
    """The position in the class decides: 65 rows are its lower end, 128 its upper one, and half
    the way between them, by their logarithms, are 91.2. Other classes have the static plan."""
    plans.use(CPU, table_for(lambda: normed(100), (0.5, PYTORCH), (1.0, "cpu")))
    for rows, wanted in ((64, "torch"), (65, PYTORCH), (91, PYTORCH), (92, CPU), (128, CPU)):
        ran.clear()
        normed(rows)
        assert [impl for _, impl, _ in ran] == [wanted], rows
    for other in (129, 32):
        ran.clear()
        normed(other)
        assert ran_by(ran, "forward") == {"torch"}


@pytest.mark.usefixtures("torch_is_static")
def test_other_facts_are_other_classes(ran: Ran) -> None:
    install("cpu", lambda: normed(100))
    for how in ({"prenorm": True}, {"dropout_p": 0.5}, {"residual": torch.ones(100, 16)}):
        normed(100, **how)
        layer_norm(torch.ones(100, 16, requires_grad=True), torch.ones(16))
        layer_norm(torch.ones(100, 17), torch.ones(17))
    assert ran_by(ran, "forward") == {"torch"}
    normed(100, eps=0.1)
    assert ran_by(ran, "forward") == {"torch", "cpu"}


def test_the_kill_switch_beats_the_table(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    install("cpu", lambda: normed(100))
    monkeypatch.setenv("GPTKERNELS_IMPL", "torch")
    ran.clear()
    normed(101)
    assert ran_by(ran, "forward") == {"torch"}
    normed(101, impl="cpu")
    assert ran_by(ran, "forward") == {"torch", "cpu"}


def test_an_implementation_that_is_named_asks_no_table(ran: Ran) -> None:
    install(PYTORCH, lambda: normed(100))
    for impl in ("cpu", "torch"):
        ran.clear()
        normed(100, impl=impl)
        assert ran_by(ran, "forward") == {impl}
        assert not ran_by(ran, "whole")


def test_the_plan_of_a_call() -> None:
    (call,) = seen_calls(lambda: normed(100))
    assert plans.of(call) == call.static
    plans.use(CPU, Table([Entry(call.key, ((1.0, "cpu+torch"),))]))
    assert plans.of(call) == Plan("cpu", "torch", None, measured=True)


# PyTorch's own functions: (op, inputs, options).


def _strided(rows: int, C: int) -> Tensor:
    return torch.randn(C, rows).t()


def _wide(*shape: int) -> Tensor:
    """Rows that lie apart."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]


def _heads(B: int, T: int, H: int, D: int = 16) -> Tensor:
    return torch.randn(B, H, T, D).transpose(1, 2)


SAME: dict[str, Callable[[], tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "layer_norm": lambda: ("layer_norm", layer_norm_inputs(2, 6, 32), {}),
    "prenorm": lambda: ("layer_norm", layer_norm_inputs(6, 32), {"prenorm": True}),
    "residual": lambda: ("layer_norm", layer_norm_inputs(6, 32, residual=FP32), {"prenorm": True}),
    "16 bits": lambda: (
        "layer_norm",
        layer_norm_inputs(6, 32, dtype=BF16, residual=BF16),
        {"prenorm": True, "eps": 0.1},
    ),
    "fp32 weights": lambda: ("layer_norm", layer_norm_inputs(6, 32, dtype=BF16, weight=FP32), {}),
    "no bias": lambda: ("layer_norm", layer_norm_inputs(6, 32, bias=False), {}),
    "no weight": lambda: (
        "layer_norm",
        {"x": torch.randn(6, 32), "weight": None},
        {"prenorm": True},
    ),
    "a bias alone": lambda: (
        "layer_norm",
        {"x": torch.randn(6, 32), "weight": None, "bias": torch.randn(32)},
        {},
    ),
    "a strided sum": lambda: (
        "layer_norm",
        {"x": _strided(6, 32), "weight": torch.ones(32), "residual": _strided(6, 32)},
        {"prenorm": True},
    ),
    "strided rows": lambda: ("layer_norm", {"x": _strided(6, 32), "weight": torch.ones(32)}, {}),
    "gelu_mlp": lambda: ("gelu_mlp", gelu_mlp_inputs(2, 3, 10, 20), {}),
    "erf": lambda: ("gelu_mlp", gelu_mlp_inputs(6, 10, 20, dtype=BF16), {"approximate": "none"}),
    "no biases": lambda: ("gelu_mlp", gelu_mlp_inputs(6, 10, 20, biases=False), {}),
    "wide rows": lambda: (
        "gelu_mlp",
        {**gelu_mlp_inputs(2, 3, 10, 20), "x": _wide(2, 3, 10)},
        {},
    ),
    "transposed": lambda: (
        "gelu_mlp",
        {**gelu_mlp_inputs(6, 10, 20), "w1": _strided(20, 10) / 4, "w2": _strided(10, 20) / 4},
        {},
    ),
    "losses": lambda: ("linear_cross_entropy", *_head(40, 10, 20)),
    "losses, bias": lambda: ("linear_cross_entropy", *_head(4, 9, 10, 20, dtype=BF16, bias=True)),
    "losses, options": lambda: _losses(label_smoothing=0.1, z_loss=1e-2, softcap=3.0),
    "attention": lambda: ("attention", attention_inputs(2, 12), {}),
    "grouped": lambda: ("attention", attention_inputs(2, 12, H=4, Hk=2, dtype=BF16), {}),
    "all keys": lambda: (
        "attention",
        attention_inputs(2, 12, 20, H=4, Hk=1),
        {"causal": False, "softmax_scale": 0.3},
    ),
    "heads first": lambda: (
        "attention",
        {"q": _heads(2, 12, 4), "k": _heads(2, 12, 2), "v": _heads(2, 12, 2)},
        {},
    ),
}


def _losses(**options: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    tensors, rest = _head(40, 10, 20)
    return "linear_cross_entropy", tensors, rest | options


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_pytorchs_sum_and_mean(ran: Ran, reduction: str, z_loss: float) -> None:
    """Of the rows that count, also where there are none."""
    op, tensors, rest = _losses(z_loss=z_loss)
    rest["reduction"] = reduction
    for targets in (rest["targets"], torch.full((40,), -100)):
        rest["targets"] = targets
        install(PYTORCH, both_directions(op, tensors, rest))
        ran.clear()
        one = [torch.ones(())]
        found = run(functools.partial(OPS[op], **rest), tensors, one)
        assert ran_by(ran, "whole") == {PYTORCH}
        assert not ran_by(ran, "forward")
        wanted = run(functools.partial(OPS[op], **rest, impl="torch"), tensors, one)
        torch.testing.assert_close(found, wanted, equal_nan=True)


def test_pytorch_under_autocast(ran: Ran) -> None:
    """Its own function converts as ours do, and LayerNorm is not its own then."""
    for op in WHOLES:
        tensors, rest = INPUTS[op]()
        with torch.autocast(CPU, dtype=BF16):
            calls = seen_calls(functools.partial(OPS[op], **tensors, **rest))
            takes = [PYTORCH in WHOLES[op].takes(call.facts) for call in calls]
            assert takes == [op in ("gelu_mlp", "linear_cross_entropy")]
            if takes[0]:
                install(PYTORCH, functools.partial(OPS[op], **tensors, **rest))
                ran.clear()
                found = OPS[op](**tensors, **rest)
                assert ran_by(ran, "whole") == {PYTORCH}
                wanted = OPS[op](**tensors, **rest, impl="torch")
                torch.testing.assert_close(found, wanted)
        ran.clear()
        OPS[op](**tensors, **rest)  # of another class
        # Of few logits the static plan is PyTorch's function too.
        assert bool(ran_by(ran, "whole")) == (op == "linear_cross_entropy")


@pytest.mark.parametrize("name", SAME)
def test_what_pytorch_returns_is_what_an_op_returns(name: str, ran: Ran) -> None:
    """Of the same shape, dtype and layout, and right."""
    op, tensors, options = SAME[name]()
    tensors = on_cpu(tensors)
    install(PYTORCH, both_directions(op, tensors, options))
    wanted = _tuple(OPS[op](**tensors, **options, impl="torch"))
    ran.clear()
    found = _tuple(OPS[op](**tensors, **options))
    assert ran_by(ran, "whole") == {PYTORCH}
    assert not ran_by(ran, "forward")
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, b.is_contiguous())
        assert not a.requires_grad
    if options.get("prenorm") and tensors.get("residual") is None:
        assert found[1] is tensors["x"]
    differentiable = {k: v for k, v in tensors.items() if v is not None}
    others = {k: None for k, v in tensors.items() if v is None}
    if tensors.get("weight", 1) is None:  # the truth has no default for it
        ones = torch.ones(32)
        found, wanted = (
            run(functools.partial(layer_norm, impl=impl, **others, **options), differentiable)
            for impl in ("auto", "torch")
        )
        torch.testing.assert_close(found, wanted)
        again = layer_norm(**{**tensors, "weight": ones}, **options, impl="torch")
        torch.testing.assert_close(found[0], _tuple(again)[0])
        return
    # With a weight of another dtype PyTorch rounds that one's gradient at times too much: tuning
    # then refuses it.
    gradients = name != "fp32 weights"
    assert_right(OPS[op], differentiable, gradients=gradients, **others, **options)


LACKING: dict[str, tuple[str, dict[str, Any]]] = {
    "not square": ("attention", on_cpu(attention_inputs(2, 12, 14))),
    "lengths": ("attention", {"key_lengths": torch.tensor([3, 12], dtype=torch.int32)}),
    "a window": ("attention", {"window": (3, 0)}),
    "a mask": ("attention", {"attn_mask": torch.ones(12, 12).tril(2) > 0}),
    "lse": ("attention", {"return_lse": True}),
    "deterministic": ("attention", {"deterministic": True}),
    "softcap": ("attention", {"softcap": 2.0}),
    "dropout": ("layer_norm", {"dropout_p": 1.0}),
    "a wide sum": (
        "layer_norm",
        {"residual": torch.ones(6, 32), "x": torch.ones(6, 32).bfloat16()},
    ),
    "recompute": ("gelu_mlp", {"recompute": True}),
    "other weights": ("gelu_mlp", {"x": torch.ones(6, 10).bfloat16()}),
}


@pytest.mark.parametrize("name", LACKING)
def test_a_table_that_names_what_lacks_an_option(name: str, ran: Ran) -> None:
    """A file may say anything: the call has its static plan, also in a context with plans."""
    op, changes = LACKING[name]
    tensors, rest = INPUTS[op]()
    call = functools.partial(OPS[op], **{**tensors, **rest, **changes})
    wanted = _tuple(call())
    static = ran_by(ran, "forward")
    install(PYTORCH, call)
    for context in (contextlib.nullcontext(), plans.only({op: plans.of_way(PYTORCH)})):
        with context:
            ran.clear()
            for _ in range(2):
                assert_same(_tuple(call()), wanted)
            assert not ran_by(ran, "whole")
            assert ran_by(ran, "forward") == static


@pytest.mark.parametrize("Tk", [16, 9])
def test_a_causal_call_that_is_not_square_is_not_pytorchs(Tk: int, ran: Ran) -> None:
    """It counts positions from the first query. Both lengths are in the octave of square calls."""
    square = on_cpu(attention_inputs(2, 12))
    other = on_cpu(attention_inputs(2, 12, Tk))
    install(PYTORCH, both_directions("attention", square, {}))
    attention(**square)
    assert ran_by(ran, "whole") == {PYTORCH}
    ran.clear()
    assert_right(attention, other)
    assert not ran_by(ran, "whole")
    (call,) = seen_calls(lambda: attention(**other))
    assert not attention_whole.takes(call.facts)


# What a cached plan must not let pass: argument -> values, or functions of the right value.


def _tensors_like(x: Tensor) -> list[Any]:
    """What a tensor may not be, and some that it may."""
    return [
        x.double(),
        x.long(),
        x.to(BF16),
        x.to("meta"),
        x[..., :-1],
        x[:-1],
        x[None],
        x.new_empty(0),
        torch.cat([x, x], -1)[..., ::2],
        x.tolist(),
        x.numpy(),
        "x",
        3,
        None,
        nn.Parameter(x),
    ]


def _integers_like(x: Tensor) -> list[Any]:
    wrong = [x.long(), x.float(), x.to("meta"), x[:-1], x[None], x.tolist(), None, 3]
    return [*wrong, x - 100, x + 1000, x + 1, x * 0]


NUMBERS: list[Any] = ["x", None, float("nan"), float("inf"), -1.0, 2.0, 0, 1, [0.5], torch.ones(2)]
FLAGS: list[Any] = [0, 1, None, "x", False, True]
WRONG: dict[str, dict[str, list[Any]]] = {
    "layer_norm": {"dropout_p": NUMBERS, "eps": NUMBERS},
    "gelu_mlp": {"approximate": ["relu", None, 1, [1], "tanh", "none"]},
    "linear_cross_entropy": {
        "label_smoothing": NUMBERS,
        "z_loss": NUMBERS,
        "softcap": NUMBERS,
        "ignore_index": [0, 3, True, 1.0, None, "x", torch.tensor(3)],
        "reduction": ["avg", None, 1, ["sum"], "sum", "mean", "none"],
    },
    "attention": {
        "causal": FLAGS,
        "softmax_scale": NUMBERS,
        "softcap": NUMBERS,
        "window": [(1,), (1, 2), (-2, 0), 3, "x", [1, 2], [-2, 1], (True, 1), (1.0, 2.0)],
        "alibi_slopes": [torch.ones(3), torch.ones(4).long(), [1.0] * 3, [1.0] * 4, 3, "x"],
        "dropout_p": ["x", None, float("nan"), -1.0, 2.0, [0.5], 0],
        "key_lengths": [torch.tensor(n, dtype=torch.int32) for n in ([12, 13], [-1, 2], [1], 3)],
        "attn_mask": [torch.ones(12, 13) > 0, torch.ones(12, 12).long(), [1], torch.ones(12)],
    },
    "attention_decode": {
        "softmax_scale": NUMBERS,
        "num_splits": [0, -1, "x", 1.5, True, 3],
        "softcap": NUMBERS,
    },
    "attention_varlen": {
        "softmax_scale": NUMBERS,
        "max_seqlen_q": [3, 11, 12, 100, "x", 12.0, None, True],
        "max_seqlen_k": [3, 11, 12, 100, "x", 12.0, None, True],
        "causal": FLAGS,
    },
}


def outcome(call: Callable[[], Any]) -> Any:
    """The error of a call, as a type and a sentence; else the shapes and dtypes of its results."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = _tuple(call())
    except Exception as error:
        return type(error), str(error)
    return [(x.shape, x.dtype) for x in found]


def without_name(told: Any) -> Any:
    """Some sentences hold the address of an object."""
    return (told[0], told[1].partition(" at 0x")[0]) if isinstance(told, tuple) else told


@each_op
@pytest.mark.parametrize("way", ["", "cpu", "torch", PYTORCH])
def test_a_cached_plan_lets_nothing_wrong_pass(op: str, way: str) -> None:
    """After right calls, each wrong argument raises what it raises with impl="cpu", and after it
    the right call is right."""
    tensors, rest = INPUTS[op]()
    if op == "layer_norm":
        rest = {**rest, "dropout_p": 0.0, "eps": 1e-5}
    right = {**tensors, **rest}
    if way:
        install(way, both_directions(op, tensors, rest))
    wanted = OPS[op](**right)
    changes: list[tuple[str, Any]] = []
    for name, value in right.items():
        if isinstance(value, Tensor):
            like = _tensors_like if value.is_floating_point() else _integers_like
            changes += [(name, other) for other in like(value)]
    changes += [(name, other) for name, values in WRONG[op].items() for other in values]
    passed, refused = [], 0
    for name, other in changes:
        call = functools.partial(OPS[op], **{**right, name: other})
        expected = without_name(outcome(functools.partial(call, impl="cpu")))
        found = [without_name(outcome(call)) for _ in range(2)]
        if found != [expected] * 2:
            passed.append((name, other, found, expected))
        refused += isinstance(expected, tuple)
        assert_same(_tuple(OPS[op](**right)), _tuple(wanted))
    assert not passed
    assert refused >= 10 + 5 * len(tensors)


@pytest.mark.parametrize(
    ("op", "way", "name", "value"),
    [
        ("attention", "cpu", "softmax_scale", True),
        ("attention", "cpu", "softcap", False),
        ("attention", "cpu", "dropout_p", False),
        ("attention_decode", "cpu", "softcap", False),
        ("attention_varlen", "cpu", "dropout_p", False),
        # True equals 1.0, and False 0.0, also in a signature.
        ("attention", PYTORCH, "softmax_scale", True),
        ("attention", PYTORCH, "softcap", False),
        ("attention", PYTORCH, "dropout_p", False),
        ("layer_norm", "cpu", "dropout_p", False),
        ("layer_norm", PYTORCH, "dropout_p", False),
        # The signature has no strides of biases.
        ("gelu_mlp", "cpu", "b1", torch.ones(40)[::2]),
        ("gelu_mlp", PYTORCH, "b2", torch.ones(20)[::2]),
    ],
)
def test_what_is_like_the_right_value(op: str, way: str, name: str, value: Any) -> None:
    tensors, rest = INPUTS[op]()
    if not isinstance(value, Tensor):
        rest = {**rest, name: float(value)}
    install(way, both_directions(op, tensors, rest))
    OPS[op](**tensors, **rest)
    call = functools.partial(OPS[op], **{**tensors, **rest, name: value})
    expected = outcome(functools.partial(call, impl="cpu"))
    assert isinstance(expected, tuple)
    assert outcome(call) == expected


@pytest.mark.parametrize("page", [None, 4])
def test_lengths_are_checked_in_every_call(page: int | None) -> None:
    tensors, rest = _cached(page=page)
    inputs = on_cpu(attention_inputs(2, 12))
    lengths = torch.tensor([12, 3], dtype=torch.int32)
    for _ in range(3):
        attention_decode(**tensors, **rest)
        attention(**inputs, key_lengths=lengths)
    for wrong in (-1, 1000):
        rest["cache_lengths"][0] = lengths[0] = wrong
        with pytest.raises(ValueError, match=rf"^cache_lengths must lie between .* got {wrong}$"):
            attention_decode(**tensors, **rest)
        with pytest.raises(ValueError, match=rf"^key_lengths must lie between .* got {wrong}$"):
            attention(**inputs, key_lengths=lengths)
    if page:
        rest["cache_lengths"][0] = 9
        rest["block_table"][0, 0] = 1000
        with pytest.raises(ValueError, match=r"^block_table must name pages"):
            attention_decode(**tensors, **rest)
    q = tensors["q"].clone().requires_grad_()
    with torch.no_grad():
        rest["cache_lengths"][0] = 0
        attention_decode(**{**tensors, "q": q}, **rest)
    with pytest.raises(RuntimeError, match="has no backward pass"):
        attention_decode(**{**tensors, "q": q}, **rest)


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Each call whose plan is looked up in the tables."""
    seen: list[Call] = []
    look_up = plans.of

    def spy(call: Call) -> Plan:
        seen.append(call)
        return look_up(call)

    monkeypatch.setattr(plans, "of", spy)
    return seen


@each_op
def test_a_plan_is_looked_up_once(op: str, lookups: list[Call]) -> None:
    """And again where something that it depends on is another: it is of another class then, but
    for new tables."""
    tensors, rest = INPUTS[op]()
    call = functools.partial(OPS[op], **tensors, **rest)

    def new(count: int, label: str) -> None:
        before = len(lookups)
        for _ in range(3):
            call()
        assert len(lookups) - before == count, label

    new(1, "first")
    with threads(torch.get_num_threads() + 1):
        new(1, "threads")
    new(0, "back")
    with torch.autocast(CPU, dtype=BF16):
        new(1, "autocast")
    new(0, "back")
    if op in TRAINED:
        call = functools.partial(OPS[op], **leaves(tensors), **rest)
        new(1, "gradients")
        with torch.no_grad():
            new(0, "no gradients")
        with torch.inference_mode():
            new(0, "inference mode")
    deterministic = op in ("attention", "attention_varlen")
    if deterministic:
        torch.use_deterministic_algorithms(True)
        try:
            new(1, "deterministic")
        finally:
            torch.use_deterministic_algorithms(False)
        new(0, "back")
    assert len({call.key for call in lookups}) == len(lookups)
    plans.use(CPU, None)
    new(1, "other tables")


def test_new_tables_hold_from_the_next_call_on(ran: Ran) -> None:
    normed(100)
    for way in ("torch", "cpu", PYTORCH, "cpu"):
        install(way, lambda: normed(100))
        ran.clear()
        normed(100)
        assert [impl for _, impl, _ in ran] == [way]


def test_tables_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def load(device_type: str) -> Table:
        reads.append(device_type)
        return Table()

    monkeypatch.setattr(plans.tuned_files, "load", load)
    for rows in range(1, 20):
        normed(rows)
    assert reads == [CPU]
    plans.use(CPU, None)
    normed(1)
    assert reads == [CPU, CPU]
    mine = Table()
    plans.use(CPU, mine)
    normed(1)
    assert plans.table(CPU) is mine
    assert reads == [CPU, CPU]


def test_a_table_that_is_installed_while_the_files_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = Table()

    def load(_: str) -> Table:
        plans.use(CPU, mine)  # as another thread might
        return Table()

    monkeypatch.setattr(plans.tuned_files, "load", load)
    assert plans.table(CPU) is mine


@pytest.mark.usefixtures("torch_is_static")
def test_a_plan_of_old_tables_does_not_come_back(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one thread looks it up while another installs new ones."""
    found = table_for(lambda: normed(100), (1.0, "cpu"))
    look_up = plans.of

    def slow(call: Call) -> Plan:
        plan = look_up(call)
        plans.use(CPU, found)
        return plan

    plans.use(CPU, None)
    known = plans.known
    with monkeypatch.context() as patched:
        patched.setattr(plans, "of", slow)
        normed(100)
    assert plans.known is known  # who holds it sees what is new
    ran.clear()
    normed(100)
    assert ran_by(ran, "forward") == {"cpu"}


def test_the_most_plans_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST_KNOWN", 5)
    for rows in range(1, 30):
        normed(rows)
        assert 1 <= len(plans.known) <= 5


# A way that cannot run after all.


class Broken:
    """Implementations of impl="cpu" that raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.patch = monkeypatch.setattr

    def breaks(self, home: str, name: str, error: BaseException) -> None:
        def raises(*_: Any, **__: Any) -> Any:
            self.calls += 1
            raise error

        self.patch(importlib.import_module(f"gptkernels.ops.{home}.cpu"), name, raises)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    return Broken(monkeypatch)


# The op -> what it calls past the registered op where nobody watches.
SHORT_CUTS = {
    "layer_norm": ("layer_norm.cpu", "without_statistics"),
    "attention_decode": ("attention.cpu.decode", "without_lse"),
}


@pytest.mark.parametrize("op", SHORT_CUTS)
def test_a_way_that_cannot_run_by_a_short_cut(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("no launch")

    tensors, rest = INPUTS[op]()
    rest = {k: v for k, v in rest.items() if k != "prenorm"}
    install("cpu", lambda: OPS[op](**tensors, **rest))
    module, name = SHORT_CUTS[op]
    monkeypatch.setattr(importlib.import_module(f"gptkernels.ops.{module}"), name, raises)
    with pytest.warns(UserWarning, match="no launch"):
        found = OPS[op](**tensors, **rest)
    torch.testing.assert_close(found, OPS[op](**tensors, **rest, impl="torch"))


HOMES = {op: op for op in TRAINED} | {"attention_varlen": "attention"}
SENTENCE = (
    r"^cpu(:\w+)? was chosen for {} training eager: .*, but cannot run now "
    r"\(no launch\): PyTorch runs such calls in this process; gptkernels tune measures again$"
)


@pytest.mark.parametrize("way", ["cpu", "cpu:baseline"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("op", TRAINED)
def test_a_way_that_cannot_run_is_left(
    op: str, direction: str, way: str, broken: Broken, ran: Ran
) -> None:
    """PyTorch runs the call, and later ones of its class, with one warning."""
    tensors, rest = INPUTS[op]()
    found = table_for(both_directions(op, tensors, rest), (1.0, way))
    plans.use(CPU, found)
    home = HOMES[op]
    broken.breaks(home, f"{home}_{direction}", RuntimeError("no launch\nand why"))
    with pytest.warns(UserWarning, match=SENTENCE.format(op)) as caught:
        assert_right(OPS[op], tensors, **rest)
    assert len(caught) == 1
    assert broken.calls == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran.clear()
        assert_right(OPS[op], tensors, **rest)
        assert ran_by(ran, "forward") == ran_by(ran, "backward") == {"torch"}
        OPS[op](**leaves({name: x * 2 for name, x in tensors.items()}), **rest)
    assert broken.calls == 1
    plans.use(CPU, found)  # measured again, so tried again
    with pytest.warns(UserWarning, match="no launch"):
        assert_right(OPS[op], tensors, **rest)
    assert broken.calls == 2


def test_backward_passes_of_a_class_that_was_left(broken: Broken) -> None:
    """Those whose forward pass was before it have no other warning."""
    tensors, _ = INPUTS["gelu_mlp"]()
    given = leaves(tensors)
    install("cpu", lambda: gelu_mlp(**given))
    results = [gelu_mlp(**given) for _ in range(3)]
    broken.breaks("gelu_mlp", "gelu_mlp_bwd", RuntimeError("no launch"))
    with pytest.warns(UserWarning, match="no launch") as caught:
        torch.autograd.backward([y.sum() for y in results])
    assert len(caught) == 1
    wanted = run(lambda **t: gelu_mlp(**t, impl="torch").sum(), tensors, [torch.ones(())])
    torch.testing.assert_close([given[name].grad / 3 for name in tensors], wanted[1:])


def test_other_classes_keep_their_way(broken: Broken, ran: Ran) -> None:
    small, large = (on_cpu(gelu_mlp_inputs(rows, 10, 20)) for rows in (6, 60))
    install("cpu", lambda: gelu_mlp(**small), lambda: gelu_mlp(**large))
    with pytest.MonkeyPatch.context() as patched:
        Broken(patched).breaks("gelu_mlp", "gelu_mlp_fwd", RuntimeError("no launch"))
        with pytest.warns(UserWarning, match="no launch"):
            gelu_mlp(**small)
    ran.clear()
    gelu_mlp(**small)
    assert ran_by(ran, "forward") == {"torch"}
    ran.clear()
    gelu_mlp(**large)
    assert ran_by(ran, "forward") == {"cpu"}


def test_where_torch_raises_too_the_first_error_is_raised(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, _ = INPUTS["gelu_mlp"]()
    install("cpu", lambda: gelu_mlp(**tensors))
    broken.breaks("gelu_mlp", "gelu_mlp_fwd", ZeroDivisionError("the first"))
    module = importlib.import_module("gptkernels.ops.gelu_mlp.torch")
    with warnings.catch_warnings(), monkeypatch.context() as patched:
        warnings.simplefilter("error")
        for second in (RuntimeError("the second"), torch.OutOfMemoryError("the second")):

            def raises(*_: Any, error: Exception = second) -> Any:
                raise error

            patched.setattr(module, "gelu_mlp_fwd", raises)
            with pytest.raises(ZeroDivisionError, match="the first"):
                gelu_mlp(**tensors)
    with pytest.warns(UserWarning, match="the first"):  # it was no reason to leave the way
        gelu_mlp(**tensors)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too much"), KeyboardInterrupt()])
def test_what_no_other_way_would_help(error: BaseException, broken: Broken) -> None:
    """No memory, or the user's wish to stop."""
    tensors, _ = INPUTS["gelu_mlp"]()
    install("cpu", lambda: gelu_mlp(**tensors))
    broken.breaks("gelu_mlp", "gelu_mlp_fwd", error)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(type(error)):
                gelu_mlp(**tensors)
    assert broken.calls == 2


def test_without_a_table_an_error_is_an_error(broken: Broken) -> None:
    tensors, _ = INPUTS["gelu_mlp"]()
    broken.breaks("gelu_mlp", "gelu_mlp_fwd", RuntimeError("no launch"))
    for how in ({"impl": "cpu"}, {}):
        if how or plans.of(seen(tensors)).forward == "cpu":
            with pytest.raises(RuntimeError, match="no launch"):
                gelu_mlp(**tensors, **how)


def seen(tensors: dict[str, Any]) -> Call:
    with pytest.MonkeyPatch.context() as patched:
        module = importlib.import_module("gptkernels.ops.gelu_mlp.cpu")
        patched.setattr(module, "gelu_mlp_fwd", lambda x, *_: (x, x))
        (call,) = seen_calls(lambda: gelu_mlp(**tensors))
    return call


def test_a_variant_of_torch_that_an_op_has_not(ran: Ran) -> None:
    """It is left as another way is that cannot run."""
    tensors, _ = INPUTS["gelu_mlp"]()
    install("torch:backend=1", lambda: gelu_mlp(**tensors))
    ran.clear()
    with pytest.warns(UserWarning, match="^torch:backend=1 was chosen"):
        gelu_mlp(**tensors)
    gelu_mlp(**tensors)
    assert ran_by(ran, "forward") == {"torch"}


# Recordings, and plans of a context.


def test_a_recording_has_each_class_once(ran: Ran) -> None:
    install("cpu", *(both_directions(op, *INPUTS[op]()) for op in OPS))
    wanted = {op: OPS[op](**given, **rest) for op, (given, rest) in _one_of_each().items()}
    inputs = _one_of_each()
    with plans.recording() as calls:
        for _ in range(3):
            for op, (given, rest) in inputs.items():
                assert_same(_tuple(OPS[op](**given, **rest)), _tuple(wanted[op]))
        normed(100)
        worker = threading.Thread(target=lambda: [normed(101), normed(101), normed(100)])
        worker.start()
        worker.join()
    assert [call.op for call in calls] == [*OPS, "layer_norm", "layer_norm"]
    assert [call.sizes["rows"] for call in calls[-2:]] == [100, 101]
    assert calls[-1].key == calls[-2].key
    before = list(calls)
    normed(102)
    assert calls == before
    assert not plans._recordings


def _one_of_each() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    torch.manual_seed(1)
    return {op: INPUTS[op]() for op in OPS}


def test_a_recording_in_a_recording() -> None:
    """Also where both hold the same calls."""
    with plans.recording() as outer:
        with plans.recording() as inner:
            pass
        normed(1)
        assert not inner
        with plans.recording() as inner:
            normed(1)
            normed(2)
        normed(3)
    assert [call.sizes["rows"] for call in inner] == [1, 2]
    assert [call.sizes["rows"] for call in outer] == [1, 2, 3] or [
        call.sizes["rows"] for call in outer
    ] == [1, 1, 2, 3]  # a new recording makes all signatures new again


def test_a_recording_ends_with_an_error() -> None:
    with pytest.raises(KeyError), plans.recording() as calls:
        raise KeyError
    normed(1)
    assert not calls


def test_calls_of_no_kept_signature_are_recorded_once() -> None:
    given = {"op": "layer_norm", "training": False, "facts": {"device": CPU}, "sizes": {"rows": 1}}
    with plans.recording() as calls:
        for _ in range(3):
            plans.new(None, Call(**given, static=plans.TORCH))
    assert len(calls) == 1


@pytest.mark.usefixtures("torch_is_static")
def test_plans_of_a_context(ran: Ran) -> None:
    """They are the thread's own, and what is known stays out of them and they out of it."""
    tensors, _ = INPUTS["gelu_mlp"]()
    install(PYTORCH, lambda: normed(100), lambda: gelu_mlp(**tensors))
    assert type(plans.of_way("cpu").forward) is str

    def ran_now(function: Callable[[], Any]) -> list[str]:
        ran.clear()
        function()
        return [impl for _, impl, _ in ran]

    def everything() -> None:
        normed(100)
        gelu_mlp(**tensors)

    known = dict(plans.known)
    with plans.recording() as calls, plans.only({"layer_norm": Plan("cpu", "cpu")}):
        for _ in range(2):
            assert ran_now(everything) == ["cpu", "torch"]
        worker = threading.Thread(target=everything)
        assert ran_now(lambda: [worker.start(), worker.join()]) == [PYTORCH, PYTORCH]
        with plans.only({"gelu_mlp": Plan("cpu", "cpu")}):
            assert ran_now(everything) == ["torch", "cpu"]
        assert ran_now(everything) == ["cpu", "torch"]
    assert {call.op for call in calls} == {"layer_norm", "gelu_mlp"}
    assert plans.known.keys() >= known.keys()
    assert ran_now(everything) == [PYTORCH, PYTORCH]
    with pytest.raises(KeyError), plans.only({}):
        raise KeyError
    assert plans.fixed.get() is None


def test_what_a_way_stands_for() -> None:
    key = Key.of("attention", FORWARD, "eager", {}, {})
    for way, plan in {
        "torch": ("torch", "torch", None),
        "cpu:v3": ("cpu:v3", "cpu:v3", None),
        "cpu+torch": ("cpu", "torch", None),
        PYTORCH: ("torch", "torch", PYTORCH),
        "external:x": ("torch", "torch", "external:x"),
    }.items():
        assert plans.of_way(way)[:3] == plans.of_way(way, key)[:3] == plan
    forward, backward = plans.of_way("cpu:v3+torch", key)[:2]
    assert type(forward) is Way
    assert forward.key is key
    assert type(backward) is str
    assert (plans.implementation("cpu:v3"), plans.variant("cpu:v3")) == ("cpu", "v3")
    assert (plans.implementation("cpu"), plans.variant("cpu")) == ("cpu", "")
    assert plans.keywords("tile=128x64x8x3,build=2") == {"tile": (128, 64, 8, 3), "build": 2}


# torch.compile.


def compiled_entry(way: str, size: int = 64, dtype: str = "float32", last: str = "") -> Entry:
    key = Key.of("layer_norm", FORWARD, COMPILED, {"dtype": dtype}, {"rows": size})
    return Entry(key, ((0.5, way), (1.0, last or way)))


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ([], "torch"),
        ([compiled_entry("cpu")], "cpu"),
        ([compiled_entry("cpu"), compiled_entry("cpu", 512)], "cpu"),
        ([compiled_entry("cpu"), compiled_entry("torch", 512)], "torch"),
        ([compiled_entry("cpu", last="torch")], "torch"),
        ([compiled_entry("cpu"), compiled_entry("torch", dtype="bfloat16")], "cpu"),
        ([compiled_entry("cpu:baseline")], "cpu:baseline"),
        ([compiled_entry("cpu:v9")], "torch"),
        ([compiled_entry("nonsense")], "torch"),
        ([compiled_entry(PYTORCH)], "torch"),
        ([compiled_entry("external:x")], "torch"),
        ([compiled_entry("cpu+torch")], "torch"),  # a graph has one for both
        ([compiled_entry("cpu+nonsense")], "torch"),
    ],
)
def test_the_way_in_a_graph(
    entries: Sequence[Entry], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans.use(CPU, Table(entries))
    assert plans.compiled("layer_norm", False, FP32, CPU) == wanted
    assert plans.compiled("layer_norm", True, FP32, CPU) == "torch"
    assert plans.compiled("gelu_mlp", False, FP32, CPU) == "torch"
    with plans.only({"layer_norm": Plan("cpu", "cpu")}):  # of an engine, which is not compiled
        assert plans.compiled("layer_norm", False, FP32, CPU) == "torch"
    monkeypatch.setenv("GPTKERNELS_IMPL", "torch")
    assert plans.compiled("layer_norm", False, FP32, CPU) == "torch"


def compiled_table(way: str, *classes: tuple[str, Callable[[], Any]]) -> Table:
    """Of compiled calls, in both directions."""
    entries = []
    for op, function in classes:
        for call in seen_calls(function):
            for direction in (FORWARD, TRAINING):
                key = Key.of(op, direction, COMPILED, call.facts, call.sizes)
                entries.append(Entry(key, ((1.0, way),)))
    return Table(entries)


@pytest.mark.parametrize("way", ["", "cpu", "torch", "cpu+torch", PYTORCH])
def test_lengths_in_a_graph(way: str, ran: Ran) -> None:
    """A table that was measured at few lengths makes no graph for each of them."""

    def block(x: Tensor, w: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        y = layer_norm(x, w)
        assert isinstance(y, Tensor)
        y = gelu_mlp(y, w1, None, w2, None)
        heads = y.unflatten(-1, (2, 8))[None]
        out = attention(heads, heads, heads)
        assert isinstance(out, Tensor)
        return out

    def inputs(T: int) -> list[Tensor]:
        return [torch.randn(T, 16), torch.ones(16), torch.randn(32, 16), torch.randn(16, 32)]

    if way:
        x, w, w1, w2 = inputs(40)
        heads = torch.randn(1, 40, 2, 8)
        plans.use(CPU, compiled_table(
            way,
            ("layer_norm", lambda: layer_norm(x, w)),
            ("gelu_mlp", lambda: gelu_mlp(x, w1, None, w2, None)),
            ("attention", lambda: attention(heads, heads, heads)),
        ))  # fmt: skip
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(block, dynamic=True, fullgraph=True, backend=counter)
    impl = "cpu" if way == "cpu" else "torch"
    for T in (40, 50, 300):
        given = inputs(T)
        ran.clear()
        with torch.no_grad():
            found = compiled(*given)
        assert ran_by(ran, "forward") <= {impl}
        assert (impl == "cpu") == bool(ran_by(ran, "forward"))  # "torch" is traced
        assert not ran_by(ran, "whole")
        y = layer_norm(given[0], given[1], impl=impl)
        y = gelu_mlp(y, given[2], None, given[3], None, impl=impl)  # type: ignore[arg-type]
        heads = y.unflatten(-1, (2, 8))[None]
        torch.testing.assert_close(found, attention(heads, heads, heads, impl=impl))
    assert counter.frame_count == 1
    torch._dynamo.reset()
