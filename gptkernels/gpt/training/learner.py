"""What a step of training changes: the weights, their average, the optimiser, the batches' order.

step:  for each of n micro-batches: loss / n, backward
       clip the gradients' norm, AdamW (Loshchilov & Hutter 2019)

In float16 small gradients become 0, so the loss is multiplied by a scale before the backward pass
and the gradients are divided by it afterwards. Where one of them is then infinite or NaN, the step
is skipped and the scale halved; after 2,000 good steps it is doubled (Micikevicius et al., "Mixed
Precision Training", 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptkernels.gpt.model import GPT
from gptkernels.gpt.precision import DTYPES, autocast
from gptkernels.gpt.training import activations, checkpoint, data
from gptkernels.gpt.training.average import Average
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.noise import NoiseScale


def _go_on() -> None:
    """Nothing asks to stop."""


class Learner:
    """Trains `model` on the tokens `training`, as `config` says, and validates it on others."""

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        device: torch.device,
        training: data.Tokens,
        validation: data.Tokens,
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.dtype = DTYPES[config.dtype]
        self.model.set_impl(config.impl).set_recompute(config.recompute)
        self.model.to(device)
        self.forward: nn.Module = self.model
        if config.compile:
            self.forward = torch.compile(self.model, fullgraph=True)  # type: ignore[assignment]
        self.block_size = model.config.block_size
        self.batches = data.Batches(training, self.block_size, config.batch_size, config.seed)
        self.validation = validation
        self.average = Average(self.model, config.ema) if config.ema else None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.rates[0],
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # steps
        self.noise = NoiseScale(device)
        self.activation_bytes: int | None = None  # of a micro-batch, once one was measured

    def step(
        self, rate: float, micro_batches: int, check: Callable[[], None] = _go_on
    ) -> tuple[Tensor, Tensor]:
        """One step: the mean loss over its micro-batches, the gradients' norm before clipping.

        In float16 a norm that is not finite says that the step was skipped. Calls `check` between
        two micro-batches: what that raises ends the step, as if it had not been begun.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        if micro_batches > 1:
            sampler, random = self.batches.state_dict(), checkpoint.random_state()
        total = torch.zeros((), device=self.device)
        first: Tensor | None = None  # norm of the first micro-batch's gradients
        for number in range(micro_batches):
            if number:
                try:
                    check()
                except BaseException:
                    self.optimizer.zero_grad(set_to_none=True)
                    self.batches.load_state_dict(sampler)
                    checkpoint.set_random_state(random)
                    raise
            tokens, targets = next(self.batches)
            if self.activation_bytes is None:
                with activations.measured(self.model) as measured:
                    loss = self._loss(tokens, targets)
                self.activation_bytes = measured.bytes
            else:
                loss = self._loss(tokens, targets)
            loss = loss / micro_batches
            self.scaler.scale(loss).backward()
            total += loss.detach()
            if first is None and micro_batches > 1:
                first = self._unscaled_norm() * micro_batches
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        if first is not None:
            size = self.config.batch_size
            self.noise.add(first, norm, size, micro_batches * size)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scales:
            self.skipped += ~norm.isfinite()
        # In float16 the condition waits for the GPU, with an average alone.
        if self.average is not None and (not self.scales or norm.isfinite()):
            self.average.update()
        return total, norm

    def _unscaled_norm(self) -> Tensor:
        """The norm of the gradients so far, without the loss's scale."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        scale = self.scaler.scale(torch.ones((), device=self.device))
        return nn.utils.get_total_norm(gradients) / scale

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled, and steps may be skipped: in float16."""
        return self.scaler.is_enabled()

    def validate(self, check: Callable[[], None] = _go_on) -> dict[str, float]:
        """The validation loss of the weights and, where one is kept, of their average. Calls
        `check` before each batch: what that raises ends it, and leaves nothing changed."""
        losses = {"validation_loss": self._validation_loss(check)}
        if self.average is not None:
            with self.average.in_place():
                losses["ema_validation_loss"] = self._validation_loss(check)
        return losses

    def state(self) -> dict[str, Any]:
        """Its part of a checkpoint, by the checkpoint's keys."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "scaler": self._scaler_state(),
            "sampler": self.batches.state_dict(),
            "random": checkpoint.random_state(),
        }

    def restore(self, path: Path, content: dict[str, Any]) -> None:
        """Restore all but the model from the checkpoint at `path`. Raises ValueError."""
        if content["step"]:  # before the first step the optimiser has no state
            checkpoint.optimizer(path, content, self.optimizer)
        checkpoint.generators(path, content, self.batches)
        if self.average is not None and content["average"]:
            checkpoint.average(path, content, self.average)
        if self.scales and content["scaler"]:
            state = checkpoint.scaler(path, content, self._scaler_state())
            self.skipped.fill_(state.pop("skipped_steps"))
            self.scaler.load_state_dict(state)

    def _scaler_state(self) -> dict[str, Any]:
        """Empty where the loss is not scaled."""
        state = self.scaler.state_dict()
        return {**state, "skipped_steps": int(self.skipped)} if self.scales else state

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            loss: Tensor = self.forward(tokens.to(self.device), targets.to(self.device))
        return loss

    def _validation_loss(self, check: Callable[[], None]) -> float:
        """Mean loss over the validation windows, without dropout; draws no random number."""
        self.model.eval()
        config = self.config
        windows = data.validation_batches(
            self.validation, self.block_size, config.batch_size, config.validation_batches
        )

        def loss(tokens: Tensor, targets: Tensor) -> Tensor:
            check()
            return self._loss(tokens, targets)

        return mean_loss(loss, windows)


@torch.no_grad()
def mean_loss(
    loss: Callable[[Tensor, Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> float:
    """The mean over all windows of the batches, of which the last may be smaller."""
    total, count = 0.0, 0
    for tokens, targets in batches:
        total += loss(tokens, targets).item() * len(tokens)
        count += len(tokens)
    return total / count


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: matrices (two dimensions or more) decay; biases and norms do not.

    A parameter that is shared (the tied head) is listed once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
