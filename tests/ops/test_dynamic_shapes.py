"""Automatic dynamic shapes: how many graphs calls of many sizes make. The second size makes a graph
for all, as PyTorch's own functions do; a dimension of size 1 has graphs of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE, of
from op_inputs import attention_inputs, cache, varlen_inputs, varlen_lengths
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import gptkernels

SIZES = [(2, 7), (3, 12), (5, 9), (4, 33)]
ONES = [(1, 10), (4, 1)]
both = pytest.mark.parametrize("impl", [of("torch"), of("cpu")])


def graphs(call: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[int]:
    """How many graphs there are after each of these calls, forward and, where it has a gradient,
    backward."""
    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for arguments in calls:
        out = compiled(*arguments)
        if out.requires_grad:
            out.sum().backward()
        counts.append(counter.frame_count)
    return counts


def test_attention() -> None:
    """impl="torch" tells a window that hides nothing, here of the first size, from one that does:
    that makes another graph."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return gptkernels.attention(q, k, v, window=(8, 0), impl="torch")

    inputs = [tuple(attention_inputs(B, T, H=6).values()) for B, T in (*SIZES, *ONES)]
    assert graphs(call, inputs) == [1, 2, 3, 3, 4, 5]


def test_a_gpt_in_training() -> None:
    config = gptkernels.GPTConfig(
        n_layer=1, n_head=6, n_embd=24, vocab_size=50, block_size=64, dropout=0.1
    )
    model = gptkernels.GPT(config, device=DEVICE).train()
    texts = [torch.randint(50, size, device=DEVICE) for size in SIZES]
    assert graphs(lambda text: model(text, text), [(text,) for text in texts]) == [1, 2, 2, 2]


@both
def test_packed_sequences(impl: str) -> None:
    """Their number, their lengths and the longest differ from call to call."""

    def call(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Any:
        return gptkernels.attention_varlen(q, k, v, ends, ends, longest, longest, impl=impl)

    calls = []
    for lengths in ([5, 3, 4], [9, 2, 6], [4, 12, 3], [7, 8, 2, 6, 13]):
        tensors = [x.requires_grad_() for x in varlen_inputs(lengths, lengths).values()]
        named = varlen_lengths(lengths, lengths)
        calls.append((*tensors, named["cu_seqlens_q"], named["max_seqlen_q"]))
    assert graphs(call, calls)[-1] <= 3  # other totals, then another number of sequences


@both
def test_a_cache_that_grows(impl: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
        return gptkernels.attention_decode(q, k, v, lengths, impl=impl)

    calls = []
    for capacity in (9, 17, 33, 65):
        tensors, rest = cache([5, 3], capacity=capacity)
        calls.append((*tensors.values(), rest["cache_lengths"]))
    assert graphs(call, calls) == [1, 2, 2, 2]
