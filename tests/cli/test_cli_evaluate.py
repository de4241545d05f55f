"""The command `evaluate`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("scipy")

from models import shaken
from test_cli import assert_refused

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.tokenizer import ByteTokenizer

Call = Callable[..., Any]
TASK = """
kind = "choice"
format = "jsonl"
prompt = "{text}"
label = "right"
[labels]
a = "no"
b = "yes"
[files]
train = "rows.jsonl"
test = "rows.jsonl"
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=256, block_size=48, n_layer=1, n_head=2, n_embd=16)
    shaken(GPT(shape), 0.3).save_pretrained(tmp_path / "model", tokenizer="bytes")
    return tmp_path / "model"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"text": f"row {i}", "right": "ab"[i % 2]} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.toml").write_text(TASK)
    return tmp_path / "mine.toml"


def test_a_task_is_asked(call: Call, model: Path, task: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    result = call(
        "evaluate", model, "--task", task, "--data", tmp_path, "--shots", "0,3,8", "--out", out,
        "--device", "cpu",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert (
        "mine, test part, 9 examples; guessing 0.5000, always the most frequent answer 0.5556"
        in result.out
    )
    assert "\nshots  accuracy      95% interval\n" in result.out
    assert (
        "with 8 shots, 9 prompts had room for fewer solved examples, 3.0 on average" in result.out
    )
    assert "more were taken from the cache" in result.out
    assert f"everything is in {out}" in result.out
    assert {path.name for path in out.iterdir()} == {
        "results.json", "predictions.jsonl", "shots.png",
    }  # fmt: skip
    again = call("evaluate", model, "--task", task, "--data", tmp_path, "--out", out)
    assert_refused(again, "already holds an evaluation")


def test_a_plot_that_cannot_be_drawn_is_said_beforehand(
    call: Call, model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    asked = ("evaluate", model, "--task", task, "--data", tmp_path, "--device", "cpu")
    result = call(*asked, "--shots", "0,1", "--out", tmp_path / "out")
    assert_refused(result, "matplotlib")
    assert not (tmp_path / "out").exists()
    assert result.out == ""


def test_a_question_longer_than_the_context_is_said(
    call: Call, model: Path, task: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "long " * 20, "right": "a"}))
    result = call("evaluate", model, "--task", task, "--data", tmp_path, "--device", "cpu")
    assert "1 question longer than the context of 48 tokens lost the beginning" in result.out


def test_texts_get_their_perplexity(call: Call, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It rains @-@ again .\n" * 9)
    (tmp_path / "b.txt").write_text("The sun shines .\n" * 9)
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    out = tmp_path / "out"
    result = call(
        "evaluate", model, *files, "--stride", "24", "--detokenizer", "wikitext", "--out", out,
        "--device", "cpu",
    )  # fmt: skip
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == [
        "text",
        "tokens",
        "words",
        "bytes",
        "per",
        "token",
        "per",
        "word",
        "bits/byte",
    ]
    assert [line.split()[0] for line in lines[1:4]] == ["a.txt", "b.txt", "all"]
    assert "the first token of each text (2) was not predicted" in result.out
    written = json.loads((out / "results.json").read_text())
    assert written["total"]["bytes"] == sum(path.stat().st_size for path in files)
    assert f"{written['total']['bits_per_byte']:.4f}" == lines[3].split()[-1]


def test_a_tokenizer_that_changes_texts_is_named(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=256, block_size=48, n_layer=1, n_head=2, n_embd=16)
    GPT(shape).save_pretrained(tmp_path / "model", tokenizer="bytes")
    encode = ByteTokenizer.encode
    monkeypatch.setattr(
        ByteTokenizer, "encode", lambda self, text, **how: encode(self, text.lower(), **how)
    )
    (tmp_path / "a.txt").write_text("It rains again.\n" * 9)
    result = call("evaluate", tmp_path / "model", tmp_path / "a.txt", "--device", "cpu")
    assert "the tokenizer changes texts" in result.out
    (tmp_path / "a.txt").write_text("it rains again.\n" * 9)
    result = call("evaluate", tmp_path / "model", tmp_path / "a.txt", "--device", "cpu")
    assert "the tokenizer changes texts" not in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either texts or a --task is wanted"),
        (["{text}", "--task", "sst-2"], "either texts or a --task is wanted"),
        (["{text}", "--shots", "1"], "shots: it is for a task, leave it out"),
        (["{text}", "--data", "."], "data: it is for a task, leave it out"),
        (["--task", "{task}", "--stride", "8"], "stride: it is for texts, leave it out"),
        (["--task", "sst-3"], "task must be one of cbt-cn"),
        (["--task", "none.toml"], "task: none.toml does not exist"),
        (["{text}", "--stride", "49"], "stride must be at most block_size=48, got 49"),
        (["{text}", "--stride", "0"], "stride is 0, at least 1 is wanted"),
        (["{text}", "--detokenizer", "moses"], "detokenizer is 'moses'"),
        (["{empty}"], "is empty, a UTF-8 text file is wanted"),
        (["missing.txt"], "missing.txt"),
        (["{text}", "--dtype", "int8"], "dtype is 'int8'"),
    ],
)
def test_what_is_refused(
    call: Call, model: Path, task: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "text.txt").write_text("Some text.\n" * 9)
    (tmp_path / "empty.txt").write_text("")
    names = {"text": tmp_path / "text.txt", "empty": tmp_path / "empty.txt", "task": task}
    out = tmp_path / "out"
    given = [argument.format_map(names) for argument in arguments]
    assert_refused(call("evaluate", model, *given, "--out", out, "--device", "cpu"), words)
    assert not out.exists()


def test_a_folder_that_is_no_model(call: Call, task: Path, tmp_path: Path) -> None:
    refused = call("evaluate", tmp_path, "--task", task, "--data", tmp_path)
    assert_refused(refused, "holds no model")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('prompt = "{text}"', 'prompt = "{title}"', "has no column 'title' in line 1"),
        ('b = "yes"', 'c = "yes"', "has the label 'b', one of a, c is wanted"),
        ('label = "right"', 'label = "text"', "the prompt holds the answer, text"),
    ],
)
def test_a_task_that_does_not_fit_its_data(
    call: Call, model: Path, task: Path, tmp_path: Path, old: str, new: str, words: str
) -> None:
    task.write_text(TASK.replace(old, new))
    refused = call("evaluate", model, "--task", task, "--data", tmp_path, "--device", "cpu")
    assert_refused(refused, words)
