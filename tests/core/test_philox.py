"""The dropout contract: known answers, the layout of counters, the Triton version bit for bit, and
the CUDA C++ version through an op with dropout. tests/emulator/test_emulator.py tests the CUDA C++
device functions."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from harness import needs_cuda
from hypothesis import given
from hypothesis import strategies as st

from gptkernels import layer_norm
from gptkernels.core import philox
from gptkernels.core.triton_philox import attention_keep_tile, elementwise_keep_tile


def words(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Returns the words of Philox4x32-10, computed with Python's integers as in the paper."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ k0,
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k1,
            first & 0xFFFFFFFF,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def lane(seed: int, offset: int, c0: int, c1: int, c2: int, index: int) -> int:
    key = (seed & 0xFFFFFFFF, seed >> 32)
    word = words(key, (c0, c1, c2, offset & 0xFFFFFFFF))[index >> 1]
    return (word >> 16) if index & 1 else word & 0xFFFF


def test_known_answers_of_the_reference_implementation() -> None:
    """The Random123 library publishes these vectors for philox4x32-10."""
    assert words((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    known = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words((ones, ones), (ones, ones, ones, ones)) == known


@given(
    seed=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 2**63 - 1),
    p=st.floats(0.01, 0.99),
    row=st.integers(0, 40),
    col=st.integers(0, 50),
    head=st.integers(0, 5),
)
def test_attention_mask_follows_the_contract(
    seed: int, offset: int, p: float, row: int, col: int, head: int
) -> None:
    rng = torch.tensor([seed, offset])
    keep = philox.attention_keep(rng, p, batch=2, heads=3, rows=41, cols=51)
    c0, c1 = (col >> 4) * 4 + ((col >> 1) & 3), (row >> 4) * 8 + (row & 7)
    index = ((row >> 3) & 1) * 4 + ((col >> 3) & 1) * 2 + (col & 1)
    expected = lane(seed, offset, c0, c1, head, index) >= round(65536 * p)
    assert keep[head // 3, head % 3, row, col] == expected


@given(
    seed=st.integers(0, 2**63 - 1), offset=st.integers(0, 2**63 - 1), element=st.integers(0, 104)
)
def test_elementwise_mask_follows_the_contract(seed: int, offset: int, element: int) -> None:
    keep = philox.elementwise_keep(torch.tensor([seed, offset]), 0.4, (5, 21))
    expected = lane(seed, offset, element >> 3, 0, 0, element & 7) >= round(65536 * 0.4)
    assert keep.view(-1)[element] == expected


def test_row_blocks_are_rows_of_the_whole() -> None:
    rng = philox.draw("cpu")
    whole = philox.attention_keep(rng, 0.3, 1, 2, 70, 33)
    for first, count in ((0, 16), (16, 20), (21, 1), (37, 33)):
        block = philox.attention_keep(rng, 0.3, 1, 2, count, 33, first_row=first)
        assert torch.equal(block, whole[:, :, first : first + count])


@pytest.mark.parametrize(("p", "share", "scale"), [(0.0, 1.0, 1.0), (1.0, 0.0, 0.0)])
def test_ends_of_the_range(p: float, share: float, scale: float) -> None:
    keep = philox.elementwise_keep(philox.draw("cpu"), p, (1000,))
    assert keep.float().mean() == share
    assert philox.scale(p) == scale


def test_dropout_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="rng must be"):
        philox.elementwise_keep(None, 0.5, (3,))
    with pytest.raises(ValueError, match="rng must be"):
        philox.attention_keep(None, 0.5, 1, 1, 2, 2)


def test_share_of_kept_elements() -> None:
    keep = philox.elementwise_keep(torch.tensor([1, 2]), 0.3, (1_000_000,))
    # The bound is five standard deviations of a binomial share.
    assert abs(keep.double().mean().item() - 0.7) < 5 * (0.3 * 0.7 / 1e6) ** 0.5
    assert philox.scale(0.3) == pytest.approx(1 / 0.7, rel=1e-4)


@triton.jit
def _attention_kernel(
    rng_ptr, out_ptr, row0, col0, head, threshold, ROWS: tl.constexpr, COLS: tl.constexpr
):
    batch_head = head + tl.program_id(0)
    keep = attention_keep_tile(rng_ptr, row0, col0, batch_head, threshold, ROWS, COLS)
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + at, keep.to(tl.int8))


@triton.jit
def _elementwise_kernel(
    rng_ptr,
    out_ptr,
    C,
    col0,
    threshold,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row0 = tl.program_id(0) * ROWS
    keep = elementwise_keep_tile(rng_ptr, row0, C, col0, threshold, ROWS, COLS, ALIGNED)
    cols = col0 + tl.arange(0, COLS)[None, :]
    at = (row0 + tl.arange(0, ROWS))[:, None] * C + cols
    tl.store(out_ptr + at, keep.to(tl.int8), mask=cols < C)


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 32), (128, 16)])
def test_triton_attention_tile(tile: tuple[int, int], device: torch.device, seed: int) -> None:
    rng = philox.draw(device)
    whole = philox.attention_keep(rng, 0.3, 2, 3, 192, 160)
    out = torch.empty(tile, dtype=torch.int8, device=device)
    _attention_kernel[(1,)](rng, out, 64, 96, 4, philox.threshold(0.3), *tile)
    assert torch.equal(out.bool(), whole[1, 1, 64 : 64 + tile[0], 96 : 96 + tile[1]])


@pytest.mark.parametrize(("C", "aligned"), [(24, True), (24, False), (21, False), (64, True)])
def test_triton_elementwise_tile(C: int, aligned: bool, device: torch.device, seed: int) -> None:
    rng = philox.draw(device)
    out = torch.empty(8, C, dtype=torch.int8, device=device)
    for col0 in range(0, C, 16):
        _elementwise_kernel[(4,)](rng, out, C, col0, philox.threshold(0.6), 2, 16, aligned)
    assert torch.equal(out.bool(), philox.elementwise_keep(rng, 0.6, (8, C)))


@needs_cuda
@pytest.mark.parametrize("C", [8, 24, 21, 1, 1031])
@pytest.mark.parametrize("p", [0.001, 0.6, 1.0])
def test_cuda_layer_norm_drops_by_the_contract(
    C: int, p: float, device: torch.device, seed: int
) -> None:
    x = torch.ones(7, C, device=device, requires_grad=True)
    _, s = layer_norm(x, torch.ones(C, device=device), dropout_p=p, prenorm=True, impl="cuda")
    torch.manual_seed(seed)
    keep = philox.elementwise_keep(philox.draw(device), p, x.shape)
    assert torch.equal(s, keep * torch.tensor(philox.scale(p), device=device))
    (dx,) = torch.autograd.grad(s.sum(), x)
    assert torch.equal(dx, s)


def test_counters_past_32_bits(device: torch.device) -> None:
    """Element 2**35 + 8 is in group 2**32 + 1, so its counter needs the high word."""
    rng = torch.tensor([5, 7], device=device)
    out = torch.empty(1, 16, dtype=torch.int8, device=device)
    C = 2**35 + 8
    _far_kernel[(1,)](rng, out, C, philox.threshold(0.5), 16)
    expected = [lane(5, 7, 1 + (i >> 3), 1, 0, i & 7) >= 32768 for i in range(16)]
    assert out.bool().flatten().tolist() == expected


@triton.jit
def _far_kernel(rng_ptr, out_ptr, C, threshold, COLS: tl.constexpr):
    row0 = 1 + tl.program_id(0)
    keep = elementwise_keep_tile(rng_ptr, row0, C, 0, threshold, 1, COLS, True)
    tl.store(out_ptr + tl.arange(0, COLS)[None, :], keep.to(tl.int8))
