"""What a person sees of a corpus being prepared: a bar that moves, or a line now and then."""

from __future__ import annotations

from gptkernels.gpt.progress import Bar


class ProgressBar(Bar):
    """A progress bar for `prepare(..., observer=...)`: use as a context, call with the counts. It
    shows the bytes that were read, documents and tokens."""

    def __call__(self, counts: dict[str, int], done: int, total: int) -> None:
        """Show what was counted so far, after `done` of `total` bytes of the input."""
        self.show(
            f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB",
            done / total if total else 1.0,
            f"{counts['documents']:,} documents  {counts['tokens']:,} tokens",
        )
