"""TransformerLayer: nn.TransformerEncoderLayer on the fused ops.

    norm_first=False    x = LN(x + dropout(attention(x)));   x = LN(x + dropout(mlp(x)))
    norm_first=True     x = x + dropout(attention(LN(x)));   x = x + dropout(mlp(LN(x)))

Fused are attention, which reads a mask tensor by the CPU kernels alone; every residual add with its
dropout and the LayerNorm that follows it; and the MLP, if its activation is GELU and it has no
dropout inside. Where a module inside is hooked, replaced or parametrised, it is called, with what
nn.TransformerEncoderLayer would pass. `TransformerLayer.not_fused` names the parts that are not
fused, and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from gptkernels.core.checks import check_count, check_flag, check_probability, check_tensor
from gptkernels.core.choice import automatic
from gptkernels.nn import elsewhere
from gptkernels.nn.layers import FusedModule, LayerNorm, add_norm, head_width
from gptkernels.nn.multihead import MultiheadAttention
from gptkernels.nn.plain import class_name, not_plain_in
from gptkernels.ops.gelu_mlp.op import gelu_mlp

Activation = Callable[[Tensor], Tensor]


class _SelfAttention(MultiheadAttention):
    """That of a TransformerLayer, whose masks have other names. Pickles hold the name of this
    class."""

    _masks = ("src_mask", "src_key_padding_mask")


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

    _elsewhere = elsewhere.TRANSFORMER_LAYER

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
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_width("d_model", d_model, nhead, "nhead")
        check_count("dim_feedforward", dim_feedforward)
        check_probability("dropout", dropout)
        check_flag("batch_first", batch_first)
        check_flag("norm_first", norm_first)
        check_flag("bias", bias)
        self.d_model, self.nhead, self.dropout = d_model, nhead, dropout
        self.batch_first, self.norm_first = batch_first, norm_first
        self.activation = _activation(activation)
        made: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = _SelfAttention(d_model, nhead, dropout, batch_first=batch_first, **made)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **made)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **made)
        self.norm1 = LayerNorm(d_model, layer_norm_eps, **made)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, **made)

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
        self._check(src)
        dropout = self.dropout if self.training else 0.0
        masks = {
            "attn_mask": src_mask,
            "key_padding_mask": src_key_padding_mask,
            "is_causal": is_causal,
        }
        x = src
        if self.norm_first:
            attended = self._attend(self.norm1(x), masks)
            normed = add_norm(self.norm2, attended, x, dropout)
            return normed.s + F.dropout(self._mlp(normed.y, dropout), dropout)
        # Under autocast x keeps its dtype, as in PyTorch's own layer.
        x = add_norm(self.norm1, self._attend(x, masks).to(x.dtype), x, dropout).y
        return add_norm(self.norm2, self._mlp(x, dropout).to(x.dtype), x, dropout).y

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete a layer that was pickled when self_attn held parameters alone, or was no
        nn.MultiheadAttention."""
        super().__setstate__(state)
        if "d_model" not in state:
            self.d_model = self.linear1.in_features
            self.self_attn.impl = self.impl
        if type(self.self_attn) is _SelfAttention and "embed_dim" not in vars(self.self_attn):
            bias, first = self.self_attn.in_proj_bias is not None, self.batch_first
            sizes = self.d_model, self.nhead, self.dropout
            made = _SelfAttention(*sizes, bias, batch_first=first, device="meta")
            for name, value in vars(made).items():
                vars(self.self_attn).setdefault(name, value)
            for name, parameter in made._parameters.items():
                self.self_attn._parameters.setdefault(name, parameter)

    def not_fused(self, *, masked: bool = False, training: bool | None = None) -> dict[str, str]:
        """What runs as PyTorch's own operators with these options, and why: part -> reason.

        masked: whether forward reads a mask: src_key_padding_mask, or src_mask without is_causal.
        training: whether it is in training mode; None means the mode that the layer is in.
        """
        reasons = {}
        if not isinstance(self.self_attn, MultiheadAttention):
            reasons["attention"] = f"self_attn is a {class_name(self.self_attn)}"
        elif masked and self._attention_impl() != "cpu":
            reasons["attention"] = "a mask tensor runs with impl='torch' or 'cpu' only"
        training = self.training if training is None else training
        mlp = self._mlp_not_fused(self.dropout if training else 0.0)
        if mlp is not None:
            reasons["mlp"] = mlp
        for name in ("norm2",) if self.norm_first else ("norm1", "norm2"):
            reason = not_plain_in(self, LayerNorm, name)
            if reason is not None:
                reasons[f"residual add before {name}"] = reason
        if self.norm_first:
            reasons["last residual add"] = "with norm_first no LayerNorm of this layer follows it"
        return reasons

    def _attention_impl(self) -> str:
        """The implementation that attention runs by, where the parameters are."""
        impl = self.self_attn.impl
        return automatic(self.self_attn.in_proj_weight.device.type) if impl == "auto" else impl

    def _check(self, src: Tensor) -> None:
        check_tensor("src", src)
        if src.dim() not in (2, 3) or src.shape[-1] != self.d_model:
            raise ValueError(
                f"src must have shape (T, {self.d_model}) or three dimensions that end in "
                f"{self.d_model}, got {tuple(src.shape)}"
            )

    def _attend(self, x: Tensor, masks: dict[str, Any]) -> Tensor:
        # As nn.TransformerEncoderLayer calls it, so its hooks see the same.
        return self.self_attn(x, x, x, need_weights=False, **masks)[0]

    def _mlp(self, x: Tensor, dropout: float) -> Tensor:
        first, second = self.linear1, self.linear2
        if self._mlp_not_fused(dropout) is not None:
            return second(F.dropout(self.activation(first(x)), dropout))
        exact = self.activation is F.gelu
        return gelu_mlp(
            x,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            approximate="none" if exact else cast("nn.GELU", self.activation).approximate,
            impl=self.impl,
        )

    def _mlp_not_fused(self, dropout: float) -> str | None:
        """Why the MLP runs module by module; None where it is one op."""
        if isinstance(self.activation, nn.GELU):
            changed = not_plain_in(self, nn.GELU, "activation")
        else:
            changed = None if self.activation is F.gelu else "only GELU is fused, tanh or exact"
        changed = changed or not_plain_in(self, nn.Linear, "linear1", "linear2")
        if changed is None and dropout > 0:
            return "dropout between its two products is PyTorch's"
        return changed

    def extra_repr(self) -> str:
        """What repr shows."""
        return (
            f"nhead={self.nhead}, dropout={self.dropout}, batch_first={self.batch_first}, "
            f"norm_first={self.norm_first}, impl={self.impl!r}"
        )


def _activation(given: Any) -> Activation:
    """The function that `given` names or is."""
    if isinstance(given, str):
        if given not in ("relu", "gelu"):
            raise ValueError(f"activation must be 'relu', 'gelu' or a function, got {given!r}")
        return F.relu if given == "relu" else F.gelu
    if not callable(given):
        raise TypeError(f"activation must be 'relu', 'gelu' or a function, got {given!r}")
    return given
