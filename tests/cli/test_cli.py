"""The command line: exit codes, and one sentence, no traceback, for bad input."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, command

pytest.importorskip("click")
pytest.importorskip("rich")

from rich.console import Console

from gptkernels.cli import main, named
from gptkernels.cli import verify as verify_command
from gptkernels.core import native
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.loading import load
from gptkernels.gpt.training import checkpoint, train
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.progress import ProgressBar
from gptkernels.truth import parity, verify

COMMANDS = list(main._SUMMARIES)
SHAPE = ["--block-size", "16", "--n-layer", "1", "--n-head", "2", "--n-embd", "16"]
BATCHES = ["--batch-size", "2", "--validation-batches", "1", "--device", "cpu"]
SMALL = [*SHAPE, *BATCHES, "--steps", "3", "--warmup-steps", "1"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return file


@pytest.fixture
def trained(call: Any, text: Path, tmp_path: Path) -> Path:
    """What `train` leaves of a byte-level model whose table is as large as GPT-2's."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
    out = tmp_path / "padded"
    result = call("train", text, "--out", out, *SMALL, "--steps", "1", "--vocab-size", "50257")
    assert result.code == 0, result.err
    return out


def assert_refused(result: Any, *words: str) -> None:
    assert result.code == 2
    assert result.err.startswith("gptkernels: ")
    assert result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err


# ---- info and help


def test_no_arguments_shows_every_command(call: Any) -> None:
    result = call()
    assert result.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help(call: Any, name: str) -> None:
    result = call(name, "--help")
    assert result.code == 0
    assert f"gptkernels {name}" in result.out


def test_info(call: Any) -> None:
    result = call("info")
    assert result.code == 0
    assert f"PyTorch     {importlib.metadata.version('torch')}" in result.out
    if not torch.cuda.is_available():
        assert "\n  cuda    not usable: it runs on CUDA tensors" in result.out
    assert "\n  torch   usable" in result.out


@pytest.mark.skipif(not native._EMULATOR.exists(), reason="the emulator is not built")
def test_info_explains(call: Any) -> None:
    sizes = ["2", "8192", "32", "128", "bf16"]
    options = ["--alibi", "--kv-heads", "8", "--no-causal", "--window", "64", "-1"]
    result = call("info", "--explain", "attention", *sizes, *options, "--arch", "sm80")
    assert result.code == 0
    auto, static, _, first, second, _, direction, kernel, *_ = result.out.splitlines()
    assert auto.startswith('impl="auto" on this machine (')
    assert "nothing was measured for it" in static
    assert first == "attention B2 T8192 H32/8 D128 not causal, window 64, -1, ALiBi, bfloat16"
    assert second.startswith("dry run for sm80: ")
    assert (direction, kernel[:25]) == ("forward", "  attention_fwd_kernel on")


def test_info_tells_what_is_not_fused_without_kernels(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ImportError("a dry run needs the kernels")

    monkeypatch.setattr(native, "dry_run_module", missing)
    sizes = ["2", "9", "64", "2", "96", "fp16", "--norm-first", "--activation", "gelu"]
    result = call("info", "--explain", "transformer_layer", *sizes)
    assert_refused(result, "a dry run needs the kernels")
    head, _, _, *reasons = result.out.rstrip().splitlines()
    assert head == "transformer_layer B2 T9 C64 H2 F96 gelu, norm first, float16"
    assert [line.split(":")[0].strip() for line in reasons][:2] == [
        "not fused",
        "last residual add",
    ]
    assert len(reasons) == 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["3"], "--explain"),
        (["--residual"], "--explain"),
        (["--explain", "gelu", "1"], "op must be one of"),
        (["--explain", "gelu_mlp", "64", "64", "bf16"], "gelu_mlp takes M C F dtype"),
        (["--explain", "gelu_mlp", "64", "64", "64", "bf16", "--arch", "sm75"], "arch"),
        (["--explain", "layer_norm", "64", "64", "bf16", "--kv-heads", "3"], "kv-heads"),
    ],
)
def test_info_refuses(call: Any, arguments: list[str], word: str) -> None:
    assert_refused(call("info", *arguments), word)


def test_as_a_module() -> None:
    done = command(sys.executable, "-m", "gptkernels", "verify", "--op", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gptkernels: op must be one of ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
@pytest.mark.parametrize(
    "arguments", [["info"], ["verify", "--impl", "torch", "--op", "layer_norm"]], ids=str
)
def test_output_that_nobody_reads_is_no_failed_check(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gptkernels", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "No such command 'nothing'.\n"),
        (["verfy"], "No such command 'verfy'. Did you mean 'verify'?\n"),
        (["verify", "--nothing"], "No such option '--nothing'"),
        (["verify", "--sead", "1"], "Did you mean '--seed'?"),
        (["train", "x"], "Missing option '--out'"),
        (["generate", "x", "--tokenizer", "gtp1"], "Did you mean 'gpt1'?\n"),
        (["info", "--explain", "mlp"], "did you mean 'gelu_mlp'?\n"),
    ],
)
def test_wrong_usage_is_one_sentence(call: Any, arguments: list[str], said: str) -> None:
    assert_refused(call(*arguments), said)


# ---- verify


def test_verify_passes_and_writes_json(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--impl", "torch", "--op", "layer_norm", "--dtype", "float32", "--device", "cpu"]
    result = call("verify", *arguments, "--json", path)
    assert result.code == 0
    assert "0 fail, 0 skipped" in result.out
    content = json.loads(path.read_text())
    assert content["finished"]
    assert content["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert {row["status"] for row in content["rows"]} == {"pass"}
    assert {row["direction"] for row in content["rows"]} == {"forward", "gradient"}


def test_where_no_file_can_be_is_one_sentence(call: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ("verify", "--op", "layer_norm", "--impl", "torch", "--dtype", "float32", "--json")
    assert_refused(call(*arguments, tmp_path), f"{tmp_path} is a folder, a file is wanted")
    refused = call(*arguments, tmp_path / "file" / "rows.json")
    assert_refused(refused, f"must be a folder, but {tmp_path / 'file'} is a file")


FP32_NORM = ("verify", "--op", "layer_norm", "--dtype", "fp32", "--device", "cpu")


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--impl", "cuda"], 1, "cuda layer_norm float32 did not run, though asked for by name: "),
        (["--impl", "cuda", "--impl", "torch"], 1, "\ncuda layer_norm float32 did not run, though"),
        (["--impl", "cuda", "--allow-skip"], 0, "\n0 pass, 0 fail, 10 skipped\n"),
    ],
)
def test_what_is_named_has_to_run(call: Any, more: list[str], code: int, said: str) -> None:
    result = call(*FP32_NORM, *more)
    assert result.code == code
    assert said in f"\n{result.out}"
    assert "10 of cuda: it runs on CUDA tensors (this one is on cpu)" in f"{result.out}"
    assert "torch layer_norm float32 did not run" not in result.out
    assert ("--allow-skip" in result.out) == bool(code)


def test_a_dtype_that_is_not_named_may_be_skipped() -> None:
    """As by Triton's interpreter, which has no bfloat16."""
    rows = [
        {"impl": "triton", "op": op, "dtype": dtype, "status": status, "reason": "garbage"}
        for op in ("layer_norm", "gelu_mlp")
        for dtype, status in (("float32", "pass"), ("bfloat16", "skipped"))
    ]

    def missing(**given: tuple[str, ...]) -> list[str]:
        asked = named.names(**{"impls": (), "ops": (), "dtypes": (), **given})
        skipped = verify_command._skipped
        return list(named.missing(asked, rows, skipped))

    for given in ({}, {"impls": ("triton",)}, {"ops": ("gelu_mlp",)}, {"dtypes": ("fp32",)}):
        assert missing(**given) == []
    said = "did not run, though asked for by name: garbage"
    assert missing(dtypes=("bf16",)) == [f"bfloat16 {said}"]
    assert missing(impls=("triton",), dtypes=("bf16", "fp32")) == [f"triton bfloat16 {said}"]
    assert missing(ops=("gelu_mlp", "layer_norm"), dtypes=("bf16",)) == [
        f"gelu_mlp bfloat16, layer_norm bfloat16 {said}"
    ]
    assert missing(impls=("cuda",)) == [
        "cuda did not run, though asked for by name: there is no such case"
    ]


def test_verify_fails_with_1(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> list[parity.Measurement]:
        return [
            parity.Measurement("y", "forward", 1.0, 1e-7, 2e-7, False),
            parity.Measurement("dx", "gradient", 1e-7, 1e-7, 3e-7, True),
        ]

    monkeypatch.setattr(verify, "measure", wrong)
    result = call("verify", "--impl", "torch", "--op", "layer_norm", "--dtype", "float32")
    assert result.code == 1
    assert "\n    y: the error 1.00e+00 is above 2.00e-07\n" in result.out
    assert "\n5 pass, 5 fail, 0 skipped\n" in result.out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--op", "softmax"),
        ("--impl", "cutlass"),
        ("--impl", "auto"),
        ("--dtype", "float64"),
        ("--device", "tpu9"),
        ("--device", "meta"),
        ("--device", "mps"),
        ("--seed", "99999999999999999999"),
        ("--arch", "sm70"),
    ],
)
def test_verify_refuses(call: Any, option: str, value: str) -> None:
    assert_refused(call("verify", option, value), option[2:], value)


# ---- train


def test_train_offers_every_field(call: Any) -> None:
    shown = call("train", "--help").out
    for kind in (GPTConfig, TrainConfig):
        for field in dataclasses.fields(kind):
            assert f"--{field.name.replace('_', '-')}" in shown


def test_train_then_generate_then_resume(call: Any, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    result = call("train", text, "--out", out, *SMALL)
    assert result.code == 0, result.err
    assert "best validation loss" in result.out
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3
    for model in (out, out / "checkpoint.pt", out / "model"):
        result = call("generate", model, "--prompt", "The", "--max-new-tokens", "4")
        assert result.code == 0, result.err
        assert result.out.startswith("The")
    assert_refused(call("train", text, "--out", out, *SMALL), "checkpoint")
    result = call("train", "--resume", "--out", out, "--steps", "5")
    assert result.code == 0, result.err
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 5
    assert_refused(call("train", "--resume", "--out", out, "--n-layer", "2"), "n_layer")


def test_the_weights_say_which_tokenizer_they_were_trained_with(call: Any, trained: Path) -> None:
    for model in (trained, trained / "model"):
        result = call("generate", model, "--prompt", "x", "--max-new-tokens", "4")
        assert result.code == 0, result.err
        loaded, tokenizer = load(model, None)
        assert (loaded.config.vocab_size, tokenizer.vocab_size) == (50257, 256)


def test_a_published_shape_takes_the_tokenizers_vocabulary(
    call: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GPTConfig] = []

    def spy(files: Any, out: Path, *, model: GPTConfig, **options: Any) -> Any:
        seen.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", spy)
    call("train", text, "--out", tmp_path / "run", "--config", "gpt2-medium")
    call("train", text, "--out", tmp_path / "run", "--config", "gpt2", "--vocab-size", "300")
    assert [shape.vocab_size for shape in seen] == [256, 300]
    assert seen[0].n_embd == 1024


def test_a_refused_run_shows_no_progress_bar() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    with pytest.raises(ValueError, match="refused"), ProgressBar(console):
        raise ValueError("refused")
    assert shown.getvalue() == ""
    with ProgressBar(console) as bar:
        bar({"step": 3, "loss": 1.0}, 0.5)
    assert "step 3" in shown.getvalue()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--n-head", "3"], "n_head"),
        (["--config", "gpt9"], "gpt9"),
        (["--steps", "0"], "steps"),
        (["--steps", "many"], "--steps"),
        (["--impl", "cuda"], "impl"),
        (["--device", "cuda:99"], "device"),
        (["--device", "meta"], "device"),
        (["--vocab-size", "10"], "vocab_size"),
        (["--dropout", "1.5"], "dropout"),
    ],
)
def test_train_refuses_and_writes_nothing(
    call: Any, text: Path, tmp_path: Path, options: list[str], word: str
) -> None:
    assert_refused(call("train", text, "--out", tmp_path / "run", *SMALL, *options), word)
    assert not (tmp_path / "run").exists()


def test_train_refuses_its_files(call: Any, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run", *SMALL]
    assert_refused(call("train", *out), "files")
    assert_refused(call("train", tmp_path / "absent.txt", *out), "absent.txt")
    (tmp_path / "empty.txt").touch()
    assert_refused(call("train", tmp_path / "empty.txt", *out))
    assert_refused(call("train", "--resume", "--out", tmp_path / "run"), "checkpoint")
    assert not (tmp_path / "run").exists()


def test_generate_refuses_a_contradictory_checkpoint(call: Any, trained: Path) -> None:
    path = trained / "broken.pt"
    content = checkpoint.load(trained / "checkpoint.pt")
    for key, value in (
        ("model_config", {**content["model_config"], "n_embd": 64}),
        ("model_config", {**content["model_config"], "colour": "red"}),
        ("model_config", None),
        ("train_config", {}),
    ):
        checkpoint.save(path, {**content, key: value})
        assert_refused(call("generate", path, "--prompt", "x"), f"checkpoint: {path}")


# ---- what is no bad input


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where it has the type of a refusal, and strikes inside this package."""
    monkeypatch.setattr(verify, "unavailable", None)
    with pytest.raises(TypeError, match="not callable"):
        main.run(["verify"])
    monkeypatch.setattr(verify, "unavailable", lambda *arguments: int("seven"))
    with pytest.raises(ValueError, match="invalid literal"):
        main.run(["verify"])


def test_a_missing_package_is_one_sentence(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(**options: Any) -> Any:
        raise ModuleNotFoundError("No module named 'wonder'", name="wonder")

    monkeypatch.setattr(verify, "run", lacking)
    assert_refused(call("verify"), "pip install wonder")
