"""How corpora write their tokens: a space between any two, and some in a spelling of their own.

A Style says which of these spaces a person would not write, and how a line without them is cut into
the same tokens again. Its rules need not be right everywhere: detokenizers.py tries them.

    WIKITEXT    cut by Moses' tokenizer, with its mark for hyphens, and the same for the points and
                commas of numbers (Merity et al., "Pointer Sentinel Mixture Models", 2016; Koehn et
                al., "Moses: Open Source Toolkit for Statistical Machine Translation", 2007)
    PTB         cut as the Penn Treebank is, a sentence a line: the Children's Book Test, and SST-2
                in lower case (Marcus et al., "Building a Large Annotated Corpus of English: The
                Penn Treebank", 1993; its tokenizer.sed, 1995)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """Of a corpus.

    Fields:
        edge: the spaces that stand at both ends of a line.
        quotes: patterns of a pair of quotes, where both look the same, and how to write it, in as
            many characters, with curly ones. `joints` sees these.
        joints: matches a space, between two tokens of a line, that a person would not write.
        written: what a person writes for a token.
        token: matches the next token of a line that a person has written, or of the corpus.
        spelled: the corpus's spelling of what `token` has matched.
    """

    edge: str
    quotes: Sequence[tuple[re.Pattern[str], str]]
    joints: re.Pattern[str]
    written: Mapping[str, str]
    token: re.Pattern[str]
    spelled: Callable[[re.Match[str]], str]

    def join(self, tokens: Sequence[str], alone: AbstractSet[int]) -> str:
        """The line of `tokens` as a person writes it, but for those whose numbers are in `alone`:
        they keep their spelling, and a space on both sides."""
        spaced = " ".join(tokens)
        for pattern, curly in self.quotes:
            spaced = pattern.sub(curly, spaced)
        parts, place = [], 0
        for i, token in enumerate(tokens):
            parts.append(token if i in alone else self.written.get(token, token))
            place += len(token)
            if alone & {i, i + 1} or not self.joints.match(spaced, place):
                parts.append(" ")
            place += 1
        return "".join(parts).removesuffix(" ")

    def cut(self, line: str) -> list[str]:
        """The tokens of a line."""
        return [self.spelled(match) for match in self.token.finditer(line)]


# Words before a point that ends no sentence, as in Moses' list, and what WikiText has besides.
_ABBREVIATIONS = (
    "Adj Adm Adv Asst Ave Bart Bldg Brig Bros Capt Cmdr Co Col Comdr Con Corp Cpl Dr Drs Ens Gen "
    "Gov Hon Hosp Inc Insp Jr Lt Ltd Maj Messrs Mlle Mme Mr Mrs Ms Msgr Mt Op Ord Pfc Ph Prof Pvt "
    "Rep Reps Res Rev Rt Sen Sens Sfc Sgt Sr St Ste Supt Surg al v vs"
)

WIKITEXT = Style(
    edge=" ",
    quotes=(
        (re.compile('"([^"]*)"'), r"“\1”"),
        # Behind an s it may be the lobsters ' shells.
        (re.compile(r"(?<=[^s.,!?] )'( .{,200}?) '(?= |$)"), r"‘\1 ’"),
    ),
    joints=re.compile(
        r"""
        [ ](?=[\],.;:!?)%°′″’”](?:[ ]|$))      # before what ends a word, a number or a quote,
        | [ ](?='[^\W\d_])                     # and before 's and 't
        | (?<=[\[($£€¥#“‘])[ ]                 # behind what begins one
        | [ ](?=(?:@[-,.]@|[/⁄‑])[ ]) | (?<=@[-,.]@)[ ] | (?<=[/⁄‑])[ ]      # 10,000; and/or
        | (?<=\d)[ ](?=[–:][ ]\d) | (?<=\d[ ][–:])[ ](?=\d)                  # 1914–1918; 12:30
        | (?<==)[ ](?==)                       # == of a heading
        | (?<=s)[ ](?='(?:[ ]|$))              # the lobsters' shells
        """,
        re.VERBOSE,
    ),
    written={"@-@": "-", "@,@": ",", "@.@": "."},
    token=re.compile(
        rf"""
        <\w+> | @[-,.]@
        | (?P<between>(?<=[\w>])-(?=[\w<]) | (?<=[\d>])[.,](?=[\d<]))
        | (?<=[\w>])'[^\W\d_]\w* | '(?:s|t|re|ve|ll|d|m)(?=[ ]|$)
        | (?:[^\W\d_]+\.)+[^\W\d_]+\.?          # U.S., About.com
        | (?:[^\W\d_a-z]|{"|".join(_ABBREVIATIONS.split())})\.(?=[ ])
        | (?:No|Nos|Art|pp)\.(?=[ ][\d<])
        | \w+\.(?=[ ][a-z])                     # no sentence begins behind it
        | \w+(?:-(?![\w<]))?
        | \.\.+ | --+ | \S
        """,
        re.VERBOSE,
    ),
    spelled=lambda match: f"@{match[0]}@" if match["between"] else match[0],
)

_ESCAPES = {"(": "LRB", ")": "RRB", "[": "LSB", "]": "RSB", "{": "LCB", "}": "RCB"}


# It is asked of a line for each of its brackets.
_is_lower = functools.lru_cache(maxsize=1)(str.islower)


def _spelled_as_in_the_treebank(match: re.Match[str]) -> str:
    written = match[0]
    if match["opens"]:
        return "``" if written == '"' else "`"
    if written == '"':
        return "''"
    # A corpus in lower case, such as SST-2, has the brackets themselves.
    if written in _ESCAPES and not _is_lower(match.string):
        return f"-{_ESCAPES[written]}-"
    return written


PTB = Style(
    edge="",
    quotes=(),
    joints=re.compile(
        r"""
        [ ](?=(?:[,.;:!?%)\]}]|\.\.\.|''?|-R[RSC]B-)(?:[ ]|$))    # before what ends a word,
        | [ ](?=(?:n't|'(?:s|re|ve|ll|d|m))(?:[ ]|$))             # and before the rest of a word
        | (?<=[$\#(\[{`])[ ] | (?<=-L[RSC]B-)[ ]                  # behind what begins one
        | (?<=\bcan)[ ](?=not\b) | (?<=\b(?:gon|wan))[ ](?=na\b) | (?<=\bgot)[ ](?=ta\b)
        """,
        re.VERBOSE | re.IGNORECASE,
    ),
    written={"``": '"', "''": '"', "`": "'", **{f"-{name}-": c for c, name in _ESCAPES.items()}},
    token=re.compile(
        r"""
        ``|''|-[LR][RSC]B-|--+|\.\.\.|\*+|[?!]+
        | n't(?!\w) | '(?:s|re|ve|ll|d|m)(?!\w) | '(?:\d\ds?|em|til|tis|twas|n'?)(?!\w)
        | (?P<opens>(?<![^\s(\[{`'"-])["'](?=\S))
        | \bcan(?=not\b) | \b(?:gon|wan)(?=na\b) | \bgot(?=ta\b)
        | (?:
            (?!n't(?!\w) | '(?:s|re|ve|ll|d|m)(?!\w) | -- | \.\.\. | \.[\s"')\]}]*$)
            (?:[^\s,:;?!()\[\]{}"'`$#%] | (?<=\d)[,:](?=\d) | (?<=\w)'(?=\w))
          )+
        | \S
        """,
        re.VERBOSE | re.IGNORECASE,
    ),
    spelled=_spelled_as_in_the_treebank,
)
