"""gptkernels.tuning.explain: the table in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptkernels.cli import tune_table
from gptkernels.core import plans
from gptkernels.core.tuned import EAGER, FORWARD, PYTORCH, Entry, Key, Table
from gptkernels.tuning import Report, explain
from gptkernels.tuning.explanation import of_entry, said
from gptkernels.tuning.supervisor import Outcome

FACTS = {
    "device": "cpu",
    "threads": torch.get_num_threads(),
    "dtype": "float32",
    "C": 32,
    "bias": True,
    "wide": False,
}
US = 1e-6


def key(op: str = "layer_norm", rows: int = 12) -> Key:
    return Key.of(op, FORWARD, EAGER, FACTS, {"rows": rows})


def point(position: float, rows: int, holds: Any = (), **times: float) -> dict[str, Any]:
    named = {PYTORCH if way == "own" else way: [us * US] * 3 for way, us in times.items()}
    return {"position": position, "sizes": {"rows": rows}, "times": named, "holds": list(holds)}


POINTS = (
    point(0.0, 9, ["cpu"], torch=20.0, own=18.0, cpu=10.0),
    point(0.5, 12, ["cpu"], torch=20.0, own=21.0, cpu=15.0, triton=19.5),
    point(1.0, 16, ["slow"], torch=20.0, own=22.0, cpu=30.0, triton=19.0, slow=18.0),
)
ENTRY = Entry(
    key(),
    ((0.5, "cpu"), (1.0, "torch")),
    POINTS,
    {"cpu:v3": "it is wrong: error 1, limit 0"},
    {"cpu": (1.0, 4.0)},
)


@pytest.fixture(autouse=True)
def _own_table() -> Iterator[None]:
    plans.use("cpu", Table([ENTRY, Entry(key("gelu_mlp"), ((1.0, "torch"),), POINTS, {}, {}, "X")]))
    yield
    plans.use("cpu", None)


def test_each_range_has_the_point_of_its_end() -> None:
    low, high = of_entry(ENTRY)
    assert (low.way, low.sizes, low.seconds) == ("cpu", {"rows": 12}, 15 * US)
    assert (high.way, high.sizes, high.seconds) == ("torch", {"rows": 16}, 20 * US)
    assert low.pytorch_s == 20 * US
    assert low.margin == pytest.approx(20 / 15)
    assert high.margin == 1
    assert (low.error, low.limit) == (1.0, 4.0)
    assert (high.error, high.limit) == (None, None)
    assert str(low) == "layer_norm forward, rows 12: cpu, 15.0 us, 1.33 times as fast as PyTorch"


def test_why_not_the_others() -> None:
    _, high = of_entry(ENTRY)
    assert high.others == {
        "slow": "18.0 us, 0.90 times as long here, but not at the other end of the class",
        "triton": "19.0 us, 0.95 times as long, but not surely faster than PyTorch",
        PYTORCH: "22.0 us, 1.10 times as long",
        "cpu": "30.0 us, 1.50 times as long",
        "cpu:v3": "refused: it is wrong: error 1, limit 0",
    }
    assert "torch" not in high.others


def test_which_are_explained() -> None:
    assert [found.key.op for found in explain()] == ["layer_norm"] * 2 + ["gelu_mlp"]
    assert [found.key.op for found in explain("gelu_mlp", "cpu")] == ["gelu_mlp"]
    assert explain("attention") == []


def test_an_entry_without_points_says_nothing() -> None:
    """As of a table that was not measured by `tune`."""
    assert list(of_entry(Entry(key(), ((1.0, "cpu"),)))) == []


def test_sizes() -> None:
    assert said({"Tq": 3, "heads": 4}) == "Tq 3 heads 4"


# ---- as `gptkernels tune` prints it


def test_a_choice_with_all_that_lost() -> None:
    low, high = of_entry(ENTRY)
    first, winner, error, *others = tune_table.explained(low)
    assert first == "layer_norm forward eager: C 32 bias float32; rows 9...16"
    assert winner == "  up to rows 12: cpu, 15 us, 1.33 times as fast as PyTorch"
    assert error == "    its error against fp64 is 25% of the limit"
    assert others[-1] == "    not cpu:v3: refused: it is wrong: error 1, limit 0"
    assert len(others) == len(low.others)
    assert next(iter(tune_table.explained(explain("gelu_mlp")[0]))).startswith("gelu_mlp")
    assert "    measured on X" in tune_table.explained(explain("gelu_mlp")[0])
    assert list(tune_table.explained(high))[1] == "  up to rows 16: torch, 20 us, PyTorch's"


def test_a_class_as_it_was_measured() -> None:
    lines = list(tune_table.outcome(Outcome(ENTRY.key, ENTRY, refused=ENTRY.refused)))
    assert len(lines) == 4
    assert lines[-1] == "  cpu:v3 refused: it is wrong: error 1, limit 0"
    failed = Outcome(ENTRY.key, None, "no memory is left", {"cpu": "it crashed"})
    assert list(tune_table.outcome(failed))[1:] == [
        "  not measured: no memory is left",
        "  cpu refused: it crashed",
    ]


def test_the_foot() -> None:
    report = Report([ENTRY], left=[key(rows=100)])
    assert list(tune_table.foot(report, 3.2)) == [
        "1 class measured in 3 s, for this process alone",
        "No time was left for 1: a larger --seconds measures them too",
        "  layer_norm forward eager: C 32 bias float32; rows 65...128",
        "gptkernels tune --explain says why; --prove 200 puts it to the test",
    ]


def test_a_row_is_json() -> None:
    row = tune_table.row(next(of_entry(ENTRY)))
    assert Key.from_dict(row["class"]) == ENTRY.key
    assert (row["way"], row["time_s"], row["sizes"]) == ("cpu", 15 * US, {"rows": 12})
