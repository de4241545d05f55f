"""`attention` against the truth, in every implementation, with all sizes, options and strides."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from attention_cases import hold, shrink_tiles
from harness import BF16, DEVICE, FP16, FP32, RUNNABLE, each, name_of, runnable
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import attention_inputs as inputs
from op_inputs import int32
from right import assert_same, run, seeded
from torch import Tensor

from gptkernels import attention
from gptkernels.core.choice import automatic
from gptkernels.ops.attention.torch import blocks, fused
from gptkernels.truth import baseline, parity, reference


class TestParity:
    @runnable
    @settings(max_examples=5)  # test_edges_of_tiles and test_many_tiles have the chosen sizes
    @given(
        sizes=st.tuples(
            st.integers(1, 2),  # B
            st.integers(1, 70),  # Tq: may exceed the 64 rows of a tile
            st.integers(1, 70),  # Tk
            st.integers(1, 2),  # query heads for each key head
            st.integers(1, 2),  # Hk, 1 in a batch of 2
            st.sampled_from([8, 16, 20, 64]),  # D
        ),
        causal=st.booleans(),
        window=st.none() | st.tuples(st.integers(-1, 70), st.integers(-1, 70)),
        softcap=st.sampled_from([0.0, 0.0, 2.0, 50.0]),
        alibi=st.booleans(),
        ends=st.none() | st.tuples(st.integers(0, 70), st.integers(0, 70)),
        dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
        return_lse=st.booleans(),
        tile=st.sampled_from([(32, 32), (64, 32), (32, 64)]),
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
        Hk = min(Hk, 3 - B) if Tq > 4 else 8  # PyTorch's error on a few numbers is random
        H = group * Hk
        tensors = inputs(B, Tq, Tk, H, Hk, D, dtype, seed)
        with pytest.MonkeyPatch.context() as patch:
            # The formula gets a few rows in each block, and so several blocks.
            patch.setattr(blocks, "_SCORES_HELD", B * H * Tk * 40)
            patch.setattr(fused, "_BAND_ROWS", 24)
            if impl == "triton" and dtype != FP32:
                # With tiles as large as these lengths, no block would be without a mask.
                shrink_tiles(patch, *tile)
            masks = dict(
                causal=causal,
                window=window,
                key_lengths=int32(*(min(end, Tk) for end in ends[:B])) if ends else None,
            )
            # If no row sees two keys, dq and dk are 0. Results are then rounding noise, with which
            # nothing can be compared. In 16 bits the same noise of many rows that see one key adds
            # up in that key's gradient (docs/numerics.md).
            flat = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
            _, counts = reference.attention(**flat, **masks, return_lse=True)
            alone = 0 if dtype == FP32 else int((counts == 0).sum(-1).max())
            hold(
                tensors,
                impl,
                seed,
                gradients=bool(counts.max() > 0.5) and alone <= 8,
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
        heads = 8 if Tq == 1 else 1  # PyTorch's error on one number is random
        tensors = inputs(1, Tq, Tk, heads, D=16, dtype=dtype, seed=seed)
        # With a single key dq and dk are 0. Results are then rounding noise.
        hold(tensors, impl, seed, gradients=Tk > 1, causal=not lse, return_lse=lse)

    @runnable
    @pytest.mark.parametrize("D", [1, 17, 65, 128, 256])
    def test_head_widths(self, impl: str, dtype: torch.dtype, D: int, seed: int) -> None:
        # PyTorch's error on few numbers is random; many heads of few tokens have enough of them.
        Tq, Tk, heads, left = (24, 29, 8, 20) if D == 1 else (70, 75, 1, 60)
        tensors = inputs(1, Tq, Tk, 2 * heads, heads, D, dtype, seed)
        hold(tensors, impl, seed, window=(left, 0), return_lse=True)

    @runnable
    @pytest.mark.parametrize("D", [8, 40, 63, 64, 80, 96, 97, 129, 160, 192, 193])
    def test_more_head_widths_forward(
        self, impl: str, dtype: torch.dtype, D: int, seed: int
    ) -> None:
        tensors = inputs(1, 70, 75, 2, 1, D, dtype, seed)
        hold(tensors, impl, seed, gradients=False, dropout_p=0.1, return_lse=True)

    @each
    def test_heads_that_do_not_fit_in_the_cache_together(self, impl: str, seed: int) -> None:
        """At this length the CUDA kernels take two heads together, then the third head."""
        tensors = inputs(1, 140, 16000, 3, D=64, seed=seed)
        hold(tensors, impl, seed, gradients=False, window=(100, 0), return_lse=True)

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
            options = options | dict(key_lengths=int32(*options["key_lengths"]))
        heads = len(options.get("alibi_slopes", [0.0]))
        hold(inputs(1, 140, 290, heads, 1, 16, dtype, seed), impl, seed, **options)

    @each
    def test_alibi_where_every_key_is_far(self, impl: str) -> None:
        """Every key is 23 or more positions away, so a score's last digits are few. They must not
        be lost a second time: over many rows the errors are those of PyTorch."""
        shape, options = (1, 16, 48, 8, 8, 16), dict(alibi_slopes=[1.0] * 8, key_lengths=int32(8))
        ours, theirs = 0.0, 0.0
        for seed in range(4):
            tensors = inputs(*shape, seed=seed)
            exact = {name: parity.upcast(tensor) for name, tensor in tensors.items()}
            truth = reference.attention(**exact, **options)
            ours += (attention(**tensors, **options, impl=impl) - truth).abs().sum().item()
            theirs += (baseline.attention(**tensors, **options) - truth).abs().sum().item()
        assert ours <= 1.06 * theirs

    @runnable
    def test_eight_query_heads_read_one(self, impl: str, dtype: torch.dtype, seed: int) -> None:
        tensors = inputs(2, 40, 45, 8, 1, 24, dtype, seed)
        hold(tensors, impl, seed, dropout_p=0.1, return_lse=True)

    @pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
    @pytest.mark.parametrize("left", [40, 30], ids=["causal", "window"])
    def test_gradients_of_a_key_add_up_over_heads(self, left: int, dtype: torch.dtype) -> None:
        """64 query heads read one key head. Each query weighs the n keys that it sees alike, so dv
        adds up 1 / n."""
        T, H = 40, 64
        one = torch.ones(1, T, H, 8, dtype=dtype)
        tensors = dict(q=0 * one, k=one[:, :, :1], v=one[:, :, :1])
        call = functools.partial(attention, window=(left, 0), impl="torch")
        *_, dv = run(call, tensors, [one], ["v"])
        seen = torch.ones(T, T, dtype=torch.float64).tril().triu(-left)
        truth = H * (seen / seen.sum(1, keepdim=True)).sum(0).view(1, T, 1, 1)
        assert ((dv - truth).abs() <= 2 * torch.finfo(dtype).eps * truth).all()

    @pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
    def test_gradients_of_a_key_add_up_over_rows(self, dtype: torch.dtype) -> None:
        """PyTorch's fused op adds up blocks of 256 rows."""
        T = 8192
        zero = torch.zeros(1, T, 1, 8, dtype=dtype)
        dout = torch.linspace(1, 2, 8).to(dtype)
        call = functools.partial(attention, causal=False, impl="torch")
        *_, dv = run(call, dict(q=zero, k=zero, v=zero), [zero + dout], ["v"])
        assert ((dv - dout).abs() <= 2 * torch.finfo(dtype).eps * dout).all()

    @pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
    @pytest.mark.parametrize("masked", [False, True])
    def test_gradients_of_a_query_add_up_over_keys(self, dtype: torch.dtype, masked: bool) -> None:
        """PyTorch's fused op adds up blocks of 512 keys. Here all terms are positive."""
        T = 65536
        k = torch.ones(1, T, 1, 8, dtype=dtype)
        k[:, 1::2] = -1
        q, one = torch.zeros(1, 1, 1, 8, dtype=dtype), torch.ones(1, 1, 1, 8, dtype=dtype)
        options = {"key_lengths": int32(T)} if masked else {}
        call = functools.partial(attention, causal=False, impl="torch", **options)
        *_, dq = run(call, dict(q=q, k=k, v=k), [one], ["q"])
        assert ((dq - 8**0.5).abs() <= 2 * torch.finfo(dtype).eps * 8**0.5).all()

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
            dict(window=(-1, 3)),  # causal lowers right to 0
            dict(window=(3, -1), causal=False),
        ],
        ids=str,
    )
    def test_options(
        self, impl: str, dtype: torch.dtype, options: dict[str, Any], seed: int
    ) -> None:
        hold(inputs(1, 40, 45, dtype=dtype, seed=seed), impl, seed, **options)

    @runnable
    def test_strides(self, impl: str, dtype: torch.dtype, seed: int) -> None:
        """Slices of one projection, heads before tokens, and one key head that is expanded."""
        torch.manual_seed(seed)
        draw = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
        q, k, v = draw(2, 40, 3, 2, 24).unbind(2)
        hold(dict(q=q, k=k, v=v), impl, seed)
        q, k, v = (x.transpose(1, 2) for x in draw(3, 2, 2, 40, 24))
        hold(dict(q=q, k=k, v=v), impl, seed)
        k = draw(1, 40, 1, 24).expand(2, 40, 2, 24)
        hold(dict(q=q, k=k, v=k), impl, seed)

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
        assert_same(run(seeded(strided), tensors), run(seeded(dense), tensors))

    @pytest.mark.parametrize(
        ("impl", "dtype"), [row for row in RUNNABLE if row.values[0] in ("torch", "cpu")]
    )
    @pytest.mark.parametrize("shape", [(2, 3, 40, 45), (40, 45), (2, 1, 1, 45), (3, 40, 1)])
    @pytest.mark.parametrize("kind", ["bool", "additive"])
    def test_attn_mask(
        self,
        impl: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        kind: str,
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(blocks, "_SCORES_HELD", 2 * 3 * 45 * 16)
        tensors = inputs(2, 40, 45, 3, D=24, dtype=dtype, seed=seed)
        mask = torch.randn(shape).to(device=DEVICE, dtype=dtype)
        if kind == "bool":
            hold(tensors, impl, seed, attn_mask=mask > -0.5, softcap=5.0)
        # The mask's gradient is tested only where the mask differs within a row: one value for a
        # whole row has the gradient 0, and the result would be rounding noise.
        elif shape[-1] > 1:
            hold(tensors | dict(attn_mask=mask), impl, seed, softcap=5.0)
        else:
            hold(tensors, impl, seed, attn_mask=mask)

    @pytest.mark.skipif(automatic("cpu") != "cpu", reason="no CPU kernels here")
    @pytest.mark.parametrize(
        ("options", "picked"),
        [
            (dict(causal=False), "torch"),
            (dict(causal=False, dtype=BF16), "cpu"),
            (dict(causal=False, softcap=3.0), "cpu"),
            (dict(causal=False, key_lengths=torch.tensor([70]).int()), "cpu"),
            (dict(), "cpu"),
        ],
        ids=str,
    )
    def test_auto_on_a_cpu(self, options: dict[str, Any], picked: str) -> None:
        options = dict(options)
        tensors = inputs(1, 70, dtype=options.pop("dtype", FP32))
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        found = {how: attention(**tensors, **options, impl=how) for how in ("auto", "cpu", "torch")}
        assert torch.equal(found["auto"], found[picked])
        assert not torch.equal(found["cpu"], found["torch"])

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
