"""A tiny model and a short run, which the tests of training share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptkernels import GPTConfig
from gptkernels.gpt.training.config import TrainConfig

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
