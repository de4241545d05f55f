"""What others offer for the same ops, by name: what a figure of ours is to be compared with.

Each function returns, for one problem, name -> a function that makes the call to time. Making it
raises ImportError where a package is missing, and other errors where it cannot take the problem.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptkernels.truth import baseline

Call = Callable[[], Any]
Peers = dict[str, Callable[[], Call]]


def attention(q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, sees: dict[str, Any]) -> Peers:
    """PyTorch's backends, FlashAttention 3 and 4. With dout, their backward passes alone."""
    if sees["window"] is not None:  # which PyTorch's have no option for
        return {}
    causal = sees["causal"]

    def made(attention: Callable[..., Any]) -> Call:
        def out(*tensors: Tensor) -> Tensor:
            result = attention(*tensors)
            return result[0] if isinstance(result, tuple) else result

        return _call(out, (q, k, v), dout)

    def sdpa(backend: SDPBackend) -> Call:
        def attention(*tensors: Tensor) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in tensors)
            grouped = query.shape[1] != key.shape[1]
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    query, key, value, is_causal=causal, enable_gqa=grouped
                )
            return out.transpose(1, 2)

        return made(attention)

    def flash(module: str) -> Call:
        function = importlib.import_module(module).flash_attn_func
        return made(functools.partial(function, causal=causal))

    return {
        "SDPA cuDNN": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "FlashAttention-4": functools.partial(flash, "flash_attn.cute"),
        "FlashAttention-3": functools.partial(flash, "flash_attn_interface"),
    }


def layer_norm(
    through: Callable[..., list[Tensor]], inputs: list[Tensor], cotangents: list[Tensor] | None
) -> Peers:
    """Eager, torch.compile; Liger and quack where there is no residual, which they do not take.
    With cotangents, their backward passes alone."""

    def made(layer_norm: Callable[..., Any]) -> Call:
        return _call(functools.partial(through, layer_norm), inputs, cotangents)

    def liger() -> Call:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return made(lambda x, w, b, **_: LigerLayerNormFunction.apply(x, w, b, 1e-5))

    def quack() -> Call:
        from quack.layernorm import layernorm_fwd

        if cotangents is not None:
            raise NotImplementedError("it has no backward pass")
        x, weight, bias = inputs
        return lambda: layernorm_fwd(x, weight.float(), bias.float())

    found = {
        "torch.compile": lambda: made(torch.compile(baseline.layer_norm, dynamic=False)),
        "eager PyTorch": lambda: made(baseline.layer_norm),
    }
    return found if len(inputs) > 3 else found | {"Liger": liger, "quack": quack}


def _call(function: Callable[..., Any], tensors: Sequence[Tensor], cotangents: Any) -> Call:
    """The function on these tensors; with cotangents, its backward pass alone."""
    if cotangents is None:
        return lambda: function(*tensors)
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
