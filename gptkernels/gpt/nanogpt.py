"""nanoGPT's checkpoints (ckpt.pt, github.com/karpathy/nanoGPT), to a GPT's shape and weights.

    {"model": state_dict,
     "model_args": {n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout}, ...}

Parameters have the names of a GPT's, after "_orig_mod." where the model was compiled, or behind the
names of other wrappers (weights.py). The head is tied. nanoGPT's GELU is the exact one. Causal
masks of old checkpoints, optimiser and progress are not read.

Where the model was trained on characters, nanoGPT keeps them in meta.pkl, beside the data: "itos"
and "stoi", dictionaries of ids and characters. It is read where it lies beside the checkpoint.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptkernels.core.files import check_no_pointer
from gptkernels.gpt import weights
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.tokenizer import CharacterTokenizer

_ARGUMENTS = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")


def read(path: Path, dropout: float | None = None) -> weights.Found:
    """The model in the checkpoint; `dropout` replaces its own. Raises ValueError for any other
    file, for arguments that are missing or out of range, and for weights that contradict them."""
    content = _load(path)
    return found(path, content["model_args"], content["model"], dropout)


def found(
    source: Path | str,
    given: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dropout: float | None,
) -> weights.Found:
    """The model of these arguments and tensors. Raises ValueError as `read` does."""

    def state(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        return weights.checked(source, weights.unwrapped(source, tensors), shapes)

    return weights.Found(_config(source, given, dropout), True, state)


def _config(source: Path | str, given: Mapping[str, Any], dropout: float | None) -> GPTConfig:
    missing = [name for name in _ARGUMENTS if name not in given]
    if missing:
        raise ValueError(f"{source}: model_args lack {', '.join(missing)}")
    unknown = sorted(map(str, given.keys() - {*_ARGUMENTS, "dropout"}))
    if unknown:
        raise ValueError(f"{source}: model_args hold {', '.join(unknown)}, which is not known here")
    try:
        return GPTConfig(
            **{name: given[name] for name in _ARGUMENTS},
            approximate="none",
            dropout=given.get("dropout", 0.0) if dropout is None else dropout,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def read_tokenizer(checkpoint: Path) -> CharacterTokenizer | None:
    """The characters in meta.pkl beside the checkpoint; None where there is no such file.

    Raises ValueError, in one sentence, for a file that is broken or holds anything else.
    """
    path = checkpoint.parent / "meta.pkl"
    if not path.is_file():
        return None
    check_no_pointer(path)
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except Exception as error:  # broken bytes make the unpickler raise nearly anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a pickle of plain values alone ({reason})") from None
    texts = content.get("itos") if isinstance(content, dict) else None
    if not isinstance(texts, dict) or texts.keys() != set(range(len(texts))):
        raise ValueError(f"{path} must hold a dictionary 'itos' of ids, 0 and up, and characters")
    characters = [texts[i] for i in range(len(texts))]
    if not all(isinstance(text, str) and len(text) == 1 for text in characters):
        raise ValueError(f"{path} must hold single characters in its dictionary 'itos'")
    ids = {character: i for i, character in enumerate(characters)}
    if content.get("stoi") != ids or len(ids) != len(characters):
        raise ValueError(f"{path} must hold a dictionary 'stoi' that is its 'itos' the other way")
    return CharacterTokenizer(characters)


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, texts and their collections; what a pickle asks for by name may run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def recognises(path: Path) -> bool:
    """Whether the file is such a checkpoint, by its keys: no tensor is read."""
    try:
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except Exception:  # broken bytes make the unpickler raise nearly anything
        return False
    return isinstance(content, dict) and "model_args" in content


def _load(path: Path) -> dict[str, Any]:
    """The checkpoint's content, tensors and plain values alone.

    Raises ValueError for any other file.
    """
    content = weights.unpickle(path)
    for key in ("model", "model_args"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise ValueError(f"{path} is not a checkpoint of nanoGPT: it has no dictionary {key!r}")
    if not all(isinstance(tensor, Tensor) for tensor in content["model"].values()):
        raise ValueError(f"{path} must hold tensors alone in its dictionary 'model'")
    return content
