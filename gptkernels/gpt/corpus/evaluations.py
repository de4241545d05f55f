"""The texts of an evaluation, to look for in a corpus."""

from __future__ import annotations

from pathlib import Path

from gptkernels.gpt.corpus import sources
from gptkernels.gpt.corpus.extract import extract
from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.sources import Reading
from gptkernels.gpt.training.data import read_text


def evaluation_texts(path: Path, text_key: str = "text") -> list[str]:
    """The texts of `path`: records, if its name ends as a source's does, else it is one text.

    text_key: where a line of JSON has its text.

    Raises FileNotFoundError for a file that is not there, and ValueError for one that is empty or
    of which anything is malformed: nothing of an evaluation may be left out.
    """
    if not sources.is_source(path):
        return [read_text([path])]
    texts: list[str] = []
    for record in sources.read(path, Reading(text_key=text_key)):
        text = record if isinstance(record, Malformed) else extract(record)
        if isinstance(text, Malformed):
            raise ValueError(f"evaluations: {text.name} {text.reason}")
        if isinstance(record, Record) and record.continues:
            texts[-1] += text
        else:
            texts.append(text)
    return texts
