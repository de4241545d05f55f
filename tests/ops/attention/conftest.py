"""Attention in Triton's interpreter: fp32 gets large tiles, since a large one takes little longer
than a small one."""

from __future__ import annotations

import importlib

import pytest
from harness import DEVICE

_LARGE = (64, 64, 8, 2)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the registers of fp32 allow no such tiles."""
    if DEVICE == "cuda":
        return
    try:  # also before the first test: later ones compare with its results
        kernels = importlib.import_module("gptkernels.ops.attention.triton.dense")
    except ImportError:  # without Triton
        return
    for name in ("_FORWARD", "_QUERIES", "_KEYS"):
        tiles = getattr(kernels, name)
        monkeypatch.setitem(tiles, "fp32", dict.fromkeys(tiles["fp32"], _LARGE))
