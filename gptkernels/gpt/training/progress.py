"""What a person sees of a training run: what it is, a bar that moves, a line at every validation.

model     834,304 parameters, vocabulary 256 (bytes)
          4 layers, 4 heads, width 128, context 64
text      1,003,855 tokens, and 111,539 to validate on
machine   CPU, 2 threads; float32, impl auto
training  2,000 steps of 1,024 tokens, 2.0 epochs
memory    24.1 MiB of activations in a micro-batch
time      about 3 min; --steps or --minutes make it shorter
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from gptkernels.gpt.progress import Bar, duration
from gptkernels.gpt.training.observer import Plan, Watcher

_WORTH_SAYING_S = 10.0


class ProgressBar(Bar, Watcher):
    """A progress bar for `train(..., observer=...)`: use as a context.

    Before the first step it says what the run is, and once that was measured, how long it takes. On
    a terminal the bar shows step, loss, tokens per second and the time that is left; every
    validation leaves a line. Elsewhere (a file, a pipe) a line shows that every few seconds.

    opening: a line before the first; what is refused does not show it. shorter: how to make the run
    shorter, said with how long it takes.
    """

    def __init__(
        self, console: Console | None = None, opening: str = "", shorter: str = ""
    ) -> None:
        super().__init__(console or Console())
        self._opening, self._shorter = opening, shorter
        self._time_is_told, self._memory_is_told = False, False
        self._left_s: float | None = None  # as the run reckoned it last

    def begins(self, plan: Plan) -> None:
        """Say what the run is."""
        self._time_is_told = plan.config.minutes is not None
        for line in filter(None, (self._opening, *summary(plan))):
            self.console.print(line, markup=False, highlight=False)

    def stepped(self, step: int, done: float, left_s: float | None) -> None:
        """Move the bar; say how long the run takes, once that can be told."""
        self._left_s = left_s
        if left_s is not None and not self._time_is_told:
            self._time_is_told = True
            about = f"about {duration(left_s)}"
            if left_s >= _WORTH_SAYING_S:
                self._say("time", f"{about}; {self._shorter}" if self._shorter else about)
        self.show(f"step {step:,}", done, None, left_s)

    def __call__(self, record: dict[str, Any], done: float) -> None:
        """Show `record` (one line of log.jsonl); `done` is the share of the run behind us."""
        if "sample" in record:
            self.console.print(record["sample"], style="dim", markup=False, highlight=False)
            return
        if record.get("activation_bytes") and not self._memory_is_told:
            self._memory_is_told = True
            size = f"{record['activation_bytes'] / 2**20:,.1f} MiB"
            self._say("memory", f"{size} of activations in a micro-batch")
        step = f"step {record['step']:,}"
        if "validation_loss" in record:
            shown = describe(record, "loss", "validation_loss", "mfu")
            self.leave(f"{done:4.0%}  {step}  {shown}")
        self.show(step, done, describe(record, "loss", "tokens_per_s"), self._left_s)

    def _say(self, label: str, text: str) -> None:
        self.console.print(f"{label:10}{text}", markup=False, highlight=False)

    def stopping(self) -> None:
        """Say that the signal was heard."""
        self.interject("stopping; once more stops now")


def summary(plan: Plan) -> Iterator[str]:
    """The lines that say what a run is, of less than 80 columns."""
    shape, config = plan.shape, plan.config
    yield (
        f"{'model':10}{plan.parameters:,} parameters, vocabulary {shape.vocab_size:,} "
        f"({plan.tokenizer})"
    )
    yield (
        f"{'':10}{_count(shape.n_layer, 'layer')}, {_count(shape.n_head, 'head')}, "
        f"width {shape.n_embd:,}, context {shape.block_size:,}"
    )
    yield (
        f"{'text':10}{plan.training_tokens:,} tokens, and {plan.validation_tokens:,} to validate on"
    )
    compiled = ", compiled" if config.compile else ""
    yield f"{'machine':10}{_machine(plan.device)}; {config.dtype}, impl {config.impl}{compiled}"
    steps = f"{config.steps:,} steps of"
    if plan.step:
        steps = f"steps {plan.step + 1:,} to {config.steps:,}, of"
    if config.minutes is not None:
        steps = f"{config.minutes:g} minutes, at most {steps}"
    window = config.batch_size * shape.block_size
    label = "training"
    if config.ramp_tokens:
        yield f"{label:10}{steps} {window * config.ramp_start:,} tokens at first,"
        label, steps = "", f"after {config.ramp_tokens:,} of"
    epochs = ""
    if config.minutes is None:
        share = plan.tokens / plan.training_tokens
        epochs = f", {share:,.1f} epochs" if share >= 1 else f", {share:.2g} of an epoch"
    yield f"{label:10}{steps} {window * config.accumulation:,} tokens{epochs}"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {_count(torch.get_num_threads(), 'thread')}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


_FORMS = {
    "loss": "loss {:.4f}",
    "validation_loss": "validation loss {:.4f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}


def describe(record: dict[str, Any], *names: str) -> str:
    """Those of the figures called `names` that a log record has, in words."""
    return "  ".join(
        _FORMS[name].format(record[name]) for name in names if record.get(name) is not None
    )
