"""What the published GPT-3 models were trained with.

Brown et al., "Language Models are Few-Shot Learners", 2020, table 2.1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Fields:
        learning_rate: the highest one.
    """

    learning_rate: float


# From the smallest model to the largest.
GPT3 = {
    "gpt3-125M": Recipe(6.0e-4),
    "gpt3-350M": Recipe(3.0e-4),
    "gpt3-760M": Recipe(2.5e-4),
    "gpt3-1.3B": Recipe(2.0e-4),
    "gpt3-2.7B": Recipe(1.6e-4),
    "gpt3-6.7B": Recipe(1.2e-4),
    "gpt3-13B": Recipe(1.0e-4),
    "gpt3-175B": Recipe(0.6e-4),
}


def parameters(model: GPT) -> int:
    """How many numbers a model learns; a tied head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def continuing_rate(count: int) -> float:
    """The highest learning rate with which to go on training a model of `count` parameters.

    A tenth of that of the smallest of GPT-3's models that is at least as large, or else of the
    largest of all.
    """
    large_enough = (name for name in GPT3 if _size(name) >= count)
    # Rounded to be told and kept as 6e-05, not as 5.9999999999999995e-05.
    return round(GPT3[next(large_enough, "gpt3-175B")].learning_rate / 10, 9)


@functools.cache
def _size(name: str) -> int:
    with torch.device("meta"):  # shapes alone
        return parameters(GPT(GPTConfig.named(name)))
