"""`attention_varlen` against the truth: sequences of any lengths, laid end to end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptkernels import attention, attention_varlen, baseline, philox, reference
from gptkernels.ops.attention_varlen import _bwd, _fwd
from gptkernels.ops.choice import unavailable
from gptkernels.parity import assert_parity, poisoned_outputs

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNNABLE = [
    pytest.param(impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}")
    for impl in ("torch", "cuda")
    for dtype in (FP32, FP16, BF16)
    if unavailable(impl, DEVICE, dtype) is None
]
runnable = pytest.mark.parametrize(("impl", "dtype"), RUNNABLE)
NO_CUDA = unavailable("cuda", DEVICE, FP32)
cuda = pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA))
each = pytest.mark.parametrize(
    "impl", [impl for impl in ("torch", "cuda") if unavailable(impl, DEVICE, FP32) is None]
)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)


def inputs(
    queries: list[int],
    keys: list[int],
    H: int = 4,
    Hk: int = 2,
    D: int = 16,
    dtype: torch.dtype = FP32,
) -> dict[str, Any]:
    shapes = ((sum(queries), H, D), *[(sum(keys), Hk, D)] * 2)
    q, k, v = (torch.randn(shape).to(DEVICE, dtype) for shape in shapes)
    return {"q": q, "k": k, "v": v}


def arguments(queries: list[int], keys: list[int]) -> dict[str, Any]:
    return {
        "cu_seqlens_q": ends(queries),
        "cu_seqlens_k": ends(keys),
        "max_seqlen_q": max(queries, default=0),
        "max_seqlen_k": max(keys, default=0),
    }


def hold(
    queries: list[int], keys: list[int], tensors: dict[str, Any], impl: str, **options: Any
) -> None:
    given = arguments(queries, keys)
    seed = int(torch.randint(2**31, ()))

    def seeded(op: Any, **more: Any) -> Any:
        def run(**named: Any) -> Any:
            torch.manual_seed(seed)
            if "impl" in more:
                return op(**named, **given, **options, **more)
            rng = philox.draw(torch.device(DEVICE)) if options.get("dropout_p") else None
            return op(**named, **given, **options, rng=rng)

        return run

    # In 16 bits the CUDA C++ kernels have two ways to dq.
    for deterministic in (
        (False, True) if impl == "cuda" and tensors["q"].dtype != FP32 else (None,)
    ):
        assert_parity(
            seeded(attention_varlen, impl=impl, deterministic=deterministic),
            seeded(baseline.attention_varlen),
            seeded(reference.attention_varlen),
            tensors,
            names=("out", "lse"),
        )


@runnable
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
    impl: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    queries, keys = [5, 0, 1, 37, 3], [9, 4, 0, 37, 1]
    hold(queries, keys, inputs(queries, keys, dtype=dtype), impl, **options)


@each
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=0, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    D=st.sampled_from([1, 8, 20]),
    causal=st.booleans(),
    window=st.sampled_from([None, (0, 0), (4, -1), (-1, 3)]),
    dropout_p=st.sampled_from([0.0, 0.5]),
    return_lse=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_lengths(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    D: int,
    seed: int,
    impl: str,
    **options: Any,
) -> None:
    torch.manual_seed(seed)
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    hold(queries, keys, inputs(queries, keys, *heads, D), impl, **options)


def run(operation: Any, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    torch.manual_seed(1)
    out = operation(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


@cuda
@settings(max_examples=8)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 140)), min_size=1, max_size=3),
    D=st.sampled_from([8, 66, 200]),
    dtype=st.sampled_from([FP32, FP16, BF16]),
    window=st.sampled_from([None, (40, 5)]),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_sequence_gets_the_bits_that_attention_gives_it_alone(
    lengths: list[tuple[int, int]], D: int, dtype: torch.dtype, seed: int, **options: Any
) -> None:
    torch.manual_seed(seed)
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    q, k, v = inputs(queries, keys, 2, 1, D, dtype).values()
    options |= {"impl": "cuda", "causal": False}
    with poisoned_outputs():
        packed = run(attention_varlen, q, k, v, **arguments(queries, keys), **options)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    alone = [run(attention, *(x[None] for x in part), **options) for part in parts]
    for name, found, wanted in zip(
        ("out", "dq", "dk", "dv"), packed, zip(*alone, strict=True), strict=True
    ):
        whole = torch.cat([x[0] for x in wanted])
        if name == "dq" and not options["deterministic"]:  # atomics, in any order
            torch.testing.assert_close(found, whole)
        else:
            assert torch.equal(found, whole), name


@runnable
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_a_batch_of_equal_lengths_is_attention(
    impl: str, dtype: torch.dtype, dropout_p: float
) -> None:
    B, T, H, D = 3, 7, 2, 8
    tensors = [torch.randn(B, T, H, D).to(DEVICE, dtype) for _ in range(3)]
    options = {"dropout_p": dropout_p, "deterministic": True, "impl": impl}
    whole = run(attention, *tensors, **options)
    packed = run(
        attention_varlen,
        *(x.flatten(0, 1) for x in tensors),
        **arguments([T] * B, [T] * B),
        **options,
    )
    for one, other in zip(packed, whole, strict=True):
        if impl == "torch":  # one sequence after the other
            torch.testing.assert_close(one.unflatten(0, (B, T)), other)
        else:
            assert torch.equal(one.unflatten(0, (B, T)), other)


@runnable
def test_no_sequence_reaches_another(impl: str, dtype: torch.dtype) -> None:
    queries = keys = [4, 3, 6]
    q, k, v = inputs(queries, keys, dtype=dtype).values()
    options = {**arguments(queries, keys), "causal": False, "deterministic": True, "impl": impl}
    before = run(attention_varlen, q, k, v, **options)
    for x in (q, k, v):
        x[4:7] = torch.nan
    after = run(attention_varlen, q, k, v, **options)
    for one, other in zip(after, before, strict=True):
        assert torch.equal(one[:4], other[:4])
        assert torch.equal(one[7:], other[7:])
        assert one[4:7].isnan().all()


@runnable
@pytest.mark.parametrize("deterministic", [False, True])
def test_tokens_of_no_sequence_give_zeros(
    impl: str, dtype: torch.dtype, deterministic: bool
) -> None:
    """On a GPU nobody looks whether the sequences cover the tensors: buffers may be longer."""
    # 2 queries before the first sequence and 5 past the last one, 3 keys and 4.
    lengths = tuple(
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([2, 6, 9], [3, 9, 12])
    )
    q, k, v = inputs([14], [16], dtype=dtype).values()
    numbers = (4, 6, 0.25, -1, 0, 0.0, 0.0)
    dout, dlse = torch.randn_like(q), torch.randn(4, 14, device=DEVICE)
    for x, start, end in ((q, 2, 9), (dout, 2, 9), (k, 3, 12), (v, 3, 12)):
        x[:start], x[end:] = torch.nan, torch.nan
    with poisoned_outputs():
        out, lse = _fwd(q, k, v, *lengths, None, None, *numbers, impl)
        gradients = _bwd(
            dout, dlse, q, k, v, out, lse, *lengths, None, None, *numbers, [True] * 3,
            deterministic, impl,
        )  # fmt: skip
    inner = tuple(x - x[0] for x in lengths)
    within = (q[2:9], k[3:12], v[3:12], *inner, None, None, *numbers)
    wanted, wanted_lse = _fwd(*within, impl)
    wanted_gradients = _bwd(
        dout[2:9],
        dlse[:, 2:9],
        *within[:3],
        wanted,
        wanted_lse,
        *within[3:],
        [True] * 3,
        True,
        impl,
    )
    assert torch.equal(lse[:, 2:9], wanted_lse)
    assert (lse[:, :2] == -math.inf).all()
    assert (lse[:, 9:] == -math.inf).all()
    for found, part, (start, end) in zip(
        (out, *gradients),
        (wanted, *wanted_gradients),
        ((2, 9), (2, 9), (3, 12), (3, 12)),
        strict=True,
    ):
        assert not found[:start].any()
        assert not found[end:].any()
        torch.testing.assert_close(found[start:end], part)


@cuda
def test_lengths_are_clamped_to_what_the_tensors_hold() -> None:
    """The emulator finds every access that is out of bounds."""
    tensors = inputs([7], [7], dtype=FP16).values()
    for wild in ([0, 4, 900], [-5, 4, 7], [0, 4, 2**31 - 1], [-(2**31), 4, 7]):
        lengths = torch.tensor(wild, dtype=torch.int32, device=DEVICE)
        for cu_seqlens in (lengths, lengths.clamp(0, 7)):
            numbers = (1000, 1000, 0.25, -1, 0, 0.0, 0.0)
            extras = (cu_seqlens, cu_seqlens, None, None, *numbers)
            out, lse = _fwd(*tensors, *extras, "cuda")
            gradients = _bwd(out, None, *tensors, out, lse, *extras, [True] * 3, True, "cuda")
            if cu_seqlens is lengths:
                found = (out, lse, *gradients)
        assert all(map(torch.equal, found, (out, lse, *gradients)))


@each
def test_strided_inputs_and_autocast(impl: str) -> None:
    queries = keys = [4, 3]
    tensors = inputs(queries, keys)
    wide = {
        name: torch.randn(7, 2 * x.shape[1], 24, device=DEVICE)[:, ::2, :16]
        for name, x in tensors.items()
    }
    hold(queries, keys, wide, impl)
    given = arguments(queries, keys)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert attention_varlen(**tensors, **given, impl=impl).dtype == torch.bfloat16


@each
def test_opcheck_and_compile(impl: str) -> None:
    queries, keys = [5, 0, 3], [4, 2, 3]
    q, k, v = inputs(queries, keys).values()
    given = arguments(queries, keys)
    numbers = (5, 4, 0.25, -1, 0, 0.0, 0.0)
    lengths = (given["cu_seqlens_q"], given["cu_seqlens_k"])
    torch.library.opcheck(_fwd, (q, k, v, *lengths, None, None, *numbers, impl))
    out, lse = _fwd(q, k, v, *lengths, None, None, *numbers, impl)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    for mask in ([True] * 3, [False, True, False]):
        torch.library.opcheck(
            _bwd,
            (dout, dlse, q, k, v, out, lse, *lengths, None, None, *numbers, mask, False, impl),
        )
    compiled = torch.compile(attention_varlen, backend="aot_eager", fullgraph=True)
    found = run(compiled, q, k, v, **given, impl=impl)
    assert all(map(torch.equal, found, run(attention_varlen, q, k, v, **given, impl=impl)))


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
        ({"impl": "triton"}, NotImplementedError, "runs with impl='torch' or 'cuda' only"),
        ({"impl": "mystery"}, ValueError, "impl must be"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {**inputs([4, 3], [4, 3]), **arguments([4, 3], [4, 3])}
    with pytest.raises(error, match=message):
        attention_varlen(**{**given, **changes})
