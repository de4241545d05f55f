"""What a run tells whoever watches it: a function hears of records, a Watcher of more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.training.config import TrainConfig

Observer = Callable[[dict[str, Any], float], None]
"""Called with each log record and the share of the run that is done, 0 to 1."""


@dataclass(frozen=True)
class Plan:
    """What a run is about to do.

    Fields:
        shape, config: of the model, and how it is trained.
        parameters: how many numbers the model learns.
        tokenizer: its name; "own" for one without.
        device: where the model is.
        training_tokens, validation_tokens: in the two parts of the text.
        step: how many steps were made before; more than 0 for a resumed run.
        tokens: to train on from here on, in all steps up to config.steps.
    """

    shape: GPTConfig
    config: TrainConfig
    parameters: int
    tokenizer: str
    device: torch.device
    training_tokens: int
    validation_tokens: int
    step: int
    tokens: int


class Watcher:
    """An observer that hears of everything; a subclass overrides what it wants to hear of."""

    def begins(self, plan: Plan) -> None:
        """The run begins or goes on; all that can be refused beforehand was not refused."""

    def __call__(self, record: dict[str, Any], done: float) -> None:
        """A record was written to the log; `done` is the share of the run behind us, 0 to 1."""

    def stepped(self, step: int, done: float, left_s: float | None) -> None:
        """A step was made, with all that it asked for; `left_s` is how long the rest takes, None
        until it was measured."""

    def stopping(self) -> None:
        """A signal asks to stop. Called from its handler, between any two lines of Python."""


class _Listener(Watcher):
    """A function, which hears of records alone."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer

    def __call__(self, record: dict[str, Any], done: float) -> None:
        """Pass the record on."""
        if self._observer is not None:
            self._observer(record, done)


def watching(observer: Observer | None) -> Watcher:
    """`observer` as a Watcher; None hears of nothing."""
    return observer if isinstance(observer, Watcher) else _Listener(observer)
