"""The dropout contract (see `gptkernels.core.philox`) as Triton device functions. Each Philox call
serves eight elements.

All counters are uint32: with int64 counters `tl.philox` silently becomes Philox4x64, which has
another sequence.
"""

import triton
import triton.language as tl


@triton.jit
def attention_keep_tile(
    rng_ptr, row0, col0, batch_head, threshold, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Returns the keep mask (ROWS, COLS) at (row0, col0), both multiples of 16.
    batch_head = b * H + h."""
    # One counter serves eight elements of a 16 x 16 tile: rows i and i + 8, columns j, j + 1, j + 8
    # and j + 9.
    c1 = (row0 // 16 * 8 + tl.arange(0, ROWS // 2)).to(tl.uint32)[:, None]
    c0 = (col0 // 16 * 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros((ROWS // 2, COLS // 4), dtype=tl.uint32)
    w0, w1, w2, w3 = _words(rng_ptr, c0 + zero, c1 + zero, batch_head.to(tl.uint32) + zero)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # (.., .., column bit 3, row bit 3)
    lanes = tl.join(words & 0xFFFF, words >> 16)  # (.., .., column bit 3, row bit 3, column bit 0)
    lanes = tl.reshape(lanes, (ROWS // 16, 8, COLS // 16, 4, 2, 2, 2))
    lanes = tl.permute(lanes, (0, 5, 1, 2, 4, 3, 6))
    return tl.reshape(lanes, (ROWS, COLS)) >= threshold


@triton.jit
def elementwise_keep_tile(
    rng_ptr,
    row0,
    row_length,
    col0,
    threshold,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Returns the keep mask (ROWS, COLS) of the tile at (row0, col0) of a row-major matrix with
    `row_length` columns.

    ALIGNED: row_length and col0 are multiples of 8, so the eight lanes of a call lie in one row.
    """
    rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    if ALIGNED:
        groups = (rows * row_length + col0) // 8 + tl.arange(0, COLS // 8)[None, :]
        w0, w1, w2, w3 = _group_words(rng_ptr, groups)
        words = tl.join(
            tl.join(w0, w2), tl.join(w1, w3)
        )  # in the last two dimensions the words are in order
        lanes = tl.join(words & 0xFFFF, words >> 16)
        return tl.reshape(lanes, (ROWS, COLS)) >= threshold
    else:
        element = rows * row_length + col0 + tl.arange(0, COLS)[None, :]
        w0, w1, w2, w3 = _group_words(rng_ptr, element // 8)
        lane = (element % 8).to(tl.uint32)
        word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
        return ((word >> ((lane & 1) * 16)) & 0xFFFF) >= threshold


@triton.jit
def _group_words(rng_ptr, groups):
    low, high = (groups & 0xFFFFFFFF).to(tl.uint32), (groups >> 32).to(tl.uint32)
    return _words(rng_ptr, low, high, tl.zeros_like(low))


@triton.jit
def _words(rng_ptr, c0, c1, c2):
    seed = tl.load(rng_ptr)
    c3 = (tl.load(rng_ptr + 1) & 0xFFFFFFFF).to(tl.uint32) + tl.zeros_like(c0)
    return tl.philox(seed, c0, c1, c2, c3)
