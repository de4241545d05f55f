"""Each op's problems: sizes and options in words, and how its launchers are called for them.

Tensors are on the device meta, which have sizes and no content.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.bench.dry_run.launches import Direction, Problem
from gptkernels.nn.transformer_layer import TransformerLayer
from gptkernels.ops.attention import cuda as attention_kernels
from gptkernels.ops.attention.options import AttentionOptions, complete
from gptkernels.ops.gelu_mlp import cuda as mlp_kernels
from gptkernels.ops.layer_norm import cuda as layer_norm_kernels
from gptkernels.ops.linear_cross_entropy import cuda as loss_kernels
from gptkernels.ops.linear_cross_entropy.options import LossOptions


def attention(
    B: int,
    T: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    *,
    kv_heads: int | None = None,
    keys: int | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi: bool = False,
    key_lengths: bool = False,
    varlen: bool = False,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> Problem:
    """With `varlen` of B sequences of T tokens laid end to end. Raises TypeError, ValueError as
    `gptkernels.attention` does, or if such sequences are to have key lengths too."""
    if varlen and key_lengths:
        raise ValueError("sequences laid end to end have no key lengths")
    Hk, Tk = H if kv_heads is None else kv_heads, T if keys is None else keys
    _check_sizes(B=B, T=T, H=H, D=D, kv_heads=Hk, keys=Tk)
    q = _empty(B, T, H, D, dtype=dtype)
    k, v = (_empty(B, Tk, Hk, D, dtype=dtype) for _ in range(2))
    slopes = _empty(H, dtype=torch.float32) if alibi else None
    lengths = _empty(B, dtype=torch.int32) if key_lengths else None
    # This runs the op's checks; on the device meta nothing is computed.
    gptkernels.attention(q, k, v, window=window, key_lengths=lengths, impl="torch")
    record = complete(
        AttentionOptions(D**-0.5, softcap=softcap, dropout_p=dropout_p, key_lengths=lengths),
        q, causal=causal, window=window, alibi_slopes=slopes,
    )  # fmt: skip
    if dropout_p > 0:
        record = record._replace(rng=_empty(2, dtype=torch.int64))
    if varlen:
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        ends = _empty(B + 1, dtype=torch.int32)
        record = record._replace(
            max_seqlen_q=T, max_seqlen_k=Tk, cu_seqlens_q=ends, cu_seqlens_k=ends
        )
    out, lse = torch.empty_like(q), _empty(q.shape[0], H, q.shape[1], dtype=torch.float32)

    def forward(**chosen: Any) -> Any:
        return attention_kernels.attention_fwd(q, k, v, record, **chosen)

    def backward(**chosen: Any) -> Any:
        return attention_kernels.attention_bwd(
            torch.empty_like(q), None, q, k, v, out, lse, record, (True, True, True, False, False),
            deterministic, **chosen,
        )  # fmt: skip

    words = {
        "causal" if causal else "not causal": True,
        **_seen(window, softcap, alibi),
        "key lengths": key_lengths,
        f"dropout {dropout_p:g}": dropout_p,
        "deterministic": deterministic,
    }
    text = _text(f"B{B} T{_pair(T, Tk)} H{_pair(H, Hk)} D{D}", words)
    sizes = dict(B=B, T=T, H=H, D=D, Hk=Hk, Tk=Tk, left=record.left, right=record.right)
    directions = (
        Direction("forward", forward, "attention_fwd_builds"),
        Direction("backward", backward, "attention_bwd_builds"),
    )
    op = "attention_varlen" if varlen else "attention"
    return Problem(op, text, dtype, sizes, directions)


def attention_decode(
    B: int,
    T: int,
    KEYS: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    *,
    kv_heads: int | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi: bool = False,
) -> Problem:
    """T new tokens to caches with room for KEYS. Raises TypeError, ValueError as
    `gptkernels.attention_decode` does."""
    Hk = H if kv_heads is None else kv_heads
    _check_sizes(B=B, T=T, KEYS=KEYS, H=H, D=D, kv_heads=Hk)
    q = _empty(B, T, H, D, dtype=dtype)
    k, v = (_empty(B, KEYS, Hk, D, dtype=dtype) for _ in range(2))
    lengths = _empty(B, dtype=torch.int32)
    slopes = _empty(H, dtype=torch.float32) if alibi else None
    gptkernels.attention_decode(q, k, v, lengths, window=window, impl="torch")  # checks, as above
    record = complete(
        AttentionOptions(D**-0.5, softcap=softcap, key_lengths=lengths),
        q, causal=True, window=window, alibi_slopes=slopes,
    )  # fmt: skip

    def forward() -> Any:
        return attention_kernels.attention_decode_fwd(q, k, v, None, 0, record)

    text = _text(f"B{B} T{T}/{KEYS} H{_pair(H, Hk)} D{D}", _seen(window, softcap, alibi))
    sizes = dict(B=B, T=T, H=H, D=D, Hk=Hk, Tk=KEYS, left=record.left)
    directions = (Direction("forward", forward, None),)
    return Problem("attention_decode", text, dtype, sizes, directions)


def gelu_mlp(
    M: int,
    C: int,
    F: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    recompute: bool = False,
    approximate: str = "tanh",
) -> Problem:
    """M rows, width C, inner width F. Raises TypeError, ValueError as `gptkernels.gelu_mlp`."""
    _check_sizes(M=M, C=C, F=F)
    x, dy = (_empty(M, C, dtype=dtype) for _ in range(2))
    w1, w2 = _empty(F, C, dtype=dtype), _empty(C, F, dtype=dtype)
    b1, b2 = (_empty(n, dtype=dtype) if bias else None for n in (F, C))
    gptkernels.gelu_mlp(x, w1, b1, w2, b2, approximate=approximate, impl="torch")
    h = None if recompute else _empty(M, F, dtype=dtype)

    def forward(**chosen: Any) -> Any:
        return mlp_kernels.gelu_mlp_fwd(x, w1, b1, w2, b2, approximate, not recompute, **chosen)

    def backward(**chosen: Any) -> Any:
        wanted = (True, True, bias, True, bias)
        return mlp_kernels.gelu_mlp_bwd(dy, x, w1, b1, w2, h, approximate, wanted, **chosen)

    text = _text(f"M{M} C{C} F{F}", {"no biases": not bias, "recompute": recompute})
    directions = (
        Direction("forward", forward, "gelu_mlp_builds"),
        Direction("backward", backward, "gelu_mlp_builds"),
    )
    return Problem("gelu_mlp", text, dtype, dict(M=M, C=C, F=F), directions)


def linear_cross_entropy(
    N: int,
    C: int,
    V: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    softcap: float = 0.0,
) -> Problem:
    """N rows, width C, V classes. Raises TypeError, ValueError as `gptkernels.linear_cross_entropy`
    does."""
    _check_sizes(N=N, C=C, V=V)
    x, weight = _empty(N, C, dtype=dtype), _empty(V, C, dtype=dtype)
    shift = _empty(V, dtype=dtype) if bias else None
    targets = _empty(N, dtype=torch.int64)
    gptkernels.linear_cross_entropy(
        x, weight, targets, bias=shift, softcap=softcap, impl="torch"
    )  # checks, as above
    options = LossOptions(softcap=softcap)
    lse = _empty(N, dtype=torch.float32)

    def forward(**chosen: Any) -> Any:
        nothing = (False, False, False)
        return loss_kernels.linear_cross_entropy_fwd(
            x, weight, shift, targets, None, options, nothing, **chosen
        )

    def backward(**chosen: Any) -> Any:
        wanted = (True, True, bias)
        return loss_kernels.linear_cross_entropy_bwd(
            torch.empty_like(lse), x, weight, shift, targets, lse, options, wanted, **chosen
        )

    text = _text(f"N{N} C{C} V{V}", {"bias": bias, f"softcap {softcap:g}": softcap})
    directions = (
        Direction("forward", forward, "linear_cross_entropy_builds"),
        Direction("backward", backward, "linear_cross_entropy_builds"),
    )
    return Problem("linear_cross_entropy", text, dtype, dict(N=N, C=C, V=V), directions)


def layer_norm(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    prenorm: bool = True,
    bias: bool = True,
    dropout_p: float = 0.0,
) -> Problem:
    """With prenorm the sum with a residual is an output too, and has a gradient. Raises TypeError,
    ValueError as `gptkernels.layer_norm` does."""
    _check_sizes(rows=rows, cols=cols)
    x = _empty(rows, cols, dtype=dtype)
    weight = _empty(cols, dtype=dtype)
    shift = torch.empty_like(weight) if bias else None
    added = torch.empty_like(x) if residual else None
    gptkernels.layer_norm(x, weight, shift, residual=added, dropout_p=dropout_p, impl="torch")
    rng = _empty(2, dtype=torch.int64) if dropout_p > 0 else None
    mean, rstd = (_empty(rows, dtype=torch.float32) for _ in range(2))
    has_sum = residual or dropout_p > 0
    of_sum = torch.empty_like(x) if residual and prenorm else None

    def forward(**chosen: Any) -> Any:
        return layer_norm_kernels.layer_norm_fwd(
            x, weight, shift, added, rng, dropout_p, 1e-5, dtype if has_sum else None, **chosen
        )

    def backward(**chosen: Any) -> Any:
        return layer_norm_kernels.layer_norm_bwd(
            torch.empty_like(x), of_sum, x, mean, rstd, weight, rng, dropout_p, dtype,
            dtype if residual and dropout_p > 0 else None, True, bias, **chosen,
        )  # fmt: skip

    words = {
        "+ residual": residual,
        "no prenorm": residual and not prenorm,
        "no bias": not bias,
        f"dropout {dropout_p:g}": dropout_p,
    }
    text = _text(f"{rows} rows of {cols}", words)
    sizes = dict(rows=rows, cols=cols, residual=int(residual), prenorm=int(residual and prenorm))
    directions = (
        Direction("forward", forward, "layer_norm_fwd_builds"),
        Direction("backward", backward, "layer_norm_bwd_builds"),
    )
    return Problem("layer_norm", text, dtype, sizes, directions)


def transformer_layer(
    B: int,
    T: int,
    C: int,
    H: int,
    F: int,
    dtype: torch.dtype,
    *,
    activation: str = "relu",
    norm_first: bool = False,
    causal: bool = False,
    mask: bool = False,
    bias: bool = True,
    dropout_p: float = 0.0,
) -> Problem:
    """A `gptkernels.TransformerLayer` of width C, H heads and inner width F: its fused parts in the
    order in which they run, forward, then backward. `mask`: it is given a mask tensor to read.
    Dropout is that of training. Raises TypeError, ValueError as the layer does.
    """
    _check_sizes(B=B, T=T, C=C, H=H, F=F)
    for sizes in ((B * T, C), (3 * C, C), (F, C)):
        _empty(*sizes, dtype=torch.float64)  # no tensor of the layer has more bytes than these
    with torch.device("meta"):
        layer = TransformerLayer(C, H, F, dropout_p, activation, norm_first=norm_first, bias=bias)
    not_fused = layer.not_fused(masked=mask, training=True)
    rows, normed = B * T, functools.partial(layer_norm, B * T, C, dtype, bias=bias)
    parts = {
        "attention": lambda: attention(B, T, H, C // H, dtype, causal=causal, dropout_p=dropout_p),
        "norm1": lambda: normed(residual=True, prenorm=False, dropout_p=dropout_p),
        "mlp": lambda: gelu_mlp(rows, C, F, dtype, bias=bias, approximate="none"),
        "norm2": lambda: normed(residual=True, prenorm=norm_first, dropout_p=dropout_p),
    }
    if norm_first:
        parts = {"norm1": normed, **{name: parts[name] for name in ("attention", "norm2", "mlp")}}
    made = {name: part() for name, part in parts.items() if name not in not_fused}
    forward, backward = (
        [replace(part.directions[i], name=f"{name}, {('forward', 'backward')[i]}: {part.text}")
         for name, part in made.items()]
        for i in range(2)
    )  # fmt: skip
    words = {
        activation: True,
        "norm first": norm_first,
        "causal": causal,
        "with a mask": mask,
        "no biases": not bias,
        f"dropout {dropout_p:g}": dropout_p,
    }
    text = _text(f"B{B} T{T} C{C} H{H} F{F}", words)
    directions = (*forward, *reversed(backward))
    dimensions = dict(B=B, T=T, C=C, H=H, F=F)
    return Problem("transformer_layer", text, dtype, dimensions, directions, not_fused)


def _text(sizes: str, words: dict[str, Any]) -> str:
    """`sizes`, and those of `words` that hold."""
    return f"{sizes} {', '.join(word for word, holds in words.items() if holds)}".rstrip()


def _pair(queries: int, keys: int) -> str:
    return f"{queries}" if queries == keys else f"{queries}/{keys}"


def _seen(window: tuple[int, int] | None, softcap: float, alibi: bool) -> dict[str, Any]:
    """The words of what every attention can do to its scores."""
    return {
        f"window {', '.join(map(str, window or ()))}": window,
        f"softcap {softcap:g}": softcap,
        "ALiBi": alibi,
    }


def _empty(*sizes: int, dtype: torch.dtype) -> Tensor:
    if math.prod(sizes) * dtype.itemsize >= 2**63:
        raise ValueError(
            f"a tensor of {'x'.join(map(str, sizes))} elements has 2**63 bytes or more"
        )
    return torch.empty(sizes, dtype=dtype, device="meta")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
