"""What `gptkernels.accelerate` did to each module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One module of the model.

    Fields:
        name: its name in the model, as `model.named_modules()` has it.
        module: the name of its class.
        swapped: whether an op of the package now runs in it.
        why: what runs in it, or why it was left alone.
    """

    name: str
    module: str
    swapped: bool
    why: str


@dataclass(frozen=True)
class Report:
    """The rows in the order of the model. `print(report)` shows like modules in one line."""

    impl: str
    rows: list[Row] = field(default_factory=list)

    @property
    def swapped(self) -> list[Row]:
        """The modules that changed."""
        return [row for row in self.rows if row.swapped]

    @property
    def left(self) -> list[Row]:
        """The modules that look like one that could be swapped, and were not."""
        return [row for row in self.rows if not row.swapped]

    def lines(self) -> Iterator[tuple[str, str, str, str]]:
        """Yields (how many, class, name of the first, what was done or why not), like modules
        together, those that changed first."""
        alike: dict[tuple[bool, str, str], list[str]] = {}
        for row in [*self.swapped, *self.left]:
            alike.setdefault((row.swapped, row.module, row.why), []).append(row.name)
        for (swapped, module, why), names in alike.items():
            first = names[0] or "the model"
            name = first if len(names) == 1 else f"{first} ..."
            yield str(len(names)), module, name, why if swapped else f"left alone: {why}"

    def __str__(self) -> str:
        """The lines as a table, in plain text."""
        lines = list(self.lines())
        widths = [max((len(line[i]) for line in lines), default=0) for i in range(3)]
        count = len(self.swapped)
        head = f"gptkernels, impl={self.impl!r}: {count} module{'s' * (count != 1)} swapped, "
        head += f"{len(self.left)} left alone"
        table = (
            f"  {line[0]:>{widths[0]}} x {line[1]:<{widths[1]}}  {line[2]:<{widths[2]}}  {line[3]}"
            for line in lines
        )
        return "\n".join([head, *table])
