"""The command `gptkernels generate`: what continues texts with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gptkernels.gpt.model import GPT
    from gptkernels.gpt.tokenizer import Tokenizer

IMPLS = ("auto", "torch", "triton", "cuda")


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-new-tokens", type=int, default=100, show_default=True)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0: greedy.")
@click.option("--top-k", type=int, help="Sample among the likeliest K tokens.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens that reach P.")
@click.option("--seed", type=int, help="For the same samples again.")
@click.option(
    "--tokenizer", type=click.Choice(["bytes", "gpt1", "gpt2"]), help="Default: the model's own."
)
@click.option("--impl", type=click.Choice(IMPLS), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def generate(
    model: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    tokenizer: str | None,
    impl: str,
    device: str,
) -> None:
    """Continue a text with MODEL: a Hugging Face GPT-2 or OpenAI-GPT folder, a folder that `train`
    wrote, its checkpoint.pt, or a nanoGPT checkpoint.
    """
    import torch

    from gptkernels.device import choose_device

    where = choose_device(device)
    network, vocabulary = load(model, tokenizer)
    network.set_impl(impl)
    network.to(where)
    ids = vocabulary.encode(prompt)
    if not ids:
        raise ValueError("prompt is empty; it must hold at least one token")
    tokens = network.generate(
        torch.tensor([ids], device=where),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos=vocabulary.eos,
        seed=seed,
        vocab_size=vocabulary.vocab_size,
    )
    click.echo(vocabulary.decode(tokens[0].tolist()))


def load(path: Path, name: str | None) -> tuple[GPT, Tokenizer]:
    """The model at `path` and the tokenizer called `name`, or the one it was trained with."""
    from gptkernels.gpt import checkpoint, nanogpt, weights
    from gptkernels.gpt.model import GPT
    from gptkernels.gpt.tokenizer import load_tokenizer
    from gptkernels.gpt.train_config import TrainConfig

    if not path.exists():
        raise FileNotFoundError(f"model: {path} does not exist")
    if path.is_dir() and not (path / "config.json").exists():
        path = path / "checkpoint.pt"
    if path.is_dir():
        model = GPT.from_pretrained(path, dropout=0.0)
        name = name or weights.read_tokenizer(path)
    elif nanogpt.recognises(path):
        model = GPT.from_pretrained(path, dropout=0.0)
    else:
        content = checkpoint.load(path)
        model = checkpoint.model(path, content)
        settings = checkpoint.config(path, content, "train_config", TrainConfig)
        name = name or settings.tokenizer
    known = {256: "bytes", 50257: "gpt2", 40478: "gpt1"}
    name = name or known.get(model.config.vocab_size)
    if name is None:
        raise ValueError(
            f"tokenizer: a model of {model.config.vocab_size} tokens does not tell which it was "
            "trained with, name one with --tokenizer"
        )
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: {name} has {tokenizer.vocab_size} tokens, more than the model's "
            f"{model.config.vocab_size}"
        )
    return model, tokenizer
