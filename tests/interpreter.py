"""Triton's interpreter, made to round as a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np


def round_multiply_add_once() -> None:
    """Makes the interpreter round `tl.fma` once, as a GPU does. Its own multiplies, rounds, adds
    and rounds again. Does nothing without Triton."""
    try:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # The product of two fp32 numbers is exact in fp64.
        wide = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma
