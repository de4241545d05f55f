"""What becomes of a page that a library fails on: one such page ends no run of days."""

from __future__ import annotations

from gptkernels.gpt.corpus.records import Malformed

FATAL = (ImportError, MemoryError, KeyboardInterrupt, SystemExit)
"""What is no fault of a page. A panic of a library written in Rust is no Exception, so that all
other errors, of whatever kind, are a page's."""


def malformed(name: str, error: BaseException) -> Malformed:
    """What stands for the page `name` that a library failed on with `error`."""
    return Malformed(name, f"cannot be read ({type(error).__name__}: {error})")
