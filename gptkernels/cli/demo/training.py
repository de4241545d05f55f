"""The demo's model: its training on real text, and a sample of what it learned."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gptkernels.cli.console import print_text
from gptkernels.cli.demo.terminal import heading
from gptkernels.core.device import choose_device
from gptkernels.core.files import replacing
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.training import data
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.progress import ProgressBar
from gptkernels.gpt.training.train import TrainResult, train
from gptkernels.gpt.weights import safetensors_package

# What two minutes can train on two CPU cores, and on a GPU. Bytes, because a vocabulary of 50,257
# would spend nearly all of that time in the head; a short context, because it learns sooner: after
# 1.2 million tokens the validation loss was 1.35 with 64 bytes of context and 1.56 with 128.
CPU_MODEL = GPTConfig(vocab_size=256, block_size=64, n_layer=4, n_head=4, n_embd=128)
GPU_MODEL = GPTConfig(vocab_size=256, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.3)
CPU_BATCH = 12
PROMPT = "The "
_SAMPLE_TOKENS = 600


@dataclass(frozen=True)
class Task:
    """What is to be trained, on what, all of it checked."""

    model: GPTConfig
    config: TrainConfig
    tokens: data.Tokens
    content: str
    given: Path | None  # the file that was named; None for Python's manual

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return choose_device(self.config.device)

    @property
    def text(self) -> str:
        """What to call the text."""
        return str(self.given or f"the manual that Python {platform.python_version()} carries")

    @property
    def parts(self) -> tuple[data.Tokens, data.Tokens]:
        """The tokens to train on, and those held out, as `train` splits them."""
        return data.split(self.tokens, self.config.validation_fraction, self.model.block_size)


@dataclass(frozen=True)
class Training:
    """A trained model, and how it was trained; `rates` has the learning rate of each step."""

    task: Task
    result: TrainResult
    rates: list[float] = field(repr=False)

    @property
    def model(self) -> GPT:
        """The model."""
        return self.result.model

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return self.result.records


class _Bar(ProgressBar):
    """A signal ends the whole demo at once, where a run of `gptkernels train` would stop between
    two steps to go on later."""

    def stopping(self) -> None:
        """Called by the signal's handler."""
        raise KeyboardInterrupt


def size(on_gpu: bool) -> tuple[GPTConfig, int]:
    """The model, and how many texts a step has."""
    return (GPU_MODEL, 64) if on_gpu else (CPU_MODEL, CPU_BATCH)


def task(text: str | Path | None, minutes: float, device: str, seed: int) -> Task:
    """What the demo trains. Raises all that can be refused, before anything is written."""
    on_gpu = choose_device(device).type == "cuda"
    model, batch = size(on_gpu)
    config = TrainConfig(
        # On a CPU the minutes end the run; a GPU could read the text a hundred times in them.
        steps=2000 if on_gpu else 10**6,
        minutes=minutes,
        batch_size=batch,
        learning_rate=1e-3 if on_gpu else 3e-3,
        warmup_steps=50,
        beta2=0.99,
        dtype="bfloat16" if on_gpu else "float32",
        validation_interval=200 if on_gpu else 100,
        validation_batches=10,
        checkpoint_interval=10**6,
        device=device,
        seed=seed,
    )
    content = manual() if text is None else data.read_text([text])
    tokens = data.tokenize(content, ByteTokenizer())
    found = Task(model, config, tokens, content, None if text is None else Path(text))
    _ = found.parts  # refuses a text that is too short
    safetensors_package()
    return found


def train_model(wanted: Task, out: Path, console: Console) -> Training:
    """Train, and write the folder `out`/training; of an earlier demo nothing may be in it."""
    file = wanted.given
    if file is None:
        file = out / "text.txt"
        with replacing(file) as written:
            written.write_text(wanted.content, encoding="utf-8", newline="\n")
    heading(console, "2. Training", f"A small GPT on {wanted.text}.")
    with _Bar(console) as bar, learning_rates() as rates:
        result = train(
            [file], out / "training", model=wanted.model, config=wanted.config, observer=bar
        )
    result.model.eval()
    return Training(wanted, result, rates)


@contextlib.contextmanager
def learning_rates() -> Iterator[list[float]]:
    """The learning rate of each step that an optimiser makes in this context. With `minutes` the
    rates follow the clock, so that nobody could compute them again."""
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        yield rates
    finally:
        hook.remove()


def manual() -> str:
    """The reference manual that Python carries. Raises FileNotFoundError where it carries none."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "text: this Python comes without its manual (pydoc_data.topics), name a text file"
        ) from None
    return "\n\n\n".join(topics.values())


@torch.no_grad()
def sample(trained: Training, console: Console) -> str:
    """A continuation of the prompt, longer than the context."""
    heading(console, "4. A sample", f"What the model writes after {PROMPT!r}, temperature 0.7.")
    tokenizer = ByteTokenizer()
    prompt = torch.tensor([tokenizer.encode(PROMPT)], device=trained.task.device)
    tokens = trained.model.generate(
        prompt,
        _SAMPLE_TOKENS - prompt.shape[1],
        temperature=0.7,
        seed=trained.task.config.seed,
        slots=1,
    )
    text = tokenizer.decode(tokens[0].tolist())
    print_text(console, text, "italic")
    return text
