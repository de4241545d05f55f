"""What is timed: every case runs, and its check tells right from wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels import bench
from gptkernels.bench.case import BACKWARD, BOTH, FORWARD, Case
from gptkernels.bench.cases import (
    attention,
    attention_decode,
    attention_varlen,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
    workload,
)
from gptkernels.bench.cases.workload import listed
from gptkernels.core.choice import unavailable
from gptkernels.truth import baseline, reference

CPU = torch.device("cpu")
# Each has more rows or queries than are checked, so that a part is cut.
SMALL = {
    "attention": [
        attention.Shape(2, 80, 4, 4, 16),
        attention.Shape(1, 80, 4, 2, 16, window=8),
        attention.Shape(1, 80, 2, 2, 16, causal=False),
        attention.Shape(1, 30, 2, 2, 16, causal=False),
        attention.Shape(1, 80, 2, 2, 16, option="softcap"),
        attention.Shape(1, 80, 2, 2, 16, option="ALiBi"),
        attention.Shape(1, 80, 2, 2, 16, causal=False, option="bool mask"),
        attention.Shape(1, 80, 2, 2, 16, causal=False, option="added mask"),
    ],
    "attention_varlen": [attention_varlen.Shape((10, 70, 4), 4, 2, 16)],
    "attention_decode": [
        attention_decode.Shape(2, 40, 4, 2, 16),
        attention_decode.Shape(2, 40, 4, 2, 16, queries=3, page=4, ragged=True),
    ],
    "layer_norm": [
        layer_norm.Shape(150, 32),
        layer_norm.Shape(20, 32, residual=False),
        layer_norm.Shape(150, 32, dropout=True),
    ],
    "gelu_mlp": [gelu_mlp.Shape(70, 16), gelu_mlp.Shape(20, 16, recompute=True)],
    "linear_cross_entropy": [
        linear_cross_entropy.Shape(70, 16, 50),
        linear_cross_entropy.Shape(20, 16, 37),
    ],
}


CASES = [(op, shape) for op, shapes in SMALL.items() for shape in shapes]
IMPLS = [i for i in ("torch", "cpu") if unavailable(i, "cpu", torch.float32) is None]


def cases_of(op: str, shape: Any, dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    yield from bench.Step(op, shape, dtype).cases(CPU, ["triton", *IMPLS])


@pytest.mark.parametrize(("op", "shape"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_are_right(op: str, shape: Any, dtype: torch.dtype) -> None:
    """So the part that is checked is the same in the truth, and plain PyTorch sees what we see."""
    for case in cases_of(op, shape, dtype):
        assert (case.op, case.shape, case.dtype) == (op, str(shape), dtype)
        assert case.bytes_moved > 0
        assert list(case.ours) == IMPLS
        assert "Triton's interpreter" in case.skipped["triton"]
        for name, make in {"pytorch": case.plain, **case.ours}.items():
            if case.check is None:
                assert getattr(shape, "dropout", False)
                make()()
                continue
            error, limit = case.check(make()())
            # PyTorch adds up in 16 bits on a CPU, which the yardstick does not.
            assert error <= (10 if name == "pytorch" else 1) * limit, (name, case.direction)


@pytest.mark.parametrize(("op", "shape"), CASES, ids=str)
def test_a_wrong_result_is_noticed(op: str, shape: Any) -> None:
    """The last number of any result that the part has."""
    for case in cases_of(op, shape):
        if case.check is None:
            continue
        results = [x.clone() for x in listed(case.plain()())]
        noticed = 0
        for index, x in enumerate(results):
            wrong = [y.clone() for y in results]
            wrong[index][_last(op, x)] += 1.0
            error, limit = case.check(wrong if case.direction != FORWARD else _as(results, wrong))
            noticed += error > limit
        # Some gradients are sums over all rows, which no part has.
        assert noticed == len(results) if case.direction == FORWARD else noticed >= 1


def _last(op: str, x: Tensor) -> Any:
    """The last number that is checked."""
    if op == "attention":
        return 0, -1, -1, -1
    return (79, -1, -1) if op == "attention_varlen" else -1


def _as(results: list[Tensor], wrong: list[Tensor]) -> Any:
    return wrong[0] if len(results) == 1 else tuple(wrong)


def test_keys_and_weights_are_checked_where_the_part_has_them() -> None:
    """Causal: the last keys; all weights where all rows are in the part."""
    for op, shape in (
        ("attention", attention.Shape(1, 80, 2, 2, 16)),
        ("attention_varlen", attention_varlen.Shape((10, 70, 4), 2, 2, 16)),
        ("layer_norm", layer_norm.Shape(20, 32)),
        ("gelu_mlp", gelu_mlp.Shape(20, 16)),
    ):
        (case,) = (case for case in cases_of(op, shape) if case.direction == BOTH)
        gradients = listed(case.plain()())
        assert case.check is not None
        for x in gradients:
            x[_last(op, x)] += 1.0
            error, limit = case.check(gradients)
            assert error > limit
            x[_last(op, x)] -= 1.0


@pytest.mark.parametrize(("op", "shape"), CASES, ids=str)
def test_work_of_both_directions_is_the_sum(op: str, shape: Any) -> None:
    work = {case.direction: (case.bytes_moved, case.flops) for case in cases_of(op, shape)}
    if BACKWARD in work:
        for forward, backward, both in zip(work[FORWARD], work[BACKWARD], work[BOTH], strict=True):
            assert forward + backward == pytest.approx(both, abs=2)


def test_work_of_known_sizes() -> None:
    """GPT-2's heads: 4 T^2 D H operations forward, half of them causal; backward 2.5 times."""
    forward, backward, both = cases_of("attention", attention.Shape(1, 128, 2, 1, 16))
    assert forward.flops == 4 * 128 * 128 * 16 * 2 / 2
    assert backward.flops == 2.5 * forward.flops
    assert both.flops == 3.5 * forward.flops
    assert forward.bytes_moved == 4 * 128 * 16 * (2 * 2 + 2 * 1)
    shape = attention.Shape(1, 80, 2, 2, 16, causal=False, option="bool mask")
    masked, *_ = cases_of("attention", shape)
    seen = int(attention._options(shape, CPU, torch.float32)["attn_mask"].sum())
    assert masked.flops == 4 * seen * 16 * 2
    assert seen < 80 * 80 / 2
    (mlp, _) = cases_of("gelu_mlp", gelu_mlp.Shape(10, 16))
    assert mlp.flops == 2 * 2 * 10 * 16 * 64
    (norm, _) = cases_of("layer_norm", layer_norm.Shape(10, 16), torch.bfloat16)
    assert norm.bytes_moved == 4 * 10 * 16 * 2
    shape = linear_cross_entropy.Shape(70, 16, 50)
    forward, both = cases_of("linear_cross_entropy", shape, torch.bfloat16)
    assert (forward.direction, both.direction) == (FORWARD, BOTH)
    # One product of (70, 16) and (16, 50), and two of its size backward.
    assert (forward.flops, both.flops) == (2 * 70 * 16 * 50, 3 * 2 * 70 * 16 * 50)
    assert (forward.bytes_moved, both.bytes_moved) == (120 * 16 * 2, 3 * 120 * 16 * 2)
    assert forward.sizes == {"rows": 70, "C": 16, "V": 50}
    (step,) = cases_of("attention_decode", attention_decode.Shape(2, 40, 4, 2, 16))
    assert step.flops == 4 * 80 * 4 * 16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", bench.OPERATORS)
def test_levels_grow(op: str, device: str) -> None:
    levels = [[step.shape for step in bench.steps([op], device, level)] for level in bench.LEVELS]
    quick, default, full = map(set, levels)
    assert quick < full
    assert quick <= default <= full
    assert levels[0][0] == levels[1][0] == levels[2][0]
    names = [str(shape) for shape in full]
    assert len(set(names)) == len(names)


def test_two_outputs_get_two_gradients() -> None:
    first, second = workload._cotangents([torch.zeros(3, 4)])
    assert not torch.equal(first, second)


def test_steps_take_turns_and_are_chosen() -> None:
    steps = bench.steps(("layer_norm", "gelu_mlp"), "cpu", "default")
    assert [step.op for step in steps[:4]] == ["layer_norm", "gelu_mlp"] * 2
    chosen = bench.steps(bench.OPERATORS, "cpu", dtypes=[torch.float16], shapes=["T1024"])
    assert {step.dtype for step in chosen} == {torch.float16}
    assert all("T1024" in str(step.shape) for step in chosen)
    with pytest.raises(ValueError, match=r"gelu_mlp holds 'T7' .*; there are 512 rows C768"):
        bench.steps(["gelu_mlp"], "cpu", shapes=["C768", "T7"])
    with pytest.raises(ValueError, match=r"op must be one of layer_norm.* got 'softmax'"):
        bench.steps(["softmax"], "cpu")
    with pytest.raises(ValueError, match=r"level must be one of quick.* got 'slow'"):
        bench.steps(["layer_norm"], "cpu", "slow")


def test_plain_attention_is_timed_without_making_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [case.plain() for shape in SMALL["attention"] for case in cases_of("attention", shape)]
    make = baseline.band_mask

    def none_made(*args: Any, **options: Any) -> Any:
        assert make(*args, **options) is None

    monkeypatch.setattr(baseline, "band_mask", none_made)
    for call in calls:
        call()


def test_plain_attention_takes_a_fused_path_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal is a flag and no mask; with a mask the key heads are as many as the query heads."""
    seen: list[tuple[Any, ...]] = []
    sdpa = F.scaled_dot_product_attention

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        masked = options["attn_mask"] is not None
        seen.append((masked, options["is_causal"], options["enable_gqa"], k.shape[1]))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    q, k = (torch.randn(1, 6, heads, 8, dtype=torch.float64) for heads in (4, 2))
    lengths = torch.tensor([4])
    for options in ({}, {"causal": False}, {"window": (2, 0)}, {"key_lengths": lengths}):
        given: dict[str, Any] = {"q": q, "k": k, "v": k, **options}
        torch.testing.assert_close(baseline.attention(**given), reference.attention(**given))
        assert len(set(seen)) == 1
        case = seen.pop()
        expected = {(): (False, True, True, 2), ("causal",): (False, False, True, 2)}
        assert case == expected.get(tuple(options), (True, False, False, 4))
        seen.clear()
