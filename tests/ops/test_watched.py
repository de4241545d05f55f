"""What watches PyTorch's calls sees the ops: FlopCounterMode counts their products, the profiler
has their names and shapes. Nothing that they do would wait for a GPU."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE, each, of
from op_inputs import (
    attention_inputs,
    cache,
    draw,
    gelu_mlp_inputs,
    int32,
    layer_norm_inputs,
    linear_cross_entropy_inputs,
    varlen_inputs,
    varlen_lengths,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from gptkernels import (
    GPT,
    GPTConfig,
    attention,
    attention_decode,
    attention_varlen,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
)
from gptkernels.core import flops
from gptkernels.core.registry import _LIBRARIES
from gptkernels.truth.plain_gpt import PlainGPT

SEQUENCES = [5, 3], [4, 6]
_SHAPES = (2, 4, 9, 16), (2, 2, 11, 16), (2, 2, 11, 16)
PRODUCT = 2 * 6 * 10 * 20  # of 6 rows


def leaves(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in tensors.items()
    }


# op -> (a call, its inputs, what it takes forward, and backward)
COUNTED: dict[str, tuple[Callable[..., Any], dict[str, Any], int, int]] = {
    "attention": (
        attention,
        attention_inputs(2, 9, 11, H=4, Hk=2),
        sdpa_flop_count(*_SHAPES),
        sdpa_backward_flop_count(_SHAPES[0], *_SHAPES),
    ),
    "attention_varlen": (
        functools.partial(attention_varlen, **varlen_lengths(*SEQUENCES), window=(2, 0)),
        varlen_inputs(*SEQUENCES),
        4 * 2 * 16 * (5 * 4 + 3 * 6),
        10 * 2 * 16 * (5 * 4 + 3 * 6),
    ),
    "gelu_mlp": (gelu_mlp, gelu_mlp_inputs(6, 10, 20), 2 * PRODUCT, 4 * PRODUCT),
    "recomputed": (
        functools.partial(gelu_mlp, recompute=True),
        gelu_mlp_inputs(6, 10, 20),
        2 * PRODUCT,
        4 * PRODUCT,
    ),
    "losses": (
        functools.partial(linear_cross_entropy, reduction="none"),
        linear_cross_entropy_inputs(6, 10, 20),
        PRODUCT,
        2 * PRODUCT,
    ),
    "layer_norm": (layer_norm, layer_norm_inputs(6, 32), 0, 0),
}


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@each
@pytest.mark.parametrize("name", COUNTED)
def test_products_are_counted(name: str, impl: str) -> None:
    op, tensors, forward, backward = COUNTED[name]
    call = functools.partial(op, **leaves(tensors), impl=impl)
    assert counted(call) == forward
    assert counted(lambda: call().sum().backward()) == forward + backward


@pytest.mark.parametrize("page", [None, 4])
def test_a_cache_counts_up_to_its_length(page: int | None) -> None:
    tensors, rest = cache([5, 3], Tq=2, page=page)
    assert counted(lambda: attention_decode(**tensors, **rest)) == 4 * 2 * 2 * 16 * (5 + 3)


@each
def test_a_mean_loss_counts_the_same_wherever_its_gradients_come(impl: str) -> None:
    tensors = leaves(linear_cross_entropy_inputs(6, 10, 20))
    call = functools.partial(linear_cross_entropy, **tensors, impl=impl)
    assert counted(lambda: call().backward()) == 3 * PRODUCT


def test_a_gpt_counts_as_the_plain_one() -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=50, block_size=32)
    tokens = torch.randint(50, (2, 9), device=DEVICE)
    model, plain = GPT(config, device=DEVICE), PlainGPT(config).to(DEVICE)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = counted(lambda: plain(tokens, tokens).backward())
    again = 2 * 2 * 2 * 9 * 9 * 32  # the scores of two blocks, which the plain one keeps
    assert counted(lambda: model(tokens, tokens).backward()) == wanted + again


def test_the_formulas_wait_for_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports Triton, so the ops do not import it."""
    name = flop_counter.__name__
    monkeypatch.setattr(torch.utils, "flop_counter", flop_counter)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [flops._WhenImported(), *sys.meta_path])
    fresh = importlib.import_module(name)
    assert fresh is not flop_counter
    assert torch.ops.gptkernels.attention_fwd in fresh.flop_registry
    monkeypatch.setitem(sys.modules, name, flop_counter)


@pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
def test_the_profiler_has_names_and_shapes(impl: str) -> None:
    q = draw(2, 9, 4, 16).requires_grad_()
    tensors, rest = cache([5, 3])
    calls = {
        "attention_fwd": lambda: attention(q, q, q, impl=impl).sum().backward(),
        "layer_norm_fwd": lambda: layer_norm(q, q[0, 0, 0], impl=impl).sum().backward(),
        "gelu_mlp_fwd": lambda: gelu_mlp(
            q[..., 0, :], q[0, 0], None, q[0, 0].t(), None, impl=impl
        ).sum().backward(),
        "linear_cross_entropy_fwd": lambda: linear_cross_entropy(
            q[0, :, 0], q[0, 0], torch.zeros(9, dtype=torch.int64, device=DEVICE),
            reduction="none", impl=impl,
        ).sum().backward(),
        "attention_decode_fwd": lambda: attention_decode(**tensors, **rest, impl=impl),
    }  # fmt: skip
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for call in calls.values():
            call()
    found = {
        event.key: event.input_shapes
        for event in profiled.key_averages(group_by_input_shape=True)
        if event.key.startswith("gptkernels::")
    }
    expected = set(calls) | {name.replace("_fwd", "_bwd") for name in calls}
    assert set(found) == {f"gptkernels::{name}" for name in expected - {"attention_decode_bwd"}}
    assert found["gptkernels::attention_fwd"][:3] == [[2, 9, 4, 16]] * 3


WAITING: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "attention": lambda: (
        functools.partial(attention, dropout_p=0.1),
        attention_inputs(2, 9) | {"key_lengths": int32(3, 9)},
    ),
    "attention_varlen": lambda: (
        attention_varlen,
        varlen_inputs(*SEQUENCES) | varlen_lengths(*SEQUENCES),
    ),
    "attention_decode": lambda: (attention_decode, functools.reduce(dict.__or__, cache([5, 3]))),
    "layer_norm": lambda: (functools.partial(layer_norm, dropout_p=0.1), layer_norm_inputs(6, 32)),
    "gelu_mlp": lambda: (gelu_mlp, gelu_mlp_inputs(6, 10, 20)),
    "mean loss": lambda: (linear_cross_entropy, linear_cross_entropy_inputs(6, 10, 20)),
    "losses": lambda: (
        functools.partial(linear_cross_entropy, reduction="none"),
        linear_cross_entropy_inputs(6, 10, 20),
    ),
}


@pytest.mark.parametrize("name", WAITING)
def test_nothing_waits_for_values_that_are_not_on_the_cpu(name: str) -> None:
    """A meta tensor has none, and raises where they are read. Elsewhere that would wait for a GPU,
    and keep the call out of a CUDA graph."""
    call, tensors = WAITING[name]()
    given = {k: x.to("meta") if torch.is_tensor(x) else x for k, x in tensors.items()}
    if name == "attention_decode":
        assert call(**given, impl="torch").is_meta
    else:
        call(**leaves(given), impl="torch").sum().backward()
    assert flops.values(torch.empty(3, device="meta")) is None


def test_every_op_is_fit_for_a_cuda_graph() -> None:
    """It writes to no argument, and no tag keeps it out of a graph."""
    for name in _LIBRARIES:
        op = getattr(torch.ops.gptkernels, name).default
        assert not op._schema.is_mutable
        assert torch.Tag.cudagraph_unsafe not in op.tags


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton", "cuda"])
def test_cuda_graph_trees(impl: str) -> None:
    """mode="reduce-overhead": three training steps with dropout, all by replay in the end."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=50, block_size=32, dropout=0.1)
    model = GPT(config, device="cuda").set_impl(impl).train()
    tokens = torch.randint(50, (2, 32), device="cuda")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, mode="reduce-overhead")
    losses = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(tokens, tokens)
        loss.backward()
        losses.append(loss.item())
        model.zero_grad()
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert len(set(losses)) == len(losses)  # a replay draws new masks
