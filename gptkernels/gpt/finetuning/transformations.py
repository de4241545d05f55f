"""The four input transformations: an example becomes one or more sequences of tokens.

    classification   <start> text <extract>
    entailment       <start> premise <delimiter> hypothesis <extract>
    similarity       <start> one <delimiter> other <extract>
                     <start> other <delimiter> one <extract>
    choice           <start> context <delimiter> choice <extract>, for each choice

What the model computes at <extract> stands for the sequence; the two of a similarity are added up.
The three tokens are new: their ids follow the pre-trained vocabulary.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, section 3.3 and
figure 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.finetuning.reading import Example
from gptkernels.gpt.tokenizer import Tokenizer

NEW_TOKENS = 3


class Encoder:
    """Turns examples into sequences of at most `length` tokens.

    Args:
        transformation: one of the four.
        tokenizer: of the pre-trained model.
        vocab_size: V of the pre-trained model; the new tokens are V, V + 1 and V + 2.
        length: the model's context, block_size.

    A sequence that is too long loses tokens from the end of its longest part, one after another;
    `truncated` counts the examples that this happened to.
    """

    def __init__(
        self, transformation: str, tokenizer: Tokenizer, vocab_size: int, length: int
    ) -> None:
        self.transformation = transformation
        self.tokenizer = tokenizer
        self.start, self.delimiter, self.extract = range(vocab_size, vocab_size + NEW_TOKENS)
        self.length = length
        self.truncated = 0

    @classmethod
    def of_grown(cls, transformation: str, tokenizer: Tokenizer, shape: GPTConfig) -> Encoder:
        """For a model that has the new tokens already."""
        return cls(transformation, tokenizer, shape.vocab_size - NEW_TOKENS, shape.block_size)

    def __call__(self, example: Example) -> list[list[int]]:
        """The sequences of `example`: one, two for a similarity, one a choice for a choice."""
        cut = [self._sequence(parts) for parts in self._parts(example)]
        self.truncated += any(was_cut for _, was_cut in cut)
        return [tokens for tokens, _ in cut]

    def _parts(self, example: Example) -> list[list[list[int]]]:
        """The parts of each sequence, without the new tokens."""
        texts = [self._encode(text) for text in example.texts]
        if self.transformation == "choice":
            context = [token for text in texts for token in text]
            return [[context, self._encode(choice)] for choice in example.choices]
        if self.transformation == "similarity":
            return [texts, texts[::-1]]
        return [texts]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=False)  # <start> is what begins a sequence

    def _sequence(self, parts: Sequence[Sequence[int]]) -> tuple[list[int], bool]:
        room = self.length - len(parts) - 1  # a new token before each part, and one at the end
        kept = shortened([len(part) for part in parts], room)
        tokens = [self.start]
        for part, length in zip(parts, kept, strict=True):
            tokens += [*part[:length], self.delimiter]
        tokens[-1] = self.extract
        return tokens, kept != [len(part) for part in parts]


def shortened(lengths: Sequence[int], room: int) -> list[int]:
    """`lengths` that add up to at most `room`: always the longest is one shorter, the first of
    those that are equal. ValueError where there is no room at all."""
    if room < len(lengths):
        raise ValueError(
            f"a sequence of {len(lengths)} texts needs a context of at least "
            f"{2 * len(lengths) + 1} tokens"
        )
    kept = list(lengths)
    while sum(kept) > room:
        kept[kept.index(max(kept))] -= 1
    return kept
