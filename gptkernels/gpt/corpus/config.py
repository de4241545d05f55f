"""What decides the shards that `prepare` writes: PrepareConfig, checked once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from gptkernels.gpt.corpus.filters import MIN_CHARACTERS, MIN_SCORE
from gptkernels.gpt.options import check_option, check_options, option


@dataclass(frozen=True)
class PrepareConfig:
    """How to prepare a corpus. Raises ValueError for a value out of range, TypeError for a wrong
    type."""

    tokenizer: str = option(
        "gpt2", "Tokenizer: gpt2 (its byte-level BPE), gpt1 (its BPE of words) or bytes."
    )
    shard_tokens: int = option(100_000_000, "Tokens of a shard, at most.", least=1)
    near_duplicates: float = option(
        0.8,
        "Share, 0.1 to 1, by which a text that is left out resembles an earlier one. With 0 exact "
        "duplicates alone are left out.",
    )
    min_score: float = option(
        MIN_SCORE, "Least score of records that are kept. Those without one are kept."
    )
    min_characters: int = option(
        MIN_CHARACTERS, "Least length of texts that are kept, in characters.", least=0
    )
    text_key: str = option("text", "Key of a line of JSON that holds its text.")
    score_key: str = option("score", "Key of a line of JSON that may hold its score.")

    def __post_init__(self) -> None:
        check_options(self)
        right = self.near_duplicates == 0 or 0.1 <= self.near_duplicates <= 1
        check_option(self, "near_duplicates", right, "0 or 0.1 to 1")
