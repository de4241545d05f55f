"""The commands `finetune` and `classify`: from a table to answers, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from test_cli import assert_refused

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.finetuning.classifier import Classifier
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.finetune import finetune

Call = Callable[..., Any]
TASK = """
transformation = "classification"
metrics = ["accuracy"]
format = "tsv"
texts = ["text"]
label = "sort"
[labels]
f = "first"
t = "last"
[files]
train = "train.tsv"
test = "test.tsv"
"""
WORDS = {"f": "aa aaa aaaa aaaaa", "t": "z zz zzz zzzzz"}
QUICK = (
    "--learning-rate",
    "0.01",
    "--epochs",
    "3",
    "--batch-size",
    "8",
    "--device",
    "cpu",
    "--dropout",
    "0",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level model, a task and its files."""
    home = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=256, block_size=16, n_layer=1, n_head=2, n_embd=16, norm="post")
    GPT(shape).save_pretrained(home / "model", tokenizer="bytes")
    (home / "sorts.toml").write_text(TASK)
    lines = [f"{word}\t{sort}" for sort, words in WORDS.items() for word in words.split()]
    (home / "train.tsv").write_text("text\tsort\n" + "\n".join(lines * 20) + "\n")
    (home / "test.tsv").write_text("text\tsort\n" + "\n".join(lines) + "\n")
    return home


@pytest.fixture(scope="module")
def tuned(home: Path) -> Path:
    """The folder of a run, which nobody changes."""
    how = FinetuneConfig(learning_rate=0.01, epochs=3, batch_size=8, dropout=0.0, device="cpu")
    task = home / "sorts.toml"
    finetune(home / "model", home / "tuned", task=task, data=home, config=how)
    return home / "tuned"


def command(home: Path, out: Path, *more: str) -> tuple[Any, ...]:
    task = ("--task", home / "sorts.toml", "--data", home)
    return ("finetune", home / "model", *task, "--out", out, *QUICK, *more)


def test_a_run_says_how_good_it_is(home: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "out"
    result = call(*command(home, out))
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    epochs = [line.split()[1] for line in lines if line.startswith("epoch")]
    assert epochs == ["1", "2", "3"]
    assert lines[-2] == "test accuracy 1.0000, that of a constant answer 0.5000"
    assert lines[-1].endswith(f"ask it with: gptkernels classify {out} TEXT")
    rows = list(csv.DictReader((out / "predictions.tsv").open(), delimiter="\t"))
    assert len(rows) == 8
    assert all(row["prediction"] == row["target"] for row in rows)
    assert json.loads((out / "results.json").read_text())["test"] == {"accuracy": 1.0}


def test_classify_answers_texts(tuned: Path, call: Call) -> None:
    result = call("classify", tuned, "aaa", "zz", "--device", "cpu")
    assert [line.split("\t")[0] for line in result.out.splitlines()] == ["first", "last"]
    (one,) = Classifier(tuned, device="cpu")([("aaa",)])
    assert float(result.out.split()[1]) == pytest.approx(max(one.probabilities), abs=1e-4)
    row = json.loads(call("classify", tuned, "zz", "--json", "--device", "cpu").out)
    assert row["answer"] == "last"
    assert sum(row["probabilities"].values()) == pytest.approx(1.0, abs=1e-6)


def test_a_test_part_without_answers_is_predicted(home: Path, tmp_path: Path, call: Call) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.tsv").write_text((home / "train.tsv").read_text())
    (data / "test.tsv").write_text("text\naa\nzz\n")
    result = call(*command(home, tmp_path / "out", "--data", str(data)))
    assert "validation accuracy" in result.out.splitlines()[-2]
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.tsv").open(), delimiter="\t"))
    assert [row["target"] for row in rows] == ["", ""]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["test"] == {}


def test_a_text_is_no_list_of_examples(tuned: Path) -> None:
    with pytest.raises(TypeError, match="a list of examples, got a text"):
        Classifier(tuned, device="cpu")("aa")


def test_classify_says_what_it_cut(tuned: Path, call: Call) -> None:
    result = call("classify", tuned, "aa " * 9, "z", "--device", "cpu")
    assert result.code == 0
    assert "1 example was longer than 16 tokens, and cut" in result.err


def test_what_is_cut_is_counted(home: Path, tmp_path: Path, call: Call) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines = "text\tsort\n" + "aa\tf\nz\tt\n" * 4
    (data / "train.tsv").write_text(lines + f"{'aa ' * 9}\tf\n")
    (data / "test.tsv").write_text(lines)
    result = call(*command(home, tmp_path / "out", "--data", str(data), "--epochs", "1"))
    assert "1 example was longer than 16 tokens, and cut" in result.out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--task", "sst-3"), "task must be one of mctest, sick-entailment, sick-relatedness"),
        (("--data", "nowhere"), "data: nowhere is not a folder"),
        (("--transfer", "2"), "transfer is 2, but the model has 1 blocks"),
        (("--dtype", "float16"), "dtype is 'float16', float32 or bfloat16 is wanted"),
        (("--train-examples", "1000"), "8 are held out for validation, but train_examples is 1000"),
    ],
)
def test_bad_input_is_one_sentence(
    home: Path, tmp_path: Path, call: Call, more: tuple[str, ...], sentence: str
) -> None:
    out = tmp_path / "out"
    assert_refused(call(*command(home, out, *more)), sentence)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train.tsv", "text\tsort\nfig\tx\n", "line 2 has the label 'x', one of f, t is wanted"),
        ("test.tsv", "text\tsort\n", "the test part,"),
        ("train.tsv", "text\tsort\nfig\n", "has 1 columns in line 2, but 2 names in its first"),
    ],
)
def test_bad_data_is_one_sentence(
    home: Path, tmp_path: Path, call: Call, name: str, content: str, sentence: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train.tsv", "test.tsv"):
        (data / part).write_text((home / part).read_text())
    (data / name).write_text(content)
    out = tmp_path / "out"
    assert_refused(call(*command(home, out, "--data", str(data))), sentence)
    assert not out.exists()


def test_no_model_is_one_sentence(home: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "empty").mkdir()
    task = ("--task", home / "sorts.toml", "--data", home, "--out", tmp_path / "out")
    assert_refused(
        call("finetune", tmp_path / "empty", *task),
        "holds no model, neither config.json nor checkpoint.pt",
    )
    assert_refused(call("classify", home / "model", "aa"), "holds no fine-tuned model")
    assert not (tmp_path / "out").exists()


def test_the_folder_of_all_data_is_told_from_the_tasks(
    home: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "own.toml").write_text('folder = "sorts"\n' + TASK)
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / "all" / "sorts").mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / "sorts" / name).write_text((home / name).read_text())
    words = ("--task", tmp_path / "own.toml", "--data", tmp_path / "all", "--out", tmp_path / "o")
    assert_refused(call("finetune", home / "model", *words), "/all/sorts does")


def test_a_run_is_not_overwritten(tuned: Path, home: Path, call: Call) -> None:
    assert_refused(call(*command(home, tuned)), "already holds a run")


def test_texts_come_from_standard_input(
    tuned: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("aa\nzzz\n"))
    result = call("classify", tuned, "--device", "cpu")
    assert [line.split("\t")[0] for line in result.out.splitlines()] == ["first", "last"]
    monkeypatch.setattr("sys.stdin", io.StringIO("aa\n\nzzz\n"))
    assert_refused(call("classify", tuned), "texts: line 2 of the input is blank")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert_refused(call("classify", tuned), "texts: there is none to answer")
