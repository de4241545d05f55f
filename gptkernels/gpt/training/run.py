"""One run: its budget, its log, its checkpoints and the loop. train.py begins and resumes it.

After each step it is written down what the step asks for (`due`): a line of the log with a
validation, a sample, a snapshot, a checkpoint. It is done in this order, and what a signal leaves
undone goes into the checkpoint. So a run that was stopped in the middle of a validation makes that
one first when it goes on, and its log ends as that of a run that was not stopped.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptkernels.core.ceilings import product_rate
from gptkernels.core.device import choose_device
from gptkernels.core.figure import figure_class
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.gpt.tokenizer import Tokenizer, name_of
from gptkernels.gpt.training import checkpoint, data, tables, vocabulary
from gptkernels.gpt.training.config import (
    TrainConfig,
    in_epochs,
    learning_rate,
    micro_batches,
    tokens_of_steps,
)
from gptkernels.gpt.training.curve import draw_losses
from gptkernels.gpt.training.diverged import DivergedError
from gptkernels.gpt.training.learner import Learner
from gptkernels.gpt.training.log import Log
from gptkernels.gpt.training.observer import Observer, Plan, watching
from gptkernels.gpt.training.recipes import parameters
from gptkernels.gpt.training.sampling import Sampler
from gptkernels.gpt.training.sinks import sinks_of
from gptkernels.gpt.training.stopping import Stopped, Stopping
from gptkernels.gpt.training.throughput import Pace, Speed, flops_per_token, petaflop_s_days
from gptkernels.gpt.weights import safetensors_package

_LEAST_SCALE = 2.0**-14  # of the loss; at 1 no gradient of use is too large for float16


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind, besides its folder."""

    model: GPT
    records: list[dict[str, Any]]
    best_validation_loss: float
    seconds: float
    petaflop_s_days: float
    stopped: bool = False  # by SIGINT or SIGTERM, before its end
    nothing_left: str = ""  # what was done before, such as "12 of 12 steps", where that is all


def flops_of(model: GPT) -> float:
    """The FLOP that training `model` on a token takes."""
    shape = model.config
    return flops_per_token(model, shape.n_layer, shape.n_embd, shape.block_size)


def check_text(files: list[str], digest: str, content: dict[str, Any]) -> None:
    """Raise ValueError where the text of `files`, of this digest, is not that of a checkpoint."""
    if content["text"] != digest:
        raise ValueError(
            f"files: the text of {', '.join(files)} is not the text that the run to resume was "
            "trained on"
        )


class Run:
    """One run in the folder `out`, of a new model or of `model`; `epochs`, in place of its steps.

    Raises what `train` says of files, packages and settings, before anything is written.
    """

    def __init__(
        self,
        files: list[str],
        out: Path,
        shape: GPTConfig,
        tokenizer: Tokenizer,
        config: TrainConfig,
        observer: Observer | None,
        model: GPT | None = None,
        epochs: int | None = None,
    ) -> None:
        # Better to report a missing package now than after the training.
        figure_class()
        safetensors_package()
        self.log = Log(out, sinks_of(out, config))
        self.files, self.out, self.config, self.shape = files, out, config, shape
        self.tokenizer, self.watcher = tokenizer, watching(observer)
        self.device = choose_device(config.device)

        if shape.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"vocab_size is {shape.vocab_size}, but the tokenizer {config.tokenizer!r} "
                f"has {tokenizer.vocab_size} tokens"
            )
        self.sampler = Sampler(config, tokenizer, shape.block_size)
        tokens, self.digest = data.read(files, tokenizer, config.token_dtype, shape.vocab_size)
        training, validation = data.split(tokens, config.validation_fraction, shape.block_size)
        self.parts = len(training), len(validation)
        if epochs is not None:
            windows = (len(training) - 1) // shape.block_size
            self.config = config = in_epochs(config, epochs, windows)
        # Initial weights are drawn on the CPU, so that they do not depend on the device.
        self.model = GPT(shape) if model is None else model
        self.learner = Learner(self.model, config, self.device, training, validation)
        self.flops = flops_of(self.model)
        self.speed = Speed(self.flops, product_rate(self.device, self.learner.dtype))
        self.pace = Pace()
        self.step = 0
        self.tokens = 0
        self.seconds_before = 0.0
        self.best_validation_loss = math.inf
        self.due: dict[str, Any] = {"validation": {"step": 0, "seconds": 0.0}}
        if config.snapshot_interval:
            self.due["snapshot"] = True
        # Since the last line of the log: the sum of the losses, and the number of steps.
        self.losses, self.since = torch.zeros((), device=self.device), 0
        self.latest: tuple[Tensor, Tensor] | None = None  # loss and norm of the last step

    def restore(self, content: dict[str, Any]) -> None:
        """Go on from a checkpoint, and from the log up to its step."""
        check_text(self.files, self.digest, content)
        path = self.out / "checkpoint.pt"
        self.learner.restore(path, content)
        self.step, self.tokens = content["step"], content["tokens"]
        self.seconds_before = content["seconds"]
        self.best_validation_loss = content["best_validation_loss"]
        self.due = checkpoint.due(path, content)
        for what, interval in (
            ("sample", self.config.sample_interval),
            ("snapshot", self.config.snapshot_interval),
        ):
            if not interval:  # no longer asked for
                self.due.pop(what, None)
        losses, self.since, noise = checkpoint.since_log(path, content)
        self.losses.copy_(losses)
        self.learner.noise.sums.copy_(noise)
        now = tables.followed(self.config.impl, self.device)
        tables.warn_of_another(path, content["tuned"], now)
        self.log.take_up(self.step, self.due)

    def finish(self) -> TrainResult:
        """Train to the end of the budget, or until a signal asks to stop, and write what belongs
        in `out`."""
        with Stopping(self.watcher.stopping) as stopping, contextlib.closing(self.log):
            self.log.begin(self._about())
            self.watcher.begins(self._plan())
            stopped = self._train(stopping)
        draw_losses(self.log.records, self.out / "loss.png")
        if not stopped:
            self._save_model("model")
            if (average := self.learner.average) is not None:
                with average.in_place():
                    self._save_model("model-ema")
            elif (old := self.out / "model-ema").exists():  # resumed without an average
                shutil.rmtree(old)
        best = self.best_validation_loss
        return TrainResult(self.model, self.log.records, best, self.seconds, self.compute, stopped)

    def _train(self, stopping: Stopping) -> bool:
        """The loop; whether it was stopped before its end."""
        self.started = time.perf_counter()
        try:
            self._do_due(stopping)
            self.speed.restart(self.tokens)
            # At least one step, even if validating took all the time.
            last = self.done and self.step > 0
            while not last:
                stopping.check()
                last = self._step(stopping)
                self._do_due(stopping)
                self.watcher.stepped(self.step, self.share, self._left_s())
        except Stopped:
            self._save()
            return True
        return False

    def _step(self, stopping: Stopping) -> bool:
        """Make a step, and write down what is due then; whether it is the last."""
        config = self.config
        rate = learning_rate(config, self.step, self.seconds)
        batches = micro_batches(config, self.tokens)
        tokens = batches * self.window
        self.latest = loss, norm = self.learner.step(rate, batches, stopping.check)
        self.losses += loss
        self.since += 1
        self.step += 1
        self.tokens += tokens
        self.pace.stepped(tokens)

        last = self.done
        validate = last or self.step % config.validation_interval == 0
        if validate or self.step % config.log_interval == 0:
            record = self._record(rate, norm, tokens)
            self._check_finite(record)
            if validate:
                self.due["validation"] = record
            else:
                self._write(record)
        if config.sample_interval and self.step % config.sample_interval == 0:
            self.due["sample"] = True
        if config.snapshot_interval and (last or self.step % config.snapshot_interval == 0):
            self.due["snapshot"] = True
        if last or self.step % config.checkpoint_interval == 0:
            self.due["checkpoint"] = True
        return last

    def _do_due(self, stopping: Stopping) -> None:
        """Do what the present step asks for. Raises Stopped between any two parts of it, and leaves
        the others in `due`."""
        while self.due:
            stopping.check()
            what, value = next(iter(self.due.items()))
            if what == "validation":
                with self.pace.validation():
                    losses = self.learner.validate(stopping.check)
                self.best_validation_loss = min(
                    self.best_validation_loss, losses["validation_loss"]
                )
                self._write({**value, **losses})
            elif what == "sample":
                text = self.sampler.sample(self.model, stopping.check)
                self._write({"step": self.step, "sample": text})
            elif what == "snapshot":
                self._save_model(f"snapshots/{self.step}")
            del self.due[what]
            if what == "checkpoint":
                self._save()

    def _record(self, rate: float, norm: Tensor, tokens: int) -> dict[str, Any]:
        """A line of the log about the steps since the last one, of which rate, norm and tokens are
        the last one's."""
        noise = self.learner.noise.read()
        record = {
            "step": self.step,
            "loss": self.losses.item() / self.since,  # waits for the GPU
            "learning_rate": rate,
            "gradient_norm": self._norm(norm),
            "noise_scale": None if noise is None else noise * self.shape.block_size,
            "tokens": self.tokens,
            "batch_tokens": tokens,
            "epochs": self.learner.batches.epochs,
            **self.speed.read(self.tokens),
            "petaflop_s_days": self.compute,
            "activation_bytes": self.learner.activation_bytes,
            "seconds": self.seconds,
        }
        if self.learner.scales:
            record["loss_scale"] = self.learner.scaler.get_scale()
            record["skipped_steps"] = int(self.learner.skipped)
        self.losses.zero_()
        self.since = 0
        self.learner.noise.restart()
        return record

    def _norm(self, norm: Tensor) -> float | None:
        """The norm of a step's gradients, None where it was skipped: no run ends for that."""
        return None if self.learner.scales and not norm.isfinite() else norm.item()

    def _about(self) -> dict[str, Any]:
        return {
            "model": asdict(self.shape),
            "training": asdict(self.config),
            "files": self.files,
            "parameters": parameters(self.model),
        }

    def _plan(self) -> Plan:
        config, left = self.config, self.config.steps - self.step
        return Plan(
            self.shape, config, parameters(self.model), config.tokenizer, self.device, *self.parts,
            self.step, tokens_of_steps(config, left, self.tokens, self.window),
        )  # fmt: skip

    def _left_s(self) -> float | None:
        """How long the rest takes, as far as it can be told by now."""
        config, left = self.config, self.config.steps - self.step
        tokens = tokens_of_steps(config, left, self.tokens, self.window)
        found = self.pace.left_s(tokens, math.ceil(left / config.validation_interval))
        if config.minutes is None:
            return found
        return min(math.inf if found is None else found, 60 * config.minutes - self.seconds)

    @property
    def window(self) -> int:
        """The tokens of a micro-batch."""
        return self.config.batch_size * self.shape.block_size

    @property
    def seconds(self) -> float:
        """Time spent in this run, earlier parts included."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def compute(self) -> float:
        """Petaflop/s-days of this run, earlier parts included."""
        return petaflop_s_days(self.flops, self.tokens)

    @property
    def share(self) -> float:
        """How much of the run is behind us, 0 to 1."""
        share = self.step / self.config.steps
        if self.config.minutes is not None:
            share = max(share, self.seconds / (60 * self.config.minutes))
        return min(share, 1.0)

    @property
    def done(self) -> bool:
        """Whether the budget of steps or minutes is used up."""
        return self.share >= 1.0

    def _write(self, record: dict[str, Any]) -> None:
        self._check_finite(record)
        self.log.write(record)
        self.watcher(record, self.share)
        self.speed.restart(self.tokens)

    def _save(self) -> None:
        if self.latest is not None:
            loss, norm = self.latest
            self._check_finite({"loss": loss.item(), "gradient_norm": self._norm(norm)})
        # First: a checkpoint never lies without its tokenizer. It makes the folder, which somebody
        # may have cleaned away meanwhile.
        vocabulary.keep(self.tokenizer, self.out)
        checkpoint.save(
            self.out / "checkpoint.pt",
            {
                **self.learner.state(),
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "best_validation_loss": self.best_validation_loss,
                "since_log": {
                    "loss": self.losses,
                    "steps": self.since,
                    "noise": self.learner.noise.sums,
                },
                "due": self.due,
                "model_config": asdict(self.shape),
                "train_config": asdict(self.config),
                "files": self.files,
                "text": self.digest,
                "tuned": tables.followed(self.config.impl, self.device),
            },
        )

    def _save_model(self, name: str) -> None:
        vocabulary.keep(self.tokenizer, self.out / name)  # first, as of a checkpoint
        self.model.save_pretrained(self.out / name, tokenizer=name_of(self.tokenizer))

    def _check_finite(self, record: dict[str, Any]) -> None:
        names = ("loss", "gradient_norm", "validation_loss")
        wrong = [name for name in names if not math.isfinite(record.get(name) or 0.0)]
        if record.get("loss_scale", 1.0) < _LEAST_SCALE:  # every step was skipped for a while
            wrong.append("loss_scale")
        if wrong:
            path = self.out / "checkpoint.pt"
            kept = "no checkpoint was written yet"
            if path.exists():
                kept = f"{path} is the last good state"
            raise DivergedError(
                f"training diverged by step {self.step}, {wrong[0].replace('_', ' ')} is "
                f"{record[wrong[0]]}: {kept}, try a lower learning_rate or a longer warm-up"
            )
