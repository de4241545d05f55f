"""Speed of `gptkernels.attention` against eager PyTorch, F.scaled_dot_product_attention.

PyTorch gets a window, and what else it has no flag for, as a mask that is made before. Forward is
two products, each of 2 B H Tq Tk D operations, and backward five (the scores once more); a causal
mask leaves half of them. Bytes, in tensors:

    forward                read q, k, v; write out
    backward               read dout, q, k, v, out; write dq, dk, dv

Checked are the last queries of the first batch entry: they see all keys, and the last keys are seen
by them alone where attention is causal.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptkernels
from gptkernels.bench.case import BACKWARD, BOTH, FORWARD, Case
from gptkernels.bench.cases.dtypes import narrow_on_a_gpu
from gptkernels.bench.cases.workload import Function, Part, Workload, normal, whole
from gptkernels.bench.peers import attention as others
from gptkernels.truth import baseline, reference

_CHECKED = 64  # queries
_CAP = 20.0


@dataclass(frozen=True)
class Shape:
    """Sizes of one self-attention, and what it sees."""

    batch: int
    tokens: int
    heads: int
    key_heads: int
    head_dim: int
    causal: bool = True
    window: int | None = None  # keys to the left
    option: str | None = None  # "softcap", "ALiBi", "bool mask" or "added mask"

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.key_heads}" if self.key_heads != self.heads else "")
        return f"B{self.batch} T{self.tokens} {heads} D{self.head_dim} {self.sees}"

    @property
    def sees(self) -> str:
        """In words."""
        window = f" window {self.window}" if self.window else ""
        option = f", {self.option}" if self.option else ""
        return ("causal" if self.causal else "full") + window + option

    @property
    def series(self) -> str:
        """What the sizes do not say."""
        grouped = self.heads // self.key_heads
        return self.sees + (f", GQA {grouped}:1" if grouped > 1 else "")

    @property
    def pairs(self) -> float:
        """Queries times the keys that each sees, per head of one batch entry."""
        T = self.tokens
        if self.window is not None and self.window < T:
            return (self.window + 1) * (T - self.window / 2)
        return T * T / (2 if self.causal else 1)


def shapes(device_type: str, level: str) -> Sequence[Shape]:
    """GPT-2's heads first; then lengths at a constant number of tokens, wide heads, few key heads,
    windows, masks."""
    if device_type == "cuda":
        few = [
            Shape(8, 1024, 12, 12, 64),
            Shape(2, 4096, 64, 8, 128),
            Shape(1, 16384, 32, 8, 128),
            Shape(1, 16384, 32, 8, 128, window=1024),
            Shape(16, 512, 12, 12, 64, causal=False),
            Shape(2, 4096, 16, 16, 256),
            *(Shape(32768 // T, T, 32, 32, 64) for T in (1024, 4096, 16384)),  # one line
        ]
        tokens, width, lengths = 32768, 2048, [512, 1024, 2048, 4096, 8192, 16384, 32768]
        one = (16, 2048)
    else:
        few = [
            Shape(1, 512, 12, 12, 64),
            Shape(1, 512, 8, 2, 64, window=64),
            Shape(1, 64, 12, 12, 64),
            Shape(1, 256, 12, 12, 64),
            Shape(1, 1024, 12, 12, 64),
            Shape(1, 4096, 12, 12, 64),
            Shape(1, 1024, 12, 4, 64),
            Shape(1, 1024, 6, 6, 128),
            Shape(1, 1024, 12, 12, 64, causal=False),
        ]
        tokens, width, lengths = 4096, 768, [512, 1024, 2048, 4096]
        one = (1, 1024)
    if level == "quick":
        return few[:2]
    if level == "default":
        return few
    many = [Shape(tokens // T, T, width // D, width // D, D) for D in (64, 128) for T in lengths]
    batch, T = one
    heads = width // 64
    many += [
        Shape(batch, T, 16, 2, 64),  # GQA 8:1
        Shape(batch, T, heads, heads, 64, window=256),
        *(Shape(batch, T, heads, heads, 64, option=name) for name in ("softcap", "ALiBi")),
        *(
            Shape(batch, T, heads, heads, 64, causal=False, option=name)
            for name in ("bool mask", "added mask")
        ),
    ]
    return list(dict.fromkeys(few + many))


dtypes = narrow_on_a_gpu


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Iterator[Case]:
    """Every direction."""
    B, T, H, Hk, D = shape.batch, shape.tokens, shape.heads, shape.key_heads, shape.head_dim
    draw = normal(device, dtype)
    q, k, v = draw(B, T, H, D), draw(B, T, Hk, D), draw(B, T, Hk, D)
    sees: dict[str, Any] = {"causal": shape.causal, **_options(shape, device, dtype)}
    if shape.window is not None:
        sees["window"] = (shape.window, 0)
    moved = 2 * B * T * (H + Hk) * D * dtype.itemsize
    hidden = sees.get("attn_mask")
    pairs = shape.pairs
    if hidden is not None and hidden.dtype == torch.bool:
        pairs = int(hidden.sum())  # what it hides need not be computed
    product = 2 * B * H * pairs * D
    yield from Workload(
        shape=str(shape),
        sizes={"B": B, "T": T, "H": H, "Hk": Hk, "D": D},
        series=shape.series,
        tensors=(q, k, v),
        plain=_plain(sees, T, device, dtype),
        ours=functools.partial(gptkernels.attention, **sees),
        work={
            FORWARD: (moved, round(2 * product)),
            BACKWARD: (2 * moved, round(5 * product)),
            BOTH: (3 * moved, round(7 * product)),
        },
        peers=lambda backward, repeated: others.peers(
            device,
            dtype,
            tuple(q.shape),
            tuple(k.shape),
            backward=backward,
            repeated=repeated,
            **sees,
        ),
        part=_part(q, k, v, sees),
    ).cases("attention", impls)


def _options(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    T, H = shape.tokens, shape.heads
    match shape.option:
        case "softcap":
            return {"softcap": _CAP}
        case "ALiBi":
            slopes = [2 ** (-8 * (h + 1) / H) for h in range(H)]
            return {"alibi_slopes": torch.tensor(slopes, device=device)}
        case "bool mask":  # causal, and 2 of 10 keys hidden
            generator = torch.Generator(device).manual_seed(2)
            seen = torch.rand(T, T, generator=generator, device=device) < 0.8
            seen.fill_diagonal_(True)
            return {"attn_mask": seen.tril()}
        case "added mask":
            return {"attn_mask": normal(device, dtype, seed=2)(T, T)}
    return {}


def _plain(sees: dict[str, Any], T: int, device: torch.device, dtype: torch.dtype) -> Function:
    """SDPA, with a mask that is made before for what it has no flag for. It has no softcap at all:
    products and a softmax do that."""
    added = sees.get("attn_mask")
    if "softcap" in sees:
        hidden = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
        return functools.partial(_softcapped, hidden)
    if "window" in sees:
        sees = {"causal": False, "attn_mask": baseline.band_mask(device, T, T, **sees)}
    elif "alibi_slopes" in sees:
        token = torch.arange(T, device=device)
        away = token[:, None] - token
        slopes = sees["alibi_slopes"][:, None, None]
        added = (-slopes * away.abs()).masked_fill(away < 0, float("-inf"))[None].to(dtype)
    if added is None or added.dtype == torch.bool:
        return functools.partial(baseline.attention, **sees)

    def attention(*tensors: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in tensors)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added).transpose(1, 2)

    return attention


def _softcapped(hidden: Tensor, *tensors: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in tensors)
    scores = torch.tanh(q @ k.mT * (q.shape[-1] ** -0.5 / _CAP)) * _CAP
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def _part(q: Tensor, k: Tensor, v: Tensor, sees: dict[str, Any]) -> Part:
    n = min(_CHECKED, q.shape[1])
    options = dict(sees)
    if "attn_mask" in sees:
        options["attn_mask"] = sees["attn_mask"][..., -n:, :]

    def last(x: Tensor) -> Tensor:
        return x[:1, -n:]

    alone = sees["causal"] or n == q.shape[1]
    return Part(
        tensors=(last(q), k[:1], v[:1]),
        truth=functools.partial(reference.attention, **options),
        yardstick=functools.partial(baseline.attention, **options),
        of_output=last,
        of_gradient=(last, last, last) if alone else (last, None, None),
        of_own=(whole, last, last) if alone else (whole, None, None),
    )
