"""Triton's interpreter, made to round as a GPU does, and faster."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np


def improve() -> None:
    """Changes the interpreter for this process. Does nothing without Triton."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _round_multiply_add_once(interpreter)
    _patch_once(interpreter)
    _look_for_no_overflow(interpreter)
    _describe_types_once(interpreter)


def _round_multiply_add_once(interpreter: Any) -> None:
    """The interpreter's own `tl.fma` multiplies, rounds, adds and rounds again."""

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # The product of two fp32 numbers is exact in fp64.
        wide = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def _patch_once(interpreter: Any) -> None:
    """While a kernel runs, the functions of triton.language are replaced. The interpreter searches
    them anew at every call of a device function, a fifth of its time."""
    patch, tl = interpreter._patch_lang, interpreter.tl

    def patch_unless_patched(function: Any) -> Any:
        modules = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        if any(tl.core.is_builtin(module.arange) for module in modules):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_unless_patched


def _look_for_no_overflow(interpreter: Any) -> None:
    """The interpreter computes each sum and product of integers again in 64 bits, a fifth of its
    time, and tells nobody what it finds, since tl.device_assert does nothing unless debugged."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _describe_types_once(interpreter: Any) -> None:
    """Every value describes its shape and its dtype anew, another fifth. The descriptions are never
    changed, so values of the same shape share one."""
    core, look_up = interpreter.tl.core, interpreter._get_np_dtype
    known: dict[str, np.dtype[Any]] = {}

    def np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = np_dtype

    describe_block, describe_value = core.block_type.__init__, core.tensor.__init__

    @functools.cache
    def block(*shape: int) -> tuple[Any, Any, str]:
        one = core.block_type.__new__(core.block_type)
        describe_block(one, core.int8, list(shape))
        return one.shape, one.numel, str(one.shape)

    @functools.cache
    def value(*shape: int) -> tuple[Any, Any]:
        one = core.tensor.__new__(core.tensor)
        describe_value(one, None, core.block_type(core.int8, list(shape)) if shape else core.int8)
        return one.shape, one.numel

    def of_block(self: Any, element_ty: Any, shape: Any) -> None:
        self.shape, self.numel, text = block(*map(core._unwrap_if_constexpr, shape))
        self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"

    def of_value(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = value(*type.shape) if type.is_block() else value()

    core.block_type.__init__, core.tensor.__init__ = of_block, of_value
