"""A checkpoint says which table of measurements its run followed, and resuming under another one
says so."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training import SHORT, TINY, Interrupted, assert_same_bits, interrupt_at, unclocked

from gptkernels.core import plans, tuned_files
from gptkernels.core.plans import Call
from gptkernels.core.tuned import Entry, Key, Table
from gptkernels.gpt.training import checkpoint
from gptkernels.gpt.training.train import TrainResult, resume, train

AUTO = dataclasses.replace(SHORT, impl="auto", steps=6)
NONE = Table().digest()
KEY = Key.of("layer_norm", "training", "eager", {"device": "cpu"}, {"rows": 64})


def a_table(way: str) -> Table:
    return Table([Entry(KEY, ((1.0, way),))])


ONE, OTHER = a_table("torch"), a_table("cpu")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The table of a test is no other's. One thread: many small calls of two are slow on a machine
    that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    plans.use("cpu", None)


def begun(text: Path, out: Path, table: Table) -> str:
    """A run of `table`; returns what its checkpoint says of it."""
    plans.use("cpu", table)
    train([text], out, model=TINY, config=AUTO)
    return checkpoint.load(out / "checkpoint.pt")["tuned"]


def resumed(out: Path, **changes: object) -> tuple[TrainResult, list[str]]:
    """The run, prolonged, and what was warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = resume(out, **{"steps": 8, **changes})
    ours = [w for w in said if "measurements" in str(w.message)]
    assert all(w.filename == __file__ for w in ours)
    return result, [str(w.message) for w in ours]


def test_resuming_under_another_table_is_said(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert begun(text, out, ONE) == ONE.digest() != NONE
    plans.use("cpu", OTHER)
    _, said = resumed(out)
    assert said == [
        f"{out / 'checkpoint.pt'} was written under the table {ONE.digest()} of measurements, and "
        f"impl='auto' now follows the table {OTHER.digest()}: the rest of the run may differ in "
        "its last bits from one that was not interrupted; resumed with that table it has the same"
    ]
    # The rest was written under the other one.
    assert resumed(out, steps=10)[1] == []
    assert checkpoint.load(out / "checkpoint.pt")["tuned"] == OTHER.digest()


def test_a_table_where_there_was_none_is_said(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert begun(text, out, Table()) == NONE
    shutil.copytree(out, tmp_path / "copy")
    plans.use("cpu", ONE)
    _, [said] = resumed(out)
    now = f"now follows the table {ONE.digest()}:"
    assert f"was written without a table of measurements, and impl='auto' {now}" in said
    assert said.endswith("; resumed with GPTKERNELS_TUNE=off it has the same")
    plans.use("cpu", Table())
    assert resumed(tmp_path / "copy")[1] == []
    _, [said] = resumed(out, steps=10)
    assert f"under the table {ONE.digest()} of measurements" in said
    assert "impl='auto' now follows none: " in said


def test_the_same_table_gives_the_same_bits_and_says_nothing(text: Path, tmp_path: Path) -> None:
    """One by which calls of some sizes run by PyTorch, and others by our kernels."""
    with plans.recording() as calls:
        train([text], tmp_path / "first", model=TINY, config=AUTO)

    def way(call: Call) -> str:
        return ("torch", "cpu")[sum(k for _, k in call.key.buckets) % 2]

    split = Table(Entry(key, ((1.0, w),)) for key, w in {c.key: way(c) for c in calls}.items())
    assert {entry.way(1.0) for entry in split.entries.values()} == {"torch", "cpu"}
    plans.use("cpu", split)
    whole = train([text], tmp_path / "whole", model=TINY, config=AUTO)
    out, config = tmp_path / "out", dataclasses.replace(AUTO, checkpoint_interval=2)
    with pytest.raises(Interrupted):
        train([text], out, model=TINY, config=config, observer=interrupt_at(4))
    result, said = resumed(out, steps=AUTO.steps)
    assert said == []
    assert_same_bits(whole.model.state_dict(), result.model.state_dict())
    assert unclocked(whole.records) == unclocked(result.records)


@pytest.mark.parametrize("now", [Table(), ONE], ids=["none", "table"])
def test_an_older_checkpoint_followed_no_table(text: Path, tmp_path: Path, now: Table) -> None:
    """It lacks the key, and loads as ever."""
    out = tmp_path / "out"
    begun(text, out, Table())
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    assert content.pop("tuned") == NONE
    torch.save(content, out / "checkpoint.pt")
    assert checkpoint.load(out / "checkpoint.pt")["tuned"] == NONE
    plans.use("cpu", now)
    result, said = resumed(out)
    assert result.records[-1]["step"] == 8
    assert len(said) == bool(now.entries)


def test_a_named_impl_follows_no_table(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(text, out, ONE)
    plans.use("cpu", OTHER)
    assert resumed(out, impl="torch")[1] == []
    assert checkpoint.load(out / "checkpoint.pt")["tuned"] == ""
    assert resumed(out, impl="auto", steps=9)[1] == []


def test_the_kill_switch_is_another_choice(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begun(text, out, ONE)
    monkeypatch.setenv("GPTKERNELS_IMPL", "torch")
    _, [said] = resumed(out)
    assert "impl='auto' now follows none" in said
    assert checkpoint.load(out / "checkpoint.pt")["tuned"] == NONE


def test_a_checkpoint_whose_digest_is_no_word_is_refused(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(text, out, ONE)
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save({**content, "tuned": 3}, out / "checkpoint.pt")
    with pytest.raises(ValueError, match="must hold str as its tuned, got int"):
        resume(out)


def test_what_another_process_measures_changes_no_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "table.jsonl"
    monkeypatch.setenv("GPTKERNELS_TUNE", "cached")
    monkeypatch.setenv("GPTKERNELS_TUNED_FILE", str(file))
    monkeypatch.setattr(tuned_files, "_SHIPPED", tmp_path / "shipped")
    tuned_files.save("cpu", ONE.entries.values())
    plans.use("cpu", None)
    seen = []

    def observer(record: dict[str, Any], done: float) -> None:
        tuned_files.save("cpu", OTHER.entries.values())
        seen.append(plans.table("cpu").digest())

    out = tmp_path / "out"
    train([text], out, model=TINY, config=AUTO, observer=observer)
    assert set(seen) == {ONE.digest()}
    assert json.loads(file.read_text().splitlines()[1])["ranges"] == [[1.0, "cpu"]]
    assert checkpoint.load(out / "checkpoint.pt")["tuned"] == ONE.digest()
    plans.use("cpu", None)  # as in the next process
    assert len(resumed(out)[1]) == 1
