"""The yardstick itself: its error on the table's cases is at most 2 eps of the sums' terms.

The functions called like ops return the truth formed from absolute values: no term cancels another,
in the outputs as in the gradients that autograd finds. A step whose derivative has signs becomes
value + slopes * change(input), where the slopes are absolute.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, FP16, name_of
from right import assert_same
from torch import Tensor

from gptkernels.core import philox
from gptkernels.truth import baseline, parity, reference, verify
from gptkernels.truth.yardstick import FullSums

narrow = pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)


def change(x: Tensor) -> Tensor:
    """Returns zeros whose gradient goes to x."""
    return x - x.detach()


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    **dropout: Any,
) -> Any:
    with torch.no_grad():
        normal, s = reference.layer_norm(
            x, torch.ones_like(weight), residual=residual, prenorm=True, eps=eps, **dropout
        )
        normal, rstd = normal.abs(), (s.var(-1, keepdim=True, unbiased=False) + eps).rsqrt()
        kept = torch.ones_like(x)
        if dropout:
            keep = philox.elementwise_keep(dropout["rng"], dropout["dropout_p"], x.shape)
            kept = keep * philox.scale(dropout["dropout_p"])
    s = kept * x.abs() + (0 if residual is None else residual.abs())
    slope = normal * (normal * change(s)).mean(-1, keepdim=True)
    normal = normal + rstd * (change(s) + change(s).mean(-1, keepdim=True) + slope)
    y = normal * weight.abs() + (0 if bias is None else bias.abs())
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
    h = F.linear(x, w1, b1).detach().requires_grad_()
    a = F.gelu(h, approximate=approximate)
    (slope,) = torch.autograd.grad(a.sum(), h)
    size = F.linear(x.abs(), w1.abs(), None if b1 is None else b1.abs())
    return F.linear(
        a.detach().abs() + slope.abs() * change(size), w2.abs(), None if b2 is None else b2.abs()
    )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    counts = targets != -100
    at = torch.where(counts, targets, 0)[..., None]
    with torch.no_grad():
        l, slope = F.linear(x, weight, bias), 1.0
        if softcap > 0:
            t = torch.tanh(l / softcap)
            l, slope = softcap * t, 1 - t * t
        lse = l.logsumexp(-1, keepdim=True)
        p = torch.exp(l - lse) * (1 + 2 * z_loss * lse.abs())
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    step = slope * change(size)
    l = l.abs() + step
    losses = lse.abs() + z_loss * lse**2 + (p * step).sum(-1, keepdim=True)
    losses = losses + (1 - label_smoothing) * l.gather(-1, at)
    losses = losses + label_smoothing * l.mean(-1, keepdim=True)
    losses = losses.squeeze(-1).masked_fill(~counts, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    alibi_slopes: Any = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    (B, Tq, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    one = torch.eye(Tk, dtype=q.dtype).view(1, Tk, 1, Tk).expand(B, Tk, Hk, Tk)
    with torch.no_grad():  # with these values the outputs are the weights
        weights = functools.partial(
            reference.attention, q, k, one, softmax_scale=scale, return_lse=True,
            alibi_slopes=alibi_slopes, sinks=sinks, **options,
        )  # fmt: skip
        p, lse = weights()  # (B, Tq, H, Tk)
        kept = torch.where(p > 0, weights(dropout_p=dropout_p)[0] / p, 0)
    k, v = (x.abs().repeat_interleave(H // Hk, dim=2) for x in (k, v))
    terms = torch.einsum("bihd,bjhd->bihj", q.abs(), k) * abs(scale)
    if isinstance(alibi_slopes, Tensor):
        distance = (torch.arange(Tk - Tq, Tk)[:, None] - torch.arange(Tk)).abs()
        terms = terms + alibi_slopes.abs()[..., None, :, None] * distance[:, None]
    s = change(terms)
    mean = (p * s).sum(-1, keepdim=True)
    if sinks is not None:
        weight = torch.exp(sinks.detach()[:, None] - lse).mT[..., None]
        mean = mean + weight * change(sinks.abs())[:, None]
    out = torch.einsum("bihj,bjhd->bihd", (p + p * (s + mean)) * kept, v)
    return (out, lse.abs() + mean.squeeze(-1).mT) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    ends = (cu_seqlens_q, cu_seqlens_k)
    return reference.packed(attention, q, k, v, *ends, return_lse, options)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    caches = (k_cache, v_cache, cache_lengths, block_table)
    return reference.cached(attention, q, *caches, return_lse, options)


@narrow
@pytest.mark.parametrize("case", verify.CASES, ids=lambda case: f"{case.op} {case.name}")
def test_error_is_within_that_of_the_terms(case: verify.Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(lambda *sizes: torch.randn(sizes).to(dtype))
    options = dict(case.options)
    if "dropout_p" in options:
        options["rng"] = philox.draw(torch.device("cpu"))
    gradients = "gradient" in case.directions

    def results(module: Any, inputs: dict[str, Any], cotangents: Any) -> parity.Results:
        call = functools.partial(getattr(module, case.op), **options)
        return parity.run(call, inputs, gradients, torch.Generator(), cotangents)

    exact = {name: parity.upcast(value) for name, value in inputs.items()}
    # Gradients of one sign: a sum that stops to grow stays far below them.
    cotangents = [torch.randn_like(y).abs() for y in results(baseline, inputs, None).outputs]
    with FullSums():
        found = results(baseline, inputs, cotangents)
    truth, sizes = (
        results(module, exact, cotangents) for module in (reference, sys.modules[__name__])
    )
    named = zip(case.outputs, found.outputs, truth.outputs, sizes.outputs, strict=True)
    triples = {name: triple for name, *triple in named}
    for name in found.gradients:
        gradients_of = (found.gradients, truth.gradients, sizes.gradients)
        triples[f"d{name}"] = [these[name] for these in gradients_of]
    for name, (result, right, size) in triples.items():
        error = (result - right)[right.isfinite()].abs().max()
        limit = 2 * torch.finfo(dtype).eps * size[right.isfinite()].abs().max()
        assert error <= limit, f"{name}: {error} > {limit}"


@narrow
def test_what_adds_up_in_16_bits_adds_up_in_fp32(dtype: torch.dtype) -> None:
    """On a CPU PyTorch's own gradients stop at 256 or 2048, and its loss is too large or small."""
    rows = torch.ones(4096, 8, dtype=dtype)
    weight, bias = rows[0].clone().requires_grad_(), rows[0].clone().requires_grad_()
    table = rows[:2].clone().requires_grad_()
    with FullSums():
        y = F.layer_norm(rows, (8,), weight, bias)
        looked_up = F.embedding(torch.zeros(4096, dtype=torch.int64), table)
        dbias, dtable = torch.autograd.grad((y, looked_up), (bias, table), (rows, rows))
        loss = F.cross_entropy(rows.repeat(1, 6), torch.zeros(4096, dtype=torch.int64))
    assert (dbias == 4096).all()
    assert (dtable[0] == 4096).all()
    assert loss == torch.tensor(48.0).log().to(dtype)


def test_random_numbers_are_drawn_once() -> None:
    x, drawn = torch.ones(100, dtype=BF16), []
    for context in (FullSums(), contextlib.nullcontext()):
        torch.manual_seed(0)
        with context:
            drawn += [F.dropout(x), F.dropout(x)]
    assert_same(drawn[:2], drawn[2:])
