"""Sinks and learned slopes in the CUDA C++ kernels: those for Hopper, and 16 bits in all.
test_attention_learned.py compares every implementation with the truth."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, emulated, needs_cuda
from op_inputs import attention_inputs, cache, draw, ends, varlen_inputs
from right import assert_right, assert_same, run
from torch import Tensor

from gptkernels import attention, attention_decode
from gptkernels.core import native
from gptkernels.ops.attention.cuda import dense
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.truth import baseline, parity, reference

pytestmark = needs_cuda
H = 8
hopper = pytest.mark.usefixtures("hopper")
call = functools.partial(attention, return_lse=True, deterministic=True, impl="cuda")


@pytest.fixture(params=[(FP32, False), (BF16, False), (BF16, True), (FP16, True)], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """With the kernels for any GPU, or with Hopper's."""
    dtype, by_hopper = request.param
    if by_hopper:
        request.getfixturevalue("hopper")
    assert isinstance(dtype, torch.dtype)
    return dtype


def inputs(Tq: int, Tk: int, dtype: torch.dtype = BF16, B: int = 1) -> dict[str, Any]:
    return attention_inputs(B, Tq, Tk, H, 2, 64, dtype, seed=None)


@hopper
def test_hopper_takes_sinks_and_slopes_of_entries() -> None:
    """Rows 0 ... 9 see no key."""
    tensors, sinks, slopes = inputs(80, 70, B=2), draw(H), draw(2, H).abs() * 0.2
    options = dict(sinks=sinks, alibi_slopes=slopes, return_lse=True, impl="cuda")
    made = native.record(functools.partial(assert_right, attention, tensors, **options))
    names = {launch["kernel"] for launch in made["launches"]}
    assert names >= {"attention_fwd_sm90_kernel", "attention_bwd_sm90_kernel"}


@hopper
def test_rows_that_hopper_computes_again_have_their_sinks() -> None:
    """Rows 30 ... 39 see a NaN, which reaches the others of its block first."""
    tensors, options = inputs(60, 60), dict(window=(9, 0), sinks=draw(H) + 2, return_lse=True)
    truth = reference.attention(**{k: x.double() for k, x in tensors.items()}, **options)
    plain = baseline.attention(**tensors, **options)
    tensors["v"][:, 30] = torch.nan
    apart = [i for i in range(60) if not 30 <= i < 40]
    for one in zip(call(**tensors, **options), plain, truth, strict=True):
        rows = (x.transpose(1, -1) if x.dim() == 3 else x for x in one)
        measured = parity.compare(*(x[:, apart] for x in rows), k=parity.K_FORWARD)
        assert measured.passed, measured


@hopper
@emulated
def test_the_gradient_of_slopes_leaves_hopper_and_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = inputs(40, 70) | {"alibi_slopes": draw(H)}
    found = []
    for schedule in ("forward", "reverse"):
        monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
        made = native.record(
            lambda: found.append(run(functools.partial(attention, impl="cuda"), tensors))
        )
    assert_same(*found)
    names = [launch["kernel"] for launch in made["launches"]]
    assert names[-3:] == [f"attention_bwd_{one}_kernel" for one in ("delta", "queries", "keys")]
    assert made["refusals"][-1][0] == "attention_bwd_sm90"
    assert "the gradient of slopes" in made["refusals"][-1][1]


def test_a_sink_of_no_weight_changes_no_bit_of_any_kernel(dtype: torch.dtype) -> None:
    """Rows 0 ... 3 see no key."""
    tensors, none = inputs(24, 20, dtype), torch.full((H,), -math.inf, device=DEVICE)
    assert_same(*(run(functools.partial(call, sinks=x), tensors) for x in (none, None)))


@pytest.mark.parametrize("num_splits", [1, 3])
def test_decoding_with_a_sink_of_no_weight(num_splits: int) -> None:
    tensors, rest = cache([150, 0, 5], 2, H, 2, 16, dtype=BF16)
    none = torch.full((H,), -math.inf, device=DEVICE)
    options = dict(num_splits=num_splits, return_lse=True, impl="cuda", **rest)
    assert_same(*(attention_decode(**tensors, sinks=x, **options) for x in (none, None)))


@pytest.mark.parametrize("where", ["q", "dout", "dlse", "-inf in q"])
def test_what_is_not_finite_reaches_nobody_who_does_not_see_it(
    dtype: torch.dtype, where: str
) -> None:
    """Rows 0 ... 3 see no key, but their sinks make lse finite. So it is in row 9, whose scores are
    all -inf; it sees keys 0 ... 5. 32 rows fill a tile: past the end of one rows are cleared."""
    tensors, sinks = inputs(32, 28, dtype), draw(H)
    cotangents = [torch.randn_like(tensors["q"]), draw(1, H, 32)]
    tensors["k"][..., 0] = 1
    hidden = 0
    if where == "-inf in q":
        tensors["q"][:, 9, :, 0] = -math.inf
        hidden = 6
    else:
        given = {"q": tensors["q"], "dout": cotangents[0], "dlse": cotangents[1].mT}
        given[where][:, :4] = math.nan
    out, lse, *gradients = run(functools.partial(call, sinks=sinks), tensors, cotangents)
    empty = 9 if hidden else slice(0, 4)
    assert not out[:, empty].any()
    assert_same([lse.mT[:, empty]], [sinks.expand_as(lse.mT[:, empty])])
    dq, dk, dv = gradients
    assert hidden or not dq[:, :4].any()
    assert torch.isfinite(dq[:, 10:]).all()
    assert all(torch.isfinite(x[:, hidden:]).all() for x in (dk, dv))


def test_tokens_of_no_sequence_add_nothing_to_the_slopes_gradient() -> None:
    """On a GPU callers may have them. They have no sink either: lse is -inf."""
    lengths = [10, 3]
    tensors = varlen_inputs([33], [33], H, 2)
    q, k, v, dout = (x[None] for x in (*tensors.values(), torch.randn_like(tensors["q"])))
    options = AttentionOptions(
        0.25, right=0, max_seqlen_q=10, max_seqlen_k=10, alibi_slopes=draw(2, H), sinks=draw(H),
        cu_seqlens_q=ends(lengths) + 7, cu_seqlens_k=ends(lengths) + 7,
    )  # fmt: skip
    with parity.poisoned_outputs():
        out, lse = dense.attention_fwd(q, k, v, options)
        wanted = [False, False, False, False, True]
        by_query: Tensor = dense.attention_bwd(
            dout, None, q, k, v, out, lse, options, wanted, deterministic=False
        )[4]
    outside = [i for i in range(33) if not 7 <= i < 20]
    assert (lse[..., outside] == -math.inf).all()
    assert not by_query[..., outside].any()
    assert by_query[..., 8:17].all()
