"""A fine-tuned model that answers texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gptkernels.core.device import choose_device
from gptkernels.gpt.finetuning import folder
from gptkernels.gpt.finetuning.answers import Answer, answer
from gptkernels.gpt.finetuning.parts import encode
from gptkernels.gpt.finetuning.reading import Example
from gptkernels.gpt.finetuning.transformations import Encoder

_BATCH = 32


class Classifier:
    """The fine-tuned model in a folder that `finetune` wrote, as a function of texts.

        classify = Classifier("out")
        classify([("a film of rare warmth",)])[0].label        # "positive"

    Its arguments: the folder, an implementation, a device, a dtype to compute in. Raises
    FileNotFoundError or ValueError for a folder that holds no such model.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        impl: str = "auto",
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, tokenizer = folder.load(path)
        self.model.body.set_impl(impl)
        self.model.to(choose_device(device))
        self.task, self.dtype = self.model.task, dtype
        shape = self.model.body.config
        self.encoder = Encoder.of_grown(self.task.transformation, tokenizer, shape)

    @property
    def texts(self) -> int:
        """How many texts an example has, besides the choices of a choice."""
        return len(self.task.texts) or 1

    def __call__(self, examples: Sequence[Sequence[str]]) -> list[Answer]:
        """An answer to each example: its texts and, for a choice, the choices after them.

        The label of a choice is the choice itself. `encoder.truncated` counts the examples that
        were too long. Raises ValueError for another number of texts than the task has.
        """
        if isinstance(examples, str):
            raise TypeError("examples must be a list of examples, got a text")
        asked = [self._example(texts) for texts in examples]
        answers = answer(self.model, encode(self.encoder, asked), _BATCH, self.dtype)
        if not self.task.choice:
            return answers
        return [
            replace(one, label=example.choices[int(one.value)])
            for one, example in zip(answers, asked, strict=True)
        ]

    def _example(self, texts: Sequence[str]) -> Example:
        if isinstance(texts, str):
            texts = (texts,)
        least = self.texts + 2 if self.task.choice else self.texts
        if len(texts) < least or (len(texts) > least and not self.task.choice):
            wanted = f"at least {least} (a context and its choices)" if self.task.choice else least
            raise ValueError(
                f"the task {self.task.name} needs {wanted} texts for an example, got {len(texts)}"
            )
        return Example(tuple(texts[: self.texts]), tuple(texts[self.texts :]))
