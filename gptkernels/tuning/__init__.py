"""Measures which implementation is the fastest on this machine, and keeps the answer for
impl="auto" (core/tuned.py, core/plans.py)."""

from __future__ import annotations
