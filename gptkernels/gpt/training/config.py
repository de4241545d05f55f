"""How to train: TrainConfig, checked once, when it is made, and what follows from it: the
steps of a number of epochs, the learning rate and the micro-batches of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptkernels.gpt.model import RECOMPUTE
from gptkernels.gpt.options import DEVICE, IMPL, check_choice, check_option, check_options, option
from gptkernels.gpt.precision import DTYPES

# The steps already made depend on these settings: a resumed run cannot change them.
DECIDED = ("seed", "tokenizer", "token_dtype", "validation_fraction")
_TOKEN_DTYPES = ("auto", "uint16", "uint32")
_LEARNING_RATE = 1e-3  # of a new model


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError for a value out of range, TypeError for a wrong type."""

    steps: int = option(2000, "Optimiser steps of the whole run.", least=1)
    minutes: float | None = option(
        None,
        "Minutes after which the run ends at the latest. The learning rate then follows the clock.",
        unset="no limit",
    )
    batch_size: int = option(16, "Windows of text in a micro-batch.", least=1)
    accumulation: int = option(1, "Micro-batches whose gradients make one step.", least=1)
    ramp_tokens: int = option(
        0,
        "Tokens in which a step's micro-batches grow linearly from `ramp_start` to `accumulation`. "
        "With 0 all steps are alike.",
        least=0,
    )
    ramp_start: int = option(1, "Micro-batches of the first step, with `ramp_tokens`.", least=1)
    learning_rate: float | None = option(
        None,
        "Highest learning rate, reached after the warm-up.",
        unset=f"{_LEARNING_RATE}; for a trained model that goes on, a tenth of what GPT-3's paper "
        "trains one of its size with",
    )
    min_learning_rate: float | None = option(
        None, "Learning rate at the end of the cosine.", least=0, unset="a tenth of the highest"
    )
    decay_steps: int = option(
        0, "Steps after which the learning rate has fallen. With 0 it falls to the end.", least=0
    )
    warmup_steps: int = option(100, "Steps in which the learning rate rises linearly.", least=0)
    weight_decay: float = option(0.1, "Weight decay of AdamW, of matrices only.", least=0)
    beta1: float = option(0.9, "Decay of AdamW's mean of gradients.")
    beta2: float = option(0.95, "Decay of AdamW's mean of squared gradients.")
    clip: float = option(
        1.0, "Largest norm of all gradients together. With 0 nothing is clipped.", least=0
    )
    dtype: str = option(
        "float32",
        "Dtype of the computation: float32, or bfloat16 or float16 under autocast. Weights stay "
        "float32.",
    )
    device: str = option("auto", DEVICE)
    impl: str = option("auto", IMPL)
    tokenizer: str = option(
        "auto",
        "Tokenizer: bytes, gpt2 (its byte-level BPE) or gpt1 (its BPE of words). With auto it is "
        "that of the model that goes on, the one that the shards' manifest names, gpt2 "
        "for a recipe, else bytes.",
    )
    token_dtype: str = option(
        "auto",
        "Dtype of the ids in token shards (.bin): uint16 or uint32. With auto it is what their "
        "manifest says, else uint16.",
    )
    seed: int = option(1337, "Seed of initial weights, dropout and the order of the text.", least=0)
    validation_fraction: float = option(
        0.1, "Share of the text that is held out for validation: its end."
    )
    validation_interval: int = option(200, "Steps between two validations.", least=1)
    validation_batches: int = option(20, "Batches in a validation, at most.", least=1)
    checkpoint_interval: int = option(500, "Steps between two checkpoints.", least=1)
    log_interval: int = option(10, "Steps between two lines of the log.", least=1)
    sample_interval: int = option(
        0, "Steps between two samples of text. With 0 none is taken.", least=0
    )
    sample_prompt: str = option("\n", "Text that a sample continues.")
    sample_tokens: int = option(64, "Tokens of a sample, at most.", least=1)
    tensorboard: bool = option(False, "Whether to write TensorBoard's events beside log.jsonl.")
    wandb: bool = option(False, "Whether to log to Weights & Biases too.")
    wandb_project: str | None = option(
        None,
        "Project of Weights & Biases, with `wandb`.",
        unset="the variable WANDB_PROJECT, else gptkernels",
    )
    compile: bool = option(False, "Whether to compile the model by torch.compile.")
    recompute: str = option(
        "none",
        "What the backward pass computes again to save memory: none, mlp or block.",
    )
    snapshot_interval: int = option(
        0,
        "Steps between two copies of the model, kept in snapshots/. With 0 none is kept.",
        least=0,
    )
    ema: float = option(
        0.0,
        "Decay of an average of the weights, saved in model-ema/. With 0 none is kept.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_option(self, "seed", self.seed < 2**63, "less than 2**63")
        right = self.wandb or self.wandb_project is None
        check_option(self, "wandb_project", right, "none without wandb")
        check_option(self, "minutes", self.minutes is None or self.minutes > 0, "more than 0")
        right = self.ramp_start <= self.accumulation
        check_option(self, "ramp_start", right, f"at most accumulation={self.accumulation}")
        right = self.ramp_start == 1 or self.ramp_tokens > 0
        check_option(self, "ramp_start", right, "1 without ramp_tokens")
        right = self.ramp_start < self.accumulation or self.ramp_tokens == 0
        alike = f"0 for steps that do not grow (ramp_start=accumulation={self.accumulation})"
        check_option(self, "ramp_tokens", right, alike)
        right = self.decay_steps == 0 or self.decay_steps > self.warmup_steps
        more = f"0 or more than warmup_steps={self.warmup_steps}"
        check_option(self, "decay_steps", right, more)
        highest, lowest = self.rates
        check_option(self, "learning_rate", highest > 0, "more than 0")
        right = lowest <= highest
        check_option(self, "min_learning_rate", right, f"at most learning_rate={highest}")
        for name in ("beta1", "beta2", "ema"):
            check_option(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        check_option(
            self, "validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1"
        )
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "recompute", RECOMPUTE)
        check_choice(self, "token_dtype", _TOKEN_DTYPES)

    @property
    def rates(self) -> tuple[float, float]:
        """The highest learning rate, and that at the end of the cosine."""
        highest = _LEARNING_RATE if self.learning_rate is None else self.learning_rate
        lowest = highest / 10 if self.min_learning_rate is None else self.min_learning_rate
        return highest, lowest


def learning_rate(config: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """Linear warm-up to the highest rate, then half a cosine down to the lowest (`rates`).

    `step` counts from 0. The cosine ends at `decay_steps`, or at the last step, and the lowest rate
    stays. With `minutes`, it ends when the time is up, if that is sooner (`seconds` is the time the
    run has taken so far).
    """
    highest, lowest = config.rates
    if step < config.warmup_steps:
        return highest * (step + 1) / config.warmup_steps
    fallen = config.decay_steps or config.steps
    done = (step - config.warmup_steps) / max(1, fallen - config.warmup_steps)
    if config.minutes is not None:
        done = max(done, seconds / (60 * config.minutes))
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return lowest + fall * (highest - lowest)


def micro_batches(config: TrainConfig, tokens: int) -> int:
    """The micro-batches of a step before which `tokens` tokens were trained on.

    "We gradually increase the batch size linearly from a small value to the full value" over the
    first tokens (Brown et al., "Language Models are Few-Shot Learners", 2020, appendix B).
    """
    if tokens >= config.ramp_tokens:
        return config.accumulation
    growth = config.accumulation - config.ramp_start
    return config.ramp_start + growth * tokens // config.ramp_tokens  # in integers, so exact


def growth_at(config: TrainConfig, count: int) -> int:
    """The fewest tokens after which a step has at least `count` micro-batches, more than
    ramp_start and at most accumulation."""
    growth = config.accumulation - config.ramp_start
    return -(-(count - config.ramp_start) * config.ramp_tokens // growth)


def sizes_of_steps(
    config: TrainConfig, tokens: int, micro_batch: int
) -> Iterator[tuple[int, float]]:
    """After `tokens` tokens, with micro-batches of `micro_batch`: the tokens of a step, and how
    many steps in a row have that many, the last of them without end.

    Counted together, since there may be billions of steps of one size.
    """
    while (count := micro_batches(config, tokens)) < config.accumulation:
        size = micro_batch * count
        steps = -(-(growth_at(config, count + 1) - tokens) // size)
        yield size, steps
        tokens += size * steps
    yield micro_batch * count, math.inf


def tokens_of_steps(config: TrainConfig, steps: int, tokens: int, micro_batch: int) -> int:
    """The tokens of the next `steps` steps, after `tokens` tokens."""
    total = 0
    for size, in_a_row in sizes_of_steps(config, tokens, micro_batch):
        made = min(steps, in_a_row)
        total += size * int(made)
        steps -= int(made)
        if not steps:
            break
    return total


def in_epochs(config: TrainConfig, epochs: int, windows: int) -> TrainConfig:
    """`config` with the steps that `epochs` passes over `windows` windows of text take. At most a
    tenth of them warm up."""
    steps = math.ceil(epochs * windows / (config.batch_size * config.accumulation))
    warmup = min(config.warmup_steps, steps // 10)
    return dataclasses.replace(config, steps=steps, warmup_steps=warmup)
