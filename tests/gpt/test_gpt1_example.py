"""examples/gpt1.py on a few lines of the real data: every step, from texts to the summary."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from few_lines import few_lines
from harness import DATA

pytest.importorskip("matplotlib")
pytest.importorskip("rbloom")
pytest.importorskip("rensa")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("tokenizers")

from examples import gpt1
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.finetuning.analyses.spread import Spread
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.training.config import TrainConfig

FILES = {
    "tinyshakespeare.txt": 60,
    "wikitext-2/valid.txt": 12,
    "wikitext-2/test.txt": 12,
    "sst-2/train.tsv": 400,
    "sst-2/dev.tsv": 40,
    "sick/SICK_train.txt": 60,
    "sick/SICK_trial.txt": 30,
    "sick/SICK_test_annotated.txt": 40,
    **{f"mctest/mc500.{part}.statements.tsv": 4 for part in ("train", "dev", "test")},
    **{f"mctest/mc500.{part}.ans": 4 for part in ("train", "dev", "test")},
}
HOW = FinetuneConfig(epochs=1, learning_rate=1e-3, train_examples=30, device="cpu")
TINY = gpt1.Settings(
    shape=GPTConfig(vocab_size=40478, block_size=32, n_layer=1, n_head=2, n_embd=8, norm="post"),
    training=TrainConfig(
        steps=4, batch_size=2, validation_batches=1, snapshot_interval=2, device="cpu"
    ),
    tasks={"sst-2": HOW, "sick-relatedness": HOW},
    asked=("sst-2",),
    seeds=(1, 2),
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first lines of each file."""
    folder = few_lines(tmp_path / "data", FILES)
    (folder / "gpt1-bpe").symlink_to(DATA / "gpt1-bpe")
    monkeypatch.setenv("GPTKERNELS_DATA", str(folder))
    return folder


def test_every_step_is_made_once(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = gpt1.run(data, out, TINY)
    written = json.loads((out / "summary.json").read_text())
    assert written["tasks"].keys() == {"sst-2", "sick-relatedness"}
    variants = {"full", "without the auxiliary loss", "without pre-training", "majority"}
    for task in written["tasks"].values():
        assert task.keys() == variants | {"ahead_of_scratch", "ahead_of_majority"}
    assert found["cpu_minutes"] > 0
    records = json.loads((out / "ablations.json").read_text())["records"]
    assert len(records) == 2 * 2 * 3
    assert (out / "pretrained" / "snapshots" / "4" / "model.safetensors").exists()
    assert {one["name"] for one in json.loads((out / "overlap.json").read_text())} == {*TINY.tasks}
    for picture in ("ablations.png", "zero_shot.png", "pretrained/loss.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")

    before = {path: path.stat().st_mtime_ns for path in (out / "pretrained").rglob("*")}
    again = gpt1.run(data, out, TINY)
    assert again["tasks"] == found["tasks"]
    assert before == {path: path.stat().st_mtime_ns for path in (out / "pretrained").rglob("*")}
    assert json.loads((out / "ablations.json").read_text())["records"] == records


def test_only_text_of_training_parts_is_read(data: Path, tmp_path: Path) -> None:
    gpt1.write_texts(data, tmp_path / "texts")
    pairs = (tmp_path / "texts" / "sick-entailment.jsonl").read_text().splitlines()
    train = (data / "sick" / "SICK_train.txt").read_text().splitlines()[1:]
    said = [" . ".join(line.split("\t")[1:3]) for line in train]
    assert [json.loads(line) for line in pairs] == [{"text": text} for text in said]
    phrases = (tmp_path / "texts" / "sst-2.jsonl").read_text().splitlines()
    assert all(json.loads(line)["text"].rstrip().endswith(".") for line in phrases)


def test_the_larger_deviation_counts() -> None:
    spread = {
        "full": {"t": Spread(0.8, 0.01)},
        "without pre-training": {"t": Spread(0.6, 0.05)},
        "majority": {"t": Spread(0.5, 0.0)},
    }
    found = gpt1.standings(spread)["t"]
    assert found["ahead_of_scratch"] == pytest.approx({"by": 0.2, "deviations": 4.0})
    assert found["ahead_of_majority"] == pytest.approx({"by": 0.3, "deviations": 30.0})


def test_settings_are_those_of_a_gpt1() -> None:
    assert gpt1.SETTINGS.shape.norm == "post"
    paper = dataclasses.asdict(FinetuneConfig())
    for how in gpt1.SETTINGS.tasks.values():
        changed = {k for k, v in dataclasses.asdict(how).items() if v != paper[k]}
        assert changed <= {"learning_rate", "dtype", "train_examples"}
