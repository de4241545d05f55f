"""PyTorch's own transformer modules: nn.MultiheadAttention, nn.TransformerEncoderLayer and
nn.TransformerDecoderLayer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.dropin.mlp import approximate_of
from gptkernels.dropin.probe import Probe
from gptkernels.dropin.swap import Fused, Match, dropout_p, with_mask
from gptkernels.nn.multihead import attend
from gptkernels.nn.plain import not_plain
from gptkernels.ops.attention.limits import KERNEL_HEAD_DIM
from gptkernels.ops.gelu_mlp.op import gelu_mlp
from gptkernels.ops.layer_norm.op import layer_norm

# With fewer numbers in x, PyTorch's add and LayerNorm take less time than the op (docs/dropin.md).
_LEAST_NUMBERS = 1 << 17


class MultiheadAttention(Fused):
    """Attention as one op where no weights are asked for; a query that may see no key gives zeros,
    where PyTorch gives NaN."""

    what = "attention as one op, where need_weights=False"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's."""
        if (
            need_weights
            or not all(self.fuses(x) and x.dim() == 3 for x in (query, key, value))
            or key.shape[:2] != value.shape[:2]
            or (is_causal and attn_mask is None)
        ):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        # As in PyTorch: the hint replaces the mask where that is all there is.
        tokens = 1 if self.batch_first else 0
        causal = is_causal and key_padding_mask is None and query.shape[tokens] == key.shape[tokens]
        mask = None if causal else attn_mask
        merged = attend(
            self, (query, key, value), (mask, key_padding_mask), causal,
            with_mask(self._gptkernels.impl, key_padding_mask if mask is None else mask),
            ("attn_mask", "key_padding_mask"),
        )  # fmt: skip
        return F.linear(merged, self.out_proj.weight, self.out_proj.bias), None


class FeedForward(Fused):
    """A layer whose _ff_block is linear1, GELU, linear2, with dropouts: as one op where the one
    inside drops nothing."""

    what = "linear, GELU, linear as one op"

    def _ff_block(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(self._gptkernels.last_dropout)(self._mlp(x))
        return y

    def _mlp(self, x: Tensor) -> Tensor:
        first, second = self.linear1, self.linear2
        approximate = approximate_of(self.activation) if self._gptkernels.mlps else None
        if (
            approximate is None
            or dropout_p(self.dropout) != 0
            or not self.fuses(x)
            or not_plain(first, nn.Linear)
            or not_plain(second, nn.Linear)
        ):
            y: Tensor = second(self.dropout(self.activation(first(x))))
            return y
        return gelu_mlp(
            x if x.stride(-1) == 1 else x.contiguous(), first.weight, first.bias, second.weight,
            second.bias, approximate=approximate, impl=self._gptkernels.impl,
        )  # fmt: skip


class EncoderLayer(FeedForward):
    """nn.TransformerEncoderLayer: each residual add, its dropout and the norm behind it as one
    op."""

    what = "residual adds with LayerNorm as one op each"

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerEncoderLayer's."""
        p1, p2 = dropout_p(self.dropout1), dropout_p(self.dropout2)
        if not self.fuses(src) or p1 is None or p2 is None or not self._adds(src):
            found: Tensor = super().forward(src, src_mask, src_key_padding_mask, is_causal)
            return found

        def attended(x: Tensor) -> Tensor:
            y: Tensor = self.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask,
                need_weights=False, is_causal=is_causal,
            )[0]  # fmt: skip
            return y

        if self.norm_first:
            y, x = self._add_norm(self.norm2, attended(self.norm1(src)), src, p1)
            return x + self._ff_block(y)
        x, _ = self._add_norm(self.norm1, attended(src), src, p1)
        return self._add_norm(self.norm2, self._mlp(x), x, p2)[0]

    def _adds(self, x: Tensor) -> bool:
        """Whether the op adds to x and norms."""
        if self._gptkernels.impl == "auto" and x.numel() < _LEAST_NUMBERS:
            return False
        return not any(
            not_plain(norm, nn.LayerNorm) or norm.weight is None or norm.weight.dtype != x.dtype
            for norm in (self.norm1, self.norm2)
        )

    def _add_norm(
        self, norm: Any, branch: Tensor, stream: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """norm(s) and s = stream + dropout(branch)."""
        y, s = layer_norm(
            branch.to(stream.dtype), norm.weight, norm.bias, residual=stream, dropout_p=dropout,
            eps=norm.eps, prenorm=True, impl=self._gptkernels.impl,
        )  # fmt: skip
        return y, s


def match_attention(module: nn.Module, probe: Probe) -> Match:
    """The kind and its facts; or why the module is left alone; None where it is of another
    class."""
    if type(module) is not nn.MultiheadAttention:
        return None
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn are not fused"
    if module.head_dim > KERNEL_HEAD_DIM:
        return f"heads are wider than {KERNEL_HEAD_DIM}"
    return MultiheadAttention, {}


def match_layer(module: nn.Module, norms: bool, mlps: bool) -> Match:
    """The kind and its facts; None where it is of another class, or has nothing of what is
    wanted."""
    encoder = type(module) is nn.TransformerEncoderLayer
    if not encoder and type(module) is not nn.TransformerDecoderLayer:
        return None
    mlps = mlps and approximate_of(module.activation) is not None
    facts = {"mlps": mlps, "last_dropout": "dropout2" if encoder else "dropout3"}
    if encoder and norms:
        return EncoderLayer, facts
    return (FeedForward, facts) if mlps else None
