"""What the GPU kernels of attention lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gptkernels.core.choice import IMPLEMENTATIONS
from gptkernels.ops.attention.options import AttentionOptions

KERNEL_HEAD_DIM = 256  # the widest heads of the GPU kernels
_WITHOUT_LIMITS = ("torch", "cpu")


def lacking(op: str, D: int, Dv: int, masked: bool) -> dict[str, str]:
    """The implementations that cannot run a call, and for each what of the call it lacks. D and Dv:
    the widths of q and v; masked: whether there is an attn_mask."""
    asked_for = (
        ("attn_mask", masked),
        (f"a head width of more than {KERNEL_HEAD_DIM}", max(D, Dv) > KERNEL_HEAD_DIM),
        # The other launchers pad v, and this one will not copy a cache.
        ("v of another width than q", op == "attention_decode" and Dv != D),
    )
    for what, needed in asked_for:
        if needed:
            return {impl: what for impl in IMPLEMENTATIONS if impl not in _WITHOUT_LIMITS}
    return {}


def of_class(facts: Mapping[str, Any], op: str) -> dict[str, str]:
    """The same of a class of calls, whose facts are those of `plan.described`; nothing of other
    ops."""
    D = facts.get("D", 0)
    return lacking(op, D, facts.get("Dv", D), facts.get("mask", "none") != "none")


def refuse(impl: str, op: str, q: Tensor, v: Tensor, options: AttentionOptions) -> None:
    """Raises NotImplementedError where an implementation's launcher lacks what a call has."""
    check(impl, lacking(op, q.shape[-1], v.shape[-1], options.attn_mask is not None))


def check(impl: str, lacking: dict[str, str]) -> None:
    """Raises NotImplementedError where an explicit implementation lacks what a call has."""
    if impl in lacking:
        able = ", ".join(repr(name) for name in IMPLEMENTATIONS if name not in lacking)
        raise NotImplementedError(
            f"{lacking[impl]}: only impl={able} and 'auto' take it, got impl={impl!r}"
        )
