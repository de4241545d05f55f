from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gptkernels import attention, baseline, parity, philox, reference
from gptkernels.aten import attention as aten
from gptkernels.ops.choice import INTERPRETED, unavailable

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNNABLE = [
    pytest.param(impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}")
    for impl in ("torch", "triton", "cuda")
    for dtype in (FP32, FP16, BF16)
    if unavailable(impl, DEVICE, dtype) is None
]
runnable = pytest.mark.parametrize(("impl", "dtype"), RUNNABLE)
NO_CUDA = unavailable("cuda", DEVICE, FP32)
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA)))
each = pytest.mark.parametrize("impl", ["torch", "triton", CUDA])
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
MASKED = DEVICE == "cpu"  # where PyTorch's fused op takes a mask and gives lse


def inputs(
    B: int = 1,
    Tq: int = 20,
    Tk: int | None = None,
    H: int = 2,
    Hk: int | None = None,
    D: int = 16,
    dtype: torch.dtype = FP32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    Tk, Hk = Tq if Tk is None else Tk, H if Hk is None else Hk

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=DEVICE, dtype=dtype)

    return dict(q=draw(B, Tq, H, D), k=draw(B, Tk, Hk, D), v=draw(B, Tk, Hk, D))


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_right(
    tensors: dict[str, Any], impl: str, seed: int = 0, *, gradients: bool = True, **options: Any
) -> None:
    drawn = {}
    if options.get("dropout_p"):
        torch.manual_seed(seed)
        drawn = dict(rng=philox.draw(DEVICE))

    def candidate(deterministic: bool, **leaves: Any) -> Any:
        torch.manual_seed(seed)
        with parity.poisoned_outputs():
            return attention(**leaves, **options, deterministic=deterministic, impl=impl)

    # In 16 bits the CUDA kernels have two ways to dq.
    ways = (False, True) if impl == "cuda" and tensors["q"].dtype != FP32 else (False,)
    for deterministic in ways:
        parity.assert_parity(
            functools.partial(candidate, deterministic),
            functools.partial(baseline.attention, **options, **drawn),
            functools.partial(reference.attention, **options, **drawn),
            tensors,
            gradients=gradients,
            seed=seed,
            names=("out", "lse"),
        )


def run(
    call: Callable[..., Any], tensors: dict[str, Any], cotangents: list[Tensor] | None = None
) -> list[Tensor]:
    """Outputs, then gradients, for cotangents of ones if none are given."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = call(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    cotangents = cotangents or [torch.ones_like(o) for o in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return [*(o.detach() for o in outputs), *found]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def _shrink_tiles(patch: pytest.MonkeyPatch, BM: int, BN: int) -> None:
    kernels = pytest.importorskip("gptkernels.triton_kernels.attention")
    for name in ("_FORWARD", "_QUERIES", "_KEYS"):
        tables = {
            room: {D: (BM, BN, warps, stages) for D, (_, _, warps, stages) in tiles.items()}
            for room, tiles in getattr(kernels, name).items()
        }
        patch.setattr(kernels, name, tables)


class TestParity:
    @runnable
    @given(
        sizes=st.tuples(
            st.integers(1, 2),  # B
            st.integers(1, 100),  # Tq
            st.integers(1, 100),  # Tk
            st.integers(1, 2),  # query heads a key head
            st.integers(1, 2),  # Hk, 1 in a batch of 2
            st.sampled_from([8, 16, 20, 64]),  # D
        ),
        causal=st.booleans(),
        window=st.none() | st.tuples(st.integers(-1, 70), st.integers(-1, 70)),
        softcap=st.sampled_from([0.0, 0.0, 2.0, 50.0]),
        alibi=st.booleans(),
        ends=st.none() | st.tuples(st.integers(0, 100), st.integers(0, 100)),
        dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
        return_lse=st.booleans(),
        tile=st.sampled_from([(16, 16), (32, 16), (16, 32)]),
        seed=st.integers(0, 2**20),
    )
    def test_any_size_and_option(
        self,
        impl: str,
        dtype: torch.dtype,
        sizes: tuple[int, ...],
        causal: bool,
        window: tuple[int, int] | None,
        softcap: float,
        alibi: bool,
        ends: tuple[int, int] | None,
        dropout_p: float,
        return_lse: bool,
        tile: tuple[int, int],
        seed: int,
    ) -> None:
        B, Tq, Tk, group, Hk, D = sizes
        Hk = min(Hk, 3 - B) if Tq > 4 else 8  # of a few numbers PyTorch's error is anything
        H = group * Hk
        tensors = inputs(B, Tq, Tk, H, Hk, D, dtype, seed)
        with pytest.MonkeyPatch.context() as patch:
            # A few rows a block, so that the written-out formula has many of them.
            patch.setattr(aten, "_SCORES_HELD", B * H * Tk * 40)
            patch.setattr(aten, "_BAND_ROWS", 24)
            if impl == "triton" and dtype != FP32:
                # Tiles as large as the lengths here would have no inner blocks.
                _shrink_tiles(patch, *tile)
            masks = dict(
                causal=causal,
                window=window,
                key_lengths=lengths(*(min(end, Tk) for end in ends[:B])) if ends else None,
            )
            # Where no row sees two keys dq and dk are 0, and rounding noise has no yardstick.
            flat = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
            _, counts = reference.attention(**flat, **masks, return_lse=True)
            assert_right(
                tensors,
                impl,
                seed,
                gradients=bool(counts.max() > 0.5),
                softcap=softcap,
                alibi_slopes=[2.0**-h for h in range(H)] if alibi else None,
                dropout_p=dropout_p,
                return_lse=return_lse,
                **masks,
            )

    @runnable
    @pytest.mark.parametrize("lse", [False, True])
    @pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (63, 65), (128, 128), (130, 200), (200, 130)])
    def test_edges_of_tiles(
        self, impl: str, dtype: torch.dtype, Tq: int, Tk: int, lse: bool, seed: int
    ) -> None:
        heads = 8 if Tq == 1 else 1  # of one number PyTorch's error is anything
        tensors = inputs(1, Tq, Tk, heads, D=16, dtype=dtype, seed=seed)
        # With a single key dq and dk are 0, and rounding noise has no yardstick.
        assert_right(tensors, impl, seed, gradients=Tk > 1, causal=not lse, return_lse=lse)

    @runnable
    @pytest.mark.parametrize("D", [1, 17, 65, 96, 128, 160, 256])
    def test_head_widths(self, impl: str, dtype: torch.dtype, D: int, seed: int) -> None:
        tensors = inputs(1, 70, 75, 2, 1, D, dtype, seed)
        assert_right(tensors, impl, seed, window=(60, 0), return_lse=True)

    @runnable
    @pytest.mark.parametrize("D", [8, 40, 63, 64, 80, 97, 129, 192, 193])
    def test_more_head_widths_forward(
        self, impl: str, dtype: torch.dtype, D: int, seed: int
    ) -> None:
        tensors = inputs(1, 70, 75, 2, 1, D, dtype, seed)
        assert_right(tensors, impl, seed, gradients=False, dropout_p=0.1, return_lse=True)

    @each
    def test_heads_that_do_not_fit_in_the_cache_together(self, impl: str, seed: int) -> None:
        """At this length the CUDA kernels take the three heads two at a time, then one."""
        tensors = inputs(1, 140, 16000, 3, D=64, seed=seed)
        assert_right(tensors, impl, seed, gradients=False, window=(100, 0), return_lse=True)

    @runnable
    @pytest.mark.parametrize(
        "options",
        [
            dict(dropout_p=0.2),
            dict(window=(100, 0), alibi_slopes=[0.1, 0.02]),
            dict(window=(170, 20), causal=False, softcap=3.0, return_lse=True),
            dict(key_lengths=(270,), causal=False, dropout_p=0.4, return_lse=True),
            dict(window=(5, 0)),
            dict(window=(0, -1), causal=False),
        ],
        ids=str,
    )
    def test_many_tiles(
        self, impl: str, dtype: torch.dtype, options: dict[str, Any], seed: int
    ) -> None:
        if "key_lengths" in options:
            options = options | dict(key_lengths=lengths(*options["key_lengths"]))
        assert_right(inputs(1, 140, 290, 2, 1, 16, dtype, seed), impl, seed, **options)

    @runnable
    def test_eight_query_heads_read_one(self, impl: str, dtype: torch.dtype, seed: int) -> None:
        tensors = inputs(2, 40, 45, 8, 1, 24, dtype, seed)
        assert_right(tensors, impl, seed, dropout_p=0.1, return_lse=True)

    @runnable
    @pytest.mark.parametrize(
        "options",
        [
            dict(softmax_scale=-0.3),
            dict(softmax_scale=0.0),
            dict(softmax_scale=3.0, softcap=20.0),
            dict(dropout_p=1.0),
            dict(window=(1, 0), causal=False),
            dict(window=(2**40, 2**40), causal=False),
            dict(window=(-1, 3)),  # causal caps right at 0
            dict(window=(3, -1), causal=False),
        ],
        ids=str,
    )
    def test_options(
        self, impl: str, dtype: torch.dtype, options: dict[str, Any], seed: int
    ) -> None:
        assert_right(inputs(1, 40, 45, dtype=dtype, seed=seed), impl, seed, **options)

    @runnable
    def test_strides(self, impl: str, dtype: torch.dtype, seed: int) -> None:
        """Slices of one projection, heads before tokens, and one key head expanded."""
        torch.manual_seed(seed)
        draw = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
        q, k, v = draw(2, 40, 3, 2, 24).unbind(2)
        assert_right(dict(q=q, k=k, v=v), impl, seed)
        q, k, v = (x.transpose(1, 2) for x in draw(3, 2, 2, 40, 24))
        assert_right(dict(q=q, k=k, v=v), impl, seed)
        k = draw(1, 40, 1, 24).expand(2, 40, 2, 24)
        assert_right(dict(q=q, k=k, v=k), impl, seed)

    @each
    @pytest.mark.parametrize(
        "ends",
        [torch.tensor([[7, 0], [20, 0], [31, 0]]).int()[:, 0], torch.tensor([9]).int().expand(3)],
        ids=["column", "expanded"],
    )
    def test_strided_lengths_and_slopes(self, impl: str, ends: Tensor) -> None:
        tensors = inputs(3, 40)
        slopes = torch.tensor([0.5], device=DEVICE).expand(2)
        call = functools.partial(attention, impl=impl, dropout_p=0.2)
        ends = ends.to(DEVICE)
        assert ends.stride() != (1,)
        strided = functools.partial(call, key_lengths=ends, alibi_slopes=slopes)
        dense = functools.partial(call, key_lengths=ends.contiguous(), alibi_slopes=[0.5, 0.5])
        assert_same(_seeded(strided, tensors), _seeded(dense, tensors))

    @each
    def test_expanded_cotangent(self, impl: str) -> None:
        tensors = inputs(2, 20, D=24)
        call = functools.partial(attention, impl=impl)
        found = run(lambda **leaves: call(**leaves).sum(), tensors)[1:]
        assert_same(found, run(call, tensors)[1:])

    @pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
    @pytest.mark.parametrize("shape", [(2, 3, 40, 45), (40, 45), (2, 1, 1, 45), (3, 40, 1)])
    @pytest.mark.parametrize("kind", ["bool", "additive"])
    def test_attn_mask(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        kind: str,
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(aten, "_SCORES_HELD", 2 * 3 * 45 * 16)
        tensors = inputs(2, 40, 45, 3, D=24, dtype=dtype, seed=seed)
        mask = torch.randn(shape).to(device=DEVICE, dtype=dtype)
        if kind == "bool":
            assert_right(tensors, "auto", seed, attn_mask=mask > -0.5, softcap=5.0)
        elif shape[-1] > 1:  # its gradient too; that of one value for a whole row is 0, all noise
            assert_right(tensors | dict(attn_mask=mask), "auto", seed, softcap=5.0)
        else:
            assert_right(tensors, "auto", seed, attn_mask=mask)

    @each
    def test_lse_alone(self, impl: str, seed: int) -> None:
        tensors = inputs(1, 30, 33, seed=seed)
        tensors.pop("v")
        v = torch.zeros_like(tensors["k"])
        parity.assert_parity(
            lambda q, k: attention(q, k, v, return_lse=True, impl=impl)[1],
            lambda q, k: baseline.attention(q, k, v, return_lse=True)[1],
            lambda q, k: reference.attention(q, k, v.double(), return_lse=True)[1],
            tensors,
        )


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
            options["key_lengths"] = lengths(*options["key_lengths"])
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
        """Of six queries and four keys the first two queries stand before every key."""
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
        ends = lengths(0, 33, 64)
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
            pytest.param("triton", FP32, True, id="triton"),
            *(
                pytest.param("cuda", dtype, deterministic, id=f"cuda-{name}", marks=CUDA.marks)
                for dtype, deterministic, name in (
                    (FP32, True, "float32"),
                    (BF16, True, "deterministic"),
                    (BF16, False, "atomics"),
                )
            ),
        ],
    )
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
    @pytest.mark.parametrize("at", [25, 50])
    @pytest.mark.parametrize("softcap", [0.0, 2.0])
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
        """Causal with a window of 12: rows at ... at + 12 see key `at`, row `at` sees keys
        at - 12 ... at, and what those rows see lies between at - 12 and at + 12."""
        if HOPPER and impl == "cuda" and dtype == BF16:
            pytest.skip("Hopper's kernels then sum in another order: test_attention_*_sm90.py")
        T, reach = 70, 12
        tensors = inputs(1, T, dtype=dtype)
        cotangent = torch.randn(1, T, 2, 16, device=DEVICE, dtype=dtype)
        call = functools.partial(
            attention,
            window=(reach, 0),
            softcap=softcap,
            deterministic=deterministic,
            impl=impl,
        )
        wanted = run(call, tensors, [cotangent])
        broken = cotangent if where == "dout" else tensors[where]
        broken = broken.clone()
        broken[:, at, 1, 3] = value
        if where == "dout":
            cotangent = broken
        else:
            tensors[where] = broken
        found = run(call, tensors, [cotangent])
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

        def gradients(*wanted: str) -> dict[str, Tensor]:
            leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in tensors.items()}
            out = attention(**leaves, **options, deterministic=True, impl=impl)
            out.square().sum().backward()
            return {n: x.grad for n, x in leaves.items() if x.grad is not None}

        every = gradients(*tensors)
        for name in tensors:
            alone = gradients(name)
            assert list(alone) == [name]
            assert torch.equal(alone[name], every[name])

    @pytest.mark.parametrize("dtype", [FP32, FP16])
    def test_no_kernel_runs_for_nobody(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernels = pytest.importorskip("gptkernels.triton_kernels.attention")
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
        """Only dq may differ, only where the CUDA kernels add it up by atomics: from three blocks
        of keys here, in whatever order."""
        tensors = inputs(1, 40, 270, 2, 1, 24, dtype)

        def call(**leaves: Any) -> Any:
            torch.manual_seed(1)
            return attention(
                **leaves, dropout_p=0.2, return_lse=True, deterministic=deterministic, impl=impl
            )

        wanted = run(call, tensors)
        by_atomics = impl == "cuda" and dtype != FP32 and not deterministic
        for schedule in ("reverse", "7"):  # of the emulator
            monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
            found = run(call, tensors)
            if by_atomics:
                torch.testing.assert_close(found.pop(2), wanted[2])
            assert_same(found, wanted[:2] + wanted[3:] if by_atomics else wanted)

    @each
    def test_dropout_takes_the_mask_of_the_contract(self, impl: str) -> None:
        """Values that are unit vectors show the mask itself."""
        T = 70
        q = torch.zeros(2, T, 2, 8, device=DEVICE)
        v = torch.eye(T, device=DEVICE)[None, :, None].expand(2, T, 2, T)
        q, v = torch.zeros(2, T, 2, T, device=DEVICE), v.contiguous()
        torch.manual_seed(3)
        rng = philox.draw(DEVICE)
        keep = philox.attention_keep(rng, 0.25, 2, 2, T, T)
        torch.manual_seed(3)
        out = attention(q, q, v, causal=False, dropout_p=0.25, impl=impl)
        assert torch.equal(out.transpose(1, 2) != 0, keep)


class TestTorchImplementation:
    @pytest.mark.parametrize(
        ("options", "fused"),
        [
            (dict(), True),
            (dict(causal=False), True),
            (dict(Tq=1), True),
            (dict(Tq=4), MASKED),
            (dict(Tq=4, causal=False), True),
            (dict(window=(100, 100)), True),
            (dict(window=(3, 0)), MASKED),
            (dict(attn_mask=torch.ones(9, 9, dtype=torch.bool, device=DEVICE)), MASKED),
            (dict(attn_mask=torch.ones(9, 9, dtype=BF16, device=DEVICE)), False),
            (dict(alibi_slopes=[1.0, 1.0, 1.0, 1.0]), False),
            (dict(softcap=1.0), False),
            (dict(dropout_p=0.1), False),
            (dict(key_lengths=(9,)), MASKED),
        ],
        ids=str,
    )
    def test_it_is_fused_where_the_options_allow(
        self, options: dict[str, Any], fused: bool
    ) -> None:
        options = dict(options)
        tensors = inputs(1, options.pop("Tq", 9), 9, H=4, Hk=2, D=16, dtype=BF16)
        if "key_lengths" in options:
            options["key_lengths"] = lengths(*options["key_lengths"])
        seen: list[str] = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        def call(**leaves: Any) -> Tensor:
            with Recorder():
                return attention(**leaves, **options, impl="torch")

        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        with Recorder():
            call(**leaves).sum().backward()
        assert any("gptkernels.attention_fwd" in name for name in seen)
        assert any("gptkernels.attention_bwd" in name for name in seen)
        parts: list[str] = []
        monitored = [
            aten._fused_attention_fwd,
            aten._fused_attention_bwd,
            aten._masked_attention_fwd,
            aten._masked_attention_bwd,
        ]
        with pytest.MonkeyPatch.context() as patch:
            for function in monitored:
                patch.setattr(aten, function.__name__, _noting(function, parts))
            run(functools.partial(attention, **options, impl="torch"), tensors)
        assert bool(parts) == fused
        assert len(parts) in (0, 2)

    def test_fused_cuda_ops_take_only_what_their_grids_can(self) -> None:
        for shape in ((65536, 1, 1, 16), (1, 65536, 1, 16)):
            q = SimpleNamespace(device=torch.device("cuda"), shape=shape)
            assert aten._fused_choice(q, q, q, True, 1.0) is None

    def test_widths_that_flash_backward_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for capability, fits in (((8, 0), True), ((8, 6), False), ((9, 0), True), ((12, 0), False)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            for D, accepted in ((192, True), (200, fits), (224, fits), (232, True)):
                q = SimpleNamespace(device=torch.device("cuda"), shape=(1, 1, 1, D))
                assert aten._flash_backward_takes(q) == accepted

    def test_memory_stays_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No tensor of the written-out formula holds more scores than the bound."""
        monkeypatch.setattr(aten, "_SCORES_HELD", 2000)
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                nonlocal largest
                result = func(*args, **(kwargs or {}))
                if isinstance(result, Tensor):
                    largest = max(largest, result.numel())
                return result

        tensors = inputs(1, 300, H=1, D=4)
        with Watch():
            out, lse = aten.attention_fwd(
                *tensors.values(), None, None, None, None, 0.5, 100, 0, 2.0, 0.0
            )
            aten.attention_bwd(
                out, lse, *tensors.values(), out, lse, None, None, None, None, 0.5, 100, 0, 2.0,
                0.0, [True] * 3, False, True,
            )  # fmt: skip
        assert largest <= 2000


def _noting(function: Callable[..., Any], notes: list[str]) -> Callable[..., Any]:
    def noting(*arguments: Any) -> Any:
        result = function(*arguments)
        if result is not None:
            notes.append(function.__name__)
        return result

    return noting


class TestRegistration:
    @each
    @pytest.mark.parametrize("everything", [False, True])
    def test_opcheck(self, impl: str, everything: bool) -> None:
        q, k, v = inputs(2, 6, 9, 4, 2, 16).values()
        slopes = torch.ones(4, device=DEVICE) if everything else None
        rng = philox.draw(DEVICE) if everything else None
        mask = torch.randn(2, 1, 6, 9, device=DEVICE) if everything and impl == "torch" else None
        extras = (slopes, lengths(3, 9) if everything else None, mask, rng)
        options = (0.3, 4, 0, 2.0, 0.1) if everything else (0.3, -1, -1, 0.0, 0.0)
        ops = torch.ops.gptkernels
        torch.library.opcheck(ops.attention_fwd.default, (q, k, v, *extras, *options, impl))
        out, lse = ops.attention_fwd(q, k, v, *extras, *options, impl)
        torch.library.opcheck(
            ops.attention_bwd.default,
            (
                torch.randn_like(out),
                torch.randn_like(lse) if everything else None,
                *(q, k, v, out, lse),
                *extras,
                *options,
                [True, not everything, True],
                mask is not None,
                False,
                impl,
            ),
        )

    @each
    @pytest.mark.parametrize(
        "options",
        [dict(), dict(window=(4, 2), softcap=3.0, alibi_slopes=[0.5, 1.0], return_lse=True)],
        ids=["plain", "options"],
    )
    def test_compile_equals_eager(self, impl: str, options: dict[str, Any]) -> None:
        def call(**leaves: Any) -> Any:
            result = attention(**leaves, **options, impl=impl)
            return (result[0] * 2, result[1]) if isinstance(result, tuple) else result * 2

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for T in (9, 12):
            tensors = inputs(2, T, T + 3)
            assert_same(run(compiled, tensors), run(call, tensors))

    def test_compile_keeps_the_fused_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(aten, "_attention_rows_bwd", None)  # what a gradient of lse would need
        torch._dynamo.reset()
        call = functools.partial(attention, impl="torch")
        compiled = torch.compile(lambda q, k, v: call(q, k, v), fullgraph=True, backend="aot_eager")
        assert_same(run(compiled, inputs()), run(call, inputs()))

    @each
    def test_compile_with_key_lengths_and_dropout(self, impl: str) -> None:
        def call(ends: Tensor, **leaves: Any) -> Any:
            return attention(**leaves, key_lengths=ends, dropout_p=0.3, impl=impl)

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for T in (9, 12):
            found, wanted = (
                _seeded(functools.partial(f, lengths(3, T)), inputs(2, T)) for f in (compiled, call)
            )
            assert_same(found, wanted)

    @each
    @pytest.mark.parametrize(
        ("policy", "runs"),
        [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)],
    )
    def test_selective_checkpointing_sees_the_op(
        self, impl: str, policy: CheckpointPolicy, runs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = dict(torch="aten", triton="triton_kernels", cuda="cuda")
        module = pytest.importorskip(f"gptkernels.{names[impl]}.attention")

        def choose(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
            ours = op is torch.ops.gptkernels.attention_fwd.default
            return policy if ours else CheckpointPolicy.PREFER_RECOMPUTE

        call = functools.partial(attention, impl=impl)

        def checkpointed(**leaves: Any) -> Tensor:
            contexts = functools.partial(create_selective_checkpoint_contexts, choose)
            return checkpoint(call, **leaves, use_reentrant=False, context_fn=contexts)

        tensors = inputs()
        wanted = run(call, tensors)
        count: list[str] = []
        monkeypatch.setattr(module, "attention_fwd", _noting(module.attention_fwd, count))
        assert_same(run(checkpointed, tensors), wanted)
        assert len(count) == runs

    @each
    def test_recomputation_replays_dropout(self, impl: str) -> None:
        call = functools.partial(attention, dropout_p=0.4, impl=impl)
        tensors = inputs()
        recomputed = functools.partial(checkpoint, call, use_reentrant=False)
        assert_same(_seeded(recomputed, tensors), _seeded(call, tensors))

    @each
    def test_autocast(self, impl: str) -> None:
        dtype = FP16 if impl == "triton" and INTERPRETED else BF16
        tensors = inputs(D=24)
        call = functools.partial(attention, impl=impl)

        def cast(**leaves: Any) -> Tensor:
            with torch.autocast(DEVICE, dtype=dtype):
                return call(**leaves)

        found = run(cast, tensors)
        assert found[0].dtype == dtype
        assert all(gradient.dtype == FP32 for gradient in found[1:])
        wanted = run(call, {name: tensor.to(dtype) for name, tensor in tensors.items()})
        assert_same(found, [a.to(b.dtype) for a, b in zip(wanted, found, strict=True)])

    @each
    def test_backward_under_autocast_keeps_the_dtype(self, impl: str) -> None:
        tensors = inputs(D=24)
        call = functools.partial(attention, impl=impl, softcap=5.0)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        out = call(**leaves)
        with torch.autocast(DEVICE, dtype=BF16):
            found = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
        assert_same(list(found), run(call, tensors)[1:])


def _seeded(call: Callable[..., Any], tensors: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(11)
    return run(call, tensors)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "sentence"),
        [
            (dict(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
            (dict(q=torch.zeros(2, 5, 16)), ValueError, r"q must have shape \(B, Tq, H, D\), got"),
            (dict(k=torch.zeros(5)), ValueError, r"k must have shape \(B, Tk, Hk, D\), got \(5,\)"),
            (dict(q=torch.zeros(2, 5, 4, 16).int()), TypeError, "q must be float32, .* got int32"),
            (dict(v=torch.zeros(2, 7, 2, 16).cfloat()), TypeError, "v must .* got complex64"),
            (dict(k=torch.zeros(2, 7, 2, 16).half()), TypeError, "k must have the dtype of q"),
            (
                dict(v=torch.zeros(2, 7, 2, 16, device="meta")),
                ValueError,
                "v must be on the device of q",
            ),
            (dict(k=torch.zeros(3, 7, 2, 16)), ValueError, r"k must have shape \(2, 7, 2, 16\)"),
            (dict(k=torch.zeros(2, 7, 2, 8)), ValueError, r"k must have shape \(2, 7, 2, 16\)"),
            (dict(v=torch.zeros(2, 6, 2, 16)), ValueError, r"v must have shape \(2, 7, 2, 16\)"),
            (
                {n: torch.zeros(2, 5, 4, 257) for n in "qkv"},
                ValueError,
                "q must have a head width D between 1 and 256, got 257",
            ),
            (dict(q=torch.zeros(2, 5, 3, 16)), ValueError, "the heads of q must be a multiple"),
            (
                dict(q=torch.zeros(2, 5, 16, 4).transpose(2, 3)),
                ValueError,
                "q must have a unit stride",
            ),
            (dict(window=(-2, 0)), ValueError, "window must be at least 0 on either side, or -1"),
            (dict(window=(1, 2, 3)), ValueError, r"window must be a pair \(left, right\)"),
            (dict(window=5), ValueError, r"window must be a pair \(left, right\) .* got 5"),
            (dict(window=(1.5, 0)), ValueError, r"window must be a pair .* of integers"),
            (dict(softcap=-1.0), ValueError, "softcap must be positive, or 0 for none, got -1.0"),
            (dict(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite, got nan"),
            (dict(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1, got 1.5"),
            (dict(alibi_slopes=[1.0]), ValueError, r"alibi_slopes must have shape \(4,\)"),
            (
                dict(alibi_slopes=torch.ones(4, requires_grad=True)),
                NotImplementedError,
                "alibi_slopes is not differentiable",
            ),
            (dict(key_lengths=[1, 2]), TypeError, "key_lengths must be a torch.Tensor, got list"),
            (dict(key_lengths=torch.ones(2).long()), TypeError, "key_lengths must be int32"),
            (dict(key_lengths=torch.ones(3).int()), ValueError, r"key_lengths must have shape"),
            (
                dict(key_lengths=torch.tensor([8, 1]).int()),
                ValueError,
                "key_lengths must lie between 0 and Tk = 7, got 8",
            ),
            (
                dict(key_lengths=torch.tensor([2, -1]).int()),
                ValueError,
                "key_lengths must lie between 0 and Tk = 7, got -1",
            ),
            (dict(attn_mask=[True]), TypeError, "attn_mask must be a torch.Tensor, got list"),
            (
                dict(attn_mask=torch.ones(5, 7).int()),
                TypeError,
                "attn_mask .* must be float32, .* got int32",
            ),
            (
                dict(attn_mask=torch.ones(4, 7)),
                ValueError,
                r"attn_mask must broadcast to \(B, H, Tq, Tk\) = \(2, 4, 5, 7\), got \(4, 7\)",
            ),
            (dict(attn_mask=torch.ones(1, 1, 1, 5, 7)), ValueError, "attn_mask must broadcast"),
            (
                dict(attn_mask=torch.ones(5, 7), impl="triton"),
                NotImplementedError,
                "attn_mask runs with impl='torch' or 'auto' only, got 'triton'",
            ),
            (dict(causal="no"), TypeError, "causal must be a bool, got 'no'"),
            (dict(window=(True, 0)), ValueError, "window must be a pair .* of integers"),
            (dict(softmax_scale="x"), TypeError, "softmax_scale must be a number, got 'x'"),
            (dict(softcap=[1]), TypeError, r"softcap must be a number, got \[1\]"),
            (dict(dropout_p="a"), TypeError, "dropout_p must be a number, got 'a'"),
            (dict(alibi_slopes=0.5), TypeError, "alibi_slopes must be a tensor or floats, got 0.5"),
            (
                dict(alibi_slopes=[[0.1], [0.2]]),
                TypeError,
                "alibi_slopes must be a tensor or floats, got ",
            ),
            (dict(impl="fast"), ValueError, "impl must be 'auto', .* got 'fast'"),
        ],
        ids=str,
    )
    def test_one_clear_sentence(
        self, change: dict[str, Any], error: type[Exception], sentence: str
    ) -> None:
        arguments = dict(
            q=torch.zeros(2, 5, 4, 16), k=torch.zeros(2, 7, 2, 16), v=torch.zeros(2, 7, 2, 16)
        )
        with pytest.raises(error, match=sentence) as caught:
            attention(**(arguments | change))
        assert "\n" not in str(caught.value)

    def test_double_backward_is_refused(self) -> None:
        tensors = {n: t.requires_grad_() for n, t in inputs().items()}
        (dq,) = torch.autograd.grad(attention(**tensors).sum(), tensors["q"], create_graph=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            dq.sum().backward()

    def test_auto_with_a_mask_falls_back(self) -> None:
        tensors = inputs(1, 5)
        mask = torch.ones(5, 5, dtype=torch.bool, device=DEVICE).tril()
        found = attention(**tensors, causal=False, attn_mask=mask)
        torch.testing.assert_close(found, attention(**tensors))
