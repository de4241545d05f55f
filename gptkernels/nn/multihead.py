"""MultiheadAttention: nn.MultiheadAttention on the attention op. `attend` is the part of it that
`gptkernels.accelerate` uses too."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from gptkernels.core.checks import check_count, check_flag, check_probability, check_tensor
from gptkernels.nn import elsewhere
from gptkernels.nn.layers import FusedModule, head_width
from gptkernels.nn.masks import merge_masks
from gptkernels.ops.attention import dense


class MultiheadAttention(FusedModule, nn.MultiheadAttention):
    """A drop-in nn.MultiheadAttention, self- and cross-attention: the same constructor, state_dict,
    arguments and results, and an instance of it.

    Vaswani et al., "Attention Is All You Need", 2017.

    The op runs with need_weights=False, since it stores no weights. With need_weights=True, which
    is the default as in PyTorch, PyTorch's own forward computes them and the result, as slowly as
    there. Results agree up to rounding in evaluation, and in training with dropout=0; with dropout
    the op's masks are those of `gptkernels.attention`. A query that may see no key gives zeros by
    the op, NaN by PyTorch's forward.

    Raises TypeError and ValueError for arguments out of range, and for a head wider than 256;
    NotImplementedError for add_bias_kv and add_zero_attn.
    """

    _elsewhere = elsewhere.MULTIHEAD_ATTENTION
    # What errors call the masks.
    _masks: ClassVar[tuple[str, str]] = ("attn_mask", "key_padding_mask")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_width("embed_dim", embed_dim, num_heads, "num_heads")
        check_probability("dropout", dropout)
        check_flag("bias", bias)
        check_flag("batch_first", batch_first)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                check_count(name, width)
        for name, wanted in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if wanted:
                raise NotImplementedError(f"{name} must be False: attention adds no keys")
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )

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
        """query (Tq, B, embed_dim), key (Tk, B, kdim) and value (Tk, B, vdim), or the batch first
        with batch_first, or without a batch -> (out, weights).

        out has query's shape. weights, (B, Tq, Tk), or (B, num_heads, Tq, Tk) without
        average_attn_weights, are None with need_weights=False. attn_mask: (Tq, Tk) or
        (B * num_heads, Tq, Tk); key_padding_mask: (B, Tk), or (Tk,) without a batch. A boolean mask
        is True where a key must not be seen; a floating one is added to the scores. is_causal: each
        query sees its own key and those before it. An attn_mask given with it must be the causal
        one, and is read only for another number of keys than of queries.

        Raises TypeError and ValueError for inputs or masks of another shape or dtype, and
        NotImplementedError for a mask or need_weights=True with an `impl` that has none.
        """
        self._check(query, key, value)
        rows = -2 if self.batch_first or query.dim() == 2 else 0
        square = query.shape[rows] == key.shape[rows]
        if is_causal and attn_mask is None and not square:
            raise ValueError(
                "is_causal without attn_mask needs as many keys as queries, "
                f"got {key.shape[rows]} and {query.shape[rows]}"
            )
        if need_weights:
            if self.impl not in ("auto", "torch"):
                raise NotImplementedError(
                    "need_weights=True runs with impl='torch' or 'auto' only, got "
                    f"{self.impl!r}; pass need_weights=False"
                )
            if is_causal and attn_mask is None:
                size = query.shape[rows]
                attn_mask = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
            return super().forward(
                query, key, value, key_padding_mask, True, attn_mask, average_attn_weights
            )
        causal = is_causal and square
        masks = None if causal else attn_mask, key_padding_mask
        merged = attend(self, (query, key, value), masks, causal, self.impl, self._masks)
        return self.out_proj(merged), None

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = self.embed_dim, self.kdim, self.vdim
        named = zip(("query", "key", "value"), (query, key, value), widths, strict=True)
        for name, x, width in named:
            check_tensor(name, x)
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                raise ValueError(
                    f"{name} must have shape (T, {width}) or three dimensions that end in {width}, "
                    f"as many as query, got {tuple(x.shape)}"
                )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and key.shape[batch] != query.shape[batch]:
            raise ValueError(
                f"key must have the batch of query, {query.shape[batch]}, got {key.shape[batch]}"
            )
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"value must have the tokens and the batch of key, {tuple(key.shape[:-1])}, "
                f"got {tuple(value.shape[:-1])}"
            )

    def extra_repr(self) -> str:
        """What repr shows."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}, impl={self.impl!r}"
        )


def attend(
    module: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    causal: bool,
    impl: str,
    names: tuple[str, str],
) -> Tensor:
    """What an nn.MultiheadAttention hands to its out_proj, in the shape of the query. inputs:
    query, key and value; masks: attn_mask and key_padding_mask, which errors call by these
    names."""
    heads = _project(module, *inputs)
    batched = inputs[0].dim() == 3
    if not batched:
        heads = [x.unsqueeze(0) for x in heads]
    elif not module.batch_first:
        heads = [x.transpose(0, 1) for x in heads]
    q, k, v = heads
    out = dense.attention(
        q,
        k,
        v,
        causal=causal,
        attn_mask=merge_masks(*masks, q.shape, q.dtype, k.shape[1], names),
        dropout_p=module.dropout if module.training else 0.0,
        impl=impl,
    )
    merged = cast("Tensor", out).flatten(-2)
    if not batched:
        return merged.squeeze(0)
    return merged if module.batch_first else merged.transpose(0, 1)


def _project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """q, k and v, each (..., H, D). One product where the three inputs are one tensor."""
    weight, bias, heads = module.in_proj_weight, module.in_proj_bias, module.num_heads
    if query is key is value and weight is not None:
        return list(F.linear(query, weight, bias).unflatten(-1, (3, heads, -1)).unbind(-3))
    if weight is None:  # keys or values have another width
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    else:
        weights = weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    given = zip((query, key, value), weights, biases, strict=True)
    return [F.linear(*one).unflatten(-1, (heads, -1)) for one in given]
