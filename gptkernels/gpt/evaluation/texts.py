"""The perplexity of text files."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptkernels.gpt.evaluation.config import TextConfig
from gptkernels.gpt.evaluation.detokenizers import detokenise
from gptkernels.gpt.evaluation.perplexity import Perplexity, perplexity
from gptkernels.gpt.evaluation.subject import Subject
from gptkernels.gpt.training.data import read_text


@dataclass(frozen=True)
class Text:
    """What was found of a file.

    Fields:
        kept: lines that the detokeniser left as they are.
        changed: whether the tokens are of a text other than the one that was encoded, as those of
            GPT-1's tokenizer are: lower-cased, for one. The probability is then that other text's.
    """

    path: Path
    perplexity: Perplexity
    kept: int
    changed: bool

    def as_dict(self) -> dict[str, Any]:
        """Of JSON's types."""
        notes = {"kept_lines": self.kept, "changed": self.changed}
        return {"file": self.path.name, **figures(self.perplexity), **notes}


def figures(found: Perplexity) -> dict[str, float | None]:
    """A perplexity as the numbers that papers report, by their names; None for one that is infinite
    or NaN, which JSON has no number for."""
    numbers = {
        "nats": found.nats,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "words": found.words,
        "perplexity_per_token": found.per_token,
        "perplexity_per_word": found.per_word,
        "bits_per_byte": found.bits_per_byte,
        "unpredicted": found.unpredicted,
    }
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def evaluate_texts(
    subject: Subject,
    files: Sequence[str | Path],
    *,
    config: TextConfig | None = None,
    observer: Callable[[str, float], None] | None = None,
) -> list[Text]:
    """The perplexity of each of `files`, UTF-8 texts; added up, that of all. Where the config names
    a detokenizer, a file is a data set of words, whose lines' ends count as words too.

    Raises FileNotFoundError and ValueError, in one sentence, for a file that is no text, and for a
    stride that is longer than the model's context.
    """
    config = config or TextConfig()
    # Read before any is computed: a file that is refused is refused at once.
    texts = [read_text([path]) for path in files]
    whole, before = sum(map(len, texts)), 0
    tokenizer, scorer, found = subject.tokenizer, subject.scorer(), []
    for path, text in zip(files, texts, strict=True):

        def show(
            done: int,
            of: int,
            *,
            name: str = str(path),
            before: int = before,
            length: int = len(text),
        ) -> None:
            if observer is not None:
                observer(name, (before + length * done / of) / whole)

        plain, kept = text, 0
        if config.detokenizer is not None:
            detokenised = detokenise(config.detokenizer, text)
            plain, kept = detokenised.text, detokenised.kept
        one = perplexity(
            scorer,
            tokenizer,
            plain,
            block_size=subject.length,
            stride=config.stride or subject.length,
            original=text,
            line_ends=config.detokenizer is not None,
            observer=show,
        )
        changed = tokenizer.decode(tokenizer.encode(plain, special=False)) != plain
        found.append(Text(Path(path), one, kept, changed))
        before += len(text)
    return found


def total(texts: Sequence[Text]) -> Perplexity:
    """The perplexity of all of them together."""
    return functools.reduce(operator.add, (text.perplexity for text in texts))
