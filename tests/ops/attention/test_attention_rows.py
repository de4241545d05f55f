"""Which keys reach which rows of `attention`: rows without keys, keys past a length, NaN, sizes of
0. Also the same bits on every run, and dropout's mask."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, each, name_of, of, runnable
from op_inputs import attention_inputs as inputs
from op_inputs import int32
from right import assert_gradients_alone, assert_same, run, seeded
from torch import Tensor

from gptkernels import attention
from gptkernels.core import philox
from gptkernels.truth import parity


@functools.cache
def clean_run(**options: Any) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Returns inputs of 70 tokens, a cotangent, and the results. Many tests compare with these."""
    dtype = options.pop("dtype")
    tensors = inputs(1, 70, dtype=dtype)
    cotangent = inputs(1, 70, dtype=dtype, seed=1)["q"]
    return tensors, cotangent, run(functools.partial(attention, **options), tensors, [cotangent])


class TestRowsAndKeysThatAreApart:
    @each
    @pytest.mark.parametrize(
        ("options", "empty"),
        [
            (dict(key_lengths=(0, 5)), lambda b, i: b == 0 or i < -10),
            (dict(key_lengths=(70, 9), window=(3, 0)), lambda b, i: b == 1 and i >= 12),
            (dict(Tq=90), lambda b, i: i < 20),
        ],
        ids=["no keys", "a window past the end", "more queries than keys"],
    )
    def test_a_row_without_keys(
        self, impl: str, options: dict[str, Any], empty: Callable[[int, int], bool]
    ) -> None:
        options = dict(options)
        Tq = options.pop("Tq", 70)
        tensors = inputs(2, Tq, 70)
        if "key_lengths" in options:
            options["key_lengths"] = int32(*options["key_lengths"])
        call = functools.partial(attention, return_lse=True, impl=impl, **options)
        with parity.poisoned_outputs():
            out, lse, dq, dk, dv = run(call, tensors)
        assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))
        for b, i in itertools.product(range(2), range(Tq)):
            assert (lse[b, :, i] == -torch.inf).all() == empty(b, i), (b, i)
            assert (out[b, i] == 0).all() == empty(b, i)
            if empty(b, i):
                assert (dq[b, i] == 0).all()

    @each
    @pytest.mark.parametrize("where", ["q", "out", "lse"])
    @pytest.mark.parametrize("softcap", [0.0, 3.0])
    def test_a_row_without_keys_passes_nothing_on(
        self, impl: str, where: str, softcap: float
    ) -> None:
        """With six queries and four keys, the first two queries are before every key."""
        tensors = inputs(1, 6, 4)
        cotangents = [torch.randn_like(tensors["q"]), torch.randn(1, 2, 6, device=DEVICE)]
        call = functools.partial(attention, return_lse=True, softcap=softcap, impl=impl)
        wanted = run(call, tensors, cotangents)
        rows = dict(q=tensors["q"], out=cotangents[0], lse=cotangents[1].mT)[where]
        rows[:, :2] = torch.nan
        assert_same(run(call, tensors, cotangents), wanted)

    @each
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_lies_past_a_length_never_leaks(self, impl: str, value: float) -> None:
        tensors = inputs(3, 40, 70, 1)
        ends = int32(0, 33, 64)
        dead = torch.arange(70, device=DEVICE) >= ends[:, None]
        call = functools.partial(attention, key_lengths=ends, return_lse=True, impl=impl)
        wanted = run(call, tensors)
        for name in ("k", "v"):
            tensors[name] = tensors[name].masked_fill(dead[..., None, None], value)
        found = run(call, tensors)
        assert_same(found, wanted)
        assert (found[3][dead] == 0).all()
        assert (found[4][dead] == 0).all()

    @pytest.mark.parametrize(
        ("impl", "dtype", "deterministic"),
        [
            of("triton", FP32, True, id="triton"),
            *(of("cpu", dtype, True, id=f"cpu-{name_of(dtype)}") for dtype in (FP32, BF16, FP16)),
            *(
                of("cuda", dtype, deterministic, id=f"cuda-{name}")
                for dtype, deterministic, name in (
                    (FP32, True, "float32"),
                    (BF16, True, "deterministic"),
                    (BF16, False, "atomics"),
                )
            ),
        ],
    )
    @pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
    @pytest.mark.parametrize(  # each pair of two of them
        ("at", "value", "softcap"),
        [(25, torch.nan, 0.0), (25, torch.inf, 2.0), (50, torch.nan, 2.0), (50, torch.inf, 0.0)],
    )
    def test_not_a_number_reaches_only_those_who_see_it(
        self,
        impl: str,
        dtype: torch.dtype,
        deterministic: bool,
        where: str,
        at: int,
        value: float,
        softcap: float,
    ) -> None:
        """Causal with a window of 12. Rows at ... at + 12 see key `at`, and row `at` sees the keys
        at - 12 ... at. All keys that those rows see lie between at - 12 and at + 12."""
        hopper = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
        if hopper and impl == "cuda" and dtype == BF16:
            pytest.skip("Hopper's kernels then sum in another order: test_attention_*_sm90.py")
        T, reach = 70, 12
        how = dict(deterministic=deterministic, impl=impl)
        options = dict(window=(reach, 0), softcap=softcap, **how)
        tensors, dout, wanted = clean_run(dtype=dtype, **options)
        broken = {**tensors, "dout": dout}
        broken[where] = broken[where].clone()
        broken[where][:, at, 1, 3] = value
        dout = broken.pop("dout")
        found = run(functools.partial(attention, **options), broken, [dout])
        rows = (at, at) if where in ("q", "dout") else (at, at + reach)
        keys = (at - reach, rows[1])
        for name, a, b, (first, last) in zip(
            ("out", "dq", "dk", "dv"), found, wanted, (rows, rows, keys, keys), strict=True
        ):
            apart = torch.ones(T, dtype=torch.bool)
            apart[first : last + 1] = False
            assert torch.equal(a[:, :, 0], b[:, :, 0]), name
            assert torch.equal(a[:, apart], b[:, apart]), name
        out, dq, dk, dv = found
        if where == "v":
            assert not torch.isfinite(out[:, rows[0] : rows[1] + 1, 1, 3]).any()
            assert torch.isfinite(out[:, :, 1, 4]).all()
        if (value != value and where in ("q", "k")) or (where == "q" and not softcap):
            assert torch.isnan(out[:, at, 1]).all()
        if where == "q":
            assert torch.isnan(dk[:, keys[0] : keys[1] + 1, 1, 3]).all()
        if where == "k":
            assert torch.isnan(dq[:, rows[0] : rows[1] + 1, 1, 3]).all()
        if where == "dout":
            assert torch.equal(out, wanted[0])
            assert not torch.isfinite(dv[:, keys[0] : keys[1] + 1, 1, 3]).any()
            assert not torch.isfinite(dk[:, keys[0] : keys[1] + 1, 1]).any()

    @each
    @pytest.mark.parametrize(
        "sizes",
        [dict(B=0), dict(Tq=0), dict(Tk=0), dict(Tq=0, Tk=0), dict(H=0, Hk=1)],
        ids=str,
    )
    def test_zero_sizes(self, impl: str, sizes: dict[str, int]) -> None:
        tensors = inputs(**(dict(B=2, Tq=5, Tk=7, H=2, Hk=2, D=8) | sizes))
        call = functools.partial(attention, return_lse=True, impl=impl)
        with parity.poisoned_outputs():
            out, lse, dq, dk, dv = run(call, tensors)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
        for gradient, name in ((dq, "q"), (dk, "k"), (dv, "v")):
            assert gradient.shape == tensors[name].shape
            assert (gradient == 0).all()

    @runnable
    @pytest.mark.parametrize(
        "options", [dict(), dict(window=(9, 0)), dict(softcap=3.0), dict(D=200)], ids=str
    )
    def test_only_the_gradients_asked_for(
        self, impl: str, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        options = dict(options)
        tensors = inputs(1, 20, D=options.pop("D", 16), dtype=dtype)
        call = functools.partial(attention, **options, deterministic=True, impl=impl)
        assert_gradients_alone(call, tensors)

    @pytest.mark.parametrize("dtype", [FP32, FP16])
    def test_no_kernel_runs_for_nobody(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernels = pytest.importorskip("gptkernels.ops.attention.triton.dense")
        ran: list[str] = []

        class Spy:
            def __init__(self, name: str) -> None:
                self.name, self.kernel = name, getattr(kernels, name)

            def __getitem__(self, grid: Any) -> Any:
                ran.append(self.name.split("_")[2])
                return self.kernel[grid]

        for part in ("delta", "queries", "keys"):
            name = f"attention_bwd_{part}_kernel"
            monkeypatch.setattr(kernels, name, Spy(name))
        first = [] if dtype == FP32 else ["delta"]
        after_queries = ["queries", "keys"] if dtype == FP32 else ["keys"]
        for name, expected in (("q", ["queries"]), ("k", after_queries), ("v", after_queries)):
            ran.clear()
            leaves = {n: x.requires_grad_(n == name) for n, x in inputs(dtype=dtype).items()}
            attention(**leaves, impl="triton").sum().backward()
            assert ran == first + expected

    @runnable
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_the_same_bits_again(
        self, impl: str, dtype: torch.dtype, deterministic: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only dq may differ, and only where the CUDA kernels sum it with atomics: here over three
        blocks of keys, in any order."""
        tensors = inputs(1, 40, 270, 2, 1, 24, dtype)
        options = dict(dropout_p=0.2, return_lse=True, deterministic=deterministic)
        call = seeded(functools.partial(attention, **options, impl=impl))
        wanted = run(call, tensors)
        by_atomics = impl == "cuda" and dtype != FP32 and not deterministic
        for schedule in ("reverse", "7"):  # of the emulator; a GPU ignores it
            monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
            found = run(call, tensors)
            if by_atomics:
                torch.testing.assert_close(found.pop(2), wanted[2])
            assert_same(found, wanted[:2] + wanted[3:] if by_atomics else wanted)

    @each
    def test_dropout_takes_the_mask_of_the_contract(self, impl: str) -> None:
        """With unit vectors as values, out shows the mask itself."""
        T = 70
        v = torch.eye(T, device=DEVICE)[None, :, None].expand(2, T, 2, T)
        q, v = torch.zeros(2, T, 2, T, device=DEVICE), v.contiguous()
        keep = philox.attention_keep(seeded(philox.draw)(DEVICE), 0.25, 2, 2, T, T)
        out = seeded(attention)(q, q, v, causal=False, dropout_p=0.25, impl=impl)
        assert torch.equal(out.transpose(1, 2) != 0, keep)
