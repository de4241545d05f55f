"""Which of the fused CUDA ops behind F.scaled_dot_product_attention (SDPA) runs a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

# The numbers that PyTorch's functions use.
NONE, FLASH, EFFICIENT, CUDNN = (
    backend.value
    for backend in (
        SDPBackend.MATH,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    )
)
CPU = -2  # the one fused op for CPUs
# The most batch entries, and the most heads, that the grids of the ops take.
_LAUNCH_LIMIT = 65535


def pick(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> int:
    """Returns the backend that SDPA would pick for (B, H, T, D) inputs on a GPU, or the next one if
    that one is wrong in either pass; NONE where there is none."""
    grouped = q.shape[1] != k.shape[1]
    if q.device.type != "cuda" or max(q.shape[:2]) > _LAUNCH_LIMIT:
        return NONE
    try:
        found = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=grouped)
    except RuntimeError:  # the backends that are not switched off do not take the call
        return NONE
    if found == NONE or _right_in_both_passes(found, q, k):
        return found
    return next((b for b in (FLASH, EFFICIENT) if takes(b, q, k, v, causal)), NONE)


def takes(backend: int, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether a fused op for GPUs takes (B, H, T, D) inputs, is switched on, and is right in both
    passes."""
    ask = {
        FLASH: torch.backends.cuda.can_use_flash_attention,
        EFFICIENT: torch.backends.cuda.can_use_efficient_attention,
        CUDNN: torch.backends.cuda.can_use_cudnn_attention,
    }.get(backend)
    if ask is None or q.device.type != "cuda" or max(q.shape[:2]) > _LAUNCH_LIMIT:
        return False
    grouped = q.shape[1] != k.shape[1]
    call = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, grouped)
    return _right_in_both_passes(backend, q, k) and ask(call)


def _right_in_both_passes(backend: int, q: Tensor, k: Tensor) -> bool:
    """Whether the op is right for inputs that it takes, and has a backward pass for them."""
    capability = torch.cuda.get_device_capability(q.device)
    if backend == FLASH:
        # On GPUs with little shared memory, the backward pass refuses some widths.
        return not 192 < q.shape[-1] <= 224 or capability == (8, 0) or capability[0] in (9, 10)
    if backend == EFFICIENT:
        # With grouped heads, releases differ in the shapes of dk and dv.
        return q.shape[1] == k.shape[1]
    # From compute capability 10 on, cuDNN's results for a single query can be wrong.
    return backend == CUDNN and (q.shape[2] > 1 or capability[0] < 10)


def laid_out_like(q: Tensor, x: Tensor) -> Tensor:
    """Returns x, of q's shape, with the strides of `torch.empty_like(q)`.

    PyTorch caches cuDNN's graphs by the strides of q, k and v alone, so those of out and dout have
    to follow from them.
    """
    strides = torch.empty_like(q, device="meta").stride()
    if x.stride() == strides:
        return x
    return torch.empty_strided(q.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
