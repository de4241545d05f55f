"""A fine-tuned model in a folder.

config.json, model.safetensors   the body, as `GPT.save_pretrained` writes it
head.safetensors                 weight (outputs, C) and bias (outputs,), fp32
task.json                        the task, and the scale of its numbers
tokenizer.json                   the tokenizer, and what is said of it in tokenizer_config.json;
                                 or characters.json; plain bytes are named in config.json
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptkernels.core.files import replacing
from gptkernels.gpt import tokenizer_files, weights
from gptkernels.gpt.finetuning.task import as_dict, task_of
from gptkernels.gpt.finetuning.task_model import TaskModel
from gptkernels.gpt.finetuning.transformations import NEW_TOKENS
from gptkernels.gpt.model import GPT
from gptkernels.gpt.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    PackageTokenizer,
    Tokenizer,
)

FORMAT, VERSION = "gptkernels-task", 1
_HEAD, _TASK = "head.safetensors", "task.json"


def save(model: TaskModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `model` and its tokenizer. The folder is complete before it gets its name.

    Raises OSError where it cannot be written.
    """
    package = weights.safetensors_package()
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    plain = isinstance(tokenizer, ByteTokenizer)
    model.body.save_pretrained(aside, tokenizer="bytes" if plain else None)
    if isinstance(tokenizer, PackageTokenizer | CharacterTokenizer):
        tokenizer_files.write(aside, tokenizer)
    head = {name: tensor.detach().cpu() for name, tensor in model.head.state_dict().items()}
    with replacing(aside / _HEAD) as file:
        package.torch.save_file(head, file)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "name": model.task.name,
        "task": as_dict(model.task),
        "scale": list(model.scale),
    }
    with replacing(aside / _TASK) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # A kill between the two leaves the old one aside, so that there always is one.
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: str | Path) -> tuple[TaskModel, Tokenizer]:
    """The fine-tuned model in `folder`, on the CPU, in evaluation mode, and its tokenizer.

    `folder` is what `save` wrote, or that of a run of `finetune`, which has it in model/. Raises
    FileNotFoundError for what is missing and ValueError for what is broken or no such model.
    """
    folder = Path(folder)
    if not (folder / _TASK).is_file() and (folder / "model" / _TASK).is_file():
        folder = folder / "model"
    if not (folder / _TASK).is_file():
        raise FileNotFoundError(
            f"folder: {folder} holds no fine-tuned model (it has no {_TASK}), one that "
            "gptkernels finetune wrote is wanted"
        )
    task, scale = _read_task(folder / _TASK)
    body = GPT.from_pretrained(folder, dropout=0.0)
    tokenizer = tokenizer_files.read(folder)
    if tokenizer is None:
        raise FileNotFoundError(f"folder: {folder} has no tokenizer.json or characters.json")
    if tokenizer.vocab_size > body.config.vocab_size - NEW_TOKENS:
        raise ValueError(
            f"folder: the tokenizer in {folder} has {tokenizer.vocab_size} tokens, but the model "
            f"has {body.config.vocab_size - NEW_TOKENS} besides the {NEW_TOKENS} new ones"
        )
    model = TaskModel(task, body, scale=scale)
    _read_head(folder / _HEAD, model.head)
    return model.eval(), tokenizer


def _read_task(path: Path) -> tuple[Any, tuple[float, float]]:
    content = weights.json_object(path)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ValueError(f"{path} is not a task of version {VERSION} of {FORMAT}")
    scale = content.get("scale")
    if not isinstance(scale, list) or not all(isinstance(n, int | float) for n in scale):
        raise ValueError(f"{path} must hold two numbers as its scale, got {scale!r}")
    if len(scale) != 2 or not isinstance(content.get("task"), dict):
        raise ValueError(f"{path} must hold a task and the two numbers of its scale")
    return task_of(str(content.get("name")), content["task"]), (scale[0], scale[1])


def _read_head(path: Path, head: nn.Linear) -> None:
    package = weights.safetensors_package()
    if not path.is_file():
        raise FileNotFoundError(f"folder: {path} does not exist")
    try:
        state = package.torch.load_file(path)
    except (package.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    wanted = {name: tensor.shape for name, tensor in head.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != wanted:
        raise ValueError(f"{path} does not fit the task and the model beside it")
    with torch.no_grad():
        head.load_state_dict(state)
