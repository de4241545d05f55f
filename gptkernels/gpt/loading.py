"""A trained model and its tokenizer, from whatever a user has: a Hugging Face folder, a folder that
`train` wrote, its checkpoint.pt, or a nanoGPT checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gptkernels.gpt import hub, nanogpt, tokenizer_files
from gptkernels.gpt.model import GPT
from gptkernels.gpt.tokenizer import Tokenizer, load_tokenizer
from gptkernels.gpt.training import checkpoint, vocabulary
from gptkernels.gpt.training.config import TrainConfig

# The tokenizer of most models of this size: a hint. Others may have as many ids.
_LIKELY = {256: "bytes", 40478: "gpt1", 50257: "gpt2", 50304: "gpt2"}


def load(path: Path, name: str | None) -> tuple[GPT, Tokenizer]:
    """The model at `path` and the tokenizer called `name`, or else the one it was trained with.

    Raises FileNotFoundError where nothing is there, and ValueError for what is no model, for a
    model whose tokenizer is unknown, and for a tokenizer with more tokens than the model has.
    """
    model, own = load_network(path, "model")
    tokenizer = load_tokenizer(name) if name else own()
    return model, fitting(path, model, tokenizer, name)


def fitting(path: Path, model: GPT, tokenizer: Tokenizer | None, name: str | None) -> Tokenizer:
    """`tokenizer`, which is called `name` or is that of the model at `path`.

    Raises ValueError where it is unknown, None, or has more tokens than the model has.
    """
    if tokenizer is None:
        likely = _LIKELY.get(model.config.vocab_size)
        raise ValueError(
            f"tokenizer: nothing beside {path} says which one its {model.config.vocab_size} tokens "
            f"are of, name it with --tokenizer{f' (perhaps {likely})' if likely else ''}"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: {name or 'that of the model'} has {tokenizer.vocab_size} tokens, more "
            f"than the model's {model.config.vocab_size}"
        )
    return tokenizer


def load_network(path: Path, called: str) -> tuple[GPT, Callable[[], Tokenizer | None]]:
    """The model at `path`, and what reads the tokenizer that it was trained with, if it is known.
    `called`: the argument that named the path. Raises as `load` does."""
    if not path.exists():
        raise FileNotFoundError(f"{called}: {path} does not exist{hub.hint(path)}")
    if path.is_dir() and not (path / "config.json").exists():
        if not (path / "checkpoint.pt").exists():
            inside = path / "model"
            hint = f", perhaps {inside} is meant" if (inside / "config.json").exists() else ""
            raise FileNotFoundError(
                f"{called}: {path} holds no model, neither config.json nor checkpoint.pt{hint}"
            )
        path = path / "checkpoint.pt"
    if path.is_dir():
        return GPT.from_pretrained(path, dropout=0.0), lambda: tokenizer_files.read(path)
    if nanogpt.recognises(path):
        return GPT.from_pretrained(path, dropout=0.0), lambda: nanogpt.read_tokenizer(path)
    content = checkpoint.load(path)
    kept = checkpoint.config(path, content, "train_config", TrainConfig).tokenizer
    return checkpoint.model(path, content), lambda: vocabulary.kept(kept, path.parent)
