"""The CUDA C++ kernel of `attention_decode` (csrc/attention/decode): each of its builds, in the
emulator or on a GPU. test_attention_decode.py compares every implementation with the truth.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import cache
from right import assert_right, assert_same
from torch import Tensor

from gptkernels import attention_decode

pytestmark = needs_cuda


def problem(*sizes: Any, **options: Any) -> dict[str, Any]:
    """Returns the arguments of a call. What lies past a length, and pages that belong to no entry,
    are NaN; no block table names such pages."""
    tensors, rest = cache(*sizes, **options)
    return tensors | rest


def hold(given: dict[str, Any], num_splits: int | None = None, **options: Any) -> None:
    """Asserts that out and lse pass the parity rule."""
    tensors = {name: given[name] for name in ("q", "k_cache", "v_cache")}
    options |= {name: x for name, x in given.items() if name not in tensors}
    how = dict(num_splits=num_splits, return_lse=True, impl="cuda")
    assert_right(attention_decode, tensors, gradients=False, **how, **options)


def run(given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    found = attention_decode(**given, **options, return_lse=True, impl="cuda")
    assert isinstance(found, tuple)
    return found


# (Tq, H, Hk). The number of rows is Tq * H / Hk. With at most 16 rows each warp has keys of its
# own; the other builds have blocks of 64 and of 128 rows; 136 rows are more than one block.
ROWS = {"1 row": (1, 2, 2), "16 rows": (4, 8, 2), "40 rows": (5, 8, 1), "136 rows": (17, 8, 1)}


@pytest.mark.parametrize("D", [64, 96, 128, 192, 256, 20])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_every_build_in_16_bits(rows: tuple[int, int, int], D: int) -> None:
    Tq, H, Hk = rows
    hold(problem([70, 0, 21], Tq, H, Hk, D, dtype=BF16), num_splits=2, window=(30, 0))
    if D % 128 == 0:
        hold(problem([70], Tq, H, Hk, D, dtype=FP16), num_splits=2)


@pytest.mark.parametrize("D", [64, 96, 128, 192, 256, 20])
@pytest.mark.parametrize("Tq", [1, 5])
def test_every_build_in_32_bits(Tq: int, D: int) -> None:
    """There is one build for each width, with blocks of 16 rows."""
    hold(problem([70, 0, 21], Tq, 4, 1, D), num_splits=2, window=(30, 0))


@pytest.mark.parametrize("page", [None, 1, 7, 64])
@pytest.mark.parametrize("length", [255, 256, 257, 700])
def test_splits_by_the_length(length: int, page: int | None) -> None:
    """Up to 256 keys make one split, and 700 keys make three, which the second kernel combines."""
    hold(
        problem([length, 3], 2, 4, 2, 64, page, BF16), softcap=2.0, alibi_slopes=[0.5, 0.2, 0.1, 0]
    )


def test_a_window_far_from_the_first_split() -> None:
    given = problem([900, 300], 3, 2, 1, 64, 16, FP16)
    hold(given, window=(20, 0))
    hold(given, window=(400, 0), num_splits=9)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    Tq=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (6, 2), (8, 1)]),
    D=st.sampled_from([1, 8, 64, 72, 130]),
    page=st.sampled_from([None, 1, 5, 16]),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    window=st.sampled_from([None, (0, 0), (6, -1), (100, 0)]),
    num_splits=st.sampled_from([None, 1, 2, 7, 40]),
    seed=st.integers(0, 2**32),
)
def test_any_shape(
    lengths: list[int],
    Tq: int,
    heads: tuple[int, int],
    D: int,
    page: int | None,
    dtype: torch.dtype,
    window: tuple[int, int] | None,
    num_splits: int | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    # PyTorch's error on few numbers is random.
    lengths = lengths * max(1, 32 // (len(lengths) * Tq * heads[0]))
    hold(problem(lengths, Tq, *heads, D, page, dtype), num_splits, window=window)


@pytest.mark.parametrize("Tq", [1, 3, 20])
def test_nan_reaches_the_rows_that_see_it_alone(Tq: int) -> None:
    """Keys before the window, which no token sees, are NaN. So is the last key of key head 1, which
    only the last token sees."""
    length, left = 150, 40
    given = problem([length], Tq, 8, 2, 64, dtype=BF16)
    clean = {name: x.clone() for name, x in given.items()}
    for x in (given["k_cache"], given["v_cache"]):
        x[:, : length - Tq - left] = torch.nan  # no token sees these keys
        x[:, length - 1, 1, 5] = torch.nan
    out, lse = run(given, window=(left, 0))
    expected, expected_lse = run(clean, window=(left, 0))
    sees = torch.zeros_like(lse, dtype=torch.bool)
    sees[:, 4:, -1] = True  # the query heads that read key head 1
    assert not torch.isfinite(lse[sees]).any()
    torch.testing.assert_close(lse[~sees], expected_lse[~sees], rtol=0, atol=0)
    rows = sees.mT
    assert not torch.isfinite(out[rows]).any()
    torch.testing.assert_close(out[~rows], expected[~rows], rtol=0, atol=0)


def test_values_that_are_not_finite_with_finite_weights() -> None:
    given = problem([90], 5, 4, 2, 64, 16, FP16)
    page, place = int(given["block_table"][0, 88 // 16]), 88 % 16
    given["v_cache"][page, place, 0, 7] = -torch.inf  # only the last two tokens see this value
    out, lse = run(given)
    infinite = torch.zeros_like(out, dtype=torch.bool)
    infinite[:, 3:, :2, 7] = True
    assert torch.equal(out == -torch.inf, infinite)
    assert torch.isfinite(out[~infinite]).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("Tq", [1, 3, 9])
def test_the_same_bits_in_16_bits(Tq: int, num_splits: int | None) -> None:
    """An entry has the same bits in a batch, alone, in a larger cache, and with rows that the
    kernel copies element by element."""
    given = problem([300, 5, 90, 0], Tq, 8, 2, 64, dtype=BF16)
    together = run(given, num_splits=num_splits)
    for b, length in enumerate(given["cache_lengths"].tolist()):
        alone = {name: x[b : b + 1] for name, x in given.items()}
        larger, odd = dict(alone), dict(alone)
        for name in ("k_cache", "v_cache"):
            x = torch.full((1, 700, 2, 67), torch.nan, dtype=BF16, device=DEVICE)
            x[:, :length, :, 1:65] = alone[name][:, :length]
            odd[name], larger[name] = x[..., 1:65], x[..., 1:65].contiguous()
        for other in (alone, larger, odd):
            found = run(other, num_splits=num_splits)
            assert_same([x[0] for x in found], [x[b] for x in together])


def test_strides() -> None:
    """Heads before tokens; then rows with gaps between them, which 16-byte copies cannot read."""
    given = problem([40, 19], 2, 4, 2, 64, dtype=BF16)
    by_heads = {
        name: given[name].transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("q", "k_cache", "v_cache")
    }
    hold(given | by_heads)
    odd = {}
    for name in ("q", "k_cache", "v_cache"):
        wide = torch.full((*given[name].shape[:-1], 67), torch.nan, dtype=BF16, device=DEVICE)
        wide[..., 1:65] = given[name]
        odd[name] = wide[..., 1:65]
    hold(given | odd, num_splits=1)
