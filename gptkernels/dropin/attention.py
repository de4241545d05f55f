"""Causal self-attention as nanoGPT and minGPT write it: c_attn makes queries, keys and values, then
c_proj; attn_dropout is on the weights, resid_dropout on the result."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from gptkernels.dropin.linear import is_transposed
from gptkernels.dropin.probe import Probe
from gptkernels.dropin.swap import Match, OneInput, dropout_p
from gptkernels.ops.attention import dense
from gptkernels.ops.attention.limits import KERNEL_HEAD_DIM

_CHILDREN = {"c_attn", "c_proj", "attn_dropout", "resid_dropout"}


class CausalSelfAttention(OneInput):
    """The same modules around attention as one op."""

    what = "attention as one op"

    def fused(self, x: Tensor) -> Tensor | None:
        """x (B, T, C) -> (B, T, C)."""
        if self._gptkernels.flash:  # PyTorch's fused attention gets the number
            p: float | None = self.dropout if self.training else 0.0
        else:
            p = dropout_p(self.attn_dropout)
        if p is None:
            return None
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).unbind(-3)
        out = dense.attention(q, k, v, dropout_p=p, impl=self._gptkernels.impl)
        y: Tensor = self.resid_dropout(self.c_proj(cast("Tensor", out).flatten(-2)))
        return y


def match(module: Any, probe: Probe) -> Match:
    """The kind and its facts; or why the module is left alone; None where it is no such module."""
    children = dict(module.named_children())
    if set(children) != _CHILDREN or type(getattr(module, "n_head", None)) is not int:
        return None
    if any(is_transposed(children[name]) is not False for name in ("c_attn", "c_proj")):
        return "c_attn or c_proj is no nn.Linear"
    C = children["c_attn"].in_features
    if C % module.n_head or C // module.n_head > KERNEL_HEAD_DIM:
        return f"heads are wider than {KERNEL_HEAD_DIM}"
    if not all(_hides_the_future(buffer) for buffer in module.buffers()):
        return "it has a buffer that is no causal mask"
    shape = (2, 5, C)
    if isinstance(getattr(module, "dropout", None), float):
        none, all_of = {"dropout": 0.0}, {"dropout": 1.0}
        if probe.agrees(module, _formula, shape, none, flash=True) and probe.agrees(
            module, _all_dropped, shape, all_of
        ):
            return CausalSelfAttention, {"flash": True}
    if probe.agrees(module, _formula, shape, flash=False):
        return CausalSelfAttention, {"flash": False}
    return "its forward is not causal self-attention between c_attn and c_proj"


def _hides_the_future(buffer: Tensor) -> bool:
    """Whether a buffer is a lower triangle of ones, of any length: a few tokens would not show a
    band."""
    rows = buffer.shape[-1] if buffer.dim() else 0
    if buffer.is_meta or buffer.numel() != rows * rows:
        return False
    triangle = torch.ones(rows, rows, dtype=torch.bool, device=buffer.device).tril()
    return torch.equal(buffer.reshape(rows, rows), triangle.to(buffer.dtype))


def _formula(module: Any, x: Tensor, flash: bool) -> Tensor:
    q, k, v = module.c_attn(x).unflatten(-1, (3, module.n_head, -1)).movedim(-2, -4).unbind(-2)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    if not flash:
        weights = module.attn_dropout(weights)
    out = (weights @ v).transpose(1, 2).flatten(-2)
    return module.resid_dropout(module.c_proj(out))


def _all_dropped(module: Any, x: Tensor) -> Tensor:
    """Attention where every weight is dropped, in training mode."""
    if not module.training:
        return _formula(module, x, flash=True)
    return module.resid_dropout(module.c_proj(torch.zeros_like(x)))
