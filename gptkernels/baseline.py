"""The ops as users compose them today in eager PyTorch, at the dtype of their tensors.

The yardstick for errors (`gptkernels.parity`) and for speed (`gptkernels.benchmarks`), written
apart from `aten` and `reference`. Signatures are those of `reference`. Dropout takes the
contract's mask, since PyTorch's own draws another one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels import philox


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    rng: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dropout, an addition and F.layer_norm. Shapes as in `reference.layer_norm`."""
    s = x
    if dropout_p > 0:
        s = s.masked_fill(~philox.elementwise_keep(rng, dropout_p, x.shape), 0) * philox.scale(
            dropout_p
        )
    if residual is not None:
        s = s + residual
    if residual_in_fp32 or (residual is not None and residual.dtype == torch.float32):
        s = s.float()
    else:
        s = s.to(x.dtype)
    weight = weight.to(s.dtype)
    bias = None if bias is None else bias.to(s.dtype)
    y = F.layer_norm(s, (x.shape[-1],), weight, bias, eps).to(x.dtype)
    return (y, s) if prenorm else y


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "tanh",
) -> Tensor:
    """F.linear, F.gelu, F.linear. Shapes as in `reference.gelu_mlp`."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)
