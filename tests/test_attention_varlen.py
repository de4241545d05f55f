"""`attention_varlen` against the truth: sequences of any lengths, laid end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptkernels import attention, attention_varlen, baseline, philox, reference
from gptkernels.ops.attention_varlen import _bwd, _fwd
from gptkernels.parity import assert_parity


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(
    queries: list[int], keys: list[int], H: int = 4, Hk: int = 2, D: int = 16, **options: Any
) -> dict[str, Any]:
    dtype = options.pop("dtype", torch.float32)
    q = torch.randn(sum(queries), H, D).to(dtype)
    k, v = (torch.randn(sum(keys), Hk, D).to(dtype) for _ in range(2))
    return {"q": q, "k": k, "v": v}


def arguments(queries: list[int], keys: list[int]) -> dict[str, Any]:
    return {
        "cu_seqlens_q": ends(queries),
        "cu_seqlens_k": ends(keys),
        "max_seqlen_q": max(queries, default=0),
        "max_seqlen_k": max(keys, default=0),
    }


def hold(queries: list[int], keys: list[int], tensors: dict[str, Any], **options: Any) -> None:
    given = arguments(queries, keys)
    seed = int(torch.randint(2**31, ()))

    def seeded(op: Any, draws: bool) -> Any:
        def run(**named: Any) -> Any:
            torch.manual_seed(seed)
            if draws:
                return op(**named, **given, **options)
            rng = philox.draw(torch.device("cpu")) if options.get("dropout_p") else None
            return op(**named, **given, **options, rng=rng)

        return run

    assert_parity(
        seeded(attention_varlen, True),
        seeded(baseline.attention_varlen, False),
        seeded(reference.attention_varlen, False),
        tensors,
        names=("out", "lse"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": (3, 0)},
        {"causal": False, "window": (2, 1)},
        {"alibi_slopes": [0.5, 0.25, 0.125, 0.1]},
        {"softcap": 2.0, "return_lse": True},
        {"dropout_p": 0.3},
        {"softmax_scale": 0.7},
    ],
    ids=str,
)
def test_each_option_by_positions_of_each_sequence(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    queries, keys = [5, 0, 1, 17, 3], [9, 4, 0, 17, 1]
    hold(queries, keys, inputs(queries, keys, dtype=dtype), **options)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=0, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    D=st.sampled_from([1, 8, 20]),
    causal=st.booleans(),
    window=st.sampled_from([None, (0, 0), (4, -1), (-1, 3)]),
    dropout_p=st.sampled_from([0.0, 0.5]),
    return_lse=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_lengths(
    lengths: list[tuple[int, int]], heads: tuple[int, int], D: int, seed: int, **options: Any
) -> None:
    torch.manual_seed(seed)
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    hold(queries, keys, inputs(queries, keys, *heads, D), **options)


def test_a_batch_of_equal_lengths_is_attention() -> None:
    B, T, H, D = 3, 7, 2, 8
    q, k, v = (torch.randn(B, T, H, D, requires_grad=True) for _ in range(3))
    given = arguments([T] * B, [T] * B)
    for p in (0.0, 0.4):
        torch.manual_seed(1)
        whole = attention(q, k, v, dropout_p=p)
        torch.manual_seed(1)
        packed = attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), **given, dropout_p=p)
        torch.testing.assert_close(packed.unflatten(0, (B, T)), whole)


def test_no_sequence_reaches_another() -> None:
    queries = keys = [4, 3, 6]
    tensors = inputs(queries, keys)
    given = arguments(queries, keys)
    before = attention_varlen(**tensors, **given, causal=False)
    for name in ("q", "k", "v"):
        tensors[name] = tensors[name].clone()
        tensors[name][4:7] = torch.nan
    after = attention_varlen(**tensors, **given, causal=False)
    assert torch.equal(after[:4], before[:4])
    assert torch.equal(after[7:], before[7:])


def test_strided_inputs_and_autocast() -> None:
    queries = keys = [4, 3]
    tensors = inputs(queries, keys)
    wide = {name: torch.randn(7, 2 * x.shape[1], 24)[:, ::2, :16] for name, x in tensors.items()}
    hold(queries, keys, wide)
    given = arguments(queries, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_varlen(**tensors, **given).dtype == torch.bfloat16


def test_opcheck_and_compile() -> None:
    queries, keys = [5, 0, 3], [4, 2, 3]
    tensors = inputs(queries, keys, dtype=torch.float32)
    q, k, v = tensors.values()
    given = arguments(queries, keys)
    numbers = (5, 4, 0.25, -1, 0, 0.0, 0.0)
    lengths = (given["cu_seqlens_q"], given["cu_seqlens_k"])
    torch.library.opcheck(_fwd, (q, k, v, *lengths, None, None, *numbers, "torch"))
    out, lse = _fwd(q, k, v, *lengths, None, None, *numbers, "torch")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    for mask in ([True] * 3, [False, True, False]):
        torch.library.opcheck(
            _bwd,
            (dout, dlse, q, k, v, out, lse, *lengths, None, None, *numbers, mask, False, "torch"),
        )
    compiled = torch.compile(attention_varlen, backend="aot_eager", fullgraph=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    compiled(*leaves, **given).sum().backward()
    eager = [x.clone().requires_grad_() for x in (q, k, v)]
    attention_varlen(*eager, **given).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, eager, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": ends([4, 3]).long()}, TypeError, "cu_seqlens_q must be int32, got int64"),
        ({"cu_seqlens_q": ends([4, 3])[None]}, ValueError, r"must have shape \(B \+ 1,\)"),
        ({"cu_seqlens_q": ends([4, 3]) + 1}, ValueError, "from 0 to the 7 tokens of q, got 1 to 8"),
        ({"cu_seqlens_q": ends([4, 2])}, ValueError, "from 0 to the 7 tokens of q, got 0 to 6"),
        ({"cu_seqlens_k": ends([9, -2])}, ValueError, "must never fall, got 9 and then 7"),
        ({"cu_seqlens_k": ends([4, 3, 0])}, ValueError, r"shape \(3,\) .* got \(4,\)"),
        ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q must be at least the longest length 4"),
        ({"max_seqlen_k": 4.0}, TypeError, r"max_seqlen_k must be an int, got 4\.0"),
        ({"q": torch.zeros(1, 7, 4, 16)}, ValueError, r"q must have shape \(total_q, H, D\)"),
        ({"k": torch.zeros(7, 3, 16), "v": torch.zeros(7, 3, 16)}, ValueError, "a multiple of"),
        ({"v": torch.zeros(6, 2, 16)}, ValueError, r"v must have shape \(7, 2, 16\)"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1"),
        ({"impl": "triton"}, NotImplementedError, "attention_varlen runs with impl='torch' only"),
        ({"impl": "mystery"}, ValueError, "impl must be"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {**inputs([4, 3], [4, 3]), **arguments([4, 3], [4, 3])}
    with pytest.raises(error, match=message):
        attention_varlen(**{**given, **changes})
