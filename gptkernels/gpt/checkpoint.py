"""Checkpoints: one file that is either the old one or the new one, and never runs code when read.

`save` writes a temporary file in the same folder, forces it to the disk, and renames it over the
old checkpoint: a rename within one folder is atomic (POSIX rename(2), os.replace on Windows), so a
failure at any moment leaves a whole file. `load` unpickles tensors and plain values only
(`weights_only=True`).

What is inside: {"format", "version", "model", "optimizer", "step", "seconds",
"best_validation_loss", "sampler", "random" (PyTorch's CPU and CUDA generators), "model_config",
"train_config", "files", "text" (a fingerprint of what the files hold)}.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "gptkernels-checkpoint"
VERSION = 1
KEYS = (
    "model",
    "optimizer",
    "step",
    "seconds",
    "best_validation_loss",
    "sampler",
    "random",
    "model_config",
    "train_config",
    "files",
    "text",
)


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` by `content` (the keys in `KEYS`), all of it or nothing.

    Raises OSError when the disk refuses; the checkpoint that was there before is then untouched.
    """
    path = Path(path)
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise ValueError(f"content: a checkpoint needs {', '.join(missing)} too")
    # One fixed name: what a killed run left behind is overwritten, not collected.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save({"format": FORMAT, "version": VERSION, **content}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load(path: str | Path) -> dict[str, Any]:
    """The content of the checkpoint at `path`, tensors on the CPU.

    Raises FileNotFoundError when there is none, and ValueError when the file is truncated or
    damaged, was not written by `save`, or has another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    try:
        # torch.load does not look at the sums that torch.save wrote: a flipped bit would train on.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} does not have the sum it was written with")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        zipfile.BadZipFile,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
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
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise ValueError(f"checkpoint: {path} lacks {', '.join(missing)}")
    return content


def random_state() -> dict[str, Any]:
    """The state of PyTorch's global generators: what dropout draws from."""
    cuda: list[Tensor] = []
    if torch.cuda.is_initialized():  # asking an idle CUDA for its state would initialise it
        cuda = torch.cuda.get_rng_state_all()
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Put PyTorch's global generators where `random_state()` found them.

    CUDA generators are set as far as this machine has the devices.
    """
    torch.set_rng_state(state["cpu"])
    for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system lets a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
