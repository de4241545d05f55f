"""Which table of measurements (core/tuned.py) a run follows, so that a resumed one can tell that it
is another: the last bits may then differ."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from gptkernels.core import plans
from gptkernels.core.choice import switched_off
from gptkernels.core.tuned import Table


def followed(impl: str, device: torch.device) -> str:
    """The digest of the table that a run with `impl` follows; "" where it asks none."""
    if impl != "auto":
        return ""
    if switched_off():  # the kill switch stands above all tables
        return Table().digest()
    return plans.table(device.type).digest()


def warn_of_another(path: Path, before: str, now: str) -> None:
    """Warn where the checkpoint at `path` was written under another table than is followed now."""
    # Where either names an impl, whoever changed it knows that.
    if not before or not now or before == now:
        return
    none = Table().digest()
    then = "without a table" if before == none else f"under the table {before}"
    same = "GPTKERNELS_TUNE=off" if before == none else "that table"
    follows = "none" if now == none else f"the table {now}"
    warnings.warn(
        f"{path} was written {then} of measurements, and impl='auto' now follows {follows}: "
        "the rest of the run may differ in its last bits from one that was not interrupted; "
        f"resumed with {same} it has the same",
        stacklevel=5,  # whoever called resume
    )
