"""Attention backward's Hopper kernels, in the emulator or on a Hopper GPU. Each build is compared
with the fp64 truth. The forward pass is another implementation's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, needs_cuda
from op_inputs import attention_inputs, int32
from right import assert_right
from torch import Tensor

from gptkernels import attention
from gptkernels.core import native
from gptkernels.ops.attention.cuda import dense as launchers
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.truth import baseline, parity, reference

pytestmark = [needs_cuda, pytest.mark.usefixtures("hopper")]
BUILDS = 8
Launched = list[dict[str, Tensor | None]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """A list that receives the workspaces of each launch of the backward pass."""
    seen: Launched = []
    allocate = native.allocate

    def spy(*arguments: Any) -> dict[str, Tensor | None]:
        seen.append(allocate(*arguments))
        return seen[-1]

    monkeypatch.setattr(native, "allocate", spy)
    return seen


def by_hopper(launched: Launched) -> list[bool]:
    """Returns, for each launch, whether the Hopper kernels ran."""
    return [made["turns"] is not None for made in launched]


def again(launched: Launched) -> list[bool]:
    """Returns, for each launch, whether the kernels for any GPU had to do the work again."""
    return [bool(made["turns"][0]) for made in launched]  # type: ignore[index]


def inputs(
    B: int = 1,
    Tq: int = 150,
    Tk: int | None = None,
    H: int = 1,
    Hk: int | None = None,
    D: int = 64,
    dtype: torch.dtype = BF16,
    seed: int = 0,
) -> dict[str, Any]:
    return attention_inputs(B, Tq, Tk, H, Hk, D, dtype, seed)


def slopes(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE)


class _Backward(torch.autograd.Function):
    """The forward pass of another implementation, and our backward pass."""

    @staticmethod
    def forward(ctx: Any, how: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Any:
        impl = how.get("forward", "torch")
        out, lse = attention(q, k, v, **how["options"], return_lse=True, impl=impl)
        ctx.how = how
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return None, *gradients(ctx.how, dout, dlse, q, k, v, out, lse)


def gradients(
    how: dict[str, Any], dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    options = how["options"]
    left, right = options.get("window") or (-1, -1)
    if options.get("causal", True):
        right = 0
    record = AttentionOptions(
        options.get("softmax_scale") or 1 / math.sqrt(q.shape[-1]),
        left,
        right,
        options.get("softcap", 0.0),
        alibi_slopes=options.get("alibi_slopes"),
        key_lengths=options.get("key_lengths"),
    )
    wanted = (*how.get("wanted", (True, True, True)), False, False)
    return launchers.attention_bwd(
        dout, dlse, q, k, *rest, record, wanted, how["deterministic"], build=how.get("build", -1)
    )[:3]


def hold(
    tensors: dict[str, Any],
    *,
    deterministic: Sequence[bool] = (False, True),
    build: int = -1,
    **options: Any,
) -> None:
    def ours(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **how: Any) -> Any:
        return _Backward.apply(dict(options=options, **how), q, k, v)

    for ordered in deterministic:
        how = dict(deterministic=ordered, build=build)
        assert_right(ours, tensors, name="attention", return_lse=True, **options, **how)


CASES: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any]]]] = {
    "one tile": lambda: (inputs(Tq=1), dict(causal=False)),
    "a whole tile": lambda: (inputs(Tq=128), {}),
    "causal": lambda: (inputs(Tq=300, D=64), {}),
    "not causal": lambda: (inputs(Tq=140, Tk=270, D=128), dict(causal=False)),
    "fp16": lambda: (inputs(Tq=150, D=128, dtype=FP16), {}),
    "few queries": lambda: (inputs(Tq=70, Tk=260, D=128), {}),
    "rows without keys": lambda: (inputs(Tq=260, Tk=70, D=128), {}),
    "window": lambda: (inputs(Tq=300, D=64), dict(window=(40, 0))),
    "window both ways": lambda: (inputs(Tq=200, D=128), dict(causal=False, window=(100, 30))),
    "8 heads share keys": lambda: (inputs(Tq=70, H=8, Hk=1, D=64), {}),
    "2 heads each": lambda: (inputs(B=2, Tq=140, H=4, Hk=2, D=128, dtype=FP16), {}),
    "D 40": lambda: (inputs(Tq=150, D=40), {}),
    "D 80": lambda: (inputs(Tq=150, D=80), {}),
    "D 96": lambda: (inputs(Tq=70, Tk=140, H=2, D=96, dtype=FP16), {}),
    "D 160": lambda: (inputs(Tq=130, Tk=200, D=160, H=2, Hk=1), {}),
    "D 192, window": lambda: (inputs(Tq=200, D=192, dtype=FP16), dict(window=(70, 0))),
    "D 192, ALiBi": lambda: (
        inputs(Tq=100, D=192),
        dict(softcap=2.0, alibi_slopes=slopes(0.25), causal=False),
    ),
    "D 256": lambda: (inputs(Tq=130, Tk=70, D=256), dict(causal=False)),
    "D 256, lengths, softcap": lambda: (
        inputs(B=2, Tq=70, Tk=130, D=256, dtype=FP16),
        dict(softcap=5.0, key_lengths=int32(100, 0)),
    ),
    "lengths": lambda: (
        inputs(B=4, Tq=100, Tk=300, D=64),
        dict(causal=False, key_lengths=int32(0, 1, 130, 300)),
    ),
    "causal lengths": lambda: (
        inputs(B=2, Tq=200, D=128),
        dict(key_lengths=int32(0, 150)),
    ),
    "softcap": lambda: (inputs(Tq=150, D=64), dict(softcap=2.0)),
    "ALiBi": lambda: (
        inputs(Tq=150, H=2, Hk=1, D=128),
        dict(alibi_slopes=slopes(0.5, 0.0625)),
    ),
    "both, D 80": lambda: (
        inputs(Tq=100, H=2, D=80, dtype=FP16),
        dict(softcap=3.0, alibi_slopes=slopes(0.5, 0.0625), causal=False),
    ),
    "negative scale": lambda: (inputs(Tq=100, D=64), dict(softmax_scale=-0.2)),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, launched: Launched) -> None:
    tensors, options = CASES[case]()
    hold(tensors, **options)
    assert by_hopper(launched) == [True, True]


@pytest.mark.parametrize("number", range(BUILDS))
def test_every_build(number: int, launched: Launched) -> None:
    built = native.module().attention_bwd_builds()[number]
    tensors = inputs(Tq=150, Tk=280, D=built["head_width"])
    hold(tensors, build=number, deterministic=(False,))
    assert by_hopper(launched) == [True]


def test_there_are_no_other_builds() -> None:
    assert len(native.module().attention_bwd_builds()) == BUILDS
    for number, tensors, options, reason in (
        (BUILDS, inputs(), {}, f"there are {BUILDS} builds"),
        (0, inputs(D=128), {}, "heads up to 64 wide"),
        (5, inputs(dtype=FP16), {}, "not built for fp16"),
        (5, inputs(), dict(softcap=2.0), "not built for bf16 with options"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            hold(tensors, build=number, deterministic=(False,), **options)


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("schedule", ["reverse", "7"])
def test_any_schedule(schedule: str, copies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
    monkeypatch.setenv("GPTKERNELS_EMULATE_COPIES", copies)
    hold(inputs(Tq=200, D=128, H=2, Hk=1), deterministic=(True,))
    hold(inputs(Tq=280, D=64), deterministic=(False,))


def test_deterministic_gradients_are_the_same_bits(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fp32 sums of dq must be the same too: rounding to 16 bits hides most differences in the
    order of a sum."""
    tensors = inputs(Tq=300, Tk=700, D=64)  # six blocks of keys, three of rows
    options = dict(causal=False)
    found = []
    for schedule in ("forward", "reverse", "3", "4", "5"):
        monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        out, _ = _Backward.apply(dict(options=options, deterministic=True), *leaves)
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        found.append([*gradients, launched[-1]["dq_sum"]])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_what_is_not_wanted_is_not_written(wanted: tuple[bool, ...]) -> None:
    tensors = inputs(Tq=150, D=64)
    q, k, v = tensors.values()
    out, lse = attention(q, k, v, return_lse=True, impl="torch")
    dout = torch.randn_like(out)
    arguments = (dout, None, q, k, v, out, lse)
    how: dict[str, Any] = dict(options={}, deterministic=True)
    everything = gradients(how, *arguments)
    some = gradients({**how, "wanted": wanted}, *arguments)
    for name, x, y, is_wanted in zip("qkv", some, everything, wanted, strict=True):
        assert torch.equal(x, y) if is_wanted else x.numel() == 0, name


class TestNotFinite:
    """NaN and Inf must not reach a row that does not see them, although 0 * NaN is NaN."""

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("D", [64, 192])
    def test_keys_past_the_length(self, D: int, value: float, launched: Launched) -> None:
        tensors = inputs(B=2, Tq=60, Tk=200, D=D)
        tensors["k"][1, 130:] = value
        tensors["v"][1, 130:] = -value
        hold(tensors, deterministic=(False,), causal=False, key_lengths=int32(200, 130))
        assert again(launched) == [False]

    def test_without_dq(self, launched: Launched) -> None:
        """dk and dv must keep their NaN without dq, which shows most of the non-finite values."""
        tensors = inputs(Tq=140, D=64)
        q, k, v = tensors.values()
        q[0, 100] = math.nan
        out, lse = attention(q, k, v, return_lse=True, impl="cuda")
        arguments = (torch.randn_like(v), None, q, k, v, out, lse)
        how: dict[str, Any] = dict(options={}, deterministic=True)
        everything = gradients(how, *arguments)
        some = gradients({**how, "wanted": (False, True, True)}, *arguments)
        for x, y in zip(some[1:], everything[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        assert torch.isfinite(some[1][:, 101:]).all()
        assert again(launched) == [True, True]

    @pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
    @pytest.mark.parametrize(
        ("D", "at", "softcap", "value"),
        [
            (64, 60, 0.0, math.nan),
            (64, 128, 2.0, math.inf),
            (96, 60, 2.0, math.inf),
            (192, 128, 0.0, math.nan),
        ],
    )
    def test_only_those_who_see_it(
        self, where: str, D: int, at: int, softcap: float, value: float
    ) -> None:
        """As in test_attention_rows.py, with some tiles that need no mask. The window has 40 keys:
        rows at ... at + 40 see key `at`, and row `at` sees the keys at - 40 ... at."""
        T, reach = 200, 40
        tensors = inputs(Tq=T, H=2, D=D)
        tensors["dout"] = inputs(Tq=T, H=2, D=D, seed=1)["q"]
        options: dict[str, Any] = dict(window=(reach, 0), softcap=softcap)

        def of(call: Callable[..., Any], given: dict[str, Any]) -> Sequence[Tensor]:
            leaves = [given[name].detach().requires_grad_() for name in "qkv"]
            return torch.autograd.grad(call(*leaves), leaves, given["dout"])

        # PyTorch's own forward pass would spread NaN under a mask, so the forward pass is "cuda".
        how: dict[str, Any] = dict(options=options, deterministic=True, forward="cuda")
        truth = of(
            functools.partial(reference.attention, **options),
            {name: x.double() for name, x in tensors.items()},
        )
        yardstick = of(functools.partial(baseline.attention, **options), tensors)
        tensors[where][0, at, 1, 3] = value
        found = of(lambda *leaves: _Backward.apply(how, *leaves)[0], tensors)
        rows = (at, at) if where in ("q", "dout") else (at, at + reach)
        keys = (at - reach, rows[1])
        for name, a, b, t, seen in zip(
            ("dq", "dk", "dv"), found, yardstick, truth, (rows, keys, keys), strict=True
        ):
            apart = torch.ones(T, 2, dtype=torch.bool, device=DEVICE)
            apart[seen[0] : seen[1] + 1, 1] = False
            measured = parity.compare(a[0][apart], b[0][apart], t[0][apart], k=3, name=name)
            assert measured.passed, str(measured)
        dq, dk, dv = found
        if where == "q":
            assert torch.isnan(dk[:, keys[0] : keys[1] + 1, 1, 3]).all()
        if where == "k":
            assert torch.isnan(dq[:, rows[0] : rows[1] + 1, 1, 3]).all()
        if where == "dout":
            assert not torch.isfinite(dv[:, keys[0] : keys[1] + 1, 1, 3]).any()


class TestGeneric:
    """Calls that the Hopper kernels do not take."""

    def test_wide_heads_dropout_fp32_and_odd_strides(self, launched: Launched) -> None:
        tensors = inputs(Tq=40)
        odd = {name: torch.zeros(1, 40, 1, 68, dtype=BF16, device=DEVICE) for name in tensors}
        for name, x in tensors.items():
            odd[name][..., :64] = x
        hold({name: x[..., :64] for name, x in odd.items()}, deterministic=(False,))
        hold(inputs(Tq=40, D=36), deterministic=(False,))
        hold(inputs(Tq=20, dtype=FP32), deterministic=(False,))
        assert by_hopper(launched) == [False, False, False]
