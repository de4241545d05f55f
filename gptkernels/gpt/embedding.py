"""The embedding of tokens: nn.Embedding, with the gradients of 16-bit weights added up in fp32.

PyTorch adds them up in 16 bits on a CPU. A common token's gradient then stops to grow: ones in
bfloat16 at 256.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device


class _Embed(torch.autograd.Function):
    """F.embedding of 16-bit weights (V, C)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        found = torch.ops.aten.embedding_dense_backward(dy.float(), tokens, ctx.rows, -1, False)
        return None, found.to(dy.dtype)


class Embedding(nn.Embedding):
    """nn.Embedding(V, C): tokens (...) int64 -> (..., C). Its other options, set later, lead to
    PyTorch's own operator."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the rows of weight that `input` names."""
        narrow = self.weight.dtype in (torch.bfloat16, torch.float16)
        plain = self.padding_idx is None and self.max_norm is None
        plain = plain and not (self.scale_grad_by_freq or self.sparse)
        if narrow and plain and self.weight.device.type == "cpu":
            return _Embed.apply(input, self.weight)
        return super().forward(input)
