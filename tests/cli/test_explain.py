"""What the CUDA C++ launchers would launch, on GPUs that are not there."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from harness import emulated, needs_dry_run
from torch import Tensor

import gptkernels
from gptkernels.bench import dry_run
from gptkernels.cli import explain
from gptkernels.core import native

pytestmark = needs_dry_run

H200, A100 = dry_run.MACHINES["sm90"], dry_run.MACHINES["sm80"]


def leaf(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.bfloat16, requires_grad=True)


def ran(call: Any, *tensors: Tensor) -> list[dry_run.Launched]:
    """What is launched forward and backward."""
    made = native.record(lambda: torch.autograd.grad(call().sum(), tensors))
    return [dry_run.Launched(**launch) for launch in made["launches"]]


def would_launch(problem: dry_run.Problem) -> list[dry_run.Launched]:
    """For the machine that the emulator is."""
    machine = dry_run.Machine("emulator", "sm80", 80, 2, 100 * 1024)
    return [x for direction in problem.directions for x in direction.dry_run(machine).launches]


@emulated
def test_attention_dry_run_is_as_it_runs() -> None:
    q, k, v = leaf(2, 33, 4, 40), leaf(2, 70, 2, 40), leaf(2, 70, 2, 40)
    options: dict[str, Any] = dict(window=(20, 0), softcap=3.0, deterministic=True)
    seen = ran(lambda: gptkernels.attention(q, k, v, **options, impl="cuda"), q, k, v)
    problem = dry_run.attention(2, 33, 4, 40, torch.bfloat16, kv_heads=2, keys=70, **options)
    assert would_launch(problem) == seen
    assert problem.text == ("B2 T33/70 H4/2 D40 causal, window 20, 0, softcap 3, deterministic")


@emulated
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_dry_run_is_as_it_runs(bias: bool) -> None:
    x, w1, w2 = leaf(70, 33), leaf(130, 33), leaf(33, 130)
    b1, b2 = (leaf(130), leaf(33)) if bias else (None, None)
    wanted = [tensor for tensor in (x, w1, b1, w2, b2) if tensor is not None]
    seen = ran(lambda: gptkernels.gelu_mlp(x, w1, b1, w2, b2, impl="cuda"), *wanted)
    assert would_launch(dry_run.gelu_mlp(70, 33, 130, torch.bfloat16, bias=bias)) == seen


@emulated
@pytest.mark.parametrize(("keys", "kernels"), [(200, 1), (700, 2)])
def test_attention_decode_dry_run_is_as_it_runs(keys: int, kernels: int) -> None:
    q, k, v = (torch.randn(3, t, h, 64).bfloat16() for t, h in ((2, 4), (keys, 2), (keys, 2)))
    lengths = torch.tensor([keys, 0, 5], dtype=torch.int32)
    options: dict[str, Any] = dict(window=(99, 0), softcap=9.0)

    made = native.record(
        lambda: gptkernels.attention_decode(q, k, v, lengths, impl="cuda", **options)
    )
    problem = dry_run.attention_decode(3, 2, keys, 4, 64, torch.bfloat16, kv_heads=2, **options)
    assert would_launch(problem) == [dry_run.Launched(**launch) for launch in made["launches"]]
    assert len(made["launches"]) == kernels


@emulated
@pytest.mark.parametrize("residual", [True, False])
def test_layer_norm_dry_run_is_as_it_runs(residual: bool) -> None:
    x, weight, bias, added = leaf(9, 768), leaf(768), leaf(768), leaf(9, 768)
    wanted = [x, weight, bias, *([added] if residual else [])]

    def call() -> Any:
        more = dict(residual=added, prenorm=True) if residual else {}
        outputs = gptkernels.layer_norm(x, weight, bias, impl="cuda", **more)
        return sum(outputs) if residual else outputs

    assert would_launch(dry_run.layer_norm(9, 768, torch.bfloat16, residual=residual)) == ran(
        call, *wanted
    )


@emulated
@pytest.mark.parametrize(
    ("activation", "norm_first", "causal", "bias", "dropout_p"),
    [
        ("gelu", False, False, True, 0.0),
        ("gelu", True, True, False, 0.0),
        ("relu", True, False, True, 0.0),
        ("gelu", False, True, True, 0.3),
    ],
)
def test_transformer_layer_dry_run_is_as_it_runs(
    activation: str, norm_first: bool, causal: bool, bias: bool, dropout_p: float
) -> None:
    options: dict[str, Any] = dict(activation=activation, norm_first=norm_first, bias=bias)
    layer = gptkernels.TransformerLayer(64, 2, 96, dropout_p, **options, dtype=torch.bfloat16)
    layer.impl = "cuda"
    x = leaf(33, 2, 64)
    seen = ran(lambda: layer(x, is_causal=causal), x, *layer.parameters())
    options |= dict(causal=causal, dropout_p=dropout_p)
    problem = dry_run.transformer_layer(2, 33, 64, 2, 96, torch.bfloat16, **options)
    assert would_launch(problem) == seen
    assert problem.not_fused == layer.not_fused()


def test_a_layers_report_says_what_is_not_fused() -> None:
    words = ["8", "512", "768", "12", "3072", "bf16"]

    def report(**options: Any) -> list[str]:
        return list(explain.lines(explain.parse("transformer_layer", words, **options), A100))

    whole = report(activation="gelu")
    assert whole[0] == "transformer_layer B8 T512 C768 H12 F3072 gelu, bfloat16"
    assert whole[3] == "fused throughout"
    parts = [line.split(":")[0] for line in whole if line[:1].isalpha()][3:]
    names = ["attention", "norm1", "mlp", "norm2"]
    assert parts == [
        *(f"{name}, forward" for name in names),
        *(f"{name}, backward" for name in reversed(names)),
    ]
    some = report(activation="gelu", norm_first=True, mask=True, dropout_p=0.1)
    assert some[0].endswith(" gelu, norm first, with a mask, dropout 0.1, bfloat16")
    assert some[3] == "not fused: these run as PyTorch's own operators"
    assert [line.split(":")[0] for line in some[4:7]] == [
        "  attention", "  mlp", "  last residual add",
    ]  # fmt: skip
    parts = [line.split(":")[0] for line in some if line[:1] == "n"][1:]
    assert parts == ["norm1, forward", "norm2, forward", "norm2, backward", "norm1, backward"]


def test_nothing_is_allocated_or_launched() -> None:
    """A problem of 16 TB, with addresses that lead nowhere."""
    problem = dry_run.attention(1024, 131072, 128, 128, torch.bfloat16, kv_heads=8)
    for direction in problem.directions:
        assert direction.dry_run(H200).launches


def test_sizes_past_all_memory_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="9223372036854775807x64 elements has"):
        explain.parse("gelu_mlp", ["8", "64", "9223372036854775807", "bf16"])


def test_a_dry_run_is_one_threads_and_ends_with_it() -> None:
    seen: list[Any] = []

    def elsewhere() -> None:
        seen.append(native._DRY.module)

    def run() -> None:
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        seen.append(native._DRY.module)
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        native.dry_run(run, capability=90, multiprocessors=132)
    assert seen[0] is None
    assert seen[1] is native.dry_run_module()
    assert native._DRY.module is None
    empty = native.dry_run(lambda: None, capability=90, multiprocessors=132)
    assert empty == {"launches": [], "refusals": []}
    with pytest.raises(RuntimeError, match="this thread makes a dry run already"):
        native.dry_run(
            lambda: native.dry_run_module().dry_run(90, 1, lambda: None),
            capability=90,
            multiprocessors=132,
        )


def test_grids_follow_the_machine() -> None:
    """Split products fill the multiprocessors that there are."""
    problem = dry_run.layer_norm(100_000, 768, torch.bfloat16)
    backward = problem.directions[1]
    grids = [backward.dry_run(machine).launches[0].ctas for machine in (A100, H200)]
    assert grids[0] / 108 == grids[1] / 132


def test_kernels_that_mostly_have_nothing_to_do_start_few_ctas() -> None:
    """After Hopper's own kernels, in case their result is not finite."""
    backward = dry_run.attention(2, 8192, 32, 128, torch.bfloat16).directions[1]
    names = ("attention_bwd_queries_kernel", "attention_bwd_keys_kernel")
    launches = {x.kernel: x for x in backward.dry_run(H200).launches}
    assert [(launches[name].ctas, launches[name].tiles) for name in names] == [(132, 4096)] * 2
    (keys,) = (x for x in backward.dry_run(A100).launches if x.kernel == names[1])
    assert (keys.ctas, keys.tiles) == (4096, 0)


def test_waves_and_residents() -> None:
    launch = dry_run.Launched("k", "s", (264, 1, 1), 384, 1, 200 * 1024, 0, None)
    assert launch.resident(H200) == 1
    assert launch.waves(H200) == 2
    persistent = dry_run.Launched("k", "s", (132, 1, 1), 384, 1, 200 * 1024, 1000, None)
    assert persistent.waves(H200) == 1000 / 132
    few = dry_run.Launched("k", "s", (10, 1, 1), 384, 1, 200 * 1024, 20, None)
    assert few.waves(H200) == 2
    small = dry_run.Launched("k", "s", (132 * 8, 1, 1), 256, 1, 1000, 0, None)
    assert small.resident(H200) == 8
    assert small.waves(H200) == 1


def test_report_of_hoppers_kernels() -> None:
    words = ["2", "8192", "16", "128", "bf16"]
    lines = list(explain.lines(explain.parse("attention", words, kv_heads=2), H200))
    assert lines[4] == ("  attention_fwd_sm90_kernel on q (2, 8192, 16, 128), k (2, 8192, 2, 128)")
    assert ": tile 128x128, 2 stages, 2 consumer warpgroups taking turns" in lines[5]
    assert re.match(
        r"    grid 132 of 384 threads, .* 1 CTA an SM, 2048 tiles, 15.52 waves", lines[6]
    )
    builds = [line for line in lines[7:] if line.startswith("  build ")]
    assert sum(line.endswith(": runs") for line in builds) >= 1
    assert any(line.endswith(": could run") for line in builds)
    assert all("D128" in line for line in builds[:2])
    refused = list(explain.lines(explain.parse("attention", words, dropout_p=0.1), H200))
    assert refused[4].startswith("  attention_fwd_kernel on q")
    assert refused[6].startswith("  not attention_fwd_sm90_kernel: dropout ")
    elsewhere = list(explain.lines(explain.parse("attention", words), A100))
    assert not any("sm90_kernel" in line or "build" in line for line in elsewhere)


def test_every_build_asks_for_the_memory_that_it_says() -> None:
    seen = set()
    for D in (64, 96, 128, 192, 256):
        problem = dry_run.attention(1, 512, 2, D, torch.bfloat16, causal=False)
        for direction in problem.directions:
            for index, made, _ in direction.ways(H200, lambda launches: launches[0]):
                for launched in made.launches:
                    if launched.built is None:
                        continue
                    assert launched.shared_bytes == launched.built["shared_bytes"]
                    assert launched.threads == launched.built["threads"]
                    assert launched.cluster == launched.built["cluster"]
                    seen.add((direction.list_name, index))
    wanted = {
        (direction.list_name, index)
        for direction in problem.directions
        for index in range(len(direction.builds()))
    }
    assert wanted <= seen


def test_report() -> None:
    problem = explain.parse("attention", ["2", "8192", "32", "128", "bf16"], kv_heads=8)
    text = "\n".join(explain.lines(problem, A100))
    assert text.startswith("attention B2 T8192 H32/8 D128 causal, bfloat16\n")
    assert "dry run for sm80: A100, 108 multiprocessors" in text
    assert "attention_fwd_kernel on q (2, 8192, 32, 128), k (2, 8192, 8, 128)" in text
    assert "grid 4096 of 128 threads, 48.0 KiB of shared memory: at most 3 CTAs an SM" in text
    built = dict(
        name="a way", head_width=128, tile_m=128, tile_n=176, tile_k=0, stages=2, consumers=2,
        cluster=2, pingpong=True, threads=384, shared_bytes=1,
    )  # fmt: skip
    assert explain.built_as(built) == (
        "a way: tile 128x176, 2 stages, 2 consumer warpgroups taking turns, clusters of 2"
    )


def test_report_of_sequences_laid_end_to_end() -> None:
    problem = explain.parse("attention_varlen", ["3", "500", "8", "128", "bf16"])
    text = "\n".join(explain.lines(problem, H200))
    assert text.startswith("attention_varlen B3 T500 H8 D128 causal, bfloat16\n")
    assert "attention_fwd_kernel on q (3, up to 500, 8, 128), k (3, up to 500, 8, 128)" in text
    # Of 8 heads: 1,500 tokens fill 11 blocks of 128, and each sequence may leave a part of one.
    assert "grid 112 of 128 threads" in text
    for direction in ("fwd_sm90_kernel", "bwd_sm90"):
        assert f"not attention_{direction}: its boxes end where a batch entry does" in text
    assert "builds cannot take it" in text


@pytest.mark.parametrize(
    ("op", "words", "options", "sentence"),
    [
        (
            "attention_varlen",
            ["1", "2", "3", "4", "bf16"],
            {"key_lengths": True},
            "sequences laid end to end have no key lengths",
        ),
        (
            "softmax",
            [],
            {},
            "op must be one of attention, attention_varlen, attention_decode, gelu_mlp, "
            "layer_norm, linear_cross_entropy, transformer_layer",
        ),
        (
            "gelu_mlp",
            ["1", "2", "bf16"],
            {},
            "gelu_mlp takes M C F dtype, such as 8192 4096 16384 bf16",
        ),
        ("gelu_mlp", ["1", "2", "x", "bf16"], {}, "F cannot be 'x'"),
        ("gelu_mlp", ["1", "2", "0", "bf16"], {}, "F must be at least 1, got 0"),
        (
            "layer_norm",
            ["1", "2", "int8"],
            {},
            "dtype must be one of float32, bfloat16, float16",
        ),
        ("layer_norm", ["1", "2", "fp16"], {"kv_heads": 1}, "layer_norm has no option kv-heads"),
        ("layer_norm", ["1", "2", "fp16"], {"dropout_p": 2.0}, "dropout_p must "),
        ("attention", ["1", "2", "4", "513", "fp16"], {}, "a head width between 1 and 512"),
        ("attention", ["1", "2", "4", "64", "fp16"], {"kv_heads": 3}, "got 4 and 3"),
        ("attention", ["1", "2", "4", "64", "fp16"], {"window": (-2, 0)}, "window must be"),
        ("transformer_layer", ["1", "2", "64", "5", "9", "bf16"], {}, "nhead must divide d_model"),
        ("transformer_layer", ["1", "2", "64", "2", str(2**60), "bf16"], {}, "2\\*\\*63 bytes"),
        ("transformer_layer", ["1", "2", "64", "2", "9", "bf16"], {"activation": "tanh"}, "'relu'"),
    ],
)
def test_refusals(op: str, words: list[str], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        explain.parse(op, words, **options)


def test_what_a_launcher_refuses_is_one_sentence() -> None:
    problem = dry_run.layer_norm(1, 2**30 + 1, torch.bfloat16)
    with pytest.raises(ValueError, match=r"up to 2\*\*30 columns"):
        problem.directions[0].dry_run(H200)


def test_architectures() -> None:
    with pytest.raises(ValueError, match="arch must be sm80 or sm90, got 'sm70'"):
        dry_run.machine_here("sm70")
    if not torch.cuda.is_available():
        assert dry_run.machine_here() is H200
        assert dry_run.machine_here("sm80") is A100
