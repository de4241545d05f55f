"""Attention by functions that are no implementation of ours: they bring their own autograd, and
compute a call with and without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gptkernels.core.tuned import EXTERNAL, PYTORCH
from gptkernels.ops.attention import external
from gptkernels.ops.attention.options import bounds


def pytorch(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float | None) -> Tensor:
    """out (B, Tq, H, D) of q (B, Tq, H, D), k and v (B, Tk, Hk, D), by PyTorch's own function."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal,
        scale=softmax_scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


# What PyTorch's function has no argument for, or another meaning.
_LACKING = (
    "converted", "softcap", "alibi", "lengths", "dropout", "lse", "deterministic", "Dv", "sinks",
)  # fmt: skip


def takes(facts: Mapping[str, Any]) -> list[str]:
    """Those that have all that a class of calls of `attention` asks for."""
    bounded = facts["left"] >= 0 or facts["right"] > 0
    lacking = any(facts.get(name) for name in _LACKING) or facts["mask"] != "none" or bounded
    # SDPA counts a causal mask's positions from the first query, ours from the last.
    own = not lacking and (facts["square"] or not facts["causal"])
    return [*([PYTORCH] if own else []), *(EXTERNAL + name for name in external.takes(facts))]


def run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """out of the call by the function of this name, which takes it."""
    if name == PYTORCH:
        # Of windows it takes the one that says no more than `causal`.
        last = causal or (window is not None and bounds(causal, window)[1] == 0)
        return pytorch(q, k, v, last, softmax_scale)
    name = name.removeprefix(EXTERNAL)
    options = (causal, softmax_scale, window, softcap, alibi_slopes)
    return external.run(name, q, k, v, *options)
