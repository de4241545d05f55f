"""attn_mask in attention's CPU kernels, on every instruction set. A mask is read in squares of 32
queries and as many keys as 64 bytes hold; blocks of 32 queries and 128 or 256 keys that it hides
are left out."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from harness import BF16, FP16, by_dtype
from op_inputs import attention_inputs
from right import assert_right, assert_same, run
from torch import Tensor

from gptkernels import attention

pytestmark = pytest.mark.usefixtures("isa")
Tq, Tk = 150, 390
# With weights of about one size no single query decides the largest error, PyTorch's or ours.
EVEN = dict(impl="cpu", causal=False, softmax_scale=0.05)


def scattered() -> Tensor:
    seen = torch.rand(Tq, Tk) < 0.6
    seen[:, :2] = True  # no row is without keys
    return seen


def in_blocks() -> Tensor:
    """Groups of queries that meet a block together see it in part, not at all, and whole."""
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    seen[:32, 128:] = False
    seen[32:64, :256] = False
    seen[96:130, 200:384] = False
    seen[:, 384:] = torch.rand(Tq, 6) < 0.5
    return seen


def one_block() -> Tensor:
    """Of the keys past 128 a query sees one."""
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    seen[:, 128:] = False
    seen[70, 300] = True
    return seen


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda mask: mask,
    "keys first": lambda mask: mask.t().contiguous().t(),
    "every second key": lambda mask: mask.repeat_interleave(2, 1)[:, ::2],
    "odd rows": lambda mask: torch.nn.functional.pad(mask, (1, 2))[:, 1:-2],
    "of each head": lambda mask: torch.stack([mask, mask.flip(0)])[None],
}


@by_dtype
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize(
    ("make", "layout"),
    [(scattered, "as it is"), (one_block, "as it is"), *((in_blocks, name) for name in LAYOUTS)],
)
def test_a_mask(
    dtype: torch.dtype, kind: str, make: Callable[[], Tensor], layout: str, seed: int
) -> None:
    tensors = attention_inputs(1, Tq, Tk, 2, 1, 16, dtype=dtype, seed=seed)
    mask = seen = make()
    if kind == "added":
        mask = torch.zeros(Tq, Tk) if make is one_block else 0.3 * torch.randn(Tq, Tk)
        mask = mask.masked_fill(~seen, -torch.inf).to(dtype)
    mask = LAYOUTS[layout](mask)
    assert_right(attention, tensors, seed, attn_mask=mask, **EVEN)


@by_dtype
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_padding(dtype: torch.dtype, kind: str, seed: int) -> None:
    """A mask of the keys alone, which hides whole blocks; the last entry sees nothing."""
    tensors = attention_inputs(3, 40, Tk, 2, 1, 16, dtype=dtype, seed=seed)
    seen = torch.arange(Tk) < torch.tensor([300, 100, 0])[:, None]
    mask = seen[:, None, None]
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).to(dtype)
    call = functools.partial(attention, attn_mask=mask, return_lse=True, **EVEN)
    found = run(call, tensors)
    assert all(x[2].eq(0).all() for x in (found[0], *found[2:]))
    assert torch.isneginf(found[1][2]).all()
    rest = {name: x[:2] for name, x in tensors.items()}
    assert_right(attention, rest, seed, attn_mask=mask[:2], **EVEN)


@by_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_that_a_mask_hides_reaches_nobody(dtype: torch.dtype, value: float) -> None:
    tensors = attention_inputs(1, Tq, Tk, 2, 1, 16, dtype=dtype)
    mask = in_blocks()
    mask[:, 300] = mask[:, 5] = False  # in blocks of which others are seen
    call = functools.partial(attention, impl="cpu", causal=False, attn_mask=mask)
    wanted = run(call, tensors)
    for name in ("k", "v"):
        tensors[name][:, [5, 300]] = value
    assert_same(run(call, tensors), wanted)


@by_dtype
@pytest.mark.parametrize("shape", [(2, 1, 300, 50), (1, 4, 300, 50), (300, 50), (2, 1, 1, 50)])
def test_the_gradient_of_a_mask(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    tensors = attention_inputs(2, 300, 50, 4, 2, dtype=dtype, seed=seed)
    tensors["attn_mask"] = torch.randn(shape).to(dtype)
    assert_right(attention, tensors, seed, impl="cpu", dropout_p=0.2, softcap=3.0)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_gradient_of_a_mask_that_hides(dtype: torch.dtype, seed: int) -> None:
    tensors = attention_inputs(1, Tq, Tk, 2, 1, 16, dtype=dtype, seed=seed)
    mask = torch.randn(Tq, Tk).masked_fill(~in_blocks(), -torch.inf)
    tensors["attn_mask"] = mask.to(dtype)
    assert_right(attention, tensors, seed, impl="cpu", causal=False)
