"""The demo's model: its training on real text, and a sample of what it learned."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from gptkernels.cli.demo.terminal import heading
from gptkernels.core.device import choose_device
from gptkernels.core.figure import figure_class
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
class Training:
    """A trained model, and what it was trained with."""

    result: TrainResult
    config: TrainConfig
    file: Path
    text: str  # what to call the file

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.result.model.parameters()).device


def size(on_gpu: bool) -> tuple[GPTConfig, int]:
    """The model, and how many texts a step has."""
    return (GPU_MODEL, 64) if on_gpu else (CPU_MODEL, CPU_BATCH)


def train_model(
    text: str | Path | None, out: Path, minutes: float, device: str, seed: int, console: Console
) -> Training:
    """Train for `minutes` and write the folder `out`/training; refuses what it cannot train on
    before it removes anything of an earlier demo.
    """
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
    # Everything that can be refused is refused before anything is removed.
    tokens = data.tokenize(content, ByteTokenizer())
    data.split(tokens, config.validation_fraction, model.block_size)
    figure_class()
    safetensors_package()
    for old in (out / "report.html", out / "training" / "checkpoint.pt"):
        old.unlink(missing_ok=True)
    if text is None:
        file = out / "text.txt"
        with replacing(file) as written:
            written.write_text(content, encoding="utf-8", newline="\n")
        named = f"the reference manual that Python {platform.python_version()} carries"
    else:
        file, named = Path(text), str(text)
    where = "the GPU" if on_gpu else f"{torch.get_num_threads()} CPU threads"
    heading(
        console, "2. Training", f"on {named}, {len(tokens):,} bytes, {minutes:g} minutes, {where}"
    )
    with ProgressBar(console) as bar:
        result = train([file], out / "training", model=model, config=config, observer=bar)
    result.model.eval()
    return Training(result, config, file, named)


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
def sample(model: GPT, seed: int, console: Console) -> str:
    """A continuation of the prompt, longer than the context."""
    heading(console, "3. A sample", f"after {PROMPT!r}, temperature 0.7")
    tokenizer = ByteTokenizer()
    prompt = torch.tensor([tokenizer.encode(PROMPT)], device=next(model.parameters()).device)
    tokens = model.generate(
        prompt, _SAMPLE_TOKENS - prompt.shape[1], temperature=0.7, seed=seed, slots=1
    )
    text = tokenizer.decode(tokens[0].tolist())
    console.print(escape(text), style="italic", soft_wrap=True)
    return text
