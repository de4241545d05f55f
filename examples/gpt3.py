"""GPT-3 in small: a model that learns in its context, without a step of training.

    python -m examples.gpt3 --out DIR

The model is trained on episodes of made-up words and their colours, "dax red", which hold within an
episode alone: what a word means can only be learnt from the lines before it. Then it is asked about
new episodes, with K of their lines in its prompt, K = 0, 1, 2, 4, 8, 16; and, as a control, with
colours drawn at random in these lines (Min et al., "Rethinking the Role of Demonstrations", 2022).
The words of an episode are six, so K = 1 shows the right one in a sixth of the prompts. DIR gets

    texts/          the episodes to train on; symbols/, those to ask about, and symbols.toml
    trained/        the run, as `gptkernels train` leaves it
    right/, random/ as `gptkernels evaluate --task` leaves them
    curve.png       accuracy over K, of both
    noise.png       the gradient noise scale while it was trained, beside the batch
    summary.json    the curve, what training took, the gradient noise scale along the way
    cpu_seconds.json of all of it, on all threads

What is trained is not trained again. docs/gpt3.md has the figures. Brown et al., "Language Models
are Few-Shot Learners", 2020, figure 1.2: accuracy over K on a task of symbol manipulation.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.steps import counted, pretrain
from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.cli.console import plain_console
from gptkernels.core.arguments import new_folder
from gptkernels.core.figure import figure_class
from gptkernels.core.files import replacing
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.evaluation import folder
from gptkernels.gpt.evaluation.config import RunConfig, TaskConfig
from gptkernels.gpt.evaluation.evaluate import Evaluation, evaluate
from gptkernels.gpt.evaluation.subject import Subject
from gptkernels.gpt.evaluation.task import load_task
from gptkernels.gpt.progress import Bar
from gptkernels.gpt.training.config import TrainConfig

COLOURS = ("red", "blue", "green", "pink", "gold", "white", "black", "olive")
WORDS = 6  # of an episode that is asked about
_MOST_WORDS = 8  # of one that is trained on: where there are few, the right line is easily found
_LINES = 24  # of one that is trained on

TASK = (
    """\
# Which colour has a word in this episode? (examples/gpt3.py)
kind = "choice"
format = "jsonl"
prompt = "{word}"
label = "colour"
group = "episode"
separator = "\\n"

[labels]
"""
    + "".join(f'{colour} = "{colour}"\n' for colour in COLOURS)
    + """
[files]
train = "shown.jsonl"
test = "asked.jsonl"
"""
)


@dataclass(frozen=True)
class Settings:
    """What is done.

    Fields:
        shape, training: the model, and how it is trained.
        texts: episodes that it is trained on.
        episodes: that it is asked about, one question each.
        shots: lines of the episode in its prompt.
    """

    shape: GPTConfig
    training: TrainConfig
    texts: int
    episodes: int
    shots: str


SETTINGS = Settings(
    shape=GPTConfig(vocab_size=256, block_size=192, n_layer=2, n_head=4, n_embd=128),
    training=TrainConfig(
        steps=2500,
        batch_size=6,
        accumulation=4,
        ramp_tokens=1_000_000,
        learning_rate=1e-3,
        dtype="bfloat16",
        validation_fraction=0.02,
    ),
    texts=30_000,
    episodes=1_000,
    shots="0,1,2,4,8,16",
)


def _word(drawing: random.Random) -> str:
    return "".join(drawing.choices("abcdefghijklmnopqrstuvwxyz", k=3))


def _meanings(drawing: random.Random, words: int) -> dict[str, str]:
    return {_word(drawing): drawing.choice(COLOURS) for _ in range(words)}


def write_texts(path: Path, episodes: int) -> None:
    """Write the episodes to train on: of 1 to 8 words, in random order."""
    drawing = random.Random("texts")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(episodes):
            meaning = _meanings(drawing, drawing.randint(1, _MOST_WORDS))
            for word in drawing.choices(list(meaning), k=_LINES):
                file.write(f"{word} {meaning[word]}\n")
            file.write("\n")


def write_task(path: Path, episodes: int, most_shots: int) -> None:
    """Write symbols.toml and its data: of each episode `most_shots` lines to show and one to ask
    about, drawn alike, so that the asked word may be among those shown or not."""
    drawing = random.Random("task")
    path.mkdir(parents=True, exist_ok=True)
    (path / "symbols.toml").write_text(TASK, encoding="utf-8")
    with (path / "shown.jsonl").open("w") as shown, (path / "asked.jsonl").open("w") as asked:
        for episode in range(episodes):
            meaning = _meanings(drawing, WORDS)
            words = drawing.choices(list(meaning), k=most_shots + 1)
            for place, word in enumerate(words):
                line = {"episode": episode, "word": word, "colour": meaning[word]}
                (shown if place < most_shots else asked).write(json.dumps(line) + "\n")


def ask(out: Path, settings: Settings, name: str, random_answers: bool) -> Evaluation:
    """Ask the trained model, and write DIR/`name`."""
    run = RunConfig(dtype="float32")
    how = TaskConfig(shots=settings.shots, random_answers=random_answers)
    subject = Subject.load(out / "trained" / "model", run=run)
    task = load_task(out / "symbols" / "symbols.toml")
    with Bar(plain_console()) as bar:
        found = evaluate(subject, task, data=out / "symbols", config=how, observer=bar.show)
    folder.write_task(out / name, found, run, "trained")
    return found


def run(out: Path, settings: Settings) -> dict[str, Any]:
    """Make everything that is not in `out` yet; returns the summary."""
    out.mkdir(parents=True, exist_ok=True)
    with counted(out / "cpu_seconds.json"):
        if not (out / "texts" / "episodes.txt").exists():
            write_texts(out / "texts" / "episodes.txt", settings.texts)
            most = max(TaskConfig(shots=settings.shots).counts)
            write_task(out / "symbols", settings.episodes, most)
        pretrain(
            [out / "texts" / "episodes.txt"], out / "trained", settings.shape, settings.training
        )
        asked = {name: ask(out, settings, name, name == "random") for name in ("right", "random")}
    folder.draw_shots(
        list(asked.values()), out / "curve.png", ["their colours", "colours drawn at random"]
    )
    lines = (out / "trained" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    draw_noise(log, out / "noise.png")
    found = {
        "environment": environment(),
        "cpu_minutes": json.loads((out / "cpu_seconds.json").read_text()) / 60,
        "curves": {name: evaluation.as_dict() for name, evaluation in asked.items()},
        "training": log[-1],
        "noise_scale": noise(log),
        "settings": asdict(settings),
    }
    write_json(out / "summary.json", found)
    print(markdown(asked))
    return found


def noise(log: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The gradient noise scale and the batch, in tokens, of the records that have both."""
    names = ("step", "noise_scale", "batch_tokens")
    # A single line's estimate is rough, and may be negative (training/noise.py).
    return [
        {name: record[name] for name in names}
        for record in log
        if (record.get("noise_scale") or 0) > 0
    ]


def draw_noise(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG of both over the steps."""
    found = noise(log)
    figure = figure_class()(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in found]
    scales = [record["noise_scale"] for record in found]
    batches = [record["batch_tokens"] for record in found]
    axes.plot(steps, scales, ".", color="#c2452d", markersize=3, label="gradient noise scale")
    axes.plot(steps, batches, color="#4878a8", label="batch")
    if found:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("tokens")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def markdown(asked: dict[str, Evaluation]) -> str:
    """The curves as a table."""
    rows = ["| K | " + " | ".join(asked) + " |", "| ---: |" + " ---: |" * len(asked)]
    for outcomes in zip(*(one.outcomes for one in asked.values()), strict=True):
        figures = [
            "{:.3f} ({:.3f} to {:.3f})".format(o.metrics["accuracy"], *o.intervals["accuracy"])
            for o in outcomes
        ]
        rows.append(f"| {outcomes[0].shots} | " + " | ".join(figures) + " |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=new_folder, required=True, help="the folder to write")
    run(parser.parse_args(arguments).out, SETTINGS)


if __name__ == "__main__":
    main()
