"""Which classes of calls a program makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gptkernels.core import plans
from gptkernels.core.tuned import Key


class Classes(list[Key]):
    """The classes of calls that were made, each once, in their order."""


@contextlib.contextmanager
def record() -> Iterator[Classes]:
    """Collects the classes of the calls with impl="auto" that are made in this context, by any
    thread; nothing is measured, and nothing that is computed changes.

        with gptkernels.tuning.record() as classes:
            step()
        gptkernels.tune(classes)

    The list is filled when the context ends. Calls inside a graph of torch.compile are not seen.
    """
    classes = Classes()
    with plans.recording() as calls:
        yield classes
    classes += dict.fromkeys(call.key for call in calls)
