"""F.scaled_dot_product_attention (SDPA) by one of its backends, in the layout of our ops."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptkernels.bench.peers import Function, Peers, Shape

_CPU_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
_BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def peers(
    device: torch.device,
    dtype: torch.dtype,
    q_shape: Shape,
    k_shape: Shape,
    sees: Callable[[], tuple[Tensor | None, bool]],
    *,
    backward: bool,
) -> Peers:
    """Makers of functions of q (B, Tq, H, D), k and v (B, Tk, Hk, D). `sees` makes SDPA's mask, and
    says whether its causal flag is set."""

    def make(backend: SDPBackend) -> Function:
        mask, is_causal = sees()
        (B, Tk, Hk, D), H = k_shape, q_shape[2]

        def why_not(heads: int) -> str | None:
            q, k = (
                torch.empty(shape, device=device, dtype=dtype).requires_grad_(backward)
                for shape in (q_shape, (B, Tk, heads, D))
            )
            return _why_not(backend, q.transpose(1, 2), k.transpose(1, 2), mask, is_causal)

        # As users do, the keys of a group are repeated where there is no other way.
        reason, repeats = why_not(Hk), 1
        if reason is not None and Hk != H:
            reason, repeats = why_not(H), H // Hk
        if reason is not None:
            raise NotImplementedError(reason)
        return functools.partial(_attention, backend, mask, is_causal, repeats)

    found = _CPU_BACKENDS if device.type == "cpu" else _BACKENDS
    return {name: functools.partial(make, backend) for name, backend in found.items()}


def _attention(
    backend: SDPBackend,
    mask: Tensor | None,
    is_causal: bool,
    repeats: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def _why_not(
    backend: SDPBackend, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool
) -> str | None:
    """Why PyTorch has no kernel of the backend for q (B, H, Tq, D) and k (B, Hk, Tk, D), in its own
    words; None where it has one."""
    grouped = q.shape[1] != k.shape[1]
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(backend):
        warnings.simplefilter("always")
        try:
            torch._fused_sdp_choice(q, k, k, mask, 0.0, is_causal, enable_gqa=grouped)
            return None
        except RuntimeError:
            reasons = [str(warning.message).partition(" (Triggered")[0] for warning in said]
    told = [text for text in reasons if "because" not in text and "runtime disabled" not in text]
    return told[0] if told else f"PyTorch has no kernel of its {backend.name} for this"
