"""Makes the inputs of the ops, one function for each op. They are random: by PyTorch's generator,
which the fixture `seed` of conftest.py seeds for every test, or by a seed of their own."""

from __future__ import annotations

from typing import Any

import torch
from harness import DEVICE, FP32
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype = FP32, generator: Any = None) -> Tensor:
    return torch.randn(shape, generator=generator).to(device=DEVICE, dtype=dtype)


def layer_norm_inputs(
    *shape: int,
    dtype: torch.dtype = FP32,
    weight: torch.dtype | None = None,
    bias: bool = True,
    residual: torch.dtype | None = None,
) -> dict[str, Any]:
    """Returns x of this shape with a mean near 0.5, the parameters and, if `residual` is a dtype, a
    residual of that dtype."""
    C = shape[-1]
    weight = weight or dtype
    return {
        "x": (draw(*shape) + 0.5).to(dtype),
        "weight": draw(C, dtype=weight),
        "bias": draw(C, dtype=weight) if bias else None,
        "residual": None if residual is None else draw(*shape, dtype=residual),
    }


def gelu_mlp_inputs(
    *sizes: int, dtype: torch.dtype = FP32, biases: bool = True, seed: int = 0
) -> dict[str, Any]:
    """Returns x (..., C), weights and biases for sizes (..., C, F), scaled so that h and y are
    about 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return (draw(*shape, generator=generator) * scale).to(dtype)

    *_, width, inner = sizes
    made = {
        "x": drawn(*sizes[:-1]),
        "w1": drawn(inner, width, scale=max(width, 1) ** -0.5),
        "b1": drawn(inner),
        "w2": drawn(width, inner, scale=max(inner, 1) ** -0.5),
        "b2": drawn(width),
    }
    return made if biases else made | {"b1": None, "b2": None}


def linear_cross_entropy_inputs(
    *sizes: int, dtype: torch.dtype = FP32, bias: bool = False, ignored: bool = True, seed: int = 0
) -> dict[str, Any]:
    """Returns x (..., C), weight (V, C), targets (...) and bias (V,) or None for sizes (..., C, V),
    scaled so that the logits are about 2. Unless `ignored` is False, every fifth target is -100,
    the second one first."""
    generator = torch.Generator().manual_seed(seed)
    *rows, width, classes = sizes
    x, weight = (draw(*s, generator=generator) for s in ((*rows, width), (classes, width)))
    targets = torch.randint(classes, rows, generator=generator)
    if ignored:
        targets.view(-1)[1::5] = -100
    return {
        "x": x.to(dtype),
        "weight": (weight * (2 * max(width, 1) ** -0.5)).to(dtype),
        "targets": targets.to(DEVICE),
        "bias": draw(classes, dtype=dtype, generator=generator) if bias else None,
    }


def attention_inputs(
    B: int = 1,
    Tq: int = 20,
    Tk: int | None = None,
    H: int = 2,
    Hk: int | None = None,
    D: int = 16,
    dtype: torch.dtype = FP32,
    seed: int | None = 0,
) -> dict[str, Any]:
    """Returns q, k and v. By default Tk is Tq, and Hk is H."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    Tk, Hk = Tq if Tk is None else Tk, H if Hk is None else Hk
    shapes = {"q": (B, Tq, H, D), "k": (B, Tk, Hk, D), "v": (B, Tk, Hk, D)}
    return {k: draw(*shape, dtype=dtype, generator=generator) for k, shape in shapes.items()}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def varlen_inputs(
    queries: list[int],
    keys: list[int],
    H: int = 2,
    Hk: int = 1,
    D: int = 16,
    dtype: torch.dtype = FP32,
) -> dict[str, Tensor]:
    """Returns q, k and v of sequences of these lengths, packed end to end."""
    sizes = {"q": (sum(queries), H, D), "k": (sum(keys), Hk, D), "v": (sum(keys), Hk, D)}
    return {name: draw(*size, dtype=dtype) for name, size in sizes.items()}


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def varlen_lengths(queries: list[int], keys: list[int]) -> dict[str, Any]:
    return {
        "cu_seqlens_q": ends(queries),
        "cu_seqlens_k": ends(keys),
        "max_seqlen_q": max(queries, default=0),
        "max_seqlen_k": max(keys, default=0),
    }


def cache(
    lengths: list[int],
    Tq: int = 1,
    H: int = 2,
    Hk: int = 1,
    D: int = 16,
    page: int | None = None,
    dtype: torch.dtype = FP32,
    capacity: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (q and the caches, the other arguments). What lies past a length, and pages that
    belong to no entry, are NaN."""
    B = len(lengths)
    capacity = max([capacity, *(n + 3 for n in lengths)])
    tensors = {
        "q": draw(B, Tq, H, D, dtype=dtype),
        "k_cache": draw(B, capacity, Hk, D, dtype=dtype),
        "v_cache": draw(B, capacity, Hk, D, dtype=dtype),
    }
    rest = {"cache_lengths": int32(*lengths)}
    dead = torch.arange(capacity, device=DEVICE) >= rest["cache_lengths"][:, None]
    for name in ("k_cache", "v_cache"):
        tensors[name][dead] = torch.nan
    return (tensors, rest) if page is None else in_pages(tensors, rest, page)


def in_pages(
    tensors: dict[str, Tensor], rest: dict[str, Any], page: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the same keys and values in shuffled pages. Two pages belong to no entry."""
    B, capacity, *heads = tensors["k_cache"].shape
    pages = -(-capacity // page)
    table = torch.randperm(B * pages + 2, device=DEVICE)[: B * pages].view(B, pages)
    caches = {}
    for name in ("k_cache", "v_cache"):
        padded = tensors[name].new_full((B, pages * page, *heads), torch.nan)
        padded[:, :capacity] = tensors[name]
        caches[name] = padded.new_full((B * pages + 2, page, *heads), torch.nan)
        caches[name][table] = padded.view(B, pages, page, *heads)
    used = torch.arange(pages, device=DEVICE) * page < rest["cache_lengths"][:, None]
    table = torch.where(used, table, -7).to(torch.int32)  # numbers of unused pages are never read
    return {**tensors, **caches}, {**rest, "block_table": table}
