"""The calls that are measured: each is of the class that it was made for, all ways pass on it, and
it runs by the way that is asked for."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import BF16, FP16, FP32
from torch import Tensor

from gptkernels import (
    attention,
    attention_decode,
    attention_varlen,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
)
from gptkernels.core import cpu, plans
from gptkernels.core.plans import Call
from gptkernels.core.tuned import TRAINING, Key
from gptkernels.tuning import ways
from gptkernels.tuning.contest import sizes_at
from gptkernels.tuning.problems import problem
from gptkernels.tuning.trial import Refused, Runner

pytestmark = pytest.mark.skipif(
    cpu.unavailable("cpu") is not None, reason="the CPU kernels are not built"
)


@pytest.fixture(autouse=True)
def _own_plans() -> Iterator[None]:
    plans.use("cpu", None)
    yield
    plans.use("cpu", None)


def drawn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(dtype)


def norm(
    rows: int = 6,
    C: int = 24,
    *,
    dtype: torch.dtype = FP32,
    weight: torch.dtype | None = FP32,
    bias: torch.dtype | None = FP32,
    residual: torch.dtype | None = None,
    strided: bool = False,
    **options: Any,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    tensors: dict[str, Any] = {"x": drawn(C, rows, dtype=dtype).t()}
    if not strided:
        tensors["x"] = tensors["x"].contiguous()
    tensors["weight"] = None if weight is None else drawn(C, dtype=weight)
    tensors["bias"] = None if bias is None else drawn(C, dtype=bias)
    if residual is not None:
        tensors["residual"] = drawn(rows, C, dtype=residual)
    return layer_norm, tensors, options


def mlp(
    rows: int = 6,
    C: int = 16,
    F: int = 40,
    *,
    dtype: torch.dtype = FP32,
    weights: torch.dtype | None = None,
    transposed: bool = False,
    strided: bool = False,
    b1: bool = True,
    b2: bool = True,
    **options: Any,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    own = weights or dtype

    def matrix(N: int, K: int) -> Tensor:
        w = drawn(N, K, dtype=own) / 4
        return w.t().contiguous().t() if transposed else w

    x = drawn(rows, 2 * C, dtype=dtype)[:, :C]
    tensors: dict[str, Any] = {
        "x": x if strided else x.contiguous(),
        "w1": matrix(F, C),
        "b1": drawn(F, dtype=own) if b1 else None,
        "w2": matrix(C, F),
        "b2": drawn(C, dtype=own) if b2 else None,
    }
    return gelu_mlp, tensors, options


def head(
    rows: int = 6,
    C: int = 16,
    V: int = 40,
    *,
    dtype: torch.dtype = FP32,
    weights: torch.dtype | None = None,
    bias: bool = False,
    strided: bool = False,
    **options: Any,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    x = drawn(rows, 2 * C, dtype=dtype)[:, :C]
    tensors: dict[str, Any] = {
        "x": x if strided else x.contiguous(),
        "weight": drawn(V, C, dtype=weights or dtype) / 4,
        "bias": drawn(V, dtype=weights or dtype) if bias else None,
    }
    return linear_cross_entropy, tensors, {**options, "targets": torch.randint(V, (rows,))}


def dense(
    B: int = 2,
    Tq: int = 12,
    Tk: int | None = None,
    H: int = 4,
    Hk: int | None = None,
    D: int = 16,
    *,
    Dv: int = 16,
    dtype: torch.dtype = FP32,
    strided: bool = False,
    **options: Any,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    Tk, Hk = Tq if Tk is None else Tk, H if Hk is None else Hk
    tensors = {}
    for name, T, heads, width in (("q", Tq, H, D), ("k", Tk, Hk, D), ("v", Tk, Hk, Dv)):
        x = drawn(B, heads, T, width, dtype=dtype).transpose(1, 2)
        tensors[name] = x if strided else x.contiguous()
    return attention, tensors, options


def packed(
    queries: tuple[int, ...] = (5, 12, 7),
    keys: tuple[int, ...] | None = None,
    H: int = 4,
    Hk: int = 2,
    D: int = 16,
    *,
    dtype: torch.dtype = FP32,
    **options: Any,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    keys = keys or queries
    tensors = {
        "q": drawn(sum(queries), H, D, dtype=dtype),
        "k": drawn(sum(keys), Hk, D, dtype=dtype),
        "v": drawn(sum(keys), Hk, D, dtype=dtype),
    }
    options |= {
        "cu_seqlens_q": torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, *itertools.accumulate(keys)], dtype=torch.int32),
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
    }
    return attention_varlen, tensors, options


def cached(
    B: int = 3,
    Tq: int = 1,
    capacity: int = 100,
    H: int = 4,
    Hk: int = 2,
    D: int = 16,
    *,
    dtype: torch.dtype = FP32,
    page: int | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    shape = (B, capacity) if page is None else (B * capacity // page, page)
    tensors = {
        "q": drawn(B, Tq, H, D, dtype=dtype),
        "k_cache": drawn(*shape, Hk, D, dtype=dtype),
        "v_cache": drawn(*shape, Hk, D, dtype=dtype),
    }
    options["cache_lengths"] = torch.full((B,), capacity // 2, dtype=torch.int32)
    if page is not None:
        pages = torch.arange(B * capacity // page, dtype=torch.int32)
        options["block_table"] = pages.view(B, capacity // page)
    return attention_decode, tensors, options


def causal_mask(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


SLOPES = [0.5, 0.25, 0.125, 0.0625]
Made = tuple[Any, dict[str, Any], dict[str, Any]]
CALLS: dict[str, Callable[[], Made]] = {
    "norm": norm,
    "norm of one row": lambda: norm(1),
    "norm of two rows": lambda: norm(2),
    "norm in bf16": lambda: norm(dtype=BF16, weight=BF16, bias=BF16),
    "norm with fp32 weights": lambda: norm(dtype=FP16),
    "norm with bf16 weights": lambda: norm(weight=BF16, bias=BF16),
    "norm, residual": lambda: norm(residual=FP32),
    "norm, prenorm": lambda: norm(prenorm=True),
    "norm, all": lambda: norm(residual=FP32, prenorm=True, dropout_p=0.2),
    "norm, bf16 and a fp32 residual": lambda: norm(dtype=BF16, residual=FP32, prenorm=True),
    "norm, fp32 and a bf16 residual": lambda: norm(residual=BF16, prenorm=True),
    "norm, wide": lambda: norm(
        dtype=BF16, residual=BF16, prenorm=True, residual_in_fp32=True, dropout_p=0.1
    ),
    "norm, dropout": lambda: norm(dropout_p=0.5),
    "norm without bias": lambda: norm(bias=None),
    "norm without weight": lambda: norm(weight=None, bias=None),
    "norm with bias alone": lambda: norm(weight=None),
    "norm of strided rows": lambda: norm(strided=True, residual=FP32, prenorm=True),
    "norm of many rows": lambda: norm(300, 8),
    "mlp": mlp,
    "mlp of one row": lambda: mlp(1),
    "mlp in bf16": lambda: mlp(dtype=BF16),
    "mlp in fp16, erf": lambda: mlp(dtype=FP16, approximate="none"),
    "mlp, erf": lambda: mlp(approximate="none"),
    "mlp, recompute": lambda: mlp(recompute=True),
    "mlp without biases": lambda: mlp(b1=False, b2=False),
    "mlp with one bias": lambda: mlp(b1=False),
    "mlp, transposed": lambda: mlp(transposed=True),
    "mlp, strided": lambda: mlp(strided=True),
    "mlp, strided and transposed": lambda: mlp(strided=True, transposed=True, dtype=BF16),
    "head": head,
    "head of one row": lambda: head(1),
    "head, each row": lambda: head(100, reduction="none", label_smoothing=0.2, bias=True),
    "head, sum": lambda: head(reduction="sum", z_loss=0.01, softcap=3.0, bias=True),
    "head with bf16 weights": lambda: head(weights=BF16),
    "head in bf16, strided": lambda: head(100, dtype=BF16, strided=True, bias=True),
    "attention": dense,
    "attention in bf16": lambda: dense(dtype=BF16),
    "attention, no mask": lambda: dense(causal=False),
    "attention to more keys": lambda: dense(Tq=5, Tk=12),
    "attention to more keys, one octave": lambda: dense(Tq=10, Tk=12),
    "attention to fewer keys": lambda: dense(Tq=12, Tk=10, causal=False),
    "attention of one query": lambda: dense(Tq=1, Tk=12),
    "attention of two queries": lambda: dense(Tq=2, Tk=12),
    "attention of one token": lambda: dense(Tq=1),
    "attention of one token in bf16": lambda: dense(B=1, Tq=1, dtype=BF16),
    "attention, grouped": lambda: dense(Hk=2),
    "attention, one key head": lambda: dense(Hk=1),
    "attention, 5 heads in a group": lambda: dense(B=4, H=5, Hk=1),
    "attention, 24 heads in a group": lambda: dense(B=2, H=24, Hk=1),
    "attention, window": lambda: dense(window=(3, 0)),
    "attention, window to both sides": lambda: dense(window=(3, 2), causal=False),
    "attention, window to the right": lambda: dense(window=(-1, 2), causal=False),
    "attention, window of one": lambda: dense(window=(0, 0), causal=False),
    "attention, softcap": lambda: dense(softcap=5.0),
    "attention, alibi": lambda: dense(alibi_slopes=torch.tensor(SLOPES)),
    "attention, alibi by a list": lambda: dense(alibi_slopes=SLOPES),
    "attention, lengths": lambda: dense(key_lengths=torch.tensor([12, 5], dtype=torch.int32)),
    "attention, a bool mask": lambda: dense(attn_mask=causal_mask(12), causal=False),
    "attention, an added mask": lambda: dense(attn_mask=drawn(12, 12), causal=False),
    "attention, dropout": lambda: dense(dropout_p=0.2),
    "attention, lse": lambda: dense(return_lse=True),
    "attention, sinks, wide values": lambda: dense(sinks=torch.tensor(SLOPES), Dv=24),
    "attention, slopes of each entry": lambda: dense(alibi_slopes=torch.tensor([SLOPES, SLOPES])),
    "attention, strided": lambda: dense(strided=True, Hk=2),
    "attention, deterministic": lambda: dense(deterministic=True),
    "attention, all": lambda: dense(
        Hk=2, window=(6, 0), softcap=5.0, alibi_slopes=torch.tensor(SLOPES), dropout_p=0.1,
        return_lse=True, deterministic=True, dtype=BF16,
    ),
    "varlen": packed,
    "varlen, other keys": lambda: packed(keys=(9, 12, 30)),
    "varlen, other keys in one octave": lambda: packed(keys=(9, 14, 12)),
    "varlen, window": lambda: packed(window=(4, 0)),
    "varlen, all": lambda: packed(
        softcap=5.0, alibi_slopes=torch.tensor(SLOPES), dropout_p=0.1, return_lse=True, dtype=BF16
    ),
    "varlen, no mask, deterministic": lambda: packed(causal=False, deterministic=True),
    "decode": cached,
    "decode in bf16": lambda: cached(dtype=BF16),
    "decode, several tokens": lambda: cached(Tq=5),
    "decode, as many tokens as keys": lambda: cached(Tq=12, capacity=12),
    "decode, window": lambda: cached(window=(20, 0)),
    "decode, all": lambda: cached(
        softcap=5.0, alibi_slopes=torch.tensor(SLOPES), return_lse=True, Tq=2
    ),
    "decode, not causal, sinks": lambda: cached(
        causal=False, sinks=torch.tensor(SLOPES), Tq=3, window=(20, -1)
    ),
    "decode, pages": lambda: cached(capacity=128, page=16),
    "decode, pages in bf16": lambda: cached(B=2, capacity=96, page=32, dtype=BF16, window=(9, 0)),
}  # fmt: skip
AUTOCAST: dict[str, Callable[[], Made]] = {
    "norm": norm,
    "norm in bf16": lambda: norm(dtype=BF16, residual=FP32, prenorm=True),
    "mlp, converted": mlp,
    "mlp, converted weights": lambda: mlp(dtype=BF16, weights=FP32, recompute=True),
    "mlp, converted and transposed": lambda: mlp(transposed=True, b1=False),
    "mlp in bf16": lambda: mlp(dtype=BF16),
    "head, converted": lambda: head(bias=True),
    "attention in bf16": lambda: dense(dtype=BF16),
}


def seen(function: Callable[[], Any]) -> list[Call]:
    with plans.recording() as calls:
        function()
    return calls


def differentiable(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v if v is None else v.detach().requires_grad_() for k, v in tensors.items()}


def keys_of(made: Made, autocast: bool = False) -> list[Key]:
    """The classes of a call without gradients and, where it has some, with them."""
    op, tensors, options = made
    narrow = torch.autocast("cpu", BF16) if autocast else contextlib.nullcontext()

    def both() -> None:
        with narrow:
            op(**tensors, **options)
            if op is not attention_decode:
                op(**differentiable(tensors), **options)

    found = [call.key for call in seen(both)]
    assert len(set(found)) == len(found) == (1 if op is attention_decode else 2)
    return found


def assert_measurable(key: Key) -> None:
    """At both ends of the class."""
    for end in (0.0, 1.0):
        sizes = sizes_at(key, end)
        made = problem(key, sizes)
        assert made.training == (key.direction == TRAINING)
        runner = Runner(key, made)  # which looks at the class of its call
        found = ways.of(key, made.inputs)
        for way in (w for w in (*found.forward, *found.whole) if not w.startswith("cpu:")):
            try:
                trial = runner.trial(way)
            except Refused as error:
                # PyTorch's own rounds at times once too often.
                if way in ("torch", "cpu"):
                    raise AssertionError(f"{way} at {sizes}: {error}") from error
                continue
            assert 0 <= trial.error <= trial.limit
            assert {call.key for call in seen(trial.call)} <= {key}


@pytest.mark.parametrize("name", CALLS)
def test_a_problem_is_of_the_class_it_is_made_for(name: str) -> None:
    for key in keys_of(CALLS[name]()):
        assert_measurable(key)


@pytest.mark.parametrize("name", AUTOCAST)
def test_a_problem_under_autocast(name: str) -> None:
    for key in keys_of(AUTOCAST[name](), autocast=True):
        assert_measurable(key)


@pytest.mark.parametrize(
    ("wanted", "reduction"),
    [("x", "mean"), ("x", "none"), ("w", "mean"), ("wb", "none"), ("b", "sum"), ("xb", "mean")],
)
def test_a_problem_where_some_gradients_are_wanted(wanted: str, reduction: str) -> None:
    """As with a frozen head, or a frozen model under it."""
    op, tensors, options = head(bias=True, reduction=reduction)
    leaves = {k: v.requires_grad_(k[0] in wanted) for k, v in tensors.items()}
    (call,) = seen(lambda: op(**leaves, **options))
    made = problem(call.key, sizes_at(call.key, 1.0))
    assert {name[0] for name in made.differentiated} == set(wanted)
    assert_measurable(call.key)
    assert_wrong_is_noticed(call.key)


def assert_wrong_is_noticed(key: Key) -> None:
    """In the first number of each output and gradient."""
    made = problem(key, sizes_at(key, 1.0))
    leaves = made.leaves()
    outputs = made.forward(leaves, impl="torch")
    results = [*outputs, *(made.backward(leaves, outputs) if made.training else [])]
    results = [x.detach() for x in results]

    def checked(found: list[Tensor]) -> bool:
        error, limit = made.check(found[: len(outputs)], found[len(outputs) :])
        return error <= limit

    assert checked(results)
    for index, right in enumerate(results):
        wrong = right.clone()
        wrong.view(-1)[0] += right.abs().max() / 4
        assert not checked([*results[:index], wrong, *results[index + 1 :]]), index


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("head")])
def test_a_wrong_loss_or_gradient_is_noticed(name: str) -> None:
    for key in keys_of(CALLS[name]()):
        assert_wrong_is_noticed(key)


@pytest.mark.parametrize("way", ["torch", "cpu"])
@pytest.mark.parametrize(
    "name",
    [
        "norm of strided rows",
        "mlp",
        "mlp, transposed",
        "mlp, strided",
        "attention, strided",
        "head",
    ],
)
def test_a_call_runs_by_the_way_that_is_asked_for(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a plan is not kept by the call's signature."""
    op, *_ = made = CALLS[name]()
    ran = []

    def spy(impl: str, own: Any) -> Any:
        def function(*given: Any) -> Any:
            ran.append(impl)
            return own(*given)

        return function

    for impl in ("torch", "cpu"):
        module = importlib.import_module(f"gptkernels.ops.{op.__name__}.{impl}")
        for function in [f for f in vars(module) if f.endswith("_fwd")]:
            monkeypatch.setattr(module, function, spy(impl, getattr(module, function)))
    key = keys_of(made)[1]
    call = Runner(key, problem(key, sizes_at(key, 1.0))).call(way)
    ran.clear()
    call()
    assert set(ran) == {way}


def test_what_autocast_converts_for_attention_is_not_measured() -> None:
    for key in keys_of(dense(), autocast=True):
        with pytest.raises(NotImplementedError, match="converted by autocast"):
            problem(key, sizes_at(key, 1.0))


def test_the_gradient_of_slopes_is_not_measured() -> None:
    op, tensors, options = dense(alibi_slopes=torch.tensor(SLOPES, requires_grad=True))
    (call,) = seen(lambda: op(**tensors, **options))
    with pytest.raises(NotImplementedError, match="gradient of ALiBi slopes is not measured"):
        problem(call.key, sizes_at(call.key, 1.0))


def test_a_call_of_another_class_is_not_measured() -> None:
    key, _ = keys_of(norm())
    with pytest.raises(NotImplementedError, match="of another class"):
        Runner(key, problem(key, {"rows": 100}))
