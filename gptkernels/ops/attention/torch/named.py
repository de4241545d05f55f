"""The fused op behind F.scaled_dot_product_attention (SDPA) that a variant of "torch" names."""

from __future__ import annotations

from torch import Tensor

from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import backend
from gptkernels.ops.attention.torch.dense import fused_backend
from gptkernels.ops.attention.torch.fused import heads_first
from gptkernels.ops.attention.widths import widened

BACKENDS = (backend.CUDNN, backend.FLASH, backend.EFFICIENT)


def chosen(name: int, own: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> int:
    """The backend that is named where it takes the call now, since its user may have switched it
    off; else that of `fused_backend`, `own`."""
    if own < 0 or name == own:
        return own
    return name if _takes(name, q, k, v, options) else own


def usable(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> list[int]:
    """All backends that take a call, first the one that SDPA would pick; none where the formula
    runs it."""
    own = fused_backend(q, k, v, options)
    if own < 0:
        return []
    others = (name for name in BACKENDS if name != own and _takes(name, q, k, v, options))
    return [*([own] if own in BACKENDS else []), *others]


def _takes(name: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> bool:
    """Of a call that fused ops are asked for: they have all of its options."""
    causal = 0 <= options.right < q.shape[1] - 1
    q, k, v = (heads_first(x) for x in widened(q, k, v))
    return backend.takes(name, q, k, v, causal)
