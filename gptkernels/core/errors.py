"""Errors in one line, for sentences that report them."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of its message; "" where it has none."""
    return next(iter(str(error).strip().splitlines()), "")


def in_a_line(error: BaseException) -> str:
    """Its kind and its first line, where it has one."""
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
