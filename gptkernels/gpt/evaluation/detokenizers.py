"""Texts of corpora that were cut into tokens, as a person would write them; and back again.

    restore(name, detokenise(name, text).text) == text        for every text

GPT-2's paper removes such "tokenization artifacts" before it measures a corpus, and reports the
perplexity of what the corpus itself counts as words: since the change can be undone, the
probability of the one text is that of the other.

Each line is changed by itself. Its tokens are joined by rules, and what comes out is cut again:

    tokens    Homarus gammarus , a " clawed " lobster , weighs 0 @.@ 7 kg , type C . See below .
    joined    Homarus gammarus, a "clawed" lobster, weighs 0.7 kg, type C. See below.
    cut       ... weighs 0 @.@ 7 kg , type C. See below .      as if it were an abbreviation
    joined    ... weighs 0.7 kg, type C . See below.           so this token stays as it was

That may fail, such as for a line that is not of the corpus. It then stays whole, with MARK before
it only if `restore` would otherwise cut it. So every text comes back, whatever the rules are:

    a line was joined    it has no MARK and is what joining its cut gives; the cut was compared
    a line has MARK      what stands behind it is the line
    any other line       joining its cut gives something else, so `restore` leaves it

The rules of each corpus are in corpus_styles.py.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gptkernels.core.names import check_name
from gptkernels.gpt.evaluation.corpus_styles import PTB, WIKITEXT, Style

DETOKENIZERS = {"wikitext": WIKITEXT, "ptb": PTB}
MARK = "\\"
_TRIES = 16  # for a line: each leaves one token more as it was


@dataclass(frozen=True, slots=True)
class Detokenised:
    """A text as it is written.

    Fields:
        text: it.
        kept: how many of its lines could not be joined, and stay as they were.
    """

    text: str
    kept: int


def detokenise(name: str, text: str) -> Detokenised:
    """`text`, which is in the style `name` of DETOKENIZERS, as a person would write it.

    Raises ValueError for an unknown name.
    """
    style = _style(name)
    kept = 0

    def change(line: str) -> str:
        nonlocal kept
        joined = _join(style, line)
        if not joined.startswith(MARK) and _cut(style, joined) == line:
            return joined
        kept += 1
        marked = line.startswith(MARK) or _join(style, _cut(style, line)) == line
        return MARK + line if marked else line

    return Detokenised(_each_line(change, text), kept)


def restore(name: str, text: str) -> str:
    """The text that `detokenise` has made `text` of. Raises ValueError for an unknown name."""
    style = _style(name)

    def change(line: str) -> str:
        if line.startswith(MARK):
            return line.removeprefix(MARK)
        cut = _cut(style, line)
        return cut if _join(style, cut) == line else line

    return _each_line(change, text)


def _style(name: str) -> Style:
    return DETOKENIZERS[check_name("a detokenizer", name, DETOKENIZERS)]


def _each_line(change: Callable[[str], str], text: str) -> str:
    # What stands behind the last line's end is no blank line.
    *lines, last = text.split("\n")
    return "\n".join([*map(change, lines), change(last) if last.strip(" ") else last])


def _cut(style: Style, line: str) -> str:
    """A line as the corpus has it, from one as a person writes it."""
    if line in ("", style.edge):
        return _other_blank(style, line)
    return style.edge + " ".join(style.cut(line)) + style.edge


def _join(style: Style, line: str) -> str:
    """A line as a person writes it, from one as the corpus has it; or the line itself."""
    if line in ("", style.edge):
        return _other_blank(style, line)
    tokens = line.removeprefix(style.edge).removesuffix(style.edge).split(" ")
    alone: set[int] = set()
    for _ in range(_TRIES):
        joined = style.join(tokens, alone)
        found = style.cut(joined)
        if found == tokens:
            return joined
        pairs = zip(found, tokens, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(tokens)))
        # The token that is not found again is to blame, or one beside it.
        others = {first, first - 1, first + 1} & set(range(len(tokens))) - alone
        if not others:
            break
        alone.add(min(others, key=lambda i: abs(i - first)))
    return line


def _other_blank(style: Style, line: str) -> str:
    """A corpus' blank line is its edge, a person's is empty: each takes the other's place."""
    return "" if line else style.edge
