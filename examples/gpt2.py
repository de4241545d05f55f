"""GPT-2 in small: a model that is judged by prompts alone, and then trained on another text.

    python -m examples.gpt2 DATA --out DIR

DATA holds tinyshakespeare.txt, wikitext-2/, mctest/ and sst-2/. A GPT-2 with the paper's 50,257
tokens is trained on WikiText-2's validation part, the stories of MCTest's training part and the
sentences of SST-2's, all detokenised and without labels. It is then asked, without any further
training,

    texts         the perplexity of a part of WikiText-2's test part, by stride, with the data set's
                  own marks and with them taken out (an invertible detokeniser)
    last words    of MCTest's test stories (LAMBADA's rule)
    cloze         words left out of these stories (the Children's Book Test's form)
    tasks         sst-2, mctest: prompts that come with the package

and trained on Shakespeare, with a third of the learning rate, beside a model from scratch that is
given the same steps. DIR gets texts/ and tasks/, the runs pretrained/, continued/ and scratch/, the
figures perplexity.png and continued.png, summary.json, and cpu_seconds.json of all of it, on all
threads.

What is trained is not trained again. docs/gpt2.md has the figures. Radford et al., "Language Models
are Unsupervised Multitask Learners", 2019, section 3.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
from gptkernels.gpt.evaluation.config import RunConfig, TaskConfig, TextConfig
from gptkernels.gpt.evaluation.detokenizers import detokenise
from gptkernels.gpt.evaluation.evaluate import evaluate
from gptkernels.gpt.evaluation.subject import Subject
from gptkernels.gpt.evaluation.task import load_task
from gptkernels.gpt.evaluation.texts import evaluate_texts, figures, total
from gptkernels.gpt.progress import Bar
from gptkernels.gpt.rows import rows
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.curve import plot_losses

LAST_WORDS = """\
# The last word of a story (examples/gpt2.py).
kind = "last-word"
format = "lines"
prompt = "{text}"
[files]
test = "last-words.txt"
"""
CLOZE = """\
# A word left out of a story's sentence (examples/gpt2.py).
kind = "cloze"
format = "jsonl"
prompt = "{context} {question}"
blank = "XXXXX"
choices = ["choices"]
label = "word"
[files]
test = "cloze.jsonl"
"""
_CHOICES = 10  # of a cloze, as the Children's Book Test has


@dataclass(frozen=True)
class Settings:
    """What is done.

    Fields:
        shape, training: the model, and how it is trained.
        continued: steps on Shakespeare, after pre-training and from scratch.
        characters: how much of WikiText-2's test part is predicted.
        strides: of its windows.
        examples: that are asked of each task, at most.
    """

    shape: GPTConfig
    training: TrainConfig
    continued: int
    characters: int
    strides: Sequence[int]
    examples: int


SETTINGS = Settings(
    shape=GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=192, dropout=0.1),
    training=TrainConfig(
        steps=2000,
        batch_size=8,
        learning_rate=1e-3,
        tokenizer="gpt2",
        dtype="bfloat16",
        validation_fraction=0.03,
    ),
    continued=300,
    characters=300_000,
    strides=(256, 128, 64, 32),
    examples=300,
)


def write_texts(data: Path, folder: Path, characters: int) -> None:
    """Write what is trained on, and what is predicted."""
    folder.mkdir(parents=True, exist_ok=True)
    wiki = data / "wikitext-2"
    plain = detokenise("wikitext", (wiki / "valid.txt").read_text(encoding="utf-8")).text
    (folder / "wikitext.txt").write_text(plain, encoding="utf-8")
    stories = dict.fromkeys(row["story"] for _, row in rows("mctest", data / "mctest/mc500.train"))
    (folder / "stories.txt").write_text("\n\n".join(stories), encoding="utf-8")
    said = dict.fromkeys(row[1] for _, row in rows("tsv", data / "sst-2" / "train.tsv"))
    sentences = "\n".join(text for text in said if text.rstrip().endswith("."))
    (folder / "reviews.txt").write_text(detokenise("ptb", sentences).text, encoding="utf-8")
    test = (wiki / "test.txt").read_text(encoding="utf-8")[:characters]
    (folder / "test.txt").write_text(test[: test.rindex("\n") + 1], encoding="utf-8")


def write_tasks(data: Path, folder: Path) -> None:
    """Write the two tasks that are made of MCTest's test stories."""
    folder.mkdir(parents=True, exist_ok=True)
    stories = dict.fromkeys(row["story"] for _, row in rows("mctest", data / "mctest/mc500.test"))
    flat = [" ".join(story.split()) for story in stories]
    ends = [match[0] for story in flat if (match := re.match(r".* [A-Za-z]+(?=[.!]$)", story))]
    (folder / "last-words.txt").write_text("\n".join(ends) + "\n", encoding="utf-8")
    (folder / "last-words.toml").write_text(LAST_WORDS, encoding="utf-8")
    drawing = random.Random("cloze")
    lines = "".join(json.dumps(row) + "\n" for story in flat for row in _clozes(story, drawing))
    (folder / "cloze.jsonl").write_text(lines, encoding="utf-8")
    (folder / "cloze.toml").write_text(CLOZE, encoding="utf-8")


def _clozes(story: str, drawing: random.Random) -> Iterator[dict[str, Any]]:
    """Two sentences of a story's second half, each without a word that was said before; the other
    choices are words that were said too."""
    sentences = re.split(r"(?<=[.!?]) ", story)
    for place in sorted(drawing.sample(range(len(sentences) // 2, len(sentences)), 2)):
        context, question = " ".join(sentences[:place]), sentences[place]
        known = sorted(set(re.findall(r"(?<= )[a-z]{4,}(?= )", context)))
        words = [
            word for word in re.findall(r"(?<= )[a-z]{4,}(?=[ .,!?])", question) if word in known
        ]
        if words and len(known) >= _CHOICES:
            word = drawing.choice(words)
            others = drawing.sample([other for other in known if other != word], _CHOICES - 1)
            choices = [word, *others]
            drawing.shuffle(choices)
            blank = re.sub(rf"(?<= ){word}(?=[ .,!?])", "XXXXX", question, count=1)
            yield {"context": context, "question": blank, "word": word, "choices": choices}


def perplexities(out: Path, subject: Subject, settings: Settings) -> list[dict[str, Any]]:
    """Of the text to predict, for each stride, with its marks and with them taken out."""
    found = []
    with Bar(plain_console()) as bar:
        for stride in settings.strides:
            for detokenizer in (None, "wikitext"):
                how = TextConfig(stride=stride, detokenizer=detokenizer)
                texts = evaluate_texts(
                    subject, [out / "texts" / "test.txt"], config=how, observer=bar.show
                )
                kept = texts[0].kept
                found.append({**asdict(how), **figures(total(texts)), "kept_lines": kept})
    return found


def answers(data: Path, out: Path, subject: Subject, examples: int) -> dict[str, Any]:
    """What the model knows of each task."""
    asked: dict[str, tuple[str | Path, Path]] = {
        "last-words": (out / "tasks" / "last-words.toml", out / "tasks"),
        "cloze": (out / "tasks" / "cloze.toml", out / "tasks"),
        "sst-2": ("sst-2", data / "sst-2"),
        "mctest": ("mctest", data / "mctest"),
    }
    found = {}
    with Bar(plain_console()) as bar:
        for name, (task, folder) in asked.items():
            result = evaluate(
                subject,
                load_task(task),
                data=folder,
                config=TaskConfig(examples=examples),
                observer=bar.show,
            )
            found[name] = result.as_dict()
    return found


def go_on(data: Path, out: Path, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Train on Shakespeare for some steps: the pre-trained model, and one from scratch."""
    how = replace(
        settings.training,
        steps=settings.continued,
        warmup_steps=settings.continued // 10,
        validation_fraction=0.1,
        validation_interval=max(1, settings.continued // 10),
    )
    files, found = [data / "tinyshakespeare.txt"], {}
    gentle = replace(how, learning_rate=3e-4, min_learning_rate=3e-5)
    begun = {"continued": gentle, "scratch": how}
    for name, config in begun.items():
        init = out / "pretrained" / "model" if name == "continued" else None
        pretrain(files, out / name, settings.shape, config, init=init)
        lines = (out / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = [json.loads(line) for line in lines]
    return found


def draw_perplexities(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the bits per byte, by stride."""
    figure = figure_class()(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    looks = {None: ("#7aa6c2", "the data set's marks"), "wikitext": ("#c2452d", "marks taken out")}
    for detokenizer, (colour, label) in looks.items():
        points = [one for one in found if one["detokenizer"] == detokenizer]
        places = range(len(points))
        values = [one["bits_per_byte"] for one in points]
        axes.plot(places, values, color=colour, marker="o", markersize=4, label=label)
        axes.set_xticks(places, [str(one["stride"]) for one in points])
    axes.set_xlabel("stride (tokens)")
    axes.set_ylabel("bits per byte, WikiText-2")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    with replacing(path) as file:
        figure.savefig(file, format="png")


def draw_continued(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write a PNG of both validation losses over the steps."""
    figure = figure_class()(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    looks = {"continued": ("#c2452d", "pre-trained "), "scratch": ("#7aa6c2", "from scratch ")}
    for name, (colour, label) in looks.items():
        validated = [
            {key: one[key] for key in ("step", "validation_loss")}
            for one in curves[name]
            if "validation_loss" in one
        ]
        plot_losses(axes, validated, label, color=colour)
    axes.set_xlabel("steps on Shakespeare")
    axes.set_ylabel("loss (nats per token)")
    with replacing(path) as file:
        figure.savefig(file, format="png")


def run(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Make everything that is not in `out` yet; returns the summary."""
    out.mkdir(parents=True, exist_ok=True)
    with counted(out / "cpu_seconds.json"):
        write_texts(data, out / "texts", settings.characters)
        write_tasks(data, out / "tasks")
        texts = [out / "texts" / f"{name}.txt" for name in ("wikitext", "stories", "reviews")]
        pretrain(texts, out / "pretrained", settings.shape, settings.training)
        subject = Subject.load(out / "pretrained" / "model", run=RunConfig())
        predicted = perplexities(out, subject, settings)
        known = answers(data, out, subject, settings.examples)
        curves = go_on(data, out, settings)
    draw_perplexities(predicted, out / "perplexity.png")
    draw_continued(curves, out / "continued.png")
    found = {
        "environment": environment(),
        "cpu_minutes": json.loads((out / "cpu_seconds.json").read_text()) / 60,
        "texts": predicted,
        "tasks": known,
        "continued": {
            name: [
                {"step": one["step"], "validation_loss": one["validation_loss"]}
                for one in curve
                if "validation_loss" in one
            ]
            for name, curve in curves.items()
        },
        "settings": asdict(settings),
    }
    write_json(out / "summary.json", found)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="the folder of all data")
    parser.add_argument("--out", type=new_folder, required=True, help="the folder to write")
    given = parser.parse_args(arguments)
    run(given.data, given.out, SETTINGS)


if __name__ == "__main__":
    main()
