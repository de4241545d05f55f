"""An engine has one plan for each op, chosen before its first request: no bit of a text depends on
how a table of measurements splits the sizes, or on when another table comes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from models import sharpened

from gptkernels import GPT, GPTConfig
from gptkernels.core import externals, plans
from gptkernels.core.choice import automatic
from gptkernels.core.plans import Call, Plan
from gptkernels.core.tuned import Entry, Table
from gptkernels.gpt import model as model_file
from gptkernels.gpt.cached_blocks import cached_blocks
from gptkernels.gpt.generation import engine as engine_file
from gptkernels.gpt.generation.choices import choices_of, running
from gptkernels.gpt.generation.engine import Engine
from gptkernels.gpt.generation.generate import stream
from gptkernels.gpt.generation.request import Request
from gptkernels.gpt.generation.sampling import Sampling

# Without the CPU kernels there is one implementation alone, and PyTorch's products.
pytestmark = pytest.mark.skipif(automatic("cpu") != "cpu", reason="no CPU kernels")
CONTEXT = 24
OPS = ("layer_norm", "gelu_mlp", "attention", "attention_decode")
CPU = Plan("cpu", "cpu")


def make(dtype: torch.dtype = torch.float32, **fields: Any) -> GPT:
    """Hooked, so that the layers run: a fused step asks no op."""
    torch.manual_seed(0)
    config = GPTConfig(**{**dict(vocab_size=64, block_size=CONTEXT, n_layer=2), **fields})
    model = sharpened(GPT(config).eval(), 6.0).to(dtype)
    model.transformer.h[0].register_forward_hook(lambda *_: None)
    return model


SIZES = {"n_head": 2, "n_embd": 64}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The table of a test is no other's. One thread: many small calls of two are slow on a machine
    that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    plans.use("cpu", None)


def requests(count: int = 9) -> list[Request]:
    """Of all lengths, some of which slide."""
    generator = torch.Generator().manual_seed(1)
    return [
        Request(
            torch.randint(64, (1 + 2 * i % CONTEXT,), generator=generator).tolist(),
            (9, 20, 1)[i % 3],
            Sampling(temperature=(0.0, 1.0)[i % 2]),
            seed=i,
        )
        for i in range(count)
    ]


def results(model: GPT, wanted: Iterable[Request], **options: Any) -> list[Any]:
    """Of each request its tokens and log-probabilities, bit for bit."""
    wanted = list(wanted)
    got: list[Any] = [[] for _ in wanted]
    for event in stream(model, wanted, **options):
        got[event.request].append((event.token, event.logprob))
    return got


def calls_of(model: GPT) -> list[Call]:
    """All kinds of calls that generation with `model` makes, of all sizes."""
    with (
        mock.patch.object(engine_file, "running"),  # a context that does nothing
        plans.recording() as calls,
    ):
        for slots in (1, 8, 16):
            results(model, requests(), slots=slots)
        results(model, requests(2), draft="lookup")
    assert {call.op for call in calls} == set(OPS)
    assert not any(call.training for call in calls)
    return list(calls)


def table(calls: Iterable[Call], way: Callable[[Call], str | None]) -> Table:
    """What says `way(call)` to each call."""
    ways = {call.key: way(call) for call in calls}
    return Table(Entry(key, ((1.0, found),)) for key, found in ways.items() if found)


def by_size(call: Call) -> str:
    """Another way in each octave."""
    return ("cpu", "torch", "cpu:v3")[sum(k for _, k in call.key.buckets) % 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ways_that_differ_by_size_change_no_bit(dtype: torch.dtype) -> None:
    """Alone, in a batch of 8 or 16 slots, in any order, and in any slot."""
    model = make(dtype, **SIZES)
    wanted = results(model, requests(), slots=1)
    split = table(calls_of(model), by_size)
    assert {entry.way(1.0) for entry in split.entries.values()} == {"cpu", "torch", "cpu:v3"}
    plans.use("cpu", split)
    assert choices_of(model) == {}
    for slots in (1, 8, 16):
        assert results(model, requests(), slots=slots) == wanted
        assert results(model, requests()[::-1], slots=slots)[::-1] == wanted
    for i in (0, 4, 7):
        assert results(model, requests()[i : i + 1]) == wanted[i : i + 1]


@pytest.mark.parametrize("draft", ["lookup", "smaller"])
def test_a_draft_changes_no_bit(draft: str) -> None:
    """Though a step of a token and guesses has other sizes."""
    model = make(**SIZES)
    wanted = results(model, requests(), slots=1)
    plans.use("cpu", table(calls_of(model), by_size))
    other: Any = draft if draft == "lookup" else make(n_head=1, n_embd=16)
    assert results(model, requests(), draft=other) == wanted


@pytest.mark.parametrize("fused", [False, True])
def test_a_table_that_comes_between_two_steps_changes_nothing(fused: bool) -> None:
    model = make(**SIZES)
    calls = calls_of(model)
    if fused:
        model.transformer.h[0]._forward_hooks.clear()
    tables = [table(calls, lambda call, way=way: way) for way in ("torch", "cpu:v3", "cpu")]

    def run(changing: bool) -> list[Any]:
        plans.use("cpu", tables[0])
        engine, got = Engine(model), []
        for number, request in enumerate(requests()):
            engine.submit(request)
            if changing:
                plans.use("cpu", tables[number % 3])
            got += engine.step()
        while engine.busy:
            got += engine.step()
        return [(event.request, event.token, event.logprob) for event in got]

    wanted = run(False)
    assert run(True) == wanted
    plans.use("cpu", Table())
    assert results(model, requests(1)) != [wanted[:9]]  # the tables do change bits


def test_a_way_that_always_won_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(**SIZES)
    ways = dict(layer_norm="pytorch", gelu_mlp="torch", attention="pytorch", attention_decode="cpu")
    calls = calls_of(model)
    model.transformer.h[0]._forward_hooks.clear()
    called: list[str] = []
    spied = [
        ("layer_norm.whole", "pytorch", "layer_norm"),
        ("attention.whole", "pytorch", "attention"),
        ("gelu_mlp.torch", "gelu_mlp_fwd", "gelu_mlp"),
        ("attention.cpu.decode", "without_lse", "attention_decode"),
    ]
    for home, name, op in spied:
        module = importlib.import_module(f"gptkernels.ops.{home}")
        function = getattr(module, name)

        def spy(*given: Any, op: str = op, kept: Any = function) -> Any:
            called.append(op)
            return kept(*given)

        monkeypatch.setattr(module, name, spy)
    fused: list[bool] = []

    def step(*given: Any) -> Any:
        found = cached_blocks(*given)
        fused.append(found is not None)
        return found

    monkeypatch.setattr(model_file, "cached_blocks", step)
    results(model, requests(1))
    assert any(fused)
    assert not called
    fused.clear()
    model.transformer.h[0].register_forward_hook(lambda *_: None)  # the layers run
    plans.use("cpu", table(calls, lambda call: ways[call.op]))
    torch_way, whole = Plan("torch", "torch"), Plan("torch", "torch", "pytorch")
    assert choices_of(model) == dict(
        layer_norm=whole, gelu_mlp=torch_way, attention=whole, attention_decode=CPU
    )
    found = results(model, [Request([1, 2, 3], 3, seed=1)])
    assert len(found[0]) == 3
    # Two norms and an MLP of each of two blocks and the last norm, in the prefill and two steps.
    assert {op: called.count(op) for op in ways} == dict(
        layer_norm=15, gelu_mlp=6, attention=2, attention_decode=4
    )
    assert not any(fused)
    assert results(model, requests(), slots=8) == results(model, requests()[::-1], slots=8)[::-1]


@pytest.mark.parametrize("ways", [{}, dict.fromkeys(OPS, "cpu"), dict.fromkeys(OPS, "torch")])
def test_a_fused_step_runs_whatever_the_ops_would_run_by(
    ways: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was measured as a whole, and the ops by themselves."""
    model = make(**SIZES)
    calls = calls_of(model)
    model.transformer.h[0]._forward_hooks.clear()
    seen: list[bool] = []

    def step(*given: Any) -> Any:
        found = cached_blocks(*given)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(model_file, "cached_blocks", step)
    plans.use("cpu", table(calls, lambda call: ways.get(call.op)))
    assert set(choices_of(model)) == set(ways)
    for slots in (1, 8):
        seen.clear()
        results(model, [Request([1, 2, 3], 3, seed=1)], slots=slots)
        assert seen == [False, True, True]  # the prefill, two steps
    # An impl that is named asks for no plan.
    model.set_impl("cpu")
    assert choices_of(model) == {}


@pytest.mark.parametrize("ways", [dict.fromkeys(OPS, "cpu:v3"), {"gelu_mlp": "cpu:v3"}], ids=str)
def test_another_instruction_set_gives_the_same_bits_in_any_batch(ways: dict[str, str]) -> None:
    model = make(torch.bfloat16, **SIZES)
    plans.use("cpu", table(calls_of(model), lambda call: ways.get(call.op)))
    wanted = results(model, requests(), slots=1)
    assert results(model, requests(), slots=8) == wanted
    assert results(model, requests(), draft="lookup") == wanted


def test_the_smaller_model_has_choices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, smaller = make(**SIZES), make(n_head=1, n_embd=16)
    calls = [*calls_of(model), *calls_of(smaller)]

    def way(call: Call) -> str | None:
        if call.op != "gelu_mlp":
            return None
        return "cpu:v3" if call.facts["C"] == 16 else "torch"

    plans.use("cpu", table(calls, way))
    wanted = {model: Plan("torch", "torch"), smaller: Plan("cpu:v3", "cpu:v3")}
    for one, plan in wanted.items():
        assert choices_of(one) == {"gelu_mlp": plan}
    seen: dict[int, set[Any]] = {}
    forward = GPT.hidden_states

    def spy(self: GPT, *given: Any, **options: Any) -> Any:
        fixed = plans.fixed.get()
        seen.setdefault(id(self), set()).add(None if fixed is None else fixed["gelu_mlp"])
        return forward(self, *given, **options)

    monkeypatch.setattr(GPT, "hidden_states", spy)
    results(model, requests(4), draft=smaller)
    assert seen == {id(one): {plan} for one, plan in wanted.items()}
    assert plans.fixed.get() is None


def test_what_was_measured_of_other_layers_has_no_say() -> None:
    """Of another width or dtype; and of this width under another number of threads."""
    model, wide = make(**SIZES), make(n_head=2, n_embd=96)
    narrow = make(torch.bfloat16, **SIZES)
    entries = table(calls_of(model), lambda call: "torch").entries
    plans.use("cpu", Table(entries.values()))
    assert set(choices_of(model)) == set(OPS)
    assert choices_of(wide) == choices_of(narrow) == {}
    others = table(calls_of(wide), lambda call: "cpu").entries
    plans.use("cpu", Table([*entries.values(), *others.values()]))
    assert choices_of(model) == dict.fromkeys(OPS, Plan("torch", "torch"))
    assert choices_of(wide) == dict.fromkeys(OPS, CPU)
    torch.set_num_threads(2)
    assert choices_of(model) == {}


def test_ways_that_cannot_be_taken_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, banded = make(**SIZES), make(**SIZES, window=5)
    monkeypatch.setattr(externals, "missing", lambda name: None)
    calls = calls_of(model)

    def chosen(way: str, one: GPT = model, calls: list[Call] = calls) -> set[str]:
        plans.use("cpu", table(calls, lambda call: way))
        return set(choices_of(one))

    assert chosen("cpu:v9") == chosen("nothing") == set()
    assert chosen("external:liger") == chosen("external:nothing") == set()
    # F.gelu's rows depend on those beside them, and a cache is more than PyTorch's function takes.
    assert chosen("pytorch") == {"layer_norm", "attention"}
    # Nor does it take a window: the layers without one say nothing of the others.
    assert chosen("pytorch", banded) == {"layer_norm"}
    assert chosen("pytorch", banded, [*calls, *calls_of(banded)]) == {"layer_norm"}
    assert results(banded, requests(), slots=1) == results(banded, requests(), slots=8)
    monkeypatch.setenv("GPTKERNELS_IMPL", "torch")
    assert choices_of(model) == {}


def test_layers_that_disagree_have_the_static_plan() -> None:
    """Those with a window, and those without, each have a winner of their own."""
    model = make(**SIZES, window=5)
    assert [block.attn.window for block in model.transformer.h] == [None, (4, 0)]
    plans.use(
        "cpu",
        table(calls_of(model), lambda call: "torch" if call.facts.get("left", -1) < 0 else "cpu"),
    )
    assert set(choices_of(model)) == {"layer_norm", "gelu_mlp"}


def test_under_autocast_plans_are_static() -> None:
    model = make(**SIZES)
    plans.use("cpu", table(calls_of(model), lambda call: "pytorch"))
    choices = choices_of(model)
    with running(choices, "cpu"):
        assert plans.fixed.get() == choices != {}
    with torch.autocast("cpu"), running(choices, "cpu"):
        assert plans.fixed.get() == {}
    with torch.autocast("cpu"):
        under = results(model, requests(4))
        plans.use("cpu", Table())
        assert results(model, requests(4)) == under
