"""Attention's forward kernel for Hopper (csrc/attention/fwd/sm90), on a GPU of compute capability
9.0 or in the emulator, which imitates one.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, HERE, emulated, needs_cuda
from op_inputs import attention_inputs, int32
from right import assert_right, assert_same
from torch import Tensor

from gptkernels import attention
from gptkernels.core import native
from gptkernels.ops.attention.cuda.dense import attention_fwd
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.truth import baseline, parity, reference

pytestmark = [needs_cuda, pytest.mark.usefixtures("hopper")]

KERNEL = "attention_fwd_sm90_kernel"
BUILDS = native.module().attention_fwd_builds() if "cuda" in HERE else []
in_16_bits = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


def inputs(
    B: int = 1,
    Tq: int = 70,
    Tk: int | None = None,
    H: int = 2,
    Hk: int | None = None,
    D: int = 64,
    dtype: torch.dtype = BF16,
) -> dict[str, Any]:
    return attention_inputs(B, Tq, Tk, H, Hk, D, dtype, seed=None)


def forward(tensors: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    with parity.poisoned_outputs():
        found = attention(**tensors, **options, return_lse=True, impl="cuda")
    assert isinstance(found, tuple)
    return found


def hold(tensors: dict[str, Any], built: str | None = None, **options: Any) -> None:
    """Asserts that attention passes the parity rule, and that Hopper's kernel ran, with the build
    whose name starts with `built`."""
    options |= dict(return_lse=True, impl="cuda", gradients=False)
    made = native.record(functools.partial(assert_right, attention, tensors, **options))
    (launch,) = made["launches"]
    assert launch["kernel"] == KERNEL
    if built is not None:
        assert launch["built"]["name"].startswith(built)


@in_16_bits
@pytest.mark.parametrize(
    ("D", "built"),
    [
        (8, "D64 192x128"),
        (40, "D64 192x128"),
        (64, "D64 192x128"),
        (80, "D96 128x128"),
        (96, "D96 128x128"),
        (128, "D128 128x128"),
        (136, "D192 128x112"),
        (192, "D192 128x112"),
        (256, "D256 128x80"),
    ],
)
def test_head_widths(dtype: torch.dtype, D: int, built: str) -> None:
    """There are blocks with a mask, a block without one, and rows and keys past the end."""
    hold(inputs(1, 150, 270, 1, 1, D, dtype), built)


@in_16_bits
@pytest.mark.parametrize("D", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    "options",
    [
        dict(softcap=3.0, window=(100, 0)),
        dict(alibi_slopes=[0.5, 0.01], causal=False),
    ],
    ids=["softcap", "ALiBi"],
)
def test_options(dtype: torch.dtype, D: int, options: dict[str, Any]) -> None:
    hold(inputs(1, 80, 150, 2, 1, D, dtype), **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(softcap=50.0),
        dict(softcap=2000.0),
        dict(softmax_scale=-0.3),
        dict(softmax_scale=0.0),
        dict(window=(0, -1), causal=False),
        dict(window=(5, 0)),
        dict(window=(170, 20), causal=False),
        dict(causal=False, key_lengths=(200,)),
    ],
    ids=str,
)
def test_more_options(options: dict[str, Any]) -> None:
    if "key_lengths" in options:
        options = options | dict(key_lengths=int32(*options["key_lengths"]))
    hold(inputs(1, 140, 290, 1, 1, 16), **options)


@pytest.mark.parametrize("number", range(len(BUILDS)))
def test_every_build(number: int) -> None:
    """Causal, with fewer queries than keys. There are several tiles of queries and several blocks
    of keys in each, and CTAs go from one tile to the next."""
    built = BUILDS[number]
    D = built["head_width"]
    tensors = inputs(1, 2 * built["tile_m"] - 30, 2 * built["tile_m"] + 75, 2, 1, D)
    options = AttentionOptions(softmax_scale=D**-0.5, right=0)
    call = functools.partial(attention_fwd, options=options, build=number)
    parity.assert_parity(
        call,
        functools.partial(baseline.attention, return_lse=True),
        functools.partial(reference.attention, return_lse=True),
        tensors,
        gradients=False,
    )
    launch = native.record(lambda: call(**tensors))["launches"][0]
    assert launch["built"] == built
    assert launch["tiles"] == 4
    if native.EMULATED:
        assert launch["grid"][0] == 2  # on two multiprocessors each CTA takes two tiles


def test_builds_that_cannot() -> None:
    call = functools.partial(attention_fwd, options=AttentionOptions(softmax_scale=1.0, right=0))
    widths = [built["head_width"] for built in BUILDS]
    with pytest.raises(RuntimeError, match=r"heads up to 128 wide, and these are .* width 64"):
        call(**inputs(D=64), build=widths.index(128))
    with pytest.raises(RuntimeError, match=f"there are {len(widths)} builds"):
        call(**inputs(D=64), build=len(widths))
    with pytest.raises(RuntimeError, match="not built for fp16"):
        call(**inputs(D=64, dtype=FP16), build=1)
    with pytest.raises(RuntimeError, match="fp32"):
        call(**inputs(D=64, dtype=FP32), build=0)


def test_dense_keys_come_in_wider_blocks() -> None:
    hold(inputs(1, 64, 350, 1, 1, 128), "D128 128x176", causal=False)
    hold(inputs(1, 64, 200, 1, 1, 128), "D128 128x128", causal=False)


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (63, 65), (64, 128), (200, 130), (1, 400)])
def test_edges_of_tiles(Tq: int, Tk: int) -> None:
    """One tile, and tiles in which some rows see no key or some consumers have no query."""
    heads = 8 if Tq == 1 else 1  # PyTorch's error on one number is random
    hold(inputs(1, Tq, Tk, heads, D=64))
    hold(inputs(1, Tq, Tk, heads, D=128), causal=False)


def test_more_tiles_than_multiprocessors() -> None:
    """There are 24 tiles, and the batch entries have different lengths; one entry is empty."""
    tensors = inputs(3, 300, 140, 4, 2, 16)
    hold(tensors, key_lengths=int32(140, 0, 57))


@pytest.mark.parametrize("T", [600, 700])
@pytest.mark.parametrize("heads", [3, 4])
def test_early_and_late_tiles_go_in_pairs(T: int, heads: int) -> None:
    """A head has an odd or an even number of tiles. Three heads with five tiles each leave one tile
    without a partner."""
    hold(inputs(1, T, T, heads, 1, 72))


def test_eight_query_heads_read_one() -> None:
    hold(inputs(2, 40, 45, 8, 1, 24))


def test_heads_that_do_not_fit_in_the_cache_together() -> None:
    """At this length the kernel takes three heads together, then the fourth head."""
    hold(inputs(1, 70, 32000, 4, D=64), window=(100, 0))


@pytest.mark.parametrize("D", [64, 256])
def test_strides(D: int) -> None:
    """Slices of one projection, and heads before tokens."""
    draw = functools.partial(torch.randn, device=DEVICE, dtype=BF16)
    q, k, v = draw(2, 40, 3, 2, D).unbind(2)
    hold(dict(q=q, k=k, v=v))
    q, k, v = (x.transpose(1, 2) for x in draw(3, 2, 2, 40, D))
    hold(dict(q=q, k=k, v=v))


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        (dict(dtype=FP32), {}, "fp32"),
        (dict(), dict(dropout_p=0.1), "dropout"),
        (dict(D=20, H=1), {}, "q: a stride is not a multiple of 16 bytes"),
    ],
    ids=["fp32", "dropout", "strides"],
)
def test_what_goes_to_the_kernel_of_every_device(
    tensors: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    made = native.record(lambda: forward(inputs(**tensors), **options))
    assert [launch["kernel"] for launch in made["launches"]] == ["attention_fwd_kernel"]
    ((kernel, why),) = made["refusals"]
    assert kernel == KERNEL
    assert reason in why


def test_an_expanded_head_goes_there_too() -> None:
    tensors = inputs()
    tensors["v"] = tensors["v"][:, :, :1].expand_as(tensors["v"])
    made = native.record(lambda: forward(tensors))
    assert [launch["kernel"] for launch in made["launches"]] == ["attention_fwd_kernel"]
    assert "v: a stride is not between 0 and" in made["refusals"][0][1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("D", [64, 128])
def test_what_lies_past_a_length_never_leaks(value: float, D: int) -> None:
    tensors = inputs(4, 200, 300, 1, D=D)
    ends = int32(0, 33, 128, 290)
    wanted = forward(tensors, key_lengths=ends, causal=False)
    assert torch.isfinite(wanted[0]).all()
    dead = torch.arange(300, device=DEVICE) >= ends[:, None]
    for name in ("k", "v"):
        tensors[name] = tensors[name].masked_fill(dead[..., None, None], value)
    found = forward(tensors, key_lengths=ends, causal=False)
    assert_same(found, wanted)


@in_16_bits
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("D", "options"),
    [(64, {}), (64, dict(softcap=3.0)), (88, {}), (128, {}), (200, {})],
    ids=str,
)
def test_not_a_number_reaches_only_those_who_see_it(
    dtype: torch.dtype, where: str, value: float, D: int, options: dict[str, Any]
) -> None:
    """Causal with a window of 12: rows 70 ... 82 see key 70. The other rows still pass the parity
    rule."""
    options = dict(window=(12, 0), **options)
    tensors = inputs(1, 150, D=D, dtype=dtype)
    truth = reference.attention(
        **{name: x.double() for name, x in tensors.items()}, **options, return_lse=True
    )
    plain = baseline.attention(**tensors, **options, return_lse=True)
    tensors[where] = tensors[where].clone()
    tensors[where][:, 70, 1, 3] = value
    out, lse = forward(tensors, **options)
    rows = slice(70, 71 if where == "q" else 83)
    apart = torch.ones(150, 2, dtype=torch.bool, device=DEVICE)
    apart[rows, 1] = False
    for name, a, b, t in (
        ("out", out[0], plain[0][0], truth[0][0]),
        ("lse", lse[0].mT, plain[1][0].mT, truth[1][0].mT),
    ):
        measured = parity.compare(
            a[apart], b[apart], t[apart], k=parity.K_FORWARD, name=name, direction="forward"
        )
        assert measured.passed, measured
    if where == "v":
        assert not torch.isfinite(out[0, rows, 1, 3]).any()
        assert torch.isfinite(out[0, :, 1, 4]).all()
    elif value != value:
        assert torch.isnan(out[0, rows, 1]).all()


@pytest.mark.parametrize("where", [0, 70])
def test_rows_that_see_what_is_not_finite_are_not_computed_again(where: int) -> None:
    """All but those with a row in the same 16 that does not see it: their other columns keep their
    bits."""
    tensors = inputs(1, 300, D=64)
    wanted = forward(tensors)
    tensors["v"] = tensors["v"].clone()
    tensors["v"][:, where, :, 3] = torch.nan
    out, lse = forward(tensors)
    assert out[:, where:, :, 3].isnan().all()
    rest = slice(-(-where // 16) * 16, None)
    others = torch.arange(64, device=DEVICE) != 3
    assert torch.equal(out[:, rest, :, others], wanted[0][:, rest, :, others])
    assert torch.equal(lse[..., rest], wanted[1][..., rest])


@emulated
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_not_a_number_that_all_rows_see_takes_no_longer(where: str) -> None:
    """Computing the rows again one by one would take 40 times as long."""

    def seconds() -> float:
        start = time.process_time()
        forward(tensors)
        return time.process_time() - start

    tensors = inputs(1, 600, H=1)
    usual = min(seconds(), seconds())
    tensors[where] = tensors[where].index_fill(1, torch.tensor([0]), torch.nan)
    assert seconds() < 5 * usual


@emulated
@pytest.mark.parametrize(
    ("schedule", "copies"), [("reverse", "late"), ("7", "late"), ("forward", "early")]
)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_the_same_bits_in_any_order(
    D: int, schedule: str, copies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(1, 260, 270, 2, 1, D)
    wanted = forward(tensors, key_lengths=int32(200))
    monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
    monkeypatch.setenv("GPTKERNELS_EMULATE_COPIES", copies)
    found = forward(tensors, key_lengths=int32(200))
    assert_same(found, wanted)
