"""Attention by other packages: FlashAttention-2, -3 and -4, with their own autograd.

They align queries and keys at their ends, as ours does, give 0 where a query sees no key, and
count a window's bounds in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gptkernels.core import externals
from gptkernels.ops.attention.options import bounds, slopes

# The widest heads of each, and whether it takes ALiBi slopes.
_WIDEST = {"flash_attn2": 256, "flash_attn3": 256, "flash_attn4": 128}
_WITH_ALIBI = ("flash_attn2",)
# What none of them has, or what has another meaning there: their dropout draws another mask.
_LACKING = (
    "converted", "lengths", "dropout", "lse", "deterministic", "Dv", "sinks", "learned slopes",
)  # fmt: skip


def takes(facts: Mapping[str, Any]) -> list[str]:
    """The names of the installed ones that have all that a class of calls of `attention` asks
    for."""
    lacking = any(facts.get(name) for name in _LACKING) or facts["mask"] != "none"
    # Some pad heads of odd widths, and others refuse them.
    half = facts["dtype"] in ("bfloat16", "float16") and facts["D"] % 8 == 0
    if facts["device"] != "cuda" or not half or lacking:
        return []
    return [
        name
        for name, widest in _WIDEST.items()
        if facts["D"] <= widest
        and (name in _WITH_ALIBI or not facts["alibi"])
        and externals.is_installed(name)
    ]


def run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | Sequence[float] | None,
) -> Tensor:
    """out (B, Tq, H, D) of q (B, Tq, H, D), k and v (B, Tk, Hk, D), by a package's function.
    Raises whatever that does, such as TypeError where an older release lacks an option."""
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal}
    if window is not None:
        endless = None if name == "flash_attn4" else -1
        options["window_size"] = tuple(endless if n < 0 else n for n in bounds(causal, window))
    if softcap > 0:
        options["softcap"] = softcap
    if alibi_slopes is not None:
        options["alibi_slopes"] = slopes(alibi_slopes, q, q.shape[0])
    out = externals.load(name).flash_attn_func(q, k, v, **options)
    found: Tensor = out[0] if isinstance(out, tuple) else out  # some return lse too
    return found
