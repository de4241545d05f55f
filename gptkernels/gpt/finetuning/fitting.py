"""The loop of fine-tuning: minimises L3 on the training part, keeps the best of all epochs.

After each epoch the model answers the validation part; the epoch with the best first metric of the
task is the best one, the earliest of those that are equal. At the end the model has its weights.
A signal cuts an epoch short, and that one is not judged, which may take long; in the first one
the model is kept as it is, so that there always is a best one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptkernels.gpt.finetuning.answers import answer, judge
from gptkernels.gpt.finetuning.batches import Encoded, collate, epoch
from gptkernels.gpt.finetuning.config import FinetuneConfig, learning_rate
from gptkernels.gpt.finetuning.task_model import TaskModel
from gptkernels.gpt.precision import DTYPES
from gptkernels.gpt.training.diverged import DivergedError
from gptkernels.gpt.training.observer import Observer
from gptkernels.gpt.training.stopping import Stopped, Stopping


@dataclass
class Fit:
    """Trains `model`, on its device, on the examples `training` and judges it on `validation`.

    observer: called with each record. on_best: called whenever the model is the best so far.
    on_signal: called from the handler of a signal that asks to stop.
    """

    model: TaskModel
    training: Sequence[Encoded]
    validation: Sequence[Encoded]
    config: FinetuneConfig
    observer: Observer | None = None
    on_best: Callable[[], None] | None = None
    on_signal: Callable[[], None] | None = None
    best: dict[str, float] = field(default_factory=dict)  # the best epoch's metrics, if any ended
    asked_to_stop: bool = False  # by a signal, if only after the last step
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _started: float = 0.0

    def run(self) -> bool:
        """Train to the end; whether SIGINT or SIGTERM stopped it before.

        The log has a line for each `log_interval` steps, and one at the end of an epoch. Raises
        DivergedError for a loss that is not finite, at the next of these lines.
        """
        config, model = self.config, self.model
        each = math.ceil(len(self.training) / config.batch_size)
        steps = config.epochs * each
        if config.freeze_body:
            model.freeze_body()
        groups = model.parameter_groups(config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        generator = torch.Generator().manual_seed(config.seed)
        self._started, step = time.perf_counter(), 0
        sums, since = torch.zeros(4, device=model.head.weight.device), 0

        def log() -> None:
            nonlocal since
            self._log(step, steps, rate, (sums / since).tolist())
            sums.zero_()
            since = 0

        with Stopping(self.on_signal) as stopping:
            try:
                for number in range(1, config.epochs + 1):
                    for part in epoch(self.training, config.batch_size, generator):
                        stopping.check()
                        rate = learning_rate(config, step, steps)
                        sums += self._step(optimizer, part, rate)
                        step, since = step + 1, since + 1
                        if step % config.log_interval == 0 or step % each == 0:
                            log()
                    self._judge(number, step, steps, stopping.check)
                stopped = False
            except Stopped:
                stopped = True
                if since:
                    log()
                if not self._kept:
                    self._keep()
        self.asked_to_stop = stopping.asked
        self._finish()
        return stopped

    def _step(self, optimizer: torch.optim.Optimizer, part: list[Encoded], rate: float) -> Tensor:
        """One step; the losses L3, L2 and L1 (0 where it is left out), and the gradients' norm
        before clipping."""
        config, model = self.config, self.model
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        batch = collate(part, model.task.range is not None).to(model.head.weight.device)
        dtype = DTYPES[config.dtype]
        scores, hidden = model(batch, dtype)
        assert batch.targets is not None  # examples to train on have answers
        task_loss = model.task_loss(scores, batch.targets)
        loss, lm_loss = task_loss, torch.zeros_like(task_loss)
        if config.lm_coefficient:
            lm_loss = model.lm_loss(hidden, batch, dtype)
            loss = task_loss + config.lm_coefficient * lm_loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack((loss.detach(), task_loss.detach(), lm_loss.detach(), norm))

    def _log(self, step: int, steps: int, rate: float, means: list[float]) -> None:
        names = ("loss", "task_loss", "lm_loss", "gradient_norm")
        found = dict(zip(names, means, strict=True))
        for name, value in found.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"fine-tuning diverged by step {step}, {name.replace('_', ' ')} is {value}: "
                    "try a lower learning_rate"
                )
        self._write({"step": step, **found, "learning_rate": rate}, step / steps)

    def _judge(self, number: int, step: int, steps: int, check: Callable[[], None]) -> None:
        metrics = evaluate(self.model, self.validation, self.config, check)
        first = self.model.task.metrics[0]
        if not self.best or metrics[first] > self.best[first]:
            self.best = metrics
            self._keep()
        of_epoch = {f"validation_{name}": value for name, value in metrics.items()}
        self._write({"step": step, "epoch": number, **of_epoch}, step / steps)

    def _keep(self) -> None:
        named = self.model.named_parameters()  # a tied one once
        self._kept = {name: parameter.detach().clone() for name, parameter in named}
        if self.on_best is not None:
            self.on_best()

    @torch.no_grad()
    def _finish(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self._kept[name])
        self._kept = {}
        self.model.eval()

    def _write(self, record: dict[str, Any], done: float) -> None:
        if self.observer is not None:
            seconds = time.perf_counter() - self._started
            self.observer({**record, "seconds": seconds}, done)


def evaluate(
    model: TaskModel,
    examples: Sequence[Encoded],
    config: FinetuneConfig,
    check: Callable[[], None] | None = None,
) -> dict[str, float]:
    """The task's metrics of the model's answers to `examples`, which all have a target. `check` is
    that of `answer`."""
    answers = answer(model, examples, config.batch_size, DTYPES[config.dtype], check)
    return judge(model.task, examples, answers)
