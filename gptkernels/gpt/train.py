"""Training, readable in one sitting: text files in, a folder with weights, log and loss curve out.

    step:  for each of `accumulation` micro-batches: loss / accumulation, backward
           clip the gradients' norm, AdamW (Loshchilov & Hutter 2019), next learning rate
    out/   log.jsonl       one JSON object a line: step, loss, learning rate, tokens/s, MFU, ...
           checkpoint.pt   replaced atomically; `resume(out)` goes on from it
           loss.png        the curve
           model/          the trained weights, as `GPT.save_pretrained` writes them

A run that was interrupted and resumed ends with the same bits as one that was not, dropout
included, on the same machine with the same number of threads: whatever has a state is in the
checkpoint (weights, optimiser, PyTorch's generators, the sampler's generator), and log, validation
and saving draw no random numbers. The exception is `minutes`: there the learning rate follows the
clock.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptkernels.device import choose_device
from gptkernels.gpt import checkpoint, data
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.curve import draw_losses, figure_class
from gptkernels.gpt.model import GPT
from gptkernels.gpt.throughput import flops_per_token, peak_flops
from gptkernels.gpt.tokenizer import load_tokenizer
from gptkernels.gpt.weights import safetensors_package

Observer = Callable[[dict[str, Any], float], None]
"""Called with each log record and the share of the run that is done, 0 to 1."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What decided the part of the run that already happened: a resumed run cannot choose it again.
_DECIDED = ("seed", "tokenizer", "token_dtype", "validation_fraction")


class DivergedError(RuntimeError):
    """The loss or the gradients' norm became NaN or infinite."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError for a value out of range, TypeError for a wrong type."""

    steps: int = _option(2000, "optimiser steps; the learning rate has fallen by then")
    minutes: float | None = _option(
        None, "stop after this many minutes at the latest; the learning rate then follows the clock"
    )
    batch_size: int = _option(16, "windows of text in a micro-batch")
    accumulation: int = _option(1, "micro-batches whose gradients make one step")
    learning_rate: float = _option(1e-3, "the highest learning rate, reached after the warm-up")
    min_learning_rate: float = _option(1e-4, "the learning rate at the end of the cosine")
    warmup_steps: int = _option(100, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "AdamW's decay, of matrices only")
    beta1: float = _option(0.9, "AdamW's decay of the mean gradient")
    beta2: float = _option(0.95, "AdamW's decay of the mean squared gradient")
    clip: float = _option(1.0, "largest norm of all gradients together; 0 does not clip")
    dtype: str = _option("float32", "float32, or bfloat16 for autocast (weights stay float32)")
    device: str = _option("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N")
    impl: str = _option("auto", "implementation of the fused operations: auto, torch or triton")
    tokenizer: str = _option("bytes", "bytes; gpt2, its byte-level BPE; gpt1, its BPE of words")
    token_dtype: str = _option("uint16", "of the ids in token shards (.bin): uint16 or uint32")
    seed: int = _option(1337, "of initial weights, dropout and batches")
    validation_fraction: float = _option(0.1, "share of the text, its end, that is held out")
    validation_interval: int = _option(200, "steps between two validations")
    validation_batches: int = _option(20, "batches in a validation, at most")
    checkpoint_interval: int = _option(500, "steps between two checkpoints")
    log_interval: int = _option(10, "steps between two lines of the log")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            _check_type(option.name, str(option.type), getattr(self, option.name))
        for name in _POSITIVE:
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "clip", "min_learning_rate", "seed"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        _check(self, "seed", self.seed < 2**63, "less than 2**63")
        _check(self, "minutes", self.minutes is None or self.minutes > 0, "more than 0")
        _check(self, "learning_rate", self.learning_rate > 0, "more than 0")
        _check(
            self,
            "min_learning_rate",
            self.min_learning_rate <= self.learning_rate,
            f"at most learning_rate={self.learning_rate}",
        )
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _check(self, "validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")
        _check(self, "dtype", self.dtype in _DTYPES, " or ".join(_DTYPES))
        _check(self, "token_dtype", self.token_dtype in ("uint16", "uint32"), "uint16 or uint32")


_POSITIVE = (
    "steps",
    "batch_size",
    "accumulation",
    "validation_interval",
    "validation_batches",
    "checkpoint_interval",
    "log_interval",
)


def _check_type(name: str, wanted: str, value: Any) -> None:
    """`wanted` is the field's annotation: "int", "float", "str" or "float | None"."""
    if value is None and wanted.endswith("| None"):
        return
    kinds = {"int": (int,), "float": (int, float), "str": (str,)}
    if not isinstance(value, kinds[wanted.removesuffix(" | None")]) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, {wanted} is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, a finite number is wanted")


def _check(config: TrainConfig, name: str, right: bool, wanted: str) -> None:
    if not right:
        raise ValueError(f"{name} is {getattr(config, name)!r}, {wanted} is wanted")


def learning_rate(config: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """Linear warm-up to `learning_rate`, then half a cosine down to `min_learning_rate`.

    `step` counts from 0. With `minutes`, the cosine ends when the time is up, if that is sooner
    (`seconds` is the time the run has taken so far).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.minutes is not None:
        done = max(done, seconds / (60 * config.minutes))
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.min_learning_rate + fall * (config.learning_rate - config.min_learning_rate)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: matrices (two dimensions or more) decay; biases and norms do not.

    A parameter that is shared (the tied head) is listed once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind, besides its folder."""

    model: GPT
    records: list[dict[str, Any]]
    best_validation_loss: float
    seconds: float


def train(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    model: GPTConfig,
    config: TrainConfig | None = None,
    observer: Observer | None = None,
) -> TrainResult:
    """Train a new GPT on the text `files` and write the folder `out`.

    Raises FileNotFoundError or ValueError for text that cannot be trained on, ValueError when `out`
    already holds a checkpoint or `model` does not fit the tokenizer (its vocab_size may be larger:
    a padded table), ImportError when matplotlib, safetensors or the tokenizer's package is missing,
    DivergedError when the loss is no longer finite (the last
    checkpoint stays), RuntimeError when `config.impl` cannot run on the device.
    """
    config = config or TrainConfig()
    out = Path(out)
    if (out / "checkpoint.pt").exists():
        raise ValueError(f"out: {out} already holds a checkpoint, resume it or name another folder")
    torch.manual_seed(config.seed)
    run = _Run([str(Path(file).resolve()) for file in files], out, model, config, observer)
    return run.finish()


def resume(
    out: str | Path,
    *,
    files: Sequence[str | Path] | None = None,
    observer: Observer | None = None,
    **changes: Any,
) -> TrainResult:
    """Go on from `out`/checkpoint.pt, with its settings less the `changes` (fields of TrainConfig).

    `files` names the same text when it has moved. Raises as `train` does, FileNotFoundError when
    there is no checkpoint, and ValueError when the checkpoint cannot be read, when the text is not
    the text it was, or when a change comes too late (seed, tokenizer, validation_fraction).
    """
    out = Path(out)
    path = out / "checkpoint.pt"
    content = checkpoint.load(path)
    saved = checkpoint.config(path, content, "train_config", TrainConfig)
    settings = dataclasses.asdict(saved)
    for name, value in changes.items():
        if name not in settings:
            raise TypeError(f"{name} is not a setting of training")
        if name in _DECIDED and value != settings[name]:
            raise ValueError(
                f"{name} is {value!r}, but the run to resume has {settings[name]!r} and cannot "
                "change it"
            )
    config = dataclasses.replace(saved, **changes)
    texts = content["files"] if files is None else [str(Path(file).resolve()) for file in files]
    model = checkpoint.model(path, content)
    run = _Run(texts, out, model.config, config, observer, model)
    run.restore(content)
    return run.finish()


class _Run:
    """One run: everything that has a state, and the loop."""

    def __init__(
        self,
        files: list[str],
        out: Path,
        model_config: GPTConfig,
        config: TrainConfig,
        observer: Observer | None,
        model: GPT | None = None,
    ) -> None:
        # Better to hear now that a package is missing than after the training.
        figure_class()
        safetensors_package()
        self.files, self.out, self.config, self.observer = files, out, config, observer
        self.model_config = model_config
        self.device = choose_device(config.device)
        self.dtype = _DTYPES[config.dtype]

        tokenizer = load_tokenizer(config.tokenizer)
        if model_config.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"vocab_size is {model_config.vocab_size}, but the tokenizer {config.tokenizer!r} "
                f"has {tokenizer.vocab_size} tokens"
            )
        tokens, self.digest = data.read(
            files, tokenizer, config.token_dtype, model_config.vocab_size
        )
        training, self.validation = data.split(
            tokens, config.validation_fraction, model_config.block_size
        )
        self.batches = data.Batches(
            training, model_config.block_size, config.batch_size, config.seed
        )

        # Initial weights are drawn on the CPU, so that they do not depend on the device.
        self.model = GPT(model_config) if model is None else model
        self.model.set_impl(config.impl)
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self.step = 0
        self.tokens = 0
        self.seconds_before = 0.0
        self.best_validation_loss = math.inf
        self.records: list[dict[str, Any]] = []

    def restore(self, content: dict[str, Any]) -> None:
        """Take up the rest of a checkpoint, and the log as far as the checkpoint saw it."""
        if content["text"] != self.digest:
            raise ValueError(
                f"files: the text of {', '.join(self.files)} is not the text that the run to "
                "resume was trained on"
            )
        path = self.out / "checkpoint.pt"
        checkpoint.optimizer(path, content, self.optimizer)
        checkpoint.generators(path, content, self.batches)
        self.step, self.tokens = content["step"], content["tokens"]
        self.seconds_before = content["seconds"]
        self.best_validation_loss = content["best_validation_loss"]
        log = self.out / "log.jsonl"
        if log.is_file():
            # Steps after the checkpoint happen again; a killed run may have left half a line.
            for line in log.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break
                if record["step"] <= self.step:
                    self.records.append(record)
            shorter = self.out / ".log.jsonl.tmp"
            shorter.write_text(
                "".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8"
            )
            shorter.replace(log)

    def finish(self) -> TrainResult:
        """Train to the end of the budget and write what belongs in `out`."""
        config = self.config
        peak = peak_flops(self.device, self.dtype)
        flops = flops_per_token(
            self.model,
            self.model_config.n_layer,
            self.model_config.n_embd,
            self.model_config.block_size,
        )
        tokens_a_step = config.accumulation * config.batch_size * self.model_config.block_size
        self.started = time.perf_counter()
        if self.step == 0:
            self._log(
                {"step": 0, "validation_loss": self.validation_loss(), "seconds": self.seconds}
            )

        since, losses = self.step, torch.zeros((), device=self.device)
        clock = time.perf_counter()
        last = self.done and self.step > 0  # one step even where validating took all the time
        while not last:
            rate = learning_rate(config, self.step, self.seconds)
            loss, norm = self._optimizer_step(rate)
            losses += loss
            self.step += 1
            self.tokens += tokens_a_step
            last = self.done
            validate = last or self.step % config.validation_interval == 0
            save = last or self.step % config.checkpoint_interval == 0
            # Always a log line before a checkpoint: no half-summed loss has to be kept in it.
            if not (validate or save or self.step % config.log_interval == 0):
                continue

            steps = self.step - since
            mean, norm_value = losses.item() / steps, norm.item()  # waits for the GPU
            speed = steps * tokens_a_step / (time.perf_counter() - clock)
            record = {
                "step": self.step,
                "loss": mean,
                "learning_rate": rate,
                "gradient_norm": norm_value,
                "tokens": self.tokens,
                "epochs": self.batches.epochs,
                "tokens_per_s": speed,
                "mfu": None if peak is None else speed * flops / peak,
                "seconds": self.seconds,
            }
            if validate:
                record["validation_loss"] = self.validation_loss()
            self._log(record)
            if save:
                self._save()
            since = self.step
            losses.zero_()
            clock = time.perf_counter()

        draw_losses(self.records, self.out / "loss.png")
        self.model.save_pretrained(self.out / "model", tokenizer=config.tokenizer)
        return TrainResult(self.model, self.records, self.best_validation_loss, self.seconds)

    def _optimizer_step(self, rate: float) -> tuple[Tensor, Tensor]:
        """One step: the mean loss over its micro-batches, the gradients' norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        total = torch.zeros((), device=self.device)
        for _ in range(self.config.accumulation):
            loss = self._loss(*next(self.batches)) / self.config.accumulation
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        ):
            loss: Tensor = self.model(tokens.to(self.device), targets.to(self.device))
        return loss

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over the validation windows, without dropout; draws no random number."""
        self.model.eval()
        total, count = 0.0, 0
        for tokens, targets in data.validation_batches(
            self.validation,
            self.model_config.block_size,
            self.config.batch_size,
            self.config.validation_batches,
        ):
            total += self._loss(tokens, targets).item() * len(tokens)
            count += len(tokens)
        mean = total / count
        self.best_validation_loss = min(self.best_validation_loss, mean)
        return mean

    @property
    def seconds(self) -> float:
        """Time spent in this run, earlier parts included."""
        return self.seconds_before + time.perf_counter() - self.started

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

    def _log(self, record: dict[str, Any]) -> None:
        for name in ("loss", "gradient_norm", "validation_loss"):
            if not math.isfinite(record.get(name, 0.0)):
                raise DivergedError(self._divergence(name, record[name]))
        # Opened for each line: a run of days loses no line, and `out` appears with the first one.
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.jsonl").open("a" if self.records else "w", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        self.records.append(record)
        if self.observer is not None:
            self.observer(record, self.share)

    def _save(self) -> None:
        checkpoint.save(
            self.out / "checkpoint.pt",
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "best_validation_loss": self.best_validation_loss,
                "sampler": self.batches.state_dict(),
                "random": checkpoint.random_state(),
                "model_config": dataclasses.asdict(self.model_config),
                "train_config": dataclasses.asdict(self.config),
                "files": self.files,
                "text": self.digest,
            },
        )

    def _divergence(self, name: str, value: float) -> str:
        path = self.out / "checkpoint.pt"
        kept = (
            f"{path} is the last good state" if path.exists() else "no checkpoint was written yet"
        )
        return (
            f"training diverged by step {self.step}, {name.replace('_', ' ')} is {value}: {kept}, "
            "try a lower learning_rate or a longer warm-up"
        )
