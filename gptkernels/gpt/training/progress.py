"""What a person sees of a training run: a bar that moves, and a line at every validation."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from gptkernels.gpt.progress import Bar


class ProgressBar(Bar):
    """A progress bar for `train(..., observer=...)`: use as a context, call with each log record.

    On a terminal the bar shows step, loss, tokens per second and MFU; every validation leaves a
    line. Elsewhere (a file, a pipe) only those lines are written. `opening` is the line before the
    first: what is refused does not show it.
    """

    def __init__(self, console: Console | None = None, opening: str = "") -> None:
        super().__init__(console or Console())
        self._opening = opening

    def __call__(self, record: dict[str, Any], done: float) -> None:
        """Show `record` (one line of log.jsonl); `done` is the share of the run behind us."""
        if self._opening:
            self.console.print(self._opening, markup=False, highlight=False)
            self._opening = ""
        if "sample" in record:
            self.console.print(record["sample"], style="dim", markup=False, highlight=False)
            return
        figures = describe(record)
        self.show(f"step {record['step']}", done, figures)
        if "validation_loss" in record:
            self.console.print(
                f"step {record['step']:>6}  {figures}  validation loss "
                f"[bold]{record['validation_loss']:.4f}[/bold]",
                highlight=False,
            )


def describe(record: dict[str, Any]) -> str:
    """Loss, tokens per second, MFU and memory of activations in a log record, where it has them."""
    parts = []
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.4f}")
    if record.get("tokens_per_s") is not None:
        parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f}%")
    if record.get("activation_bytes") is not None:
        parts.append(f"activations {record['activation_bytes'] / 2**20:,.1f} MiB")
    return "  ".join(parts)
