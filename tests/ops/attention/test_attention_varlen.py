"""`attention_varlen` against the truth, with packed sequences of any lengths."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import hold, shrink_tiles
from harness import BF16, DEVICE, FP16, FP32, RUNNABLE, each, each_kernel, needs_cuda, of, runnable
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import draw, ends, int32
from op_inputs import varlen_inputs as inputs
from op_inputs import varlen_lengths as arguments
from right import assert_same, check_op, run, seeded
from torch import Tensor

from gptkernels import attention, attention_varlen
from gptkernels.core import philox
from gptkernels.ops.attention import torch as torch_attention
from gptkernels.ops.attention.dense import attention_bwd, attention_fwd
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import varlen
from gptkernels.truth.parity import poisoned_outputs


def hold_varlen(
    impl: str, queries: list[int], keys: list[int], tensors: dict[str, Tensor], **options: Any
) -> None:
    """Asserts that attention_varlen of sequences of these lengths passes the parity rule."""
    seed = int(torch.randint(2**31, ()))
    options |= arguments(queries, keys)
    hold(tensors, impl, seed, op=attention_varlen, **options)


def of_sequences(lengths: dict[str, Any], **options: Any) -> Any:
    """Returns `attention_varlen` as a function of the tensors only. It drops the same elements at
    each call."""
    return seeded(functools.partial(attention_varlen, **lengths, **options))


@contextlib.contextmanager
def small_tiles(impl: str) -> Iterator[None]:
    """Makes the Triton kernels' tiles so small that twenty tokens fill several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        if impl == "triton":
            shrink_tiles(patch, 16, 16)
        yield


ONE_BY_ONE = (
    {},
    {"causal": False},
    {"window": (3, 0)},
    {"causal": False, "window": (2, 1)},
    {"alibi_slopes": [0.5, 0.125]},
    {"softcap": 2.0, "return_lse": True},
    {"dropout_p": 0.3},
    {"softmax_scale": 0.7},
)
# The tests of `attention` cover the arithmetic within a sequence. These options depend on where the
# positions of a sequence begin.
TOGETHER = (
    {"window": (7, 0), "alibi_slopes": [0.5, 0.125], "dropout_p": 0.3},
    {"causal": False, "window": (2, 1), "softcap": 2.0, "return_lse": True},
)


@pytest.mark.parametrize(
    ("impl", "dtype", "options"),
    [
        pytest.param(impl, dtype, options, id=f"{case.id}-{options}", marks=case.marks)
        for case in RUNNABLE
        for impl, dtype in [case.values]
        for options in (ONE_BY_ONE if impl == "torch" else TOGETHER)
    ],
)
def test_each_option_by_positions_of_each_sequence(
    impl: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    queries, keys = [5, 0, 1, 37, 3], [9, 4, 0, 37, 1]
    with small_tiles(impl):
        hold_varlen(impl, queries, keys, inputs(queries, keys, dtype=dtype), **options)


@each
@settings(max_examples=6)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), max_size=4),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    D=st.sampled_from([1, 8, 20]),
    causal=st.booleans(),
    window=st.sampled_from([None, (0, 0), (4, -1), (-1, 3)]),
    dropout_p=st.sampled_from([0.0, 0.5]),
    return_lse=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_lengths(
    impl: str,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    D: int,
    seed: int,
    **options: Any,
) -> None:
    torch.manual_seed(seed)
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    H, Hk = heads
    # The largest error of a few numbers is luck, PyTorch's too.
    more = -(-64 // max(1, sum(queries) * D)) if sum(queries) else 1
    H, Hk = more * H, more * Hk
    with small_tiles(impl):
        hold_varlen(impl, queries, keys, inputs(queries, keys, H, Hk, D), **options)


@runnable
def test_more_sequences_than_a_warp_has_lanes(impl: str, dtype: torch.dtype) -> None:
    """The lanes of a warp together find the sequence that a block of tokens belongs to. Here there
    are more sequences than lanes."""
    queries, keys = [i % 3 for i in range(70)], [i % 4 for i in range(70)]
    hold_varlen(impl, queries, keys, inputs(queries, keys, 1, 1, 8, dtype), return_lse=True)


@runnable
def test_one_long_sequence_among_short_ones(impl: str, dtype: torch.dtype) -> None:
    """The long sequence lies in the middle, and has several of the kernels' full-size tiles."""
    queries, keys = [1, 30, 140, 64, 3], [2, 30, 150, 64, 3]
    hold_varlen(impl, queries, keys, inputs(queries, keys, 1, 1, 64, dtype), return_lse=True)


@each
def test_a_batch_of_equal_lengths_is_attention(impl: str) -> None:
    B, T = 2, 21
    tensors = inputs([B * T], [B * T])
    batch = {name: tensor.unflatten(0, (B, T)) for name, tensor in tensors.items()}
    options = {"dropout_p": 0.4, "deterministic": True, "impl": impl}
    with small_tiles(impl):
        packed = run(of_sequences(arguments([T] * B, [T] * B), **options), tensors)
        whole = run(seeded(functools.partial(attention, **options)), batch)
    assert_same(packed, [x.flatten(0, 1) for x in whole])


@each_kernel
@settings(max_examples=4)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 140)), min_size=1, max_size=3),
    D=st.sampled_from([8, 66, 200]),
    dtype=st.sampled_from([FP32, FP16, BF16]),
    window=st.sampled_from([None, (40, 5)]),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_sequence_gets_the_bits_that_attention_gives_it_alone(
    impl: str,
    lengths: list[tuple[int, int]],
    D: int,
    dtype: torch.dtype,
    seed: int,
    **options: Any,
) -> None:
    dtype = dtype if impl == "cuda" else FP16  # its tiles are large, so few are interpreted
    torch.manual_seed(seed)
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    tensors = inputs(queries, keys, 2, 1, D, dtype)
    longest = {"max_seqlen_q": 1000, "max_seqlen_k": 2000}  # may exceed the longest sequence
    options |= {"impl": impl, "causal": False}
    with poisoned_outputs():
        packed = run(of_sequences(arguments(queries, keys) | longest, **options), tensors)
    q, k, v = tensors.values()
    call = functools.partial(attention, **options)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    alone = [
        run(call, {name: x[None] for name, x in zip("qkv", part, strict=True)}) for part in parts
    ]
    for name, found, wanted in zip(
        ("out", "dq", "dk", "dv"), packed, zip(*alone, strict=True), strict=True
    ):
        whole = torch.cat([x[0] for x in wanted])
        if name == "dq" and impl == "cuda" and not options["deterministic"]:
            torch.testing.assert_close(found, whole)  # atomics sum in any order
        else:
            assert torch.equal(found, whole), name


@each
def test_no_sequence_reaches_another(impl: str) -> None:
    lengths = [4, 3, 6]
    tensors = inputs(lengths, lengths)
    options = {"causal": False, "deterministic": True, "impl": impl}
    call = of_sequences(arguments(lengths, lengths), **options)
    before = run(call, tensors)
    for tensor in tensors.values():
        tensor[4:7] = torch.nan
    for a, b in zip(run(call, tensors), before, strict=True):
        assert torch.equal(a[:4], b[:4])
        assert torch.equal(a[7:], b[7:])


class TestTorchOnAGpu:
    """impl="torch" on a GPU: sequences run at once, padded, and the host reads no values."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(varlen, "attention_fwd", varlen._fwd_at_once)
        monkeypatch.setattr(varlen, "attention_bwd", varlen._bwd_at_once)
        monkeypatch.setattr(varlen, "_PADDED", 2 * 37 * 2 * 16)  # two sequences at a time

    @pytest.mark.parametrize("options", ONE_BY_ONE, ids=str)
    def test_each_option(self, options: dict[str, Any]) -> None:
        queries, keys = [5, 0, 1, 37, 3], [9, 4, 0, 37, 1]
        hold_varlen("torch", queries, keys, inputs(queries, keys), **options)

    def test_sinks_without_any_keys(self) -> None:
        tensors = inputs([3], [0]) | {"sinks": draw(2)}
        call = of_sequences(arguments([3], [0]), return_lse=True, impl="torch")
        out, lse, *_, dsinks = run(call, tensors, [draw(3, 2, 16), torch.ones(2, 3)])
        assert not out.any()
        assert (lse == tensors["sinks"][:, None]).all()
        assert dsinks.tolist() == [3, 3]

    def test_no_sequence_reaches_another(self) -> None:
        test_no_sequence_reaches_another("torch")

    def test_tokens_of_no_sequence(self) -> None:
        test_tokens_of_no_sequence("torch", BF16)

    @pytest.mark.parametrize("wild", [[0, 4, 900], [-5, 4, 7], [7, 4, 0], [2**31 - 1, 0, -9]])
    def test_lengths_are_clamped_to_what_the_tensors_hold(self, wild: list[int]) -> None:
        tensors = inputs([7], [7], dtype=FP16)
        tensors["dout"] = torch.randn_like(tensors["q"])
        found = call_ops("torch", tensors, int32(*wild), int32(*wild))
        clamped = int32(*wild).clamp(0, 7)
        assert_same(found, call_ops("torch", tensors, clamped, clamped))

    def test_the_host_reads_no_values(self) -> None:
        """Of a tensor on the meta device nobody can."""
        options = AttentionOptions(
            0.25, left=3, right=0, dropout_p=0.5, max_seqlen_q=37, max_seqlen_k=37,
            rng=torch.empty(2, dtype=torch.int64, device="meta"),
            cu_seqlens_q=ends([5, 37]).to("meta"), cu_seqlens_k=ends([9, 37]).to("meta"),
        )  # fmt: skip
        q, k, v = (x[None].to("meta") for x in inputs([5, 37], [9, 37]).values())
        out, lse = torch_attention.attention_fwd(q, k, v, options)
        mask = [True, True, True, False, False]
        gradients = torch_attention.attention_bwd(out, lse, q, k, v, out, lse, options, mask, True)
        for x, wanted in zip((out, *gradients), (q, q, k, v), strict=False):
            assert (x.shape, x.is_contiguous()) == (wanted.shape, True)


def call_ops(
    impl: str, tensors: dict[str, Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> list[Tensor]:
    """Calls the registered ops, which check nothing. Returns out, lse, dq, dk and dv of causal
    attention."""
    options = AttentionOptions(
        0.25, right=0, max_seqlen_q=50, max_seqlen_k=50, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    q, k, v, dout = (x[None] for x in tensors.values())
    out, lse = attention_fwd(q, k, v, *options, impl)
    mask = [True, True, True, False, False]
    *gradients, _, _ = attention_bwd(
        dout, torch.ones_like(lse), q, k, v, out, lse, *options, mask, True, impl
    )
    return [x[0] for x in (out, lse, *gradients)]


@runnable
def test_tokens_of_no_sequence(impl: str, dtype: torch.dtype) -> None:
    """On a GPU callers may have tokens before the first sequence and after the last one, here more
    than a block. Whatever these tokens hold, they get out 0, lse -inf and gradient 0. The results
    of the sequences do not change."""
    queries, keys = [10, 3], [4, 20]
    inner = inputs(queries, keys, dtype=dtype)
    inner["dout"] = torch.randn_like(inner["q"])
    outer = {
        name: torch.cat([x.new_full((n, *x.shape[1:]), torch.nan) for n in (7, len(x), 150)])
        for name, x in inner.items()
    }
    for name, x in inner.items():
        outer[name][7:-150] = x
    with poisoned_outputs():
        wanted = call_ops(impl, inner, ends(queries), ends(keys))
        found = call_ops(impl, outer, ends(queries) + 7, ends(keys) + 7)
    wanted[1], found[1] = wanted[1].mT, found[1].mT
    for a, b, nothing in zip(found, wanted, (0.0, -torch.inf, 0.0, 0.0, 0.0), strict=True):
        assert torch.equal(a[7:-150], b)
        assert (a[:7] == nothing).all()
        assert (a[-150:] == nothing).all()


@pytest.mark.parametrize("impl", [of("triton")])
@pytest.mark.parametrize(
    ("cu_seqlens_q", "cu_seqlens_k"),
    [
        ([0, 12, 30], [0, 20, 10]),  # decreases
        ([-9, 20, 2**31 - 1], [5, -(2**31), 2**31 - 1]),  # far outside the tensors
        ([40, 20, 0], [50, 1, 40]),
        ([2**31 - 1] * 3, [-1, 50, 25]),
    ],
)
def test_lengths_that_are_none_stay_within_the_tensors(
    impl: str, cu_seqlens_q: list[int], cu_seqlens_k: list[int]
) -> None:
    """NaN surrounds every tensor. A read out of bounds would show as NaN in the results, and a
    write out of bounds as a missing NaN."""
    T, around = 30, 40
    guarded: list[Tensor] = []

    def guard(*size: Any, dtype: torch.dtype, device: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        edge = around * 32
        count = int(torch.tensor(shape).prod())
        whole = torch.full((count + 2 * edge,), torch.nan, dtype=dtype, device=device)
        guarded.append(whole)
        return whole[edge : edge + count].zero_().view(shape)

    tensors = {
        name: guard(T, heads, 16, dtype=FP32, device=DEVICE).copy_(torch.randn(T, heads, 16))
        for name, heads in (("q", 2), ("k", 1), ("v", 1), ("dout", 2))
    }
    lengths = (int32(*x) for x in (cu_seqlens_q, cu_seqlens_k))
    with small_tiles(impl), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guard)
        results = call_ops(impl, tensors, *lengths)
    assert len(guarded) >= len(tensors) + len(results)
    for whole in guarded:
        assert int(whole.isnan().sum()) == 2 * around * 32


@needs_cuda
def test_lengths_are_clamped_to_what_the_tensors_hold() -> None:
    """The emulator reports every access out of bounds."""
    tensors = [x[None] for x in inputs([7], [7], dtype=FP16).values()]
    for wild in ([0, 4, 900], [-5, 4, 7], [0, 4, 2**31 - 1], [-(2**31), 4, 7]):
        lengths = int32(*wild)
        for cu_seqlens in (lengths, lengths.clamp(0, 7)):
            options = AttentionOptions(
                0.25, right=0, max_seqlen_q=1000, max_seqlen_k=1000, cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
            )  # fmt: skip
            out, lse = attention_fwd(*tensors, *options, "cuda")
            mask = [True, True, True, False, False]
            gradients = attention_bwd(out, None, *tensors, out, lse, *options, mask, True, "cuda")
            if cu_seqlens is lengths:
                found = (out, lse, *gradients)
        assert all(map(torch.equal, found, (out, lse, *gradients)))


@each
@pytest.mark.parametrize("lengths", [[], [0, 0], [3, 0]])
def test_lse_is_fp32_whatever_the_default_dtype(impl: str, lengths: list[int]) -> None:
    tensors = inputs(lengths, lengths)
    torch.set_default_dtype(BF16)
    try:
        _, lse = attention_varlen(
            **tensors, **arguments(lengths, lengths), return_lse=True, impl=impl
        )
    finally:
        torch.set_default_dtype(FP32)
    assert lse.dtype == FP32


@each
def test_strided_inputs(impl: str) -> None:
    lengths = [4, 3]
    tensors = inputs(lengths, lengths)
    wide = {
        name: torch.randn(7, 2 * x.shape[1], 24, device=DEVICE)[:, ::2, :16]
        for name, x in tensors.items()
    }
    hold_varlen(impl, lengths, lengths, wide)
    given = arguments(lengths, lengths)
    every_other = int32(0, 9, 4, 9, 7)[::2]
    assert every_other.tolist() == given["cu_seqlens_q"].tolist()
    strided = given | {"cu_seqlens_q": every_other, "cu_seqlens_k": every_other}
    wanted = run(of_sequences(given, impl=impl), tensors)
    assert_same(run(of_sequences(strided, impl=impl), tensors), wanted)


@each
def test_opcheck(impl: str) -> None:
    queries, keys = [5, 0], [4, 2]
    q, k, v = (x[None] for x in inputs(queries, keys, H=1).values())
    options = AttentionOptions(
        0.25, right=0, dropout_p=0.3, max_seqlen_q=5, max_seqlen_k=4,
        rng=philox.draw(torch.device(DEVICE)), cu_seqlens_q=ends(queries), cu_seqlens_k=ends(keys),
    )  # fmt: skip
    ops = torch.ops.gptkernels
    check_op(ops.attention_fwd.default, (q, k, v, *options, impl))
    out, lse = attention_fwd(q, k, v, *options, impl)
    tensors = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)
    mask = [True, False, True, False, False]
    check_op(ops.attention_bwd.default, (*tensors, *options, mask, False, impl))


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
        ({"deterministic": "no"}, TypeError, "deterministic must be a bool, got 'no'"),
        ({"max_seqlen_k": 4.0}, TypeError, r"max_seqlen_k must be an int, got 4\.0"),
        ({"q": torch.zeros(1, 7, 4, 16)}, ValueError, r"q must have shape \(total_q, H, D\)"),
        ({"k": torch.zeros(7, 3, 16), "v": torch.zeros(7, 3, 16)}, ValueError, "a multiple of"),
        ({"v": torch.zeros(6, 1, 16)}, ValueError, r"v must have shape \(7, 1, 16\)"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1"),
        ({"impl": "mystery"}, ValueError, "impl must be"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {**inputs([4, 3], [4, 3]), **arguments([4, 3], [4, 3])}
    given = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items()}
    changes = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in changes.items()}
    with pytest.raises(error, match=message):
        attention_varlen(**{**given, **changes})
