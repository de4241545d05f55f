"""The command `train` beyond a first run: what it goes on from, what it says, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from test_cli import BATCHES, SMALL, assert_refused

from gptkernels import GPT, GPTConfig
from gptkernels.cli.train import report
from gptkernels.gpt import tokenizer_files
from gptkernels.gpt.tokenizer import CharacterTokenizer
from gptkernels.gpt.training import data, train
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.observer import Plan
from gptkernels.gpt.training.recipes import recipe_config
from gptkernels.gpt.training.train import TrainResult

SENTENCE = "the quick brown fox jumps over the lazy dog. "
SHORT = (*BATCHES, "--steps", "2", "--warmup-steps", "1")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than these runs."""
    monkeypatch.setattr("gptkernels.gpt.training.run.draw_losses", lambda records, path: None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(SENTENCE * 40)
    return tmp_path / "text.txt"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of characters, whose tokenizer has no name."""
    characters = sorted(set(SENTENCE))
    torch.manual_seed(0)
    shape = GPTConfig(len(characters), 16, n_layer=1, n_head=2, n_embd=16)
    GPT(shape).save_pretrained(tmp_path / "model")
    tokenizer_files.write(tmp_path / "model", CharacterTokenizer(characters))
    return tmp_path / "model"


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_goes_on_from_a_model(call: Any, text: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = call("train", text, "--init", model, "--out", out, *SHORT)
    assert result.code == 0, result.err
    first = result.out.splitlines()[0]
    assert first.startswith("the learning rate rises to 6e-05, a tenth of what GPT-3's paper")
    assert result.out.count("the learning rate rises") == 1
    said = f" after {records(out)[-1]['petaflop_s_days']:.3g} petaflop/s-days, everything is in"
    assert said in result.out.splitlines()[-1]
    shutil.rmtree(model)
    result = call("train", "--resume", "--out", out, "--steps", "3", "--log-interval", "1")
    assert result.code == 0, result.err
    for source in (out, out / "model"):
        result = call("generate", source, "--prompt", "the", "--max-new-tokens", "4")
        assert result.code == 0, result.err
        assert set(result.out.strip()) <= set(SENTENCE)


def test_a_rate_that_was_given_is_not_announced(
    call: Any, text: Path, model: Path, tmp_path: Path
) -> None:
    given = ("--learning-rate", "3e-4", "--dropout", "0.5", "--block-size", "8")
    out = tmp_path / "run"
    result = call("train", text, "--init", model, "--out", out, *SHORT, *given)
    assert result.code == 0, result.err
    assert "learning rate" not in result.out
    last = records(out)[-1]
    assert last["learning_rate"] == pytest.approx(3e-4)
    assert last["tokens"] == 2 * 2 * 8
    saved = GPT.from_pretrained(out / "model").config
    assert (saved.dropout, saved.block_size) == (0.5, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "gpt2"], "config, init: each of them sets the model's shape, one is wanted"),
        (["--recipe", "gpt3-13B"], "recipe, init: each of them sets the model's shape"),
        (["--n-layer", "2"], "n_layer: a model to go on from keeps its shape"),
        (["--vocab-size", "300"], "vocab_size: a model to go on from keeps its shape"),
        (["--block-size", "17"], "block_size is 17, but the model to go on from has 16"),
        (["--tokenizer", "bytes"], "tokenizer is 'bytes', but"),
        (["--resume"], "init: a resumed run keeps its model"),
        (["--init", "nothing"], "init: nothing does not exist"),
    ],
)
def test_what_does_not_go_with_a_model_is_refused(
    call: Any, text: Path, model: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    out = tmp_path / "run"
    assert_refused(call("train", text, "--init", model, "--out", out, *SHORT, *options), words)
    assert not out.exists()
    assert_refused(call("train", "--init", model, "--out", out, *SHORT), "files: name at least one")
    assert_refused(call("train", text, "--out", text, *SMALL), "out must be a folder")


# ---- finetune --lm


def test_finetuning_on_texts_is_training_that_goes_on(
    call: Any, model: Path, tmp_path: Path
) -> None:
    """Two files of 145 ids, half of which are trained on: 9 windows of 16, seen three times in
    batches of 2."""
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for file in files:
        file.write_bytes(b"".join((i % 28).to_bytes(2, "little") for i in range(145)))
    out = tmp_path / "run"
    shared = ("--batch-size", "2", "--device", "cpu", "--validation-fraction", "0.5", "--seed", "5")
    texts = ("--lm", files[0], "--lm", files[1])
    result = call("finetune", model, *texts, "--out", out, *shared)
    assert result.code == 0, result.err
    assert result.out.startswith("the learning rate rises to 6e-05")
    assert records(out)[-1]["step"] == 14
    assert records(out)[-1]["epochs"] == pytest.approx(3, abs=0.5)
    same = ("--steps", "14", "--warmup-steps", "1", *shared)
    call("train", *files, "--init", model, "--out", tmp_path / "same", *same)
    tuned, trained = (GPT.from_pretrained(path / "model") for path in (out, tmp_path / "same"))
    for a, b in zip(tuned.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "sst-2"], "task, lm: exactly one of the two is wanted"),
        (["--lm-coefficient", "0.5"], "lm_coefficient: of a task alone"),
        (["--head-dropout", "0.1", "--transfer", "all"], "head_dropout, transfer: of a task alone"),
        (["--no-freeze-body"], "freeze_body: of a task alone"),
        (["--train-examples", "5"], "train_examples: of a task alone"),
        (["--warmup-fraction", "0.1"], "warmup_fraction: of a task alone"),
        (["--data", "."], "data: of a task alone"),
        (["--epochs", "0"], "epochs is 0, at least 1 is wanted"),
        (["--tokenizer", "bytes"], "tokenizer is 'bytes', but"),
    ],
)
def test_what_means_nothing_to_a_text_is_refused(
    call: Any, text: Path, model: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    out = tmp_path / "run"
    assert_refused(call("finetune", model, "--lm", text, "--out", out, *options), words)
    assert not out.exists()


def test_finetuning_needs_a_task_or_a_text(call: Any, model: Path, tmp_path: Path) -> None:
    result = call("finetune", model, "--out", tmp_path / "run")
    assert_refused(result, "task, lm: exactly one of the two is wanted")


# ---- what is read and said, and when


def test_texts_are_read_once_and_a_refusal_says_nothing_else(
    call: Any, text: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read = [], data.read
    monkeypatch.setattr(data, "read", lambda *given: reads.append(given) or read(*given))
    tuning = ("finetune", model, "--lm", text, "--epochs", "1", "--device", "cpu")
    assert call(*tuning, "--out", tmp_path / "run").code == 0
    assert len(reads) == 1
    going_on = ("train", text, "--init", model)
    anew = ("train", text, "--recipe", "gpt3-125M")
    for command in (tuning, going_on, anew):
        refused = call(*command, "--out", tmp_path / "run")
        assert_refused(refused, "already holds a checkpoint")
        assert refused.out == ""
    assert len(reads) == 1
    refused = call("train", tmp_path / "nothing.txt", "--init", model, "--out", tmp_path / "other")
    assert_refused(refused, "nothing.txt does not exist")
    assert refused.out == ""


# ---- recipes


def test_a_recipe_sets_shape_and_schedule_and_options_win(
    call: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[GPTConfig, TrainConfig]] = []

    def spy(files: Any, out: Path, *, model: GPTConfig, config: TrainConfig, observer: Any) -> Any:
        seen.append((model, config))
        cpu = torch.device("cpu")
        observer.begins(Plan(model, config, 1, config.tokenizer, cpu, 10**6, 10**5, 0, 10**7))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", spy)
    given = ("train", text, "--out", tmp_path / "run", "--recipe", "gpt3-1.3B")
    result = call(*given, "--batch-size", "8")
    assert result.out.startswith("gpt3-1.3B, trained as the paper says; the learning rate rises to")
    assert "vocabulary 50,257 (gpt2)\n" in result.out
    steps = (
        r" steps of 32,768 tokens at first,\n +after 6,000,000,000 of 1,048,576 tokens, 10.0 epochs"
    )
    assert re.search(steps, result.out)
    more = ("--block-size", "512", "--learning-rate", "1e-3", "--steps", "9", "--dropout", "0.1")
    result = call(*given, *more, "--ramp-tokens", "0", "--tokenizer", "bytes")
    assert "vocabulary 256 (bytes)\n" in result.out
    assert " 9 steps of 1,048,576 tokens, 10.0 epochs\n" in result.out
    (shape, config), (other_shape, other) = seen
    assert shape == dataclasses.replace(GPTConfig.named("gpt3-1.3B"), vocab_size=50257)
    paper = recipe_config("gpt3-1.3B", 2048, batch_size=8)
    assert config == dataclasses.replace(paper, tokenizer="gpt2", token_dtype="uint16")
    assert (other_shape.block_size, other_shape.dropout, other_shape.n_embd) == (512, 0.1, 2048)
    assert (other.learning_rate, other.steps, other.accumulation) == (1e-3, 9, 128)
    assert_refused(call(*given, "--config", "gpt2"), "config, recipe: each of them sets")
    assert_refused(call(*given, "--resume"), "recipe: a resumed run keeps its model")
    assert call(*given[:-1], "gpt2").code == 2
    assert len(seen) == 2


# ---- eval-only


def test_validation_alone_says_what_the_log_says(call: Any, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("train", text, "--out", out, *SMALL, "--ema", "0.5").code == 0
    last = records(out)[-1]
    loss, ema = last["validation_loss"], last["ema_validation_loss"]
    before = (out / "log.jsonl").read_text()
    result = call("train", "--resume", "--out", out, "--eval-only")
    assert result.code == 0, result.err
    assert result.out.splitlines() == [
        f"step 3: validation loss {loss:.4f}, perplexity {math.exp(loss):.4g}",
        f"average of the weights: validation loss {ema:.4f}",
        "on 32 of the 176 tokens of the held-out end of its text (more with --validation-batches)",
    ]
    result = call("train", text, "--init", out, "--eval-only", "--device", "cpu")
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"on 1,792 of the 1,792 tokens of {text}"
    assert (out / "log.jsonl").read_text() == before
    for given, words in (
        ((text,), "eval-only: name a run with --resume, or a model with --init"),
        (("--init", out), "files: name at least one"),
        (("--resume",), "Missing option '--out'"),
        (("--resume", "--out", out, "--n-layer", "2"), "n_layer: a resumed run keeps its model"),
        (("--init", out, text, "--n-layer", "2"), "n_layer: a model to go on from keeps its"),
        (("--resume", "--out", out, "--steps", "9", "--ema", "0.5"), "ema, steps: without effect"),
        (("--init", out, text, "--out", tmp_path / "x"), "out: without effect with eval-only"),
    ):
        assert_refused(call("train", "--eval-only", *given), words)
    assert_refused(call("train", text), "Missing option '--out'")


# ---- the shape of a new model


def test_on_a_cpu_the_model_is_a_small_one_and_options_change_it(
    call: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GPTConfig] = []

    def spy(files: Any, out: Path, *, model: GPTConfig, observer: Any, **more: Any) -> Any:
        seen.append(model)
        plan = Plan(model, more["config"], 1, "bytes", torch.device("cpu"), 10**6, 10**5, 0, 10**7)
        observer.begins(plan)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", spy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plain = ("train", text, "--out", tmp_path / "run")
    on_cpu = (*plain, "--device", "cpu")
    opening = "mini, the default on a CPU; --config gpt2 is a published one\n"
    assert call(*on_cpu).out.startswith(opening)
    assert opening not in call(*on_cpu, "--config", "mini").out
    assert call(*on_cpu, "--n-layer", "2").out.startswith(opening)
    assert opening not in call(*plain).out
    mini = GPTConfig.named("mini")
    gpt2 = dataclasses.replace(GPTConfig.named("gpt2"), vocab_size=256)
    assert seen == [mini, mini, dataclasses.replace(mini, n_layer=2), gpt2]


def test_a_run_that_is_done_says_how_to_go_on(call: Any, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "my run"
    assert call("train", text, "--out", out, *SMALL).code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    result = call("train", "--resume", "--out", out)
    assert result.code == 0
    assert result.out == (
        "the run is done: 3 of 3 steps; go on with: gptkernels train --resume --out "
        f"'{out}' --steps N\n"
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert_refused(call("train", "--resume", "--out", out, "--steps", "2"), "steps is 2, but 3")


def test_more_minutes_are_wanted_where_minutes_ended_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = TrainResult(
        GPT(GPTConfig(8, 8, 1, 1, 8)), [], 0.0, 0.0, 0.0, nothing_left="2 of 2 minutes"
    )
    report(result, Path("run"))
    assert capsys.readouterr().out.endswith("gptkernels train --resume --out run --minutes N\n")


def test_a_folder_that_holds_a_run_is_refused_before_a_model_is_read(
    call: Any, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").touch()
    refused = call("train", text, "--init", tmp_path / "nothing", "--out", tmp_path / "run")
    assert_refused(refused, "already holds a checkpoint")
