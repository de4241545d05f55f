"""How to evaluate: on texts and on tasks."""

from __future__ import annotations

from dataclasses import dataclass

from gptkernels.gpt.evaluation.detokenizers import DETOKENIZERS
from gptkernels.gpt.evaluation.task import NORMALISATIONS, SPLITS
from gptkernels.gpt.options import check_option, check_options, one_of, option
from gptkernels.gpt.precision import DTYPES


@dataclass(frozen=True)
class RunConfig:
    """By what the model is run. Raises ValueError for a value out of range, TypeError for a wrong
    type."""

    batch_size: int | None = option(
        None, "rows that run at a time; free answers are searched one by one; default: 8", least=1
    )
    dtype: str = option("float32", "float32, or bfloat16 or float16 for autocast")
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N")
    impl: str = option(
        "auto", "implementation of the fused operations: auto, torch, triton or cuda"
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_option(self, "dtype", self.dtype in DTYPES, one_of(DTYPES))


@dataclass(frozen=True)
class TextConfig:
    """How the perplexity of texts is computed. Raises ValueError for a value out of range,
    TypeError for a wrong type."""

    stride: int | None = option(
        None,
        "tokens between two windows: less than the context gives each token more of the text "
        "before it, and takes longer; default: the context",
        least=1,
    )
    detokenizer: str | None = option(
        None, f"takes word tokenisers' marks out of texts: {one_of(DETOKENIZERS)}"
    )

    def __post_init__(self) -> None:
        check_options(self)
        right = self.detokenizer is None or self.detokenizer in DETOKENIZERS
        check_option(self, "detokenizer", right, one_of(DETOKENIZERS))


@dataclass(frozen=True)
class TaskConfig:
    """How a task is asked. Raises ValueError for a value out of range, TypeError for a wrong
    type."""

    shots: str = option("0", "solved examples in a prompt: a number, or several such as 0,1,4")
    split: str | None = option(
        None, "part that is asked: train, validation or test; default: test, where there is one"
    )
    examples: int | None = option(
        None, "ask at most this many examples, drawn by the seed; default: all", least=1
    )
    normalise: str | None = option(
        None,
        "what candidates are compared by: their log-probability over the number of tokens "
        "(tokens), as it is (none), or less that behind the task's text alone (unconditional); "
        "default: the task's own",
    )
    random_answers: bool = option(
        False, "control: the examples in prompts have answers drawn at random"
    )
    beam_width: int | None = option(
        None, "of the beam search for free answers; default: 4", least=1
    )
    length_penalty: float | None = option(None, "α of the beam search; default: 0.6", least=0)
    seed: int = option(1337, "of the examples drawn and of bootstrap intervals", least=0)

    def __post_init__(self) -> None:
        check_options(self)
        check_option(self, "seed", self.seed < 2**63, "less than 2**63")
        for name, known in (("split", SPLITS), ("normalise", NORMALISATIONS)):
            value = getattr(self, name)
            check_option(self, name, value is None or value in known, one_of(known))
        check_option(self, "shots", bool(self.counts), "a number, or several such as 0,1,4,")

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of solved examples, each once and rising; none where `shots` is no list of
        numbers."""
        parts = self.shots.split(",")
        if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
            return ()
        return tuple(sorted({int(part) for part in parts}))
