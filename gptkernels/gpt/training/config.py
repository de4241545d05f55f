"""How to train: TrainConfig, checked once, when it is made, and the learning rate that follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkernels.gpt.model import RECOMPUTE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The steps already made depend on these settings: a resumed run cannot change them.
DECIDED = ("seed", "tokenizer", "token_dtype", "validation_fraction")


def _option(default: Any, text: str, least: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "least": least})


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError for a value out of range, TypeError for a wrong type."""

    steps: int = _option(2000, "optimiser steps; the learning rate has fallen by then", least=1)
    minutes: float | None = _option(
        None, "stop after this many minutes at the latest; the learning rate then follows the clock"
    )
    batch_size: int = _option(16, "windows of text in a micro-batch", least=1)
    accumulation: int = _option(1, "micro-batches whose gradients make one step", least=1)
    learning_rate: float = _option(1e-3, "the highest learning rate, reached after the warm-up")
    min_learning_rate: float = _option(1e-4, "the learning rate at the end of the cosine", least=0)
    warmup_steps: int = _option(100, "steps of linear warm-up", least=0)
    weight_decay: float = _option(0.1, "AdamW's decay, of matrices only", least=0)
    beta1: float = _option(0.9, "AdamW's decay of the mean gradient")
    beta2: float = _option(0.95, "AdamW's decay of the mean squared gradient")
    clip: float = _option(1.0, "largest norm of all gradients together; 0 does not clip", least=0)
    dtype: str = _option(
        "float32", "float32, or bfloat16 or float16 for autocast (weights stay float32)"
    )
    device: str = _option("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N")
    impl: str = _option(
        "auto", "implementation of the fused operations: auto, torch, triton or cuda"
    )
    tokenizer: str = _option("bytes", "bytes; gpt2, its byte-level BPE; gpt1, its BPE of words")
    token_dtype: str = _option("uint16", "of the ids in token shards (.bin): uint16 or uint32")
    seed: int = _option(1337, "of initial weights, dropout and batches", least=0)
    validation_fraction: float = _option(0.1, "share of the text, its end, that is held out")
    validation_interval: int = _option(200, "steps between two validations", least=1)
    validation_batches: int = _option(20, "batches in a validation, at most", least=1)
    checkpoint_interval: int = _option(500, "steps between two checkpoints", least=1)
    log_interval: int = _option(10, "steps between two lines of the log", least=1)
    sample_interval: int = _option(0, "steps between two samples of text; 0 takes none", least=0)
    sample_prompt: str = _option("\n", "what a sample continues")
    sample_tokens: int = _option(64, "tokens of a sample, at most", least=1)
    tensorboard: bool = _option(False, "write TensorBoard's events beside log.jsonl")
    compile: bool = _option(False, "torch.compile the model")
    recompute: str = _option(
        "none", "what the backward pass computes again to save memory: none, mlp or block"
    )
    ema: float = _option(
        0.0, "decay of an average of the weights, saved as model-ema; 0 keeps none"
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            _check_type(option.name, str(option.type), getattr(self, option.name))
            least = option.metadata["least"]
            if least is not None:
                right = getattr(self, option.name) >= least
                _check(self, option.name, right, f"at least {least}")
        _check(self, "seed", self.seed < 2**63, "less than 2**63")
        _check(self, "minutes", self.minutes is None or self.minutes > 0, "more than 0")
        _check(self, "learning_rate", self.learning_rate > 0, "more than 0")
        _check(
            self,
            "min_learning_rate",
            self.min_learning_rate <= self.learning_rate,
            f"at most learning_rate={self.learning_rate}",
        )
        for name in ("beta1", "beta2", "ema"):
            _check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _check(self, "validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")
        _check(self, "dtype", self.dtype in DTYPES, _one_of(DTYPES))
        _check(self, "recompute", self.recompute in RECOMPUTE, _one_of(RECOMPUTE))
        _check(self, "token_dtype", self.token_dtype in ("uint16", "uint32"), "uint16 or uint32")


def _one_of(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _check_type(name: str, wanted: str, value: Any) -> None:
    """`wanted` is the field's annotation: "int", "float", "str", "bool" or "float | None"."""
    if value is None and wanted.endswith("| None"):
        return
    kinds = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    wrong_bool = isinstance(value, bool) and wanted != "bool"
    if wrong_bool or not isinstance(value, kinds[wanted.removesuffix(" | None")]):
        raise TypeError(f"{name} is {value!r}, {wanted} is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, a finite number is wanted")


def _check(config: TrainConfig, name: str, right: bool, wanted: str) -> None:
    if not right:
        raise ValueError(f"{name} is {getattr(config, name)!r}, {wanted} is wanted")


def learning_rate(config: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """Linear warm-up to `learning_rate`, then half a cosine down to `min_learning_rate`.

    `step` counts from 0. With `minutes`, the cosine ends when the time is up, if that is sooner
    (`seconds` is the time the run has taken so far).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.minutes is not None:
        done = max(done, seconds / (60 * config.minutes))
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.min_learning_rate + fall * (config.learning_rate - config.min_learning_rate)
