"""How the published GPT-3 models were trained: recipes for `train`, and what to go on with.

    each    its shape (GPTConfig.named), highest learning rate, tokens in a step
    all     AdamW's 0.9 and 0.95, norm clipped at 1.0, weight decay 0.1; 300B tokens; the rate rises
            over 375M tokens and has fallen to a tenth by 260B, where it stays; a step begins with
            32k tokens

Tokens become steps by counting them, the ramp of the batch size included.

Three things are read into the paper. Its "0.5M", "1M" and "2M" tokens are taken as powers of two,
whole numbers of windows; of 3.2M, the nearest whole number of micro-batches is. The length of the
ramp lies "between 4-12 billion tokens", "depending on the model size", which is all that it says:
4 billion are taken for steps of 0.5M tokens, 6 for 1M, 9 for 2M and 12 for 3.2M. And 32k is 2**15.

Brown et al., "Language Models are Few-Shot Learners", 2020, table 2.1 and appendix B.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from gptkernels.core.names import check_name
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.gpt.training.config import TrainConfig, sizes_of_steps

_BILLION = 10**9
_FIRST_STEP, _WARMUP, _DECAY, _ALL = 2**15, 375 * 10**6, 260 * _BILLION, 300 * _BILLION  # tokens
_ADAMW = {"beta1": 0.9, "beta2": 0.95, "clip": 1.0, "weight_decay": 0.1}


@dataclass(frozen=True)
class Recipe:
    """What is of one model alone.

    Fields:
        batch_tokens: in a step, once the ramp is over.
        learning_rate: the highest one.
        ramp_tokens: over which a step grows to batch_tokens.
    """

    batch_tokens: int
    learning_rate: float
    ramp_tokens: int


TOKENIZER = "gpt2"  # "the reversible tokenization described therein", in GPT-2's paper: section 2.1

# From the smallest model to the largest.
GPT3 = {
    "gpt3-125M": Recipe(2**19, 6.0e-4, 4 * _BILLION),
    "gpt3-350M": Recipe(2**19, 3.0e-4, 4 * _BILLION),
    "gpt3-760M": Recipe(2**19, 2.5e-4, 4 * _BILLION),
    "gpt3-1.3B": Recipe(2**20, 2.0e-4, 6 * _BILLION),
    "gpt3-2.7B": Recipe(2**20, 1.6e-4, 6 * _BILLION),
    "gpt3-6.7B": Recipe(2**21, 1.2e-4, 9 * _BILLION),
    "gpt3-13B": Recipe(2**21, 1.0e-4, 9 * _BILLION),
    "gpt3-175B": Recipe(3_200_000, 0.6e-4, 12 * _BILLION),
}


def recipe_config(name: str, block_size: int, **settings: Any) -> TrainConfig:
    """How GPT-3's model `name` was trained, on windows of `block_size` tokens, 2,048 in the paper.

    settings: fields of TrainConfig, which win; what depends on them follows: `accumulation` makes
    the recipe's step of micro-batches of `batch_size` windows, and all numbers of steps are those
    of the recipe's tokens. `steps` alone ends the run sooner, on the same schedule. Where a step
    cannot begin with fewer micro-batches than it has later, there is no ramp. `tokenizer` stays
    "auto"; TOKENIZER was the paper's.

    Raises ValueError for another name, and what TrainConfig raises.
    """
    recipe = GPT3[check_name("recipe", name, GPT3)]
    micro = TrainConfig(batch_size=settings.get("batch_size", TrainConfig.batch_size))
    tokens = micro.batch_size * block_size  # in a micro-batch
    whole = settings.get("accumulation", max(1, round(recipe.batch_tokens / tokens)))
    first = min(whole, max(1, round(_FIRST_STEP / tokens)))
    grows = settings.get("ramp_start", first) < whole
    ramp = settings.get("ramp_tokens", recipe.ramp_tokens if grows else 0)
    start = settings.get("ramp_start", first if ramp else 1)
    sized = dataclasses.replace(micro, accumulation=whole, ramp_start=start, ramp_tokens=ramp)
    lengths = {"warmup_steps": _WARMUP, "decay_steps": _DECAY, "steps": _ALL}
    steps = {key: _steps(sized, tokens, until) for key, until in lengths.items()}
    own = {"learning_rate": recipe.learning_rate, **_ADAMW, **steps}
    return dataclasses.replace(sized, **{**own, **settings})


def _steps(config: TrainConfig, micro_batch: int, tokens: int) -> int:
    """The steps in which `config` is trained on at least `tokens` tokens, `micro_batch` at a
    time."""
    steps = 0
    for size, in_a_row in sizes_of_steps(config, 0, micro_batch):
        wanted = min(-(-tokens // size), in_a_row)
        steps += int(wanted)
        tokens -= size * int(wanted)
        if tokens <= 0:
            break
    return steps


def parameters(model: GPT) -> int:
    """How many numbers a model learns; a tied head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def continuing_rate(count: int) -> float:
    """The highest learning rate with which to go on training a model of `count` parameters.

    A tenth of that of the smallest of GPT-3's models that is at least as large, or else of the
    largest of all.
    """
    large_enough = (name for name in GPT3 if size(GPTConfig.named(name)) >= count)
    # Rounded to be told and kept as 6e-05, not as 5.9999999999999995e-05.
    return round(GPT3[next(large_enough, "gpt3-175B")].learning_rate / 10, 9)


@functools.cache
def size(shape: GPTConfig) -> int:
    """How many parameters a GPT of `shape` has."""
    with torch.device("meta"):  # shapes alone
        return parameters(GPT(shape))
