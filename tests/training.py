"""A tiny model, a short run and a text, which the tests of training share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptkernels import GPTConfig
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.train import TrainResult, train

TINY = GPTConfig(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
SHORT = TrainConfig(
    steps=12,
    batch_size=4,
    accumulation=2,
    warmup_steps=3,
    validation_interval=4,
    validation_batches=2,
    checkpoint_interval=6,
    log_interval=2,
    device="cpu",
    impl="torch",
)
# What a run measures with a clock, and therefore never repeats.
CLOCKED = ("seconds", "tokens_per_s", "mfu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It is a truth universally acknowledged, that a man in want.\n" * 60)
    return path


class Interrupted(Exception):
    """Stands for whatever kills a run."""


def interrupt_at(step: int) -> Any:
    def observer(record: dict[str, Any], done: float) -> None:
        if record["step"] == step:
            raise Interrupted

    return observer


def unclocked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in CLOCKED} for record in records]


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 80)
    seen: list[float] = []
    result = train(
        [folder / "text.txt"],
        folder / "out",
        model=TINY,
        config=SHORT,
        observer=lambda record, done: seen.append(done),
    )
    assert seen == [record["step"] / SHORT.steps for record in result.records]
    return folder / "out", result
