"""Tiny models and tiny tasks of all four transformations, which the tests of fine-tuning share.

Each task can be learnt from a few letters, so that a model of two blocks knows it within seconds.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import shaken
from torch import nn

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.finetuning.batches import Encoded
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.parts import encode
from gptkernels.gpt.finetuning.reading import Example
from gptkernels.gpt.finetuning.task import Task, task_of
from gptkernels.gpt.finetuning.task_model import TaskModel, transferred
from gptkernels.gpt.finetuning.transformations import Encoder
from gptkernels.gpt.tokenizer import ByteTokenizer

pytest.importorskip("safetensors", reason="needs the package safetensors")
pytest.importorskip("sklearn", reason="needs the package scikit-learn")
pytest.importorskip("scipy", reason="needs the package scipy")

GPT2 = GPTConfig(vocab_size=256, block_size=32, n_layer=2, n_head=2, n_embd=32)
# GPT-1's shape: its blocks, with fewer and narrower ones.
GPT1 = dataclasses.replace(
    GPTConfig.named("gpt1"), vocab_size=256, block_size=32, n_layer=2, n_head=2, n_embd=32
)
START, DELIMITER, EXTRACT = 256, 257, 258

FILES = {"train": "train", "validation": "validation", "test": "test"}
CONTENTS: dict[str, dict[str, Any]] = {
    "classification": {
        "metrics": ["accuracy", "f1", "matthews"],
        "format": "tsv",
        "texts": ["text"],
        "label": "label",
        "labels": {"-": "bad", "+": "good"},
    },
    "entailment": {
        "metrics": ["accuracy", "f1"],
        "format": "csv",
        "texts": ["premise", "hypothesis"],
        "label": "label",
        "labels": {"e": "entailment", "n": "neutral", "c": "contradiction"},
    },
    "similarity": {
        "metrics": ["pearson", "spearman"],
        "format": "tsv",
        "texts": ["one", "other"],
        "label": "score",
        "range": [0, 4],
    },
    "choice": {
        "metrics": ["accuracy"],
        "format": "jsonl",
        "texts": ["story"],
        "choices": ["endings"],
        "label": "right",
    },
}
TRANSFORMATIONS = tuple(CONTENTS)

QUICK = FinetuneConfig(
    epochs=8, batch_size=4, learning_rate=3e-3, dropout=0.0, warmup_fraction=0.1, log_interval=3,
    device="cpu", impl="torch",
)  # fmt: skip


def task(transformation: str) -> Task:
    return task_of(
        transformation,
        {"transformation": transformation, "files": FILES, **CONTENTS[transformation]},
    )


def task_model(
    kind: str, shape: GPTConfig = GPT1, *, tied: bool = True, dropout: float = 0.0
) -> TaskModel:
    """A TaskModel of this transformation whose every parameter matters; `dropout` is the head's."""
    model = TaskModel(task(kind), transferred(pretrained(shape, tied=tied), "all", 0.0), dropout)
    model.body.set_impl("torch")
    return shaken(model, 0.1)


def pretrained(shape: GPTConfig = GPT1, *, tied: bool = True) -> GPT:
    """A GPT whose every parameter matters, in evaluation mode."""
    model = GPT(shape)
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.zeros(shape.vocab_size, shape.n_embd))
    return shaken(model, 0.1).eval()


def encoder(kind: str, shape: GPTConfig = GPT1) -> Encoder:
    return Encoder(kind, ByteTokenizer(), shape.vocab_size, shape.block_size)


def encoded(kind: str, count: int, seed: int = 0, *, length: int = 32) -> list[Encoded]:
    """Examples of different lengths, in sequences of at most `length` tokens."""
    shape = dataclasses.replace(GPT1, block_size=length)
    return encode(encoder(kind, shape), examples(kind, count, seed))


def examples(kind: str, count: int, seed: int = 0) -> list[Example]:
    draw = random.Random(f"{kind} {seed}")

    def words(most: int = 8) -> str:
        return "".join(draw.choices("abc ", k=draw.randint(1, most)))

    found = []
    for _ in range(count):
        match kind:
            case "classification":
                right = draw.randrange(2)
                found.append(Example((words(12) + "-+"[right] * 2,), (), right))
            case "entailment":
                right = draw.randrange(3)
                found.append(Example((words(), words() + "enc"[right] * 2), (), right))
            case "similarity":
                one, other = draw.randrange(3), draw.randrange(3)
                found.append(
                    Example((words(5) + "!" * one, words(5) + "!" * other), (), one + other)
                )
            case _:
                endings = [words(5) + "." for _ in range(draw.randint(2, 4))]
                right = draw.randrange(len(endings))
                endings[right] = endings[right][:-1] + "!"
                found.append(Example((words(),), tuple(endings), right))
    return found


def write_data(kind: str, folder: Path, counts: Sequence[int] = (64, 24, 16)) -> Path:
    """The files of the task in `folder`, of so many examples; returns the folder."""
    folder.mkdir(exist_ok=True)
    for seed, (name, count) in enumerate(zip(FILES, counts, strict=True)):
        (folder / name).write_text(_lines(kind, examples(kind, count, seed)), encoding="utf-8")
    return folder


def _lines(kind: str, rows: Sequence[Example]) -> str:
    if kind == "choice":
        objects = [
            {"story": one.texts[0], "endings": one.choices, "right": one.target} for one in rows
        ]
        return "".join(json.dumps(one) + "\n" for one in objects)
    between = "," if kind == "entailment" else "\t"
    names = [*CONTENTS[kind]["texts"], CONTENTS[kind]["label"]]
    labels = list(CONTENTS[kind].get("labels", ()))
    lines = [names]
    for one in rows:
        lines.append([*one.texts, labels[int(one.target)] if labels else str(one.target)])
    return "".join(between.join(line) + "\n" for line in lines)
