"""The dropout contract, in PyTorch: it says which elements are dropped, and every implementation
follows it.

The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC
2011). It is counter based: the mask is a pure function of (seed, offset, position), so no kernel
stores the mask, and every kernel computes the same one.

    key      = seed (64 bits)
    word w   = Philox(key, c0, c1, c2, c3 = low 32 bits of offset)[w], w = 0..3
    lane l   = 16-bit half (l & 1), low half first, of word l >> 1: eight lanes, so eight elements
    keep    <=> u16 >= t, with t = round(65536 p); kept values are scaled by 65536 / (65536 - t)

Attention, for query i, key j and head h of batch entry b (H heads). The lanes of one call are the
accumulator elements that one thread of an mma fragment holds in a 16 x 16 tile.
    c0 = (j >> 4) * 4 + ((j >> 1) & 3)     c1 = (i >> 4) * 8 + (i & 7)     c2 = b * H + h
    lane = ((i >> 3) & 1) * 4 + ((j >> 3) & 1) * 2 + (j & 1)
Elementwise (LayerNorm's dropout), for element number e of the contiguous tensor:
    c0, c1 = low, high 32 bits of e >> 3     c2 = 0     lane = e & 7

Text generation samples its tokens with the same generator (`uniform`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def draw(device: torch.device | str) -> Tensor:
    """Returns (seed, offset) for one dropout call, int64[2], from PyTorch's generator of `device`.

    Kernels read this tensor through a pointer, so a captured CUDA graph draws new numbers at each
    replay. torch's checkpointing restores the generator, and so repeats the numbers.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """Returns t: how many of the 65,536 values of a lane drop the element."""
    return round(65536 * dropout_p)


def scale(dropout_p: float) -> float:
    """Returns the factor of kept values: the inverse of the rounded keep probability, or 0 where
    nothing is kept."""
    t = threshold(dropout_p)
    return 65536 / (65536 - t) if t < 65536 else 0.0


def attention_keep(
    rng: Tensor | None,
    dropout_p: float,
    batch: int,
    heads: int,
    rows: int,
    cols: int,
    first_row: int = 0,
    first_batch: int = 0,
) -> Tensor:
    """Returns the keep mask (batch, heads, rows, cols), bool, of the queries from first_row on and
    the batch entries from first_batch on."""
    rng = _checked(rng)
    tile_row0 = first_row // 16
    tile_rows, tile_cols = -(-(first_row + rows) // 16) - tile_row0, -(-cols // 16)
    arange = lambda n: torch.arange(n, dtype=torch.int64, device=rng.device)  # noqa: E731
    c0 = arange(tile_cols * 4)
    c1 = (tile_row0 * 8 + arange(tile_rows * 8))[:, None]
    c2 = (first_batch * heads + arange(batch * heads))[:, None, None]
    lanes = _lanes(rng, c0, c1, c2)  # (batch * heads, tile_rows * 8, tile_cols * 4, 8)
    lanes = lanes.view(batch * heads, tile_rows, 8, tile_cols, 4, 2, 2, 2)
    # row = (tile, lane bit 2, row & 7), column = (tile, lane bit 1, (column >> 1) & 3, lane bit 0)
    tile = lanes.permute(0, 1, 5, 2, 3, 6, 4, 7)
    u16 = tile.reshape(batch, heads, tile_rows * 16, tile_cols * 16)
    skipped = first_row - tile_row0 * 16
    return u16[:, :, skipped : skipped + rows, :cols] >= threshold(dropout_p)


def elementwise_keep(
    rng: Tensor | None, dropout_p: float, shape: torch.Size | tuple[int, ...]
) -> Tensor:
    """Returns the keep mask of the given shape, bool; elements are numbered in row-major order."""
    rng = _checked(rng)
    count = math.prod(shape)
    group = torch.arange((count + 7) // 8, dtype=torch.int64, device=rng.device)
    u16 = _lanes(rng, group & _WORD, group >> 32, torch.zeros_like(group))
    return u16.view(-1)[:count].view(shape) >= threshold(dropout_p)


def uniform(seeds: Tensor, stream: Tensor, position: Tensor) -> Tensor:
    """Returns one fp64 number in [0, 1) with 53 random bits for each of R triples.

    seeds (R,) int64 are the keys. stream and position, (R,) int64, are below 2**32. c0 = position,
    c1 = stream, c2 = c3 = 0. The upper 27 bits of a number are the upper bits of word 0, the lower
    26 are the upper bits of word 1.
    """
    zero = torch.zeros_like(position)
    high, low, _, _ = _philox4x32(seeds, position, stream, zero, zero)
    return ((high >> 5) * 2**26 + (low >> 6)).double() / 2**53


def _checked(rng: Tensor | None) -> Tensor:
    if rng is None:
        raise ValueError("rng must be (seed, offset), int64[2], where dropout_p > 0, got None")
    return rng


def _lanes(rng: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Returns the eight 16-bit lanes of each Philox call, int64, in a new last dimension of 8."""
    words = _philox4x32(rng[0], c0, c1, c2, rng[1] & _WORD)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1)


def _philox4x32(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the four 32-bit words of each call, held in int64. Products wrap modulo 2**64; masks
    take their two halves."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = ((first >> 32) & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3
