"""The parts of a task's data, encoded for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.finetuning.batches import Encoded
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.metrics import score
from gptkernels.gpt.finetuning.reading import Example, read_split
from gptkernels.gpt.finetuning.task import Task
from gptkernels.gpt.finetuning.transformations import Encoder
from gptkernels.gpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Parts:
    """Training, validation and test part; a task without a test part is judged on its validation
    part alone."""

    training: Sequence[Encoded]
    validation: Sequence[Encoded]
    test: Sequence[Encoded]

    def drawn(self, config: FinetuneConfig) -> Parts:
        """With the training part that `config` asks for: some examples held out where there is no
        validation part, and of the rest `train_examples`, both by its seed.

        Raises ValueError where too few examples are left.
        """
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(self.training), generator=generator).tolist()
        held_out = 0
        if not self.validation:
            held_out = max(1, round(config.validation_fraction * len(order)))
        kept = order[held_out:][: config.train_examples]
        if len(kept) < (config.train_examples or 1):
            wanted = config.train_examples
            raise ValueError(
                f"data: {len(order) - held_out} of the training part's {len(order)} examples are "
                f"left to train on, {held_out} are held out for validation, but "
                + ("one is needed" if wanted is None else f"train_examples is {wanted}")
            )
        validation = self.validation or [self.training[i] for i in order[:held_out]]
        return Parts([self.training[i] for i in kept], validation, self.test)

    @property
    def truncated(self) -> int:
        """How many examples were too long for the model."""
        return sum(one.cut for part in (self.training, self.validation, self.test) for one in part)

    def counts(self) -> dict[str, int]:
        """How many examples each part has, and how many of all were cut."""
        return {
            "training": len(self.training),
            "validation": len(self.validation),
            "test": len(self.test),
            "truncated": self.truncated,
        }

    @property
    def asked(self) -> Sequence[Encoded]:
        """What predictions are written of: the test part, or else the validation part."""
        return self.test or self.validation

    @property
    def judged(self) -> Sequence[Encoded]:
        """The same, but for a test part whose answers are not known."""
        known = all(one.target is not None for one in self.test)
        return self.asked if known else self.validation


def parts_for(task: Task, folder: Path, tokenizer: Tokenizer, shape: GPTConfig) -> Parts:
    """The parts of `task` in `folder`, for a pre-trained model of this shape. Raises as
    `read_split` does, and ValueError for a context that is too short for any example."""
    encoder = Encoder(task.transformation, tokenizer, shape.vocab_size, shape.block_size)
    return read_parts(task, folder, encoder)


def read_parts(task: Task, folder: Path, encoder: Encoder) -> Parts:
    """The parts of `task` in `folder`. Raises as `read_split` does."""
    parts = {
        split: encode(encoder, read_split(task, folder, split)) if split in task.files else []
        for split in ("train", "validation", "test")
    }
    return Parts(parts["train"], parts["validation"], parts["test"])


def encode(encoder: Encoder, examples: Sequence[Example]) -> list[Encoded]:
    """Each example as its sequences."""
    found = []
    for example in examples:
        before = encoder.truncated
        rows = encoder(example)
        found.append(Encoded(rows, example.target, encoder.truncated > before))
    return found


def targets(examples: Sequence[Encoded]) -> list[float]:
    """The right answers, of examples that have one."""
    return [example.target for example in examples if example.target is not None]


def baseline(task: Task, parts: Parts) -> dict[str, float]:
    """The metrics, on the part that is judged, of always giving the training part's most frequent
    answer, or its mean."""
    known, wanted = targets(parts.training), targets(parts.judged)
    if task.range is not None:
        constant = sum(known) / len(known)
    else:
        constant = max(sorted(set(known)), key=known.count)
    return score(task.metrics, wanted, [constant] * len(wanted), len(task.classes))
