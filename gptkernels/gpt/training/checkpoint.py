"""Checkpoints: a file that is always whole, the old one or the new, and runs no code when read.

A failure at any moment of `save` leaves a whole file (`gptkernels.core.files`). `load` unpickles
tensors and plain values only (`weights_only=True`).

What is inside: {"format", "version", "model", "optimizer", "step", "tokens" (trained on so far),
"seconds", "best_validation_loss", "since_log" (of the steps since the last line of the log: the sum
of the losses, the number, the sums of noise.py), "average" (of the weights; empty where none is
kept), "scaler" (of the loss; empty but in float16), "sampler", "random" (PyTorch's CPU and CUDA
generators), "due" (what the step asks for and was not done, since a signal stopped it: run.py),
"model_config", "train_config", "files", "text" (a fingerprint of what the files hold),
"tuned" (the digest of the table of measurements that impl="auto" followed; empty where another impl
was named)}.

`model`, `optimizer`, `average`, `scaler`, `since_log`, `due`, `generators` and `config` restore the
parts of the content: each refuses, in one sentence, what does not fit.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptkernels.core.files import check_no_pointer, replacing
from gptkernels.core.tuned import Table
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.gpt.training.average import Average
from gptkernels.gpt.training.data import Batches
from gptkernels.gpt.weights import are_one

FORMAT = "gptkernels-checkpoint"
VERSION = 2
KEYS: dict[str, type] = {
    "model": dict,
    "optimizer": dict,
    "step": int,
    "tokens": int,
    "seconds": float,
    "best_validation_loss": float,
    "since_log": dict,
    "average": dict,
    "scaler": dict,
    "sampler": dict,
    "random": dict,
    "due": dict,
    "model_config": dict,
    "train_config": dict,
    "files": list,
    "text": str,
    "tuned": str,
}
# What checkpoints of this version hold that were written before a key was known: none was in
# float16, none had a table, and none was written before all that was due was done.
_OLDER: dict[str, Any] = {"scaler": {}, "tuned": Table().digest(), "due": {}}
# Of train_config, likewise.
_OLDER_SETTINGS: dict[str, Any] = {
    "snapshot_interval": 0,
    "ramp_tokens": 0,
    "ramp_start": 1,
    "decay_steps": 0,
    "wandb": False,
    "wandb_project": None,
}
DUE = ("validation", "sample", "snapshot", "checkpoint")
"""What a step may ask for, in the order in which it is done."""

_NO_NOISE = torch.zeros(2, dtype=torch.float64)  # of since_log, likewise
_Config = TypeVar("_Config")


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` by `content` (the keys in `KEYS`), all of it or nothing.

    Raises OSError when the disk refuses; the checkpoint that was there before is then untouched.
    """
    path = Path(path)
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise ValueError(f"content: a checkpoint needs {', '.join(missing)} too")
    try:
        with replacing(path, durable=True, alone=True) as temporary, temporary.open("wb") as stream:
            torch.save({"format": FORMAT, "version": VERSION, **content}, stream)
    except (OSError, RuntimeError) as error:
        # When a write fails, torch.save may raise a RuntimeError of its own on top.
        refused = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(refused, OSError):  # from a write, which does not name the file
            raise OSError(refused.errno, refused.strerror, str(path)) from None
        raise


def check_exists(path: Path) -> None:
    """Raise FileNotFoundError where there is no checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")


def load(path: str | Path) -> dict[str, Any]:
    """The content of the checkpoint at `path`, tensors on the CPU.

    Raises FileNotFoundError when there is none, and ValueError when the file is truncated or
    damaged, was not written by `save`, has another version, or holds values of another type than
    `KEYS` says.
    """
    path = Path(path)
    check_exists(path)
    check_no_pointer(path)
    try:
        # torch.load ignores the checksums that torch.save wrote: a flipped bit would go unnoticed.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} does not have the sum it was written with")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # broken bytes make the unpickler raise nearly anything
        raise ValueError(
            f"checkpoint: {path} cannot be read, it is truncated, damaged or not a checkpoint"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: {path} is not a training checkpoint of this package (its format is not "
            f"{FORMAT!r})"
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"checkpoint: {path} has version {content.get('version')!r}, this package reads "
            f"version {VERSION}"
        )
    content = {**_OLDER, **content}
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise ValueError(f"checkpoint: {path} lacks {', '.join(missing)}")
    for key, kind in KEYS.items():
        if not isinstance(content[key], kind):
            raise ValueError(
                f"checkpoint: {path} must hold {kind.__name__} as its {key}, "
                f"got {type(content[key]).__name__}"
            )
    content["since_log"] = {"noise": _NO_NOISE, **content["since_log"]}
    content["train_config"] = {**_OLDER_SETTINGS, **content["train_config"]}
    if not all(isinstance(file, str) for file in content["files"]):
        raise ValueError(f"checkpoint: {path} must hold names as its files")
    return content


def config(path: str | Path, content: dict[str, Any], key: str, kind: type[_Config]) -> _Config:
    """The dataclass `kind` that `content[key]` describes, with all of its fields and no other.

    Raises ValueError when it does not.
    """
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    wrong = sorted(map(str, fields ^ content[key].keys()))
    if wrong:
        raise ValueError(
            f"checkpoint: {path} lacks or does not know {', '.join(wrong)} in its {key}"
        )
    try:
        return kind(**content[key])
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} has a {key} out of range ({error})") from None


def model(path: str | Path, content: dict[str, Any]) -> GPT:
    """The GPT in `content`, on the CPU. Raises ValueError when it contradicts its model_config."""
    with torch.device("meta"):  # shapes alone: random weights would be drawn in vain
        network = GPT(config(path, content, "model_config", GPTConfig))
    _check_fit(path, "model", content["model"], network.state_dict())
    network.load_state_dict(content["model"], assign=True)
    if are_one(network.lm_head.weight, network.transformer.wte.weight):
        network.tie_head()
    return network


def optimizer(path: str | Path, content: dict[str, Any], into: torch.optim.AdamW) -> None:
    """Restore step counts and moments; `into` keeps its own rates, betas and decay.

    Raises ValueError when they do not fit its parameters.
    """
    groups = into.state_dict()["param_groups"]
    parameters = [parameter for group in into.param_groups for parameter in group["params"]]
    fitting = {
        index: {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        for index, parameter in enumerate(parameters)
    }
    state = content["optimizer"].get("state")
    _check_fit(path, "optimizer", state, fitting)
    into.load_state_dict({"state": state, "param_groups": groups})


def average(path: str | Path, content: dict[str, Any], into: Average) -> None:
    """Restore the average of the weights. Raises ValueError when it does not fit the model."""
    _check_fit(path, "average", content["average"], into.state_dict())
    into.load_state_dict(content["average"])


def scaler(path: str | Path, content: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The state of the loss's scale. Raises ValueError when it is of another kind than `own`."""
    _check_fit(path, "scaler", content["scaler"], own)
    return dict(content["scaler"])


def since_log(path: str | Path, content: dict[str, Any]) -> tuple[Tensor, int, Tensor]:
    """Of the steps since the last line of the log: the sum of the losses, the number, the sums of
    the noise scale. Raises ValueError for anything else."""
    since = content["since_log"]
    own = {"loss": torch.zeros(()), "steps": 0, "noise": _NO_NOISE}
    _check_fit(path, "since_log", since, own)
    return since["loss"], since["steps"], since["noise"]


def due(path: str | Path, content: dict[str, Any]) -> dict[str, Any]:
    """What the step asks for and was not done: a validation, with the line of the log that it
    belongs to, and others. Raises ValueError for anything else."""
    found: dict[str, Any] = dict(content["due"])
    record = found.get("validation", {"step": content["step"]})
    if (
        set(found) - set(DUE)
        or not isinstance(record, dict)
        or record.get("step") != content["step"]
    ):
        raise ValueError(f"checkpoint: {path} has a due that is not of its step")
    return found


def generators(path: str | Path, content: dict[str, Any], sampler: Batches) -> None:
    """Restore the sampler and PyTorch's global generators.

    Raises ValueError for anything but generators' states.
    """
    state = content["random"]
    _check_fit(path, "sampler", content["sampler"], sampler.state_dict())
    # There may be other GPUs than when it was saved.
    _check_fit(path, "random", state, {**random_state(), "cuda": state.get("cuda")})
    try:
        sampler.load_state_dict(content["sampler"])
        set_random_state(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"checkpoint: {path} has a sampler or random that is not a generator's state ({error})"
        ) from None


def random_state() -> dict[str, Any]:
    """The state of PyTorch's global generators: what dropout draws from."""
    cuda: list[Tensor] = []
    if torch.cuda.is_initialized():  # asking an idle CUDA for its state would initialise it
        cuda = torch.cuda.get_rng_state_all()
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Give PyTorch's global generators the state that `random_state()` returned.

    Of CUDA's generators, only those of this machine's devices are set.
    """
    torch.set_rng_state(state["cpu"])
    for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)


def _check_fit(path: str | Path, key: str, state: object, own: object) -> None:
    if _outline(state) != _outline(own):
        raise ValueError(
            f"checkpoint: {path} has another {key} than its configuration asks for (names, shapes "
            "or dtypes differ)"
        )


def _outline(state: object) -> object:
    """What decides whether a state fits: names, shapes and dtypes, not the numbers."""
    if isinstance(state, dict):
        return {name: _outline(value) for name, value in state.items()}
    if isinstance(state, Tensor):
        return state.shape, state.dtype
    return type(state)
