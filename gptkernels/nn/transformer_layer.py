"""TransformerLayer: nn.TransformerEncoderLayer on the fused ops.

    norm_first=False    x = LN(x + dropout(attention(x)));   x = LN(x + dropout(mlp(x)))
    norm_first=True     x = x + dropout(attention(LN(x)));   x = x + dropout(mlp(LN(x)))

Fused are attention, unless it reads a mask tensor; every residual add with its dropout and the
LayerNorm that follows it; and the MLP, if its activation is GELU and it has no dropout inside.
`TransformerLayer.not_fused` names the parts that are not, and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.core.checks import check_count, check_flag, check_probability, check_tensor
from gptkernels.nn.layers import FusedModule, LayerNorm, head_width
from gptkernels.ops.attention.dense import attention
from gptkernels.ops.gelu_mlp.op import gelu_mlp

Activation = Callable[[Tensor], Tensor]


class _SelfAttention(nn.Module):
    """The parameters of nn.MultiheadAttention, under its names."""

    def __init__(self, d_model: int, bias: bool, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first  # nn.TransformerEncoder reads it
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model)) if bias else None
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        # The initial values are those of nn.MultiheadAttention.
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)


class TransformerLayer(FusedModule):
    """A drop-in nn.TransformerEncoderLayer: the same constructor, state_dict and results.

    Vaswani et al., "Attention Is All You Need", 2017.

    Arguments and parameters are those of nn.TransformerEncoderLayer, batch_first=False included,
    and `activation` may be any function as there. Results agree up to rounding in evaluation, and
    in training with dropout=0. With dropout the masks differ: they are those of
    `gptkernels.attention` and `gptkernels.layer_norm`, and PyTorch's own inside the MLP. A query
    that may see no key gives zeros, where PyTorch gives NaN. Under autocast the result has src's
    dtype, as there.

    Raises TypeError and ValueError for arguments out of range, and for a head wider than 256.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_width("d_model", d_model, nhead, "nhead")
        check_count("dim_feedforward", dim_feedforward)
        check_probability("dropout", dropout)
        check_flag("batch_first", batch_first)
        check_flag("norm_first", norm_first)
        check_flag("bias", bias)
        self.nhead, self.dropout = nhead, dropout
        self.batch_first, self.norm_first = batch_first, norm_first
        self.activation, self._gelu = _activation(activation)
        self.self_attn = _SelfAttention(d_model, bias, batch_first)
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias)
        self.norm1 = LayerNorm(d_model, layer_norm_eps, bias)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, bias)
        self.to(device=device, dtype=dtype)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src (T, B, d_model), or (B, T, d_model) with batch_first, or (T, d_model), to the same.

        src_mask: (T, T) or (B * nhead, T, T); src_key_padding_mask: (B, T), or (T,) for a src
        without a batch. A boolean mask is True where a key must not be seen; a floating one is
        added to the scores. is_causal: each token sees itself and those before it. A src_mask given
        with it must be the causal one, and is not read.

        Raises TypeError and ValueError for a src or mask of another shape or dtype, and
        NotImplementedError for a mask with an `impl` that takes none.
        """
        x = self._batched(src)
        mask = _merge(src_mask if not is_causal else None, src_key_padding_mask, x, self.nhead)
        dropout = self.dropout if self.training else 0.0
        if self.norm_first:
            attended = self._attend(self.norm1(x), mask, is_causal, dropout)
            y, x = self.norm2(attended, x, dropout_p=dropout, prenorm=True)
            x = x + F.dropout(self._mlp(y, dropout), dropout)
        else:
            attended = self._attend(x, mask, is_causal, dropout)
            # Under autocast x keeps its dtype, as in PyTorch's own layer.
            x = self.norm1(attended.to(x.dtype), x, dropout_p=dropout)
            x = self.norm2(self._mlp(x, dropout).to(x.dtype), x, dropout_p=dropout)
        if src.dim() == 2:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def not_fused(self, *, masked: bool = False, training: bool | None = None) -> dict[str, str]:
        """What runs as PyTorch's own operators with these options, and why: part -> reason.

        masked: whether forward reads a mask: src_key_padding_mask, or src_mask without is_causal.
        training: whether it is in training mode; None means the mode that the layer is in.
        """
        reasons = {}
        if masked:
            reasons["attention"] = "a mask tensor runs with impl='torch' only"
        dropping = self.dropout > 0 and (self.training if training is None else training)
        if self._gelu is None:
            reasons["mlp"] = "only GELU is fused, tanh or exact"
        elif dropping:
            reasons["mlp"] = "dropout between its two products is PyTorch's"
        if self.norm_first:
            reasons["last residual add"] = "with norm_first no LayerNorm of this layer follows it"
        return reasons

    def _batched(self, src: Tensor) -> Tensor:
        """src as (B, T, d_model)."""
        check_tensor("src", src)
        d_model = self.linear1.in_features
        if src.dim() not in (2, 3) or src.shape[-1] != d_model:
            raise ValueError(
                f"src must have shape (T, {d_model}) or three dimensions that end in {d_model}, "
                f"got {tuple(src.shape)}"
            )
        if src.dim() == 2:
            return src.unsqueeze(0)
        return src if self.batch_first else src.transpose(0, 1)

    def _attend(self, x: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
        projected = F.linear(x, self.self_attn.in_proj_weight, self.self_attn.in_proj_bias)
        q, k, v = projected.unflatten(-1, (3 * self.nhead, -1)).chunk(3, dim=-2)
        out = attention(
            q, k, v, causal=causal, attn_mask=mask, dropout_p=dropout, impl=self.impl
        )  # fmt: skip
        return self.self_attn.out_proj(cast("Tensor", out).flatten(-2))

    def _mlp(self, x: Tensor, dropout: float) -> Tensor:
        first, second = self.linear1, self.linear2
        if self._gelu is not None and dropout == 0:
            return gelu_mlp(
                x,
                first.weight,
                first.bias,
                second.weight,
                second.bias,
                approximate=self._gelu,
                impl=self.impl,
            )
        return second(F.dropout(self.activation(first(x)), dropout))

    def extra_repr(self) -> str:
        """What repr shows."""
        return (
            f"nhead={self.nhead}, dropout={self.dropout}, batch_first={self.batch_first}, "
            f"norm_first={self.norm_first}, impl={self.impl!r}"
        )


def _activation(given: Any) -> tuple[Activation, str | None]:
    """The function and, if it is a GELU, its `approximate`."""
    if isinstance(given, str):
        if given not in ("relu", "gelu"):
            raise ValueError(f"activation must be 'relu', 'gelu' or a function, got {given!r}")
        given = F.relu if given == "relu" else F.gelu
    if not callable(given):
        raise TypeError(f"activation must be 'relu', 'gelu' or a function, got {given!r}")
    if given is F.gelu:
        return given, "none"
    return given, given.approximate if isinstance(given, nn.GELU) else None


def _merge(mask: Tensor | None, padding: Tensor | None, x: Tensor, nhead: int) -> Tensor | None:
    """Both masks as one that `gptkernels.attention` takes, which broadcasts to (B, nhead, T, T)."""
    B, T, _ = x.shape
    for name, given in (("src_mask", mask), ("src_key_padding_mask", padding)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
    if mask is not None:
        shape = tuple(mask.shape)
        if shape not in ((T, T), (B * nhead, T, T)):
            raise ValueError(
                f"src_mask must have shape {(T, T)} or {(B * nhead, T, T)}, got {shape}"
            )
        mask = _attention_mask("src_mask", mask, x)
        mask = mask.view(B, nhead, T, T) if mask.dim() == 3 else mask
    if padding is not None:
        shape = tuple(padding.shape)
        if shape != (B, T) and not (B == 1 and shape == (T,)):
            raise ValueError(f"src_key_padding_mask must have shape {(B, T)}, got {shape}")
        padding = _attention_mask("src_key_padding_mask", padding, x).view(B, 1, 1, T)
    if mask is None or padding is None:
        return padding if mask is None else mask
    if mask.dtype == padding.dtype == torch.bool:
        return mask & padding
    return _additive(mask, x.dtype) + _additive(padding, x.dtype)


def _attention_mask(name: str, mask: Tensor, x: Tensor) -> Tensor:
    """`mask` as `gptkernels.attention` takes it: True where a key is seen, or added to scores."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean or floating, got {mask.dtype}")
    return mask.to(x.dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, -torch.inf)
