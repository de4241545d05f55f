"""PyTorch's flash attention operators by this package's kernels, called by PyTorch's dispatcher as
on a GPU, but on the device of the tests."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import DEVICE, each
from op_inputs import attention_inputs, int32, varlen_inputs
from right import assert_same, seeded
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn, varlen_attn_out

from gptkernels import attention, attention_decode, attention_varlen
from gptkernels.core import philox
from gptkernels.dropin import sdpa
from gptkernels.truth import baseline, parity, reference

aten = torch.ops.aten
KEY = DEVICE.upper()


@pytest.fixture
def active(impl: str) -> Iterator[None]:
    activation = sdpa.Activation(impl, KEY)
    yield
    activation.remove()


def heads_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.transpose(1, 2) for name, x in tensors.items()}


def of_heads_first(home: Any, **options: Any) -> Any:
    """The attention of a module, of tensors with heads in front."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        swapped = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = home.attention(*swapped, return_lse=True, **options)
        return out.transpose(1, 2), lse

    return call


@each
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.usefixtures("active")
def test_scaled_dot_product_attention(impl: str, dropout_p: float, seed: int) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True, scale=0.3)[0]

    torch.manual_seed(seed)
    options = dict(softmax_scale=0.3, dropout_p=dropout_p, rng=philox.draw(DEVICE))
    right = (of_heads_first(home, **options) for home in (baseline, reference))
    first = (lambda q, k, v, f=f: f(q, k, v)[0] for f in right)
    given = heads_first(attention_inputs(2, 33, H=2, seed=None))
    parity.assert_parity(seeded(call, seed), *first, given, seed=seed)


@each
@pytest.mark.usefixtures("active")
def test_windows_and_slopes(impl: str, seed: int) -> None:
    given = attention_inputs(1, 30, 41, 4, 2, seed=None)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aten._flash_attention_forward(
            q, k, v, None, None, 30, 41, 0.0, False, False, window_size_left=20,
            window_size_right=3,
        )[0]  # fmt: skip

    options = dict(causal=False, window=(20, 3))
    right = (functools.partial(home.attention, **options) for home in (baseline, reference))
    parity.assert_parity(call, *right, given, seed=seed)
    slopes = torch.rand(4, device=DEVICE)
    out, lse, *_ = aten._flash_attention_forward(
        *given.values(), None, None, 30, 41, 0.0, True, False, alibi_slopes=slopes
    )
    wanted = attention(**given, alibi_slopes=slopes, return_lse=True, impl=impl)
    assert_same((out, lse), wanted)


@each
@pytest.mark.usefixtures("active")
def test_packed_sequences(impl: str, seed: int) -> None:
    given = varlen_inputs([9, 20, 4], [9, 20, 4], 4, 2)
    ends = int32(0, 9, 29, 33)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, ends, ends, 20, 20, window_size=(7, 0), enable_gqa=True)

    def right(home: Any) -> Any:
        return lambda q, k, v: home.attention_varlen(q, k, v, ends, ends, 20, 20, window=(7, 0))

    parity.assert_parity(call, right(baseline), right(reference), given, seed=seed)
    plain = {name: x.repeat_interleave(4 // x.shape[1], 1) for name, x in given.items()}
    out = torch.empty_like(plain["q"])
    varlen_attn_out(out, *plain.values(), ends, ends, 20, 20, window_size=(-1, 0))
    wanted = attention_varlen(
        **plain, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=20, max_seqlen_k=20, impl=impl
    )
    assert torch.equal(out, wanted)


@each
@pytest.mark.usefixtures("active")
def test_caches_and_pages(impl: str) -> None:
    q = attention_inputs(3, 2, H=4)["q"]
    pages = dict(zip(("k", "v"), list(attention_inputs(6, 16, H=2).values())[1:], strict=True))
    table, used = int32(4, 1, 0, 2, 5, 3).view(3, 2), int32(7, 32, 17)
    ends = int32(0, 2, 4, 6)
    call = functools.partial(varlen_attn, window_size=(-1, 0), enable_gqa=True, seqused_k=used)
    found = call(q.flatten(0, 1), *pages.values(), ends, None, 2, 32, block_table=table)
    wanted = attention_decode(q, *pages.values(), used, block_table=table, impl=impl)
    assert torch.equal(found.view_as(q), wanted)
    caches = [page[table.long()].flatten(1, 2) for page in pages.values()]
    packed = [cache.flatten(0, 1) for cache in caches]
    found = call(q.flatten(0, 1), *packed, ends, int32(0, 32, 64, 96), 2, 32)
    assert torch.equal(found.view_as(q), attention_decode(q, *caches, used, impl=impl))
    for causal, window in ((True, {}), (False, dict(window_size_left=5, window_size_right=0))):
        found, lse, *_ = aten._flash_attention_forward(
            q, *caches, None, None, 2, 32, 0.0, causal, False, seqused_k=used, **window
        )
        bounds = tuple(window.values()) or None
        wanted = attention_decode(q, *caches, used, window=bounds, return_lse=True, impl=impl)
        assert_same((found, lse), wanted)


@pytest.mark.parametrize("impl", ["torch"])
@pytest.mark.usefixtures("active")
def test_results_lie_as_the_tensors(impl: str) -> None:
    """torch.compile takes that as given."""
    q = torch.randn(2, 3, 20, 16, device=DEVICE)
    for given in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        leaf = given.detach().requires_grad_()
        out = aten._scaled_dot_product_flash_attention(leaf, leaf, given)[0]
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        assert out.stride() == given.stride()
        assert gradient.stride() == given.stride()


@pytest.mark.parametrize("impl", ["torch"])
@pytest.mark.usefixtures("active")
def test_what_is_missing_is_refused_by_name(impl: str) -> None:
    q = torch.randn(2, 8, 2, 16, device=DEVICE)
    call = functools.partial(aten._flash_attention_forward, q, q, q, None, None, 8, 8)
    leaf = q.clone().requires_grad_()
    for refused, said in (
        (lambda: call(0.0, True, True), "return_debug_mask is not known"),
        (lambda: call(0.1, True, False, seqused_k=int32(3, 4)), "dropout_p is not known together"),
        (lambda: call(0.0, True, False, num_splits=4), "num_splits is known together with seqused"),
        (
            lambda: call(0.0, True, False, block_table=int32(0, 1).view(2, 1)),
            "block_table is known",
        ),
        (
            lambda: aten._flash_attention_forward(
                leaf, q, q, None, None, 8, 8, 0.0, True, False, alibi_slopes=torch.ones(2)
            ),
            "alibi_slopes has no backward pass",
        ),
        (
            lambda: varlen_attn(
                q[0], q[0], q[0], int32(0, 3, 8), int32(0, 4, 8), 5, 4, seqused_k=int32(1, 2)
            ),
            "seqused_k is known where every sequence has max_q queries",
        ),
    ):
        with pytest.raises(NotImplementedError, match=f"^{said}"):
            refused()


def test_signatures_are_those_of_the_operators() -> None:
    for name, function in sdpa.OPERATORS.items():
        schema = getattr(aten, name).default._schema
        own = list(inspect.signature(function).parameters)[1:]
        if function is not sdpa.flash_attention_forward_inplace:  # it passes them on
            wanted = [argument.name for argument in schema.arguments]
            assert own[: len(wanted)] == wanted  # an older PyTorch has fewer


def test_it_is_activated_and_restored_by_pytorchs_functions() -> None:
    operators = [f"aten::{name}" for name in sdpa.OPERATORS]

    def here() -> list[Any]:
        return [torch._C._dispatch_dump_table(name) for name in operators]

    before = here()
    activation = sdpa.Activation("torch", KEY)
    assert here() != before
    activation.remove()
    assert here() == before
    for name in sdpa.IMPLEMENTATIONS:
        assert name in nn.attention.list_flash_attention_impls()
        nn.attention.activate_flash_attention_impl(name)
        assert nn.attention.current_flash_attention_impl() == name
        assert all(table != own for table, own in zip(here(), before, strict=True))
        nn.attention.restore_flash_attention_impl()
        assert here() == before
        assert nn.attention.current_flash_attention_impl() is None
