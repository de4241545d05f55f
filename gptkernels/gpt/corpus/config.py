"""What decides the shards that `prepare` writes: PrepareConfig, checked once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from gptkernels.gpt.corpus.filters import MIN_CHARACTERS, MIN_SCORE


@dataclass(frozen=True)
class PrepareConfig:
    """How to prepare a corpus. Raises ValueError for a value out of range.

    Fields:
        tokenizer: "gpt2", "gpt1" or "bytes".
        shard_tokens: of a shard, at most.
        near_duplicates: texts that resemble an earlier one by this much, 0.1 to 1, are left out;
            None looks for exact duplicates alone.
        min_score: a record with a lower score is left out; one without a score is kept.
        min_characters: a shorter text is left out.
        text_key, score_key: where a line of JSON has its text, and may have its score.
    """

    tokenizer: str = "gpt2"
    shard_tokens: int = 100_000_000
    near_duplicates: float | None = 0.8
    min_score: float = MIN_SCORE
    min_characters: int = MIN_CHARACTERS
    text_key: str = "text"
    score_key: str = "score"

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens is {self.shard_tokens}, at least 1 is wanted")
        if self.near_duplicates is not None and not 0.1 <= self.near_duplicates <= 1:
            raise ValueError(f"near_duplicates is {self.near_duplicates}, 0.1 to 1 is wanted")
        if self.min_score != self.min_score:
            raise ValueError(f"min_score is {self.min_score}, a number is wanted")
        if self.min_characters < 0:
            raise ValueError(f"min_characters is {self.min_characters}, at least 0 is wanted")
