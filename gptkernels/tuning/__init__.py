"""Measures which implementation is the fastest on this machine, and keeps the answer for
impl="auto" (core/tuned.py, core/plans.py).

    gptkernels.tune(model, tokens)           measure what a model calls
    with gptkernels.tuning.record() as c:    or collect what anything calls, and tune(c)
    gptkernels.tuning.explain()              what was chosen, and why
    gptkernels.tuning.sync()                 one table on all ranks of torch.distributed
"""

from __future__ import annotations

from gptkernels.tuning.explanation import Explanation, explain
from gptkernels.tuning.ranks import sync
from gptkernels.tuning.recording import Classes, record
from gptkernels.tuning.tuner import Report, tune

__all__ = ["Classes", "Explanation", "Report", "explain", "record", "sync", "tune"]
