"""The validation loss of a model as it is: of a run's last checkpoint, or of any trained model.

It is what `train` computes between its steps, over the same evenly spaced windows. Nothing is
written, and no lock is taken: a run that is still going can be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptkernels.core.device import choose_device
from gptkernels.gpt.model import GPT
from gptkernels.gpt.precision import DTYPES, autocast
from gptkernels.gpt.training import checkpoint, data, prepared, vocabulary
from gptkernels.gpt.training.average import Average
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.learner import mean_loss
from gptkernels.gpt.training.pretrained import Pretrained
from gptkernels.gpt.training.train import changed


@dataclass(frozen=True)
class Validation:
    """What was found.

    loss: nats per token. ema_loss: that of the run's average of weights, where it keeps one. step:
    of the run, None for a model that is none. tokens: how many were predicted, of the `room` that
    were there. held_out: whether these are the held-out end of the run's own text.
    """

    loss: float
    ema_loss: float | None
    step: int | None
    tokens: int
    room: int
    held_out: bool

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)


def validate_run(
    out: str | Path, files: Sequence[str | Path] | None = None, **changes: Any
) -> Validation:
    """Validate the checkpoint of the run in the folder `out`, on what it holds out of its own text,
    or on the whole of other `files`. `changes` are fields of TrainConfig that get a new value.

    Raises what `resume` raises of a checkpoint, of files and of settings.
    """
    out = Path(out)
    path = out / "checkpoint.pt"
    content = checkpoint.load(path)
    saved = checkpoint.config(path, content, "train_config", TrainConfig)
    model = checkpoint.model(path, content)
    texts = content["files"] if files is None else files
    config = prepared.settled(texts, changed(saved, changes))
    tokenizer = vocabulary.kept(config.tokenizer, out)
    tokens, digest = data.read(texts, tokenizer, config.token_dtype, model.config.vocab_size)
    held_out = digest == content["text"]
    if files is None and not held_out:
        raise ValueError(
            f"files: the text of {', '.join(map(str, texts))} is not the text that the run was "
            "trained on"
        )
    if held_out:
        tokens = data.split(tokens, config.validation_fraction, model.config.block_size)[1]
    subject = _Subject(model, tokens, config)
    loss, ema_loss = subject.loss(), None
    if config.ema and content["average"]:
        average = Average(model, config.ema)
        checkpoint.average(path, content, average)
        with average.in_place():
            ema_loss = subject.loss()
    return subject.found(loss, ema_loss, content["step"], held_out)


def validate_model(
    begun: Pretrained, files: Sequence[str | Path], config: TrainConfig
) -> Validation:
    """Validate a trained model on the whole of `files`. Raises what `train` raises of files."""
    config = prepared.settled(files, begun.settled(config))
    vocab_size = begun.model.config.vocab_size
    tokens, _ = data.read(files, begun.tokenizer, config.token_dtype, vocab_size)
    subject = _Subject(begun.model, tokens, config)
    return subject.found(subject.loss(), None, None, held_out=False)


class _Subject:
    """A model on its device, and the tokens that it is to predict."""

    def __init__(self, model: GPT, tokens: data.Tokens, config: TrainConfig) -> None:
        self.length = model.config.block_size
        if len(tokens) < self.length + 1:
            raise ValueError(
                f"files: the text has {len(tokens)} tokens, but one context of "
                f"block_size={self.length} needs at least {self.length + 1}"
            )
        self.device = choose_device(config.device)
        model.set_impl(config.impl).to(self.device).eval()
        self.forward = torch.compile(model, fullgraph=True) if config.compile else model
        self.tokens, self.config = tokens, config

    def loss(self) -> float:
        """The mean loss over the windows."""
        config = self.config
        windows = data.validation_batches(
            self.tokens, self.length, config.batch_size, config.validation_batches
        )
        return mean_loss(self._loss, windows)

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.device, DTYPES[self.config.dtype]):
            loss: Tensor = self.forward(tokens.to(self.device), targets.to(self.device))
        return loss

    def found(
        self, loss: float, ema_loss: float | None, step: int | None, held_out: bool
    ) -> Validation:
        """What is said of it."""
        room = (len(self.tokens) - 1) // self.length
        windows = min(room, self.config.batch_size * self.config.validation_batches)
        tokens, room = windows * self.length, room * self.length
        return Validation(loss, ema_loss, step, tokens, room, held_out)
