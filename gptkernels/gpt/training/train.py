"""Training, readable in one sitting: text or token shards in, a folder with weights, log and loss
curve out. run.py has the loop, learner.py makes the steps.

    out/   log.jsonl       one JSON object a line: step, loss, learning rate, tokens/s, MFU, ...
           checkpoint.pt   replaced atomically; `resume(out)` goes on from it
           loss.png        the curve
           model/          the trained weights, as `GPT.save_pretrained` writes them
           tokenizer.json  or characters.json, where the tokenizer has no name (vocabulary.py)
           model-ema/      with `ema`: their average
           snapshots/      with `snapshot_interval`: the weights along the way, a folder a step
           tensorboard/    with `tensorboard`: the log for it
           wandb/          with `wandb`: the id of its run, and what it keeps of it

A run that was interrupted and resumed ends with the same bits as one that was not, dropout
included, on the same machine with the same number of threads and, with impl="auto", the same table
of measurements (core/tuned.py); under another table, `resume` warns. This is because the checkpoint
holds everything that has a state (weights, optimiser, PyTorch's generators, the sampler's
generator), and log, validation, samples and saving leave these generators alone. The exception is a
run with `minutes`, whose learning rate follows the clock.

SIGINT and SIGTERM end a run at once, with a checkpoint to resume from: a step is given up between
two micro-batches, a validation between two batches, a sample between two tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptkernels.core.checks import check_count
from gptkernels.core.device import choose_device
from gptkernels.core.files import check_folder
from gptkernels.core.lock import alone_in
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.gpt.tokenizer import load_tokenizer
from gptkernels.gpt.training import checkpoint, data, prepared, vocabulary
from gptkernels.gpt.training.config import DECIDED, TrainConfig
from gptkernels.gpt.training.log import Log
from gptkernels.gpt.training.observer import Observer
from gptkernels.gpt.training.pretrained import Pretrained
from gptkernels.gpt.training.run import Run, TrainResult, check_text, flops_of
from gptkernels.gpt.training.throughput import petaflop_s_days


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
    epoch, ImportError when matplotlib, safetensors, the tokenizer's package, tensorboard or wandb
    is missing and needed, DivergedError when the loss is no longer finite (the last checkpoint
    stays), RuntimeError when `config.impl` cannot run on the device or wandb begins no run, OSError
    when `out` is a file or cannot be written (the last checkpoint stays).
    """
    config, out = config or TrainConfig(), Path(out)
    check_new(out)
    if epochs is not None:
        check_count("epochs", epochs)
    if (model is None) == (init is None):
        raise ValueError("model, init: exactly one of the two is wanted")
    texts = [str(Path(file).resolve()) for file in files]
    with alone_in("out", out):  # before anything is read, which may take long
        check_new(out)
        network = None
        if model is not None:
            config = prepared.settled(files, config)
            shape, tokenizer = model, load_tokenizer(config.tokenizer)
        elif init is not None:
            begun = init
            if not isinstance(begun, Pretrained):
                begun = Pretrained.load(begun, config.tokenizer)
            config = prepared.settled(files, begun.settled(config))
            network, tokenizer = begun.model, begun.tokenizer
            shape = network.config
        torch.manual_seed(config.seed)
        return Run(texts, out, shape, tokenizer, config, observer, network, epochs).finish()


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
    config = changed(saved, changes)
    model = checkpoint.model(path, content)
    texts = content["files"] if files is None else [str(Path(file).resolve()) for file in files]
    if finished := _finished(out, content, saved, config):
        if files is not None:
            _check_text(texts, out, content, config, model)
        log = Log(out)
        log.take_up(content["step"])
        model.set_impl(config.impl).to(choose_device(config.device)).eval()  # as after a run
        compute = petaflop_s_days(flops_of(model), content["tokens"])
        best, seconds = content["best_validation_loss"], content["seconds"]
        return TrainResult(model, log.records, best, seconds, compute, nothing_left=finished)
    config = prepared.settled(texts, config)
    tokenizer = vocabulary.kept(config.tokenizer, out)
    run = Run(texts, out, model.config, tokenizer, config, observer, model)
    run.restore(content)
    return run.finish()


def _check_text(
    texts: list[str], out: Path, content: dict[str, Any], config: TrainConfig, model: GPT
) -> None:
    """Raise ValueError where `texts`, on which a finished run is not trained, are another's."""
    config = prepared.settled(texts, config)
    tokenizer = vocabulary.kept(config.tokenizer, out)
    _, digest = data.read(texts, tokenizer, config.token_dtype, model.config.vocab_size)
    check_text(texts, digest, content)


def changed(saved: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """The settings of a run with some changed. Raises TypeError for what is no setting, ValueError
    for one that comes too late."""
    settings = dataclasses.asdict(saved)
    for name, value in changes.items():
        if name not in settings:
            raise TypeError(f"{name} is not a setting of training")
        if name in DECIDED and value != settings[name]:
            raise ValueError(
                f"{name} is {value!r}, but the run to resume has {settings[name]!r} and cannot "
                "change it"
            )
    if changes.get("wandb") is False:  # a project alone would be refused
        changes = {"wandb_project": None, **changes}
    return dataclasses.replace(saved, **changes)


def _finished(out: Path, content: dict[str, Any], saved: TrainConfig, config: TrainConfig) -> str:
    """What was done, such as "12 of 12 steps", where all of it was and is in `out`; else nothing.

    Raises ValueError where `config` newly asks for less than was done.
    """
    step, minutes = content["step"], round(content["seconds"] / 60, 2)
    for name, made in (("steps", step), ("minutes", minutes)):
        wanted = getattr(config, name)
        if wanted is not None and wanted < made and wanted != getattr(saved, name):
            raise ValueError(f"{name} is {wanted:,}, but {made:,} were made already: ask for more")
    if step >= config.steps:
        done = f"{step:,} of {config.steps:,} steps"
    elif step and config.minutes is not None and content["seconds"] >= 60 * config.minutes:
        done = f"{minutes:,} of {config.minutes:,g} minutes"
    else:
        return ""
    whole = not content["due"] and _holds(out / "model", content["model"])
    if config.ema:
        whole = whole and _holds(out / "model-ema", content["average"])
    return done if whole else ""


def _holds(folder: Path, weights: dict[str, Tensor]) -> bool:
    """Whether the model in `folder` has these weights: a run may have been killed before it wrote
    its last ones."""
    try:
        kept = GPT.from_pretrained(folder).state_dict()
    except (OSError, ValueError):
        return False
    return all(name in kept and torch.equal(kept[name], w) for name, w in weights.items())


def check_new(out: Path) -> None:
    """Raise where `out` is a file, or holds a run or a model: ValueError or NotADirectoryError."""
    check_folder("out", out)
    if (out / "checkpoint.pt").exists():
        raise ValueError(f"out: {out} already holds a checkpoint, resume it or name another folder")
    # Its tokenizer would be overwritten.
    if (out / "config.json").exists():
        raise ValueError(f"out: {out} holds a model, name another folder")
