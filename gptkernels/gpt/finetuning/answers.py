"""What a fine-tuned model says about examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gptkernels.gpt.finetuning.batches import Encoded, collate, in_order
from gptkernels.gpt.finetuning.metrics import score
from gptkernels.gpt.finetuning.task import Task
from gptkernels.gpt.finetuning.task_model import TaskModel


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to one example.

    Fields:
        value: the index of the class or choice, or the number.
        label: the class's name; of a choice or a number, the value as text.
        probabilities: of each class or choice; empty for a number.
    """

    value: float
    label: str
    probabilities: tuple[float, ...] = ()


def judge(task: Task, examples: Sequence[Encoded], answers: Sequence[Answer]) -> dict[str, float]:
    """The task's metrics of the answers to `examples`, which all have a target."""
    wanted = [example.target for example in examples if example.target is not None]
    return score(task.metrics, wanted, [one.value for one in answers], len(task.classes))


@torch.inference_mode()
def answer(
    model: TaskModel,
    examples: Sequence[Encoded],
    batch_size: int,
    dtype: torch.dtype,
    check: Callable[[], None] | None = None,
) -> list[Answer]:
    """An answer to each example, in their order. Draws no random number; leaves the model in
    evaluation mode. Calls `check` before each batch: what that raises ends it."""
    model.eval()
    device = model.head.weight.device
    found: dict[int, Answer] = {}
    for numbers in in_order(examples, batch_size):
        if check is not None:
            check()
        part = [examples[i] for i in numbers]
        batch = collate(part, model.task.range is not None).to(device)
        scores, _ = model(batch, dtype)
        values = model.answers(scores).tolist()
        likely = [()] * len(part)
        if model.task.range is None:
            likely = scores.softmax(1).tolist()
        for i, example, value, chances in zip(numbers, part, values, likely, strict=True):
            kept = tuple(chances[: len(example.rows)]) if model.task.choice else tuple(chances)
            found[i] = Answer(value, _label(model, value), kept)
    return [found[i] for i in range(len(examples))]


def _label(model: TaskModel, value: float) -> str:
    if model.task.range is not None:
        return f"{value:.3f}"
    return model.task.classes[int(value)] if model.task.classes else str(value)
