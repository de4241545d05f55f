"""The error of a run whose numbers are no longer finite, which nothing can mend."""

from __future__ import annotations


class DivergedError(RuntimeError):
    """The loss or the gradients' norm became NaN or infinite; in float16, at any scale."""
