"""Peers of `gptkernels.layer_norm`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.bench.peers import Function, Peers
from gptkernels.bench.peers.compiled import both
from gptkernels.bench.peers.packages import installed, load, need_gpu
from gptkernels.truth import baseline

_EPS = 1e-5


def peers(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    *,
    residual: bool = False,
    dropout_p: float = 0.0,
    backward: bool,
    repeated: bool = True,
) -> Peers:
    """Makers of functions of x (..., C), weight and bias (C,), which return y; with `residual`, of
    these and the residual (..., C), which return (y, s) as gptkernels.layer_norm(prenorm=True).
    Dropout drops other elements in each; `backward`: whether the results are differentiated,
    `repeated`: again and again behind one call."""

    def alone(name: str) -> Any:
        """The module of a package that has the norm alone."""
        module = load(name)
        need_gpu(device, name)
        if residual or dropout_p > 0:
            raise NotImplementedError(f"{name}'s LayerNorm has no residual and no dropout")
        return module

    def liger() -> Function:
        apply = alone("Liger").LigerLayerNormFunction.apply
        return lambda x, weight, bias: apply(x, weight, bias, _EPS)

    def quack() -> Function:
        alone("quack")
        return _quack(backward)

    def transformer_engine() -> Function:
        name = "TransformerEngine"
        module = alone(name)
        if backward and repeated:  # it lets go of what it saved
            raise NotImplementedError(f"{name}'s backward pass cannot be repeated, to be timed")
        norm = module.LayerNorm(width, eps=_EPS, device=device, dtype=dtype)

        def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            # The module has weights of its own, which give way to these.
            return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

        return layer_norm

    def flash_attn() -> Function:
        name = "flash-attn Triton"
        function = load(name).layer_norm_fn
        need_gpu(device, name)
        options = {"eps": _EPS, "dropout_p": dropout_p, "prenorm": residual}
        return lambda x, weight, bias, *rest: function(x, weight, bias, *rest, **options)

    return installed(
        both(functools.partial(_plain, dropout_p))
        | {
            "Liger": liger,
            "quack": quack,
            "TransformerEngine": transformer_engine,
            "flash-attn Triton": flash_attn,
        }
    )


def _plain(
    dropout_p: float, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Any:
    """With PyTorch's own dropout: the baseline's draws our mask, which takes it long."""
    if dropout_p > 0:
        x = F.dropout(x, dropout_p)
    return baseline.layer_norm(
        x, weight, bias, residual=residual, eps=_EPS, prenorm=residual is not None
    )


def _quack(backward: bool) -> Function:
    """quack has the two passes, but does not join them for autograd."""
    module = load("quack", "quack.rmsnorm")
    for name in ("layernorm_fwd", "layernorm_bwd") if backward else ("layernorm_fwd",):
        if not hasattr(module, name):
            raise NotImplementedError(f"this release of quack has no {name}")

    class Joined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            y, rstd, mean = module.layernorm_fwd(
                x, weight, bias, eps=_EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, weight, rstd, mean = ctx.saved_tensors
            return module.layernorm_bwd(x, weight, dy, rstd, mean, has_bias=True)

    # It takes weights in fp32, as its users hold them: forward, a conversion is no part of it.
    in_fp32 = functools.cache(Tensor.float)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        weight, bias = (w.float() if backward else in_fp32(w) for w in (weight, bias))
        if backward:
            return Joined.apply(rows, weight, bias).view(x.shape)
        return module.layernorm_fwd(rows, weight, bias, eps=_EPS).view(x.shape)

    return layer_norm
