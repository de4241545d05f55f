"""Which records enter a corpus: WebText's filter, and a least length.

WebText took the pages that Reddit had linked to with at least 3 karma, "a heuristic indicator for
whether other users found the link interesting" (Radford et al. 2019, Language Models are
Unsupervised Multitask Learners, section 2.1).
"""

from __future__ import annotations

MIN_SCORE = 3.0
MIN_CHARACTERS = 1


def refusal(
    text: str,
    score: float | None,
    *,
    min_score: float = MIN_SCORE,
    min_characters: int = MIN_CHARACTERS,
) -> str | None:
    """Why a text is left out, as a name to count it under, or None where it is kept.

    "low score": it has a score, which is less than `min_score`. "too short": without the white
    space at its ends it has fewer than `min_characters` characters.
    """
    if score is not None and score < min_score:
        return "low score"
    if len(text.strip()) < min_characters:
        return "too short"
    return None
