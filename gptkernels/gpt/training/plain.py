"""The loop of `train`, written out in PyTorch alone: what another model is trained with, to be
compared with ours step by step.

    weights of initial_weights -> for each step: batch, loss, backward, clip, AdamW

The batches, their order, the learning rates and the optimiser are those of `train`. Each step has
one micro-batch, and no loss is scaled, so float16 is refused.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.gpt.precision import DTYPES, autocast
from gptkernels.gpt.training import data
from gptkernels.gpt.training.config import TrainConfig, learning_rate
from gptkernels.gpt.training.learner import mean_loss, parameter_groups
from gptkernels.gpt.training.observer import Observer

Curve = list[dict[str, Any]]
"""Records as in log.jsonl: step, seconds, and loss (mean since the last record), validation_loss
or both."""


def initial_weights(config: GPTConfig, seed: int) -> Mapping[str, Tensor]:
    """The weights that `train` begins with, by the names of the model's state_dict."""
    torch.manual_seed(seed)
    return GPT(config).state_dict()


def train_plainly(
    model: nn.Module,
    tokens: data.Tokens,
    held_out: data.Tokens,
    block_size: int,
    how: TrainConfig,
    *,
    rates: Sequence[float] | None = None,
    observer: Observer | None = None,
) -> Curve:
    """Train `model`, of which `model(x, y)` is the mean loss, on windows of `block_size` tokens;
    returns its records.

    rates: the learning rate of each step, as many as there are steps; by default those of `how`,
    which a clock must not decide. observer: called as that of `train`.

    Raises ValueError for a `how` with float16, with more than one micro-batch a step, or with
    `minutes` and without rates.
    """
    _check(how, rates)
    if rates is None:
        rates = [learning_rate(how, step) for step in range(how.steps)]
    device = next(model.parameters()).device
    batches = data.Batches(tokens, block_size, how.batch_size, how.seed)
    groups = parameter_groups(model, how.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(how.beta1, how.beta2), fused=True)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with autocast(device, DTYPES[how.dtype]):
            loss: Tensor = model(x.to(device), y.to(device))
        return loss

    def validation_loss() -> float:
        model.eval()
        windows = data.validation_batches(
            held_out, block_size, how.batch_size, how.validation_batches
        )
        found = mean_loss(loss_of, windows)
        model.train()
        return found

    started = time.perf_counter()
    curve: Curve = []

    def write(record: dict[str, Any]) -> None:
        curve.append(record)
        if observer is not None:
            observer(record, record["step"] / len(rates))

    write({"step": 0, "seconds": 0.0, "validation_loss": validation_loss()})
    since: list[Tensor] = []
    for step, rate in enumerate(rates, 1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(*next(batches))
        loss.backward()
        if how.clip:
            nn.utils.clip_grad_norm_(model.parameters(), how.clip)
        optimizer.step()
        optimizer.zero_grad()
        since.append(loss.detach())
        validate = step == len(rates) or step % how.validation_interval == 0
        if validate or step % how.log_interval == 0:
            record: dict[str, Any] = {"step": step, "loss": torch.stack(since).mean().item()}
            record["seconds"] = time.perf_counter() - started  # as there, before it is validated
            if validate:
                record["validation_loss"] = validation_loss()
            since.clear()
            write(record)
    return curve


def differences(ours: Curve, plain: Curve) -> dict[str, list[tuple[int, float]]]:
    """|ours - plain| by step, of the losses and of the validation losses, at the steps where both
    have them."""
    theirs = {record["step"]: record for record in plain}
    return {
        name: [
            (record["step"], abs(record[name] - theirs[record["step"]][name]))
            for record in ours
            if name in record and name in theirs.get(record["step"], {})
        ]
        for name in ("loss", "validation_loss")
    }


def _check(how: TrainConfig, rates: Sequence[float] | None) -> None:
    if how.dtype == "float16":
        raise ValueError("dtype is 'float16', whose loss would have to be scaled")
    if how.accumulation != 1:
        raise ValueError(f"accumulation is {how.accumulation}, one micro-batch a step is wanted")
    if how.minutes is not None and rates is None:
        raise ValueError("minutes decide the learning rates by the clock, so rates are wanted")
