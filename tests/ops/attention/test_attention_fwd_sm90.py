"""Attention's forward kernel for Hopper (csrc/attention_fwd_sm90_kernel.h): in the emulator as a
machine of compute capability 9.0, or on such a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from gptkernels import attention
from gptkernels.core import native
from gptkernels.ops.attention.cuda.dense import attention_fwd
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.truth import baseline, parity, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = native.EMULATED or (DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0))
WHY_NOT = native.unavailable(DEVICE) or (None if HOPPER else "no GPU of compute capability 9.0")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

KERNEL = "attention_fwd_sm90_kernel"
BUILDS = [] if WHY_NOT else native.module().attention_fwd_builds()
by_dtype = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ARCH_VARIABLE, "sm90")


def inputs(
    B: int = 1,
    Tq: int = 70,
    Tk: int | None = None,
    H: int = 2,
    Hk: int | None = None,
    D: int = 64,
    dtype: torch.dtype = BF16,
) -> dict[str, Any]:
    Tk, Hk = Tq if Tk is None else Tk, H if Hk is None else Hk
    draw = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
    return dict(q=draw(B, Tq, H, D), k=draw(B, Tk, Hk, D), v=draw(B, Tk, Hk, D))


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def forward(tensors: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    with parity.poisoned_outputs():
        found = attention(**tensors, **options, return_lse=True, impl="cuda")
    assert isinstance(found, tuple)
    return found


def assert_right(tensors: dict[str, Any], built: str | None = None, **options: Any) -> None:
    """By the rule of parity; and it was Hopper's kernel, built as `built`."""
    launches: list[dict[str, Any]] = []

    def build(**leaves: Any) -> tuple[Tensor, Tensor]:
        found: list[tuple[Tensor, Tensor]] = []
        launches.extend(native.record(lambda: found.append(forward(leaves, **options)))["launches"])
        return found[0]

    parity.assert_parity(
        build,
        functools.partial(baseline.attention, **options, return_lse=True),
        functools.partial(reference.attention, **options, return_lse=True),
        tensors,
        gradients=False,
        names=("out", "lse"),
    )
    assert [launch["kernel"] for launch in launches] == [KERNEL]
    if built is not None:
        assert launches[0]["built"]["name"].startswith(built)


@by_dtype
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
    """Blocks with a mask, one without, rows and keys past the end."""
    assert_right(inputs(1, 150, 270, 1, 1, D, dtype), built)


@by_dtype
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
    assert_right(inputs(1, 80, 150, 2, 1, D, dtype), **options)


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
        options = options | dict(key_lengths=lengths(*options["key_lengths"]))
    assert_right(inputs(1, 140, 290, 1, 1, 16), **options)


@pytest.mark.parametrize("number", range(len(BUILDS)))
def test_every_build(number: int) -> None:
    """Causal, with fewer queries than keys: from a tile to the next, and several blocks of each."""
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
        assert launch["grid"][0] == 2  # of two multiprocessors: CTAs go from tile to tile


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
    assert_right(inputs(1, 64, 350, 1, 1, 128), "D128 128x176", causal=False)
    assert_right(inputs(1, 64, 200, 1, 1, 128), "D128 128x128", causal=False)


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (63, 65), (64, 128), (200, 130), (1, 400)])
def test_edges_of_tiles(Tq: int, Tk: int) -> None:
    """One tile, and tiles of which some rows, or consumers, have no key or no query."""
    heads = 8 if Tq == 1 else 1  # of one number PyTorch's error is anything
    assert_right(inputs(1, Tq, Tk, heads, D=64))
    assert_right(inputs(1, Tq, Tk, heads, D=128), causal=False)


def test_more_tiles_than_multiprocessors() -> None:
    """24 of them, of batch entries with different lengths, one of which is empty."""
    tensors = inputs(3, 300, 140, 4, 2, 16)
    assert_right(tensors, key_lengths=lengths(140, 0, 57))


@pytest.mark.parametrize("T", [600, 700])
@pytest.mark.parametrize("heads", [3, 4])
def test_early_and_late_tiles_go_in_pairs(T: int, heads: int) -> None:
    """An odd and an even number of tiles a head; of three heads with five one pair is left over."""
    assert_right(inputs(1, T, T, heads, 1, 72))


def test_eight_query_heads_read_one() -> None:
    assert_right(inputs(2, 40, 45, 8, 1, 24))


def test_heads_that_do_not_fit_in_the_cache_together() -> None:
    """At this length heads come three at a time, then one."""
    assert_right(inputs(1, 70, 32000, 4, D=64), window=(100, 0))


@pytest.mark.parametrize("D", [64, 256])
def test_strides(D: int) -> None:
    """Slices of one projection, heads before tokens."""
    draw = functools.partial(torch.randn, device=DEVICE, dtype=BF16)
    q, k, v = draw(2, 40, 3, 2, D).unbind(2)
    assert_right(dict(q=q, k=k, v=v))
    q, k, v = (x.transpose(1, 2) for x in draw(3, 2, 2, 40, D))
    assert_right(dict(q=q, k=k, v=v))


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
    ends = lengths(0, 33, 128, 290)
    wanted = forward(tensors, key_lengths=ends, causal=False)
    assert torch.isfinite(wanted[0]).all()
    dead = torch.arange(300, device=DEVICE) >= ends[:, None]
    for name in ("k", "v"):
        tensors[name] = tensors[name].masked_fill(dead[..., None, None], value)
    found = forward(tensors, key_lengths=ends, causal=False)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@by_dtype
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, dict(softcap=3.0)], ids=["plain", "softcap"])
def test_not_a_number_reaches_only_those_who_see_it(
    dtype: torch.dtype, where: str, value: float, options: dict[str, Any]
) -> None:
    """Causal with a window of 12: rows 70 ... 82 see key 70. Rows apart are as right as ever."""
    options = dict(window=(12, 0), **options)
    tensors = inputs(1, 150, D=64, dtype=dtype)
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


@pytest.mark.skipif(not native.EMULATED, reason="the emulator's schedules")
@pytest.mark.parametrize(
    ("schedule", "copies"), [("reverse", "late"), ("7", "late"), ("forward", "early")]
)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_the_same_bits_in_any_order(
    D: int, schedule: str, copies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(1, 260, 270, 2, 1, D)
    wanted = forward(tensors, key_lengths=lengths(200))
    monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
    monkeypatch.setenv("GPTKERNELS_EMULATE_COPIES", copies)
    found = forward(tensors, key_lengths=lengths(200))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
