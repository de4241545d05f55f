"""What an evaluation writes: results.json; of a task also predictions.jsonl, a line for each
question, and shots.png, where several numbers of solved examples were asked for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptkernels.core.figure import figure_class
from gptkernels.core.files import check_folder, make_folder, replacing
from gptkernels.gpt.evaluation import metrics
from gptkernels.gpt.evaluation.config import RunConfig
from gptkernels.gpt.evaluation.evaluate import Evaluation
from gptkernels.gpt.evaluation.texts import Text, figures, total

RESULTS, PREDICTIONS, PLOT = "results.json", "predictions.jsonl", "shots.png"
_COLOURS, _GREY = ("#c2452d", "#4878a8", "#5a9367", "#8d6aa8"), "#888888"


def check_new(out: Path, plot: bool = False) -> None:
    """Raise ValueError where `out` already holds an evaluation, OSError where it is a file, and
    ImportError where a `plot` will be drawn and matplotlib is missing."""
    check_folder("out", out)
    if plot:
        figure_class()
    if (out / RESULTS).exists():
        raise ValueError(f"out: {out} already holds an evaluation, name another folder")


def write_texts(out: Path, texts: Sequence[Text], settings: Mapping[str, Any]) -> None:
    """Write the perplexity of texts. Raises OSError where the folder cannot be written."""
    make_folder("out", out)
    content = {"texts": [text.as_dict() for text in texts], "total": figures(total(texts))}
    _write_json(out / RESULTS, {**settings, **content})


def write_task(out: Path, evaluation: Evaluation, run: RunConfig, model: str) -> None:
    """Write how a model did on a task. Raises OSError where the folder cannot be written, and
    ImportError where matplotlib is missing and needed, which `check_new` tells beforehand."""
    make_folder("out", out)
    with replacing(out / PREDICTIONS) as file, file.open("w", encoding="utf-8") as lines:
        for line in _predictions(evaluation):
            lines.write(json.dumps(line) + "\n")
    if len(evaluation.outcomes) > 1:
        draw_shots([evaluation], out / PLOT)
    task = {key: value for key, value in dataclasses.asdict(evaluation.task).items() if value}
    task.pop("home", None)
    content = {"model": model, "run": dataclasses.asdict(run), **evaluation.as_dict()}
    content["asked_by"] = task
    if evaluation.task.kind == "generation" and "bleu" in evaluation.task.metrics:
        references = [one.example.answers for one in evaluation.asked]
        content["bleu_signature"] = metrics.bleu_signature(references)
    _write_json(out / RESULTS, content)  # last: it says that the folder is whole


def draw_shots(
    evaluations: Sequence[Evaluation], path: Path, labels: Sequence[str] = ("",)
) -> None:
    """Write a PNG of each evaluation's first metric over the number of solved examples, with its
    95% intervals, and of guessing.

    Raises ImportError when matplotlib is missing.
    """
    figure = figure_class()(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    name = next(iter(evaluations[0].outcomes[0].metrics))
    for evaluation, label, colour in zip(evaluations, labels, itertools.cycle(_COLOURS)):
        outcomes = evaluation.outcomes
        places = range(len(outcomes))
        low, high = zip(*(outcome.intervals[name] for outcome in outcomes), strict=True)
        values = [outcome.metrics[name] for outcome in outcomes]
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(places, values, color=colour, marker="o", markersize=4, label=label or None)
    first = evaluations[0].outcomes
    if (chance := evaluations[0].chance) is not None:
        axes.axhline(chance, color=_GREY, linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(first)), [str(outcome.shots) for outcome in first])
    axes.set_xlabel("solved examples in the prompt, K")
    axes.set_ylabel(f"{name}, {evaluations[0].task.name}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _predictions(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    for outcome in evaluation.outcomes:
        for asked, answer in zip(evaluation.asked, outcome.answers, strict=True):
            example = asked.example
            line = {
                "shots": outcome.shots,
                "solved": answer.prompt.shots,
                "example": asked.place,
                "prompt": answer.prompt.text,
                "cut": answer.prompt.cut,
                "answer": answer.text,
                "scores": answer.scores,
            }
            match evaluation.task.kind:
                case "generation":
                    line["references"] = example.answers
                case "last-word":
                    line |= {"word": example.answers[0], "greedy": answer.greedy}
                case _:
                    line |= {"candidates": example.answers, "right": example.right}
            yield line


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        text = json.dumps(_finite(content), indent=2, allow_nan=False)
        file.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """`value`, with null for what JSON has no number for, such as an infinite perplexity."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
