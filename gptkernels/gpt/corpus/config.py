"""What decides the shards that `prepare` writes: PrepareConfig, checked once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from gptkernels.gpt.corpus.filters import MIN_CHARACTERS, MIN_SCORE
from gptkernels.gpt.options import check_option, check_options, option


@dataclass(frozen=True)
class PrepareConfig:
    """How to prepare a corpus. Raises ValueError for a value out of range, TypeError for a wrong
    type."""

    tokenizer: str = option("gpt2", "gpt2, its byte-level BPE; gpt1, its BPE of words; bytes")
    shard_tokens: int = option(100_000_000, "tokens of a shard, at most", least=1)
    near_duplicates: float = option(
        0.8,
        "leave out what resembles an earlier text by this share, 0.1 to 1; 0 leaves out exact "
        "duplicates alone",
    )
    min_score: float = option(
        MIN_SCORE, "leave out records with a lower score; those without one are kept"
    )
    min_characters: int = option(MIN_CHARACTERS, "leave out shorter texts", least=0)
    text_key: str = option("text", "where a line of JSON has its text")
    score_key: str = option("score", "where a line of JSON may have its score")

    def __post_init__(self) -> None:
        check_options(self)
        right = self.near_duplicates == 0 or 0.1 <= self.near_duplicates <= 1
        check_option(self, "near_duplicates", right, "0 or 0.1 to 1")
