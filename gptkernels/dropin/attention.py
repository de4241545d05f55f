"""Causal self-attention as nanoGPT and minGPT write it: c_attn makes queries, keys and values, then
c_proj; attn_dropout is on the weights, resid_dropout on the result."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from gptkernels.dropin.linear import transposed
from gptkernels.dropin.probe import agrees
from gptkernels.dropin.swap import Fused, Match
from gptkernels.nn.plain import not_plain
from gptkernels.ops.attention import dense
from gptkernels.ops.attention.options import MAX_HEAD_DIM

_CHILDREN = {"c_attn", "c_proj", "attn_dropout", "resid_dropout"}


class CausalSelfAttention(Fused):
    """The same modules around attention as one op."""

    what = "attention as one op"
    flash: bool  # it calls PyTorch's fused attention, with a dropout of self.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        if not self.fuses(x) or not_plain(self.attn_dropout, nn.Dropout):
            return super().forward(x)
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).unbind(-3)
        p = self.dropout if self.flash else self.attn_dropout.p
        out = dense.attention(q, k, v, dropout_p=p if self.training else 0.0, impl=self.impl)
        return self.resid_dropout(self.c_proj(cast("Tensor", out).flatten(-2)))


def match(module: Any) -> Match:
    """The kind and its facts; or why the module is left alone; None where it is no such module."""
    children = dict(module.named_children())
    if set(children) != _CHILDREN or type(getattr(module, "n_head", None)) is not int:
        return None
    if any(transposed(children[name]) is not False for name in ("c_attn", "c_proj")):
        return "c_attn or c_proj is no nn.Linear"
    C = children["c_attn"].in_features
    if C % module.n_head or C // module.n_head > MAX_HEAD_DIM:
        return f"heads are wider than {MAX_HEAD_DIM}"
    for flash in (True, False):
        if flash and not isinstance(getattr(module, "dropout", None), float):
            continue
        if agrees(module, _formula, (2, 3, C), flash=flash):
            return CausalSelfAttention, {"flash": flash}
    return "its forward is not causal self-attention between c_attn and c_proj"


def _formula(module: Any, x: Tensor, flash: bool) -> Tensor:
    q, k, v = module.c_attn(x).unflatten(-1, (3, module.n_head, -1)).movedim(-2, -4).unbind(-2)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    if not flash:
        weights = module.attn_dropout(weights)
    out = (weights @ v).transpose(1, 2).flatten(-2)
    return module.resid_dropout(module.c_proj(out))
