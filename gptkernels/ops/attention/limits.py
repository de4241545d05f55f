"""What some implementations of attention lack."""

from __future__ import annotations

from torch import Tensor

from gptkernels.core.autograd import requires_grad
from gptkernels.core.choice import IMPLEMENTATIONS
from gptkernels.ops.attention.options import AttentionOptions

KERNEL_HEAD_DIM = 256  # the widest heads of the GPU kernels


def lacking(op: str, q: Tensor, v: Tensor, options: AttentionOptions) -> dict[str, str]:
    """The implementations that cannot run a call, and for each what of the call it lacks."""
    D, Dv = q.shape[-1], v.shape[-1]
    learned = requires_grad((options.alibi_slopes,))
    wide = f"a head width of more than {KERNEL_HEAD_DIM}"
    decoding = op == "attention_decode"
    but_cuda = ("torch", "cpu", "triton")
    asked_for = (
        ("attn_mask", options.attn_mask is not None, ("torch", "cpu")),
        (wide, max(D, Dv) > KERNEL_HEAD_DIM, ("torch", "cpu")),
        ("sinks", options.sinks is not None, but_cuda),
        ("alibi_slopes of each batch entry", options.alibi_stride > 0, but_cuda),
        ("the gradient of alibi_slopes", learned, but_cuda),
        # Triton's launchers pad v, and will not copy a cache.
        ("v of another width than q", Dv != D, ("torch", "cpu") if decoding else but_cuda),
        ("causal=False", decoding and options.right != 0, but_cuda),
    )
    found: dict[str, str] = {}
    for what, needed, able in asked_for:
        if needed:
            found = {impl: what for impl in IMPLEMENTATIONS if impl not in able} | found
    return found


def check(impl: str, lacking: dict[str, str]) -> None:
    """Raises NotImplementedError where an explicit implementation lacks what a call has."""
    if impl in lacking:
        able = ", ".join(repr(name) for name in IMPLEMENTATIONS if name not in lacking)
        raise NotImplementedError(
            f"{lacking[impl]}: only impl={able} and 'auto' take it, got impl={impl!r}"
        )
