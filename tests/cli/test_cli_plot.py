"""The command `plot`: what is drawn of several runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from test_cli import assert_refused

LINES = (
    {"step": 0, "validation_loss": 5.0, "seconds": 0.5},
    {"step": 2, "loss": 4.0, "tokens": 20, "mfu": 0.25, "gradient_norm": None, "seconds": 1.0},
    {"step": 2, "sample": "a text"},
    {"step": 4, "loss": 3.0, "tokens": 40, "mfu": 0.5, "validation_loss": 3.5, "seconds": 2.0},
)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other"]
    for place, run in enumerate(found):
        run.mkdir(parents=True)
        lines = [{**line, "step": line["step"] * (place + 1)} for line in LINES]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "log.jsonl").write_text(text + '{"step": 9, "lo')  # it is being written
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of each figure that is written."""
    axes: list[Any] = []
    write = Figure.savefig

    def savefig(figure: Figure, *given: Any, **how: Any) -> None:
        axes.extend(figure.axes)
        write(figure, *given, **how)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return axes


def points(axes: Any) -> list[list[tuple[float, float]]]:
    return [list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines]


def test_losses_of_several_runs(
    call: Any, runs: list[Path], drawn: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "curves.png"
    result = call("plot", *runs, "--out", out)
    assert result.code == 0, result.err
    assert result.out == f"the loss of a/run, b/run and other is in {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn
    scaled = [(1, 1), (2, 2), (3, 3)]
    for place, (training, validation) in enumerate(scaled):
        loss, checked = points(axes)[2 * place : 2 * place + 2]
        assert loss == [(2 * training, 4.0), (4 * training, 3.0)]
        assert checked == [(0, 5.0), (4 * validation, 3.5)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "a/run",
        "b/run",
        "other",
    ]
    colours = [line.get_color() for line in axes.lines]
    assert colours[::2] == colours[1::2]
    assert len({*colours}) == 3
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")


@pytest.mark.parametrize(
    ("by", "metric", "curve", "words"),
    [
        ("tokens", "validation_loss", [(0, 5.0), (40, 3.5)], "tokens trained on"),
        ("seconds", "validation_loss", [(0.5, 5.0), (2.0, 3.5)], "seconds"),
        ("step", "mfu", [(2, 0.25), (4, 0.5)], "step"),
    ],
)
def test_by_and_metric(
    call: Any, runs: list[Path], drawn: list[Any], tmp_path: Path,
    by: str, metric: str, curve: list[tuple[float, float]], words: str,
) -> None:  # fmt: skip
    out = tmp_path / "curve.svg"
    assert call("plot", runs[0], "--out", out, "--by", by, "--metric", metric).code == 0
    assert b"<svg" in out.read_bytes()
    assert points(drawn[0]) == [curve]
    assert drawn[0].get_xlabel() == words


def test_what_cannot_be_drawn_is_refused(call: Any, runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    for given, words in (
        ([tmp_path], f"runs: {tmp_path} is no folder of a run, it has no log.jsonl"),
        ([runs[0], runs[1] / ".." / "run", runs[1]], f"{runs[1]} is named twice"),
        ([runs[0], "--metric", "los"], "the log of run has no los; it has loss, mfu, validation"),
        ([runs[0], "--metric", "los"], "did you mean 'loss'?"),
        ([runs[0], "--by", "petaflop_s_days"], "the log of run has no petaflop_s_days"),
        ([runs[0], "--by", "hours"], "is not one of 'step', 'tokens', 'seconds'"),
        ([runs[0], "--out", tmp_path / "a.jpg"], "a.jpg must end in .png, .svg or .pdf"),
    ):
        assert_refused(call("plot", "--out", out, *given), words)
    (runs[0] / "log.jsonl").write_text("[1]\n")
    assert_refused(call("plot", runs[0], "--out", out), "a line that is not a record of a run")
    for text in ("", "no log\n", '{"step": 0, "lo'):  # the last: as it begins
        (runs[0] / "log.jsonl").write_text(text)
        assert_refused(call("plot", runs[0], "--out", out), "the log of run has no record\n")
    assert not list(tmp_path.glob("*.*"))
