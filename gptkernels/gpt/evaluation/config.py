"""How to evaluate: on texts and on tasks."""

from __future__ import annotations

from dataclasses import dataclass

from gptkernels.gpt.evaluation.detokenizers import DETOKENIZERS
from gptkernels.gpt.evaluation.task import NORMALISATIONS, SPLITS
from gptkernels.gpt.options import (
    DEVICE,
    IMPL,
    check_choice,
    check_option,
    check_options,
    one_of,
    option,
)
from gptkernels.gpt.precision import DTYPES


@dataclass(frozen=True)
class RunConfig:
    """By what the model is run. Raises ValueError for a value out of range, TypeError for a wrong
    type."""

    batch_size: int | None = option(
        None,
        "Rows that the model computes at a time. Free answers are searched one by one.",
        least=1,
        unset="8",
    )
    dtype: str = option(
        "float32", "Dtype of the computation: float32, or bfloat16 or float16 under autocast."
    )
    device: str = option("auto", DEVICE)
    impl: str = option("auto", IMPL)

    def __post_init__(self) -> None:
        check_options(self)
        check_choice(self, "dtype", DTYPES)


@dataclass(frozen=True)
class TextConfig:
    """How the perplexity of texts is computed. Raises ValueError for a value out of range,
    TypeError for a wrong type."""

    stride: int | None = option(
        None,
        "Tokens between two windows. With fewer than the context has, each token is predicted "
        "from more of the text before it, and it takes longer.",
        least=1,
        unset="the context",
    )
    detokenizer: str | None = option(
        None,
        f"Whose marks of a word tokeniser are taken out of the texts: {one_of(DETOKENIZERS)}.",
        unset="texts stay as they are",
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_choice(self, "detokenizer", DETOKENIZERS)


@dataclass(frozen=True)
class TaskConfig:
    """How a task is asked. Raises ValueError for a value out of range, TypeError for a wrong
    type."""

    shots: str = option("0", "Solved examples in a prompt: a number, or several such as 0,1,4.")
    split: str | None = option(
        None,
        "Part that is asked: train, validation or test.",
        unset="test, where there is one",
    )
    examples: int | None = option(
        None, "Examples that are asked at most, drawn by the seed.", least=1, unset="all"
    )
    normalise: str | None = option(
        None,
        "What candidates are compared by: their log-probability over the number of tokens "
        "(tokens), as it is (none), or less that behind the task's text alone (unconditional).",
        unset="the task's own",
    )
    random_answers: bool = option(
        False, "Whether the examples in prompts have answers drawn at random, as a control."
    )
    beam_width: int | None = option(
        None, "Texts that the beam search for free answers keeps.", least=1, unset="4"
    )
    length_penalty: float | None = option(
        None, "Length penalty α of the beam search.", least=0, unset="0.6"
    )
    seed: int = option(1337, "Seed of the examples drawn and of bootstrap intervals.", least=0)

    def __post_init__(self) -> None:
        check_options(self)
        check_option(self, "seed", self.seed < 2**63, "less than 2**63")
        check_choice(self, "split", SPLITS)
        check_choice(self, "normalise", NORMALISATIONS)
        check_option(self, "shots", bool(self.counts), "a number, or several such as 0,1,4,")

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of solved examples, each once and rising; none where `shots` is no list of
        numbers."""
        parts = self.shots.split(",")
        if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
            return ()
        return tuple(sorted({int(part) for part in parts}))
