"""examples/gpt3.py in small: every step, and that nothing but the prompt tells the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("scipy")

from examples import gpt3
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.training.config import TrainConfig

TINY = gpt3.Settings(
    shape=GPTConfig(vocab_size=256, block_size=64, n_layer=1, n_head=2, n_embd=8),
    training=TrainConfig(steps=2, batch_size=2, accumulation=2, validation_batches=1, device="cpu"),
    texts=40,
    episodes=5,
    shots="0,2",
)


def test_every_step_is_made(tmp_path: Path) -> None:
    found = gpt3.run(tmp_path, TINY)
    written = json.loads((tmp_path / "summary.json").read_text())
    for curve in (written["curves"]["right"], written["curves"]["random"]):
        assert [point["shots"] for point in curve["outcomes"]] == [0, 2]
        assert curve["chance"] == 1 / 8
        assert curve["outcomes"][0]["examples"] == 5
    assert found["cpu_minutes"] > 0
    for picture in ("curve.png", "noise.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "right" / "predictions.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines][5:]
    lines = (tmp_path / "random" / "predictions.jsonl").read_text().splitlines()
    control = [json.loads(line) for line in lines][5:]
    shown = rows(tmp_path / "symbols" / "shown.jsonl")
    for place, (right, random) in enumerate(zip(prompts, control, strict=True)):
        meaning = {row["word"]: row["colour"] for row in shown if row["episode"] == place}
        *solved, asked = right["prompt"].split("\n")
        assert len(solved) == 2
        assert all(line.split() == [line[:3], meaning[line[:3]]] for line in solved)
        assert len(asked) == 3  # the word alone
        words = [line.split()[0] for line in random["prompt"].split("\n")]
        assert words == [line.split()[0] for line in right["prompt"].split("\n")]


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_meaning_holds_within_its_episode_alone(tmp_path: Path) -> None:
    gpt3.write_texts(tmp_path / "texts.txt", 50)
    episodes = (tmp_path / "texts.txt").read_text().split("\n\n")[:-1]
    assert len(episodes) == 50
    for episode in episodes:
        pairs = {tuple(line.split(" ")) for line in episode.splitlines()}
        assert len({word for word, _ in pairs}) == len(pairs) <= 8
