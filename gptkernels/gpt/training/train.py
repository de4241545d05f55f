"""Training, readable in one sitting: text or token shards in, a folder with weights, log and loss
curve out. learner.py makes the steps.

    out/   log.jsonl       one JSON object a line: step, loss, learning rate, tokens/s, MFU, ...
           checkpoint.pt   replaced atomically; `resume(out)` goes on from it
           loss.png        the curve
           model/          the trained weights, as `GPT.save_pretrained` writes them
           tokenizer.json  or characters.json, where the tokenizer has no name (vocabulary.py)
           model-ema/      with `ema`: their average
           snapshots/      with `snapshot_interval`: the weights along the way, a folder a step
           tensorboard/    with `tensorboard`: the log for it

A run that was interrupted and resumed ends with the same bits as one that was not, dropout
included, on the same machine with the same number of threads and, with impl="auto", the same table
of measurements (core/tuned.py); under another table, `resume` warns. This is because the checkpoint
holds everything that has a state (weights, optimiser, PyTorch's generators, the sampler's
generator), and log, validation, samples and saving leave these generators alone. The exception is a
run with `minutes`, whose learning rate follows the clock.

SIGINT and SIGTERM end a run after the present step, with a checkpoint to resume from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptkernels.core import plans
from gptkernels.core.ceilings import product_rate
from gptkernels.core.checks import check_count
from gptkernels.core.choice import switched_off
from gptkernels.core.device import choose_device
from gptkernels.core.figure import figure_class
from gptkernels.core.files import check_folder
from gptkernels.core.lock import alone_in
from gptkernels.core.tuned import Table
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.gpt.tokenizer import Tokenizer, load_tokenizer, name_of
from gptkernels.gpt.training import checkpoint, data, prepared, vocabulary
from gptkernels.gpt.training.config import (
    DECIDED,
    TrainConfig,
    in_epochs,
    learning_rate,
    micro_batches,
)
from gptkernels.gpt.training.curve import draw_losses
from gptkernels.gpt.training.learner import Learner
from gptkernels.gpt.training.log import Log
from gptkernels.gpt.training.pretrained import Pretrained
from gptkernels.gpt.training.stopping import Stopping
from gptkernels.gpt.training.throughput import Speed, flops_per_token, petaflop_s_days
from gptkernels.gpt.weights import safetensors_package

Observer = Callable[[dict[str, Any], float], None]
"""Called with each log record and the share of the run that is done, 0 to 1."""

_LEAST_SCALE = 2.0**-14  # of the loss; at 1 no gradient of use is too large for float16


class DivergedError(RuntimeError):
    """The loss or the gradients' norm became NaN or infinite; in float16, at any scale."""


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind, besides its folder."""

    model: GPT
    records: list[dict[str, Any]]
    best_validation_loss: float
    seconds: float
    petaflop_s_days: float
    stopped: bool = False  # by SIGINT or SIGTERM, before its end


def train(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    model: GPTConfig | None = None,
    init: str | Path | Pretrained | None = None,
    config: TrainConfig | None = None,
    epochs: int | None = None,
    observer: Observer | None = None,
) -> TrainResult:
    """Train a GPT on `files`, text, token shards (.bin) or folders that `prepare` wrote, and write
    the folder `out`.

    model: the shape of a new GPT. init: in place of it, one to go on from, with its tokenizer and
    without its optimiser: a path as `Pretrained.load` takes it, or what that returned. epochs:
    passes over the training part of the files, in place of config.steps; at most a tenth of their
    steps warm up.

    Raises FileNotFoundError or ValueError for files that cannot be trained on and for an `init`
    that cannot be gone on from, ValueError when `out` already holds a checkpoint, is a model's own
    folder or is in use by another run, or when `model` does not fit the tokenizer (its vocab_size
    may be larger: a padded table), for both of `model` and `init` or neither, and for less than one
    epoch, ImportError when matplotlib, safetensors, the tokenizer's package or tensorboard is
    missing and needed, DivergedError when the loss is no longer finite (the last checkpoint stays),
    RuntimeError when `config.impl` cannot run on the device, OSError when `out` is a file or cannot
    be written (the last checkpoint stays).
    """
    config, out = config or TrainConfig(), Path(out)
    _check_new(out)
    if epochs is not None:
        check_count("epochs", epochs)
    texts = [str(Path(file).resolve()) for file in files]
    if init is None and model is not None:
        config = prepared.settled(files, config)
        torch.manual_seed(config.seed)
        tokenizer = load_tokenizer(config.tokenizer)
        run = _Run(texts, out, model, tokenizer, config, observer, epochs=epochs)
    elif model is None and init is not None:
        begun = init
        if not isinstance(begun, Pretrained):
            begun = Pretrained.load(begun, config.tokenizer)
        config = prepared.settled(files, begun.settled(config))
        torch.manual_seed(config.seed)
        network = begun.model
        tokenizer, shape = begun.tokenizer, network.config
        run = _Run(texts, out, shape, tokenizer, config, observer, network, epochs)
    else:
        raise ValueError("model, init: exactly one of the two is wanted")
    with alone_in("out", out):
        _check_new(out)
        return run.finish()


def resume(
    out: str | Path,
    *,
    files: Sequence[str | Path] | None = None,
    observer: Observer | None = None,
    **changes: Any,
) -> TrainResult:
    """Go on from `out`/checkpoint.pt; `changes` are fields of TrainConfig that get a new value.

    `files` names the same text when it has moved. Raises as `train` does, FileNotFoundError when
    there is no checkpoint, and ValueError when the checkpoint cannot be read, when the text is not
    the text it was, or when a change comes too late (seed, tokenizer, validation_fraction). Warns
    where impl="auto" now follows another table of measurements than when the checkpoint was
    written.
    """
    out = Path(out)
    checkpoint.check_exists(out / "checkpoint.pt")
    with alone_in("out", out):  # from here on: its holder may write another checkpoint
        return _resumed(out, files, observer, changes)


def _resumed(
    out: Path,
    files: Sequence[str | Path] | None,
    observer: Observer | None,
    changes: dict[str, Any],
) -> TrainResult:
    path = out / "checkpoint.pt"
    content = checkpoint.load(path)
    saved = checkpoint.config(path, content, "train_config", TrainConfig)
    settings = dataclasses.asdict(saved)
    for name, value in changes.items():
        if name not in settings:
            raise TypeError(f"{name} is not a setting of training")
        if name in DECIDED and value != settings[name]:
            raise ValueError(
                f"{name} is {value!r}, but the run to resume has {settings[name]!r} and cannot "
                "change it"
            )
    config = dataclasses.replace(saved, **changes)
    texts = content["files"] if files is None else [str(Path(file).resolve()) for file in files]
    config = prepared.settled(texts, config)
    model = checkpoint.model(path, content)
    tokenizer = vocabulary.kept(config.tokenizer, out)
    run = _Run(texts, out, model.config, tokenizer, config, observer, model)
    run.restore(content)
    return run.finish()


def _check_new(out: Path) -> None:
    check_folder("out", out)
    if (out / "checkpoint.pt").exists():
        raise ValueError(f"out: {out} already holds a checkpoint, resume it or name another folder")
    # Its tokenizer would be overwritten.
    if (out / "config.json").exists():
        raise ValueError(f"out: {out} holds a model, name another folder")


class _Run:
    """One run: its budget, its log, its checkpoints and the loop."""

    def __init__(
        self,
        files: list[str],
        out: Path,
        model_config: GPTConfig,
        tokenizer: Tokenizer,
        config: TrainConfig,
        observer: Observer | None,
        model: GPT | None = None,
        epochs: int | None = None,
    ) -> None:
        # Better to report a missing package now than after the training.
        figure_class()
        safetensors_package()
        self.log = Log(out, config.tensorboard)
        self.files, self.out, self.config, self.observer = files, out, config, observer
        self.model_config, self.tokenizer = model_config, tokenizer
        self.device = choose_device(config.device)

        if model_config.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"vocab_size is {model_config.vocab_size}, but the tokenizer {config.tokenizer!r} "
                f"has {self.tokenizer.vocab_size} tokens"
            )
        self.prompt = self._prompt()
        tokens, self.digest = data.read(
            files, self.tokenizer, config.token_dtype, model_config.vocab_size
        )
        training, validation = data.split(
            tokens, config.validation_fraction, model_config.block_size
        )
        if epochs is not None:
            windows = (len(training) - 1) // model_config.block_size
            self.config = config = in_epochs(config, epochs, windows)
        # Initial weights are drawn on the CPU, so that they do not depend on the device.
        self.model = GPT(model_config) if model is None else model
        self.learner = Learner(self.model, config, self.device, training, validation)
        sizes = model_config.n_layer, model_config.n_embd, model_config.block_size
        self.flops = flops_per_token(self.model, *sizes)
        self.step = 0
        self.tokens = 0
        self.seconds_before = 0.0
        self.best_validation_loss = math.inf
        # Since the last line of the log: the sum of the losses, and the number of steps.
        self.losses, self.since = torch.zeros((), device=self.device), 0

    def restore(self, content: dict[str, Any]) -> None:
        """Go on from a checkpoint, and from the log up to its step."""
        if content["text"] != self.digest:
            raise ValueError(
                f"files: the text of {', '.join(self.files)} is not the text that the run to "
                "resume was trained on"
            )
        path = self.out / "checkpoint.pt"
        self.learner.restore(path, content)
        self.step, self.tokens = content["step"], content["tokens"]
        self.seconds_before = content["seconds"]
        self.best_validation_loss = content["best_validation_loss"]
        losses, self.since, noise = checkpoint.since_log(path, content)
        self.losses.copy_(losses)
        self.learner.noise.sums.copy_(noise)
        self._warn_of_another_table(path, content["tuned"])
        self.log.take_up(self.step)

    def _tuned(self) -> str:
        """The digest of the table that the run follows; "" where it asks none."""
        if self.config.impl != "auto":
            return ""
        if switched_off():  # the kill switch stands above all tables
            return Table().digest()
        return plans.table(self.device.type).digest()

    def _warn_of_another_table(self, path: Path, before: str) -> None:
        now = self._tuned()
        # Where either names an impl, whoever changed it knows that.
        if not before or not now or before == now:
            return
        none = Table().digest()
        then = "without a table" if before == none else f"under the table {before}"
        same = "GPTKERNELS_TUNE=off" if before == none else "that table"
        follows = "none" if now == none else f"the table {now}"
        warnings.warn(
            f"{path} was written {then} of measurements, and impl='auto' now follows {follows}: "
            "the rest of the run may differ in its last bits from one that was not interrupted; "
            f"resumed with {same} it has the same",
            stacklevel=5,  # whoever called resume
        )

    def finish(self) -> TrainResult:
        """Train to the end of the budget, or until a signal asks to stop, and write what belongs
        in `out`."""
        with Stopping() as stopping, contextlib.closing(self.log):
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
        config, shape = self.config, self.model_config
        speed = Speed(self.flops, product_rate(self.device, self.learner.dtype))
        self.started = time.perf_counter()
        if self.step == 0:
            self._write({"step": 0, **self._validate(), "seconds": self.seconds})
            if config.snapshot_interval:
                self._save_model("snapshots/0")

        speed.restart(self.tokens)
        last = (
            self.done and self.step > 0
        )  # at least one step, even if validating took all the time
        while not last:
            rate = learning_rate(config, self.step, self.seconds)
            batches = micro_batches(config, self.tokens)
            tokens_a_step = batches * config.batch_size * shape.block_size
            loss, norm = self.learner.step(rate, batches)
            self.losses += loss
            self.since += 1
            self.step += 1
            self.tokens += tokens_a_step
            last = self.done
            stop = stopping.asked and not last
            validate = last or self.step % config.validation_interval == 0
            save = last or stop or self.step % config.checkpoint_interval == 0

            if validate or self.step % config.log_interval == 0:
                self._log(rate, norm, tokens_a_step, speed, validate)
            if config.sample_interval and self.step % config.sample_interval == 0:
                self._write({"step": self.step, "sample": self._sample()})
            interval = config.snapshot_interval
            if interval and (last or self.step % interval == 0):
                self._save_model(f"snapshots/{self.step}")
            if save:
                self._check_finite({"loss": loss.item(), "gradient_norm": self._norm(norm)})
                self._save()
            if stop:
                return True
        return False

    def _log(
        self, rate: float, norm: Tensor, tokens_a_step: int, speed: Speed, validate: bool
    ) -> None:
        """Write a line about the steps since the last one, of which rate, norm and tokens are the
        last one's; with `validate`, of a validation too."""
        noise = self.learner.noise.read()
        record = {
            "step": self.step,
            "loss": self.losses.item() / self.since,  # waits for the GPU
            "learning_rate": rate,
            "gradient_norm": self._norm(norm),
            "noise_scale": None if noise is None else noise * self.model_config.block_size,
            "tokens": self.tokens,
            "batch_tokens": tokens_a_step,
            "epochs": self.learner.batches.epochs,
            **speed.read(self.tokens),
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
        if validate:
            self._check_finite(record)
            record |= self._validate()
        self._write(record)
        speed.restart(self.tokens)

    def _norm(self, norm: Tensor) -> float | None:
        """The norm of a step's gradients, None where it was skipped: no run ends for that."""
        return None if self.learner.scales and not norm.isfinite() else norm.item()

    def _validate(self) -> dict[str, float]:
        losses = self.learner.validate()
        self.best_validation_loss = min(self.best_validation_loss, losses["validation_loss"])
        return losses

    def _prompt(self) -> list[int]:
        """The tokens that samples continue; none where no sample is taken, since a vocabulary of
        characters may lack those of the default."""
        if not self.config.sample_interval:
            return []
        ids = self.tokenizer.encode(self.config.sample_prompt)
        kept = ids[-self.model_config.block_size :]
        if not kept:
            raise ValueError(
                f"sample_prompt is {self.config.sample_prompt!r}, which the tokenizer "
                f"{self.config.tokenizer!r} turns into no token; at least one is wanted"
            )
        return kept

    def _sample(self) -> str:
        tokens = self.model.generate(
            torch.tensor([self.prompt], device=self.device),
            self.config.sample_tokens,
            seed=self.config.seed,  # sampling then draws nothing from PyTorch's generators
            eos=self.tokenizer.eos,
            vocab_size=self.tokenizer.vocab_size,
            slots=1,
        )
        return self.tokenizer.decode(tokens[0].tolist())

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
        if self.observer is not None:
            self.observer(record, self.share)

    def _save(self) -> None:
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
                "model_config": dataclasses.asdict(self.model_config),
                "train_config": dataclasses.asdict(self.config),
                "files": self.files,
                "text": self.digest,
                "tuned": self._tuned(),
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
