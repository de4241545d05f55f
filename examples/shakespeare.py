"""A character model on tinyshakespeare, and the same model in plain PyTorch beside it.

    python examples/shakespeare.py TEXT --out DIR

10.8 million parameters (6 layers, 6 heads, width 384), bytes, contexts of 128 tokens, no dropout.
First `gptkernels.gpt.training.train.train` trains a GPT. Then `gptkernels.truth.plain_gpt.PlainGPT`
is trained from the same initial weights, on the same batches in the same order, with the same
optimiser and learning rates. Only rounding separates the two curves, and training amplifies it;
where PyTorch's own operators run, nothing does.

DIR gets run/ (as `gptkernels train` leaves it), curves.json (both curves and their differences)
and curves.png. TEXT is any UTF-8 file; the figures in docs/training.md are of
https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptkernels.core.arguments import new_folder
from gptkernels.core.device import choose_device
from gptkernels.core.figure import figure_class
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.training import data
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.curve import LOSSES, plot_losses
from gptkernels.gpt.training.plain import Curve, differences, initial_weights, train_plainly
from gptkernels.gpt.training.progress import ProgressBar
from gptkernels.gpt.training.train import train
from gptkernels.truth.plain_gpt import PlainGPT

MODEL = GPTConfig(vocab_size=256, block_size=128, n_layer=6, n_head=6, n_embd=384)


def training(steps: int, device: str, impl: str) -> TrainConfig:
    """How both are trained."""
    return TrainConfig(
        steps=steps,
        batch_size=8,
        learning_rate=1e-3,
        warmup_steps=min(100, steps),
        beta2=0.99,
        validation_interval=100,
        checkpoint_interval=500,
        device=device,
        impl=impl,
    )


def plain_twin(config: GPTConfig, how: TrainConfig) -> PlainGPT:
    """The plain model with the weights that `train` begins with."""
    plain = PlainGPT(config)
    plain.load_state_dict(initial_weights(config, how.seed))
    return plain.to(choose_device(how.device))


def read(text: Path, config: GPTConfig, how: TrainConfig) -> tuple[data.Tokens, data.Tokens]:
    """The bytes to train on and those held out, as `train` splits them."""
    tokens = data.tokenize(data.read_text([text]), ByteTokenizer())
    return data.split(tokens, how.validation_fraction, config.block_size)


def write(out: Path, ours: Curve, plain: Curve) -> dict[str, Any]:
    """Write curves.json and curves.png into `out`; returns what the JSON holds."""
    kept = ("step", "seconds", "loss", "validation_loss")
    by_step = differences(ours, plain)
    content = {
        "gptkernels": [{name: r[name] for name in kept if name in r} for r in ours],
        "plain": plain,
        "difference": by_step,
        "largest_difference": {
            name: max(gap for _, gap in pairs) for name, pairs in by_step.items()
        },
    }
    (out / "curves.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(ours, plain, by_step, out / "curves.png")
    return content


def draw(
    ours: Curve, plain: Curve, by_step: dict[str, list[tuple[int, float]]], path: Path
) -> None:
    """Both curves above, their differences below."""
    figure = figure_class()(figsize=(8, 6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    # The plain twin wide and pale, ours thin on top: one that left the other would be seen.
    plot_losses(above, plain, "plain PyTorch, ", alpha=0.35, linewidth=5, marker="")
    plot_losses(above, ours, "gptkernels, ", linewidth=1.2, marker="")
    for key, look in LOSSES.items():
        below.plot(*zip(*by_step[key], strict=True), color=look["color"], linewidth=1.2)
    above.set_ylabel("loss (nats per byte)")
    below.set_ylabel("difference")
    below.set_yscale("symlog", linthresh=1e-7)  # a logarithm that has a place for 0
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    below.grid(alpha=0.25)
    below.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both and write the folder."""
    parser = argparse.ArgumentParser(description="A GPT on TEXT, beside its plain-PyTorch twin.")
    parser.add_argument("text", type=Path, help="UTF-8 text, such as tinyshakespeare")
    parser.add_argument("--out", type=new_folder, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--impl", default="auto", help="auto, torch, triton, cuda or cpu")
    given = parser.parse_args(arguments)
    how = training(given.steps, given.device, given.impl)
    with ProgressBar() as bar:
        ours = train([given.text], given.out / "run", model=MODEL, config=how, observer=bar).records
    with ProgressBar() as bar:
        twin, text = plain_twin(MODEL, how), read(given.text, MODEL, how)
        plain = train_plainly(twin, *text, MODEL.block_size, how, observer=bar)
    largest = write(given.out, ours, plain)["largest_difference"]
    print(
        f"largest difference: training {largest['loss']:.2g}, "
        f"validation {largest['validation_loss']:.2g}; see {given.out / 'curves.png'}"
    )


if __name__ == "__main__":
    main()
