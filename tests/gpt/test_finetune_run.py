"""Whole runs of fine-tuning: each transformation learns its task; what a run leaves behind, and
what it refuses before it writes anything."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import (
    CONTENTS,
    FILES,
    GPT1,
    GPT2,
    QUICK,
    TRANSFORMATIONS,
    examples,
    pretrained,
    task,
    write_data,
)
from training import assert_same_bits, read_log, unclocked

from gptkernels import GPT
from gptkernels.gpt.finetuning import fitting, folder
from gptkernels.gpt.finetuning.classifier import Classifier
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.finetune import FinetuneResult, finetune
from gptkernels.gpt.finetuning.metrics import score
from gptkernels.gpt.training.diverged import DivergedError

Run = tuple[Path, FinetuneResult]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT-1 of bytes, which nobody changes."""
    path = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    pretrained().save_pretrained(path, tokenizer="bytes")
    return path


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a transformation, its run's folder, which nobody changes, and its result."""
    base, done = tmp_path_factory.mktemp("runs"), dict[str, Run]()

    def run(kind: str) -> Run:
        if kind not in done:
            data, out = write_data(kind, base / f"{kind} data"), base / kind
            done[kind] = out, finetune(model, out, task=task(kind), data=data, config=QUICK)
        return done[kind]

    return run


each_kind = pytest.mark.parametrize("kind", TRANSFORMATIONS)


@each_kind
def test_each_transformation_learns_its_task(kind: str, runs: Any) -> None:
    _, result = runs(kind)
    for part in (result.validation, result.test):
        assert part.keys() == set(CONTENTS[kind]["metrics"])
        for name, value in part.items():
            assert value > 0.8, name
    assert all(value < 0.7 for value in result.majority.values())
    assert not result.stopped


@each_kind
def test_predictions_are_the_answers_to_the_test_part(kind: str, runs: Any) -> None:
    out, result = runs(kind)
    one, asked = task(kind), examples(kind, 16, 2)
    with (out / "predictions.tsv").open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream, delimiter="\t")
    longest = max(len(example.choices) for example in asked)
    names = list(one.classes or map(str, range(longest)))
    assert header == ["example", "prediction", "target", *names]
    assert [row[0] for row in rows] == [str(i) for i in range(16)]
    predicted = []
    for row, example in zip(rows, asked, strict=True):
        likely = [float(text) for text in row[3:] if text]
        assert len(row) == len(header)
        if kind == "similarity":
            assert not likely
            predicted.append(float(row[1]))
            assert float(row[2]) == example.target
            continue
        assert len(likely) == (len(example.choices) or len(names))
        assert sum(likely) == pytest.approx(1, abs=1e-5)
        assert row[1] == names[likely.index(max(likely))]
        assert row[2] == names[int(example.target)]
        predicted.append(names.index(row[1]))
    right = [float(example.target) for example in asked]
    found = score(one.metrics, right, predicted, len(one.classes))
    assert result.test == pytest.approx(found, abs=1e-6)  # all digits are there


@each_kind
def test_results_say_what_was_run_and_found(kind: str, runs: Any, model: Path) -> None:
    out, result = runs(kind)
    found = json.loads((out / "results.json").read_text())
    assert found["config"] == dataclasses.asdict(QUICK)
    assert (found["task"], found["model"], found["stopped"]) == (kind, str(model), False)
    assert found["examples"] == {"training": 64, "validation": 24, "test": 16, "truncated": 0}
    assert found["validation"] == result.validation
    assert found["test"] == result.test
    assert found["majority"] == result.majority
    assert found["seconds"] == result.seconds > 0
    best = [record for record in read_log(out) if "epoch" in record]
    first = f"validation_{task(kind).metrics[0]}"
    best.sort(key=lambda record: -record[first])  # stable: of equal ones the earliest
    assert best[0][first] == result.validation[task(kind).metrics[0]]
    assert sorted(path.name for path in out.iterdir()) == [
        "log.jsonl", "model", "predictions.tsv", "results.json",
    ]  # fmt: skip


@each_kind
def test_the_folder_answers_as_the_run_did(kind: str, runs: Any) -> None:
    out, result = runs(kind)
    loaded, tokenizer = folder.load(out)
    assert_same_bits(loaded.state_dict(), result.model.state_dict())
    assert loaded.task == task(kind)
    assert loaded.scale == result.model.scale
    assert (loaded.scale != (0.0, 1.0)) == (kind == "similarity")
    assert tokenizer.vocab_size == 256
    classify = Classifier(out, impl="torch", device="cpu")
    asked = [(*one.texts, *one.choices) for one in examples(kind, 16, 2)]
    again = classify(asked)
    torch.testing.assert_close(
        torch.tensor([one.value for one in again]),
        torch.tensor([one.value for one in result.answers]),
    )
    for one, other in zip(again, result.answers, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_the_same_seed_gives_the_same_bits(model: Path, tmp_path: Path) -> None:
    data = write_data("choice", tmp_path / "data", (24, 8, 8))
    config = dataclasses.replace(QUICK, epochs=2, dropout=0.1, head_dropout=0.3)
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)  # whatever the process drew before must not matter
        one = dataclasses.replace(config, seed=seed)
        result = finetune(model, tmp_path / name, task=task("choice"), data=data, config=one)
        states.append(result.model.state_dict())
    assert_same_bits(states[0], states[1])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    logs = [unclocked(read_log(tmp_path / name)) for name in "ab"]
    assert logs[0] == logs[1]
    for file in ("predictions.tsv", "model/model.safetensors", "model/head.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_models_folder_is_the_best_epochs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the last one's, and neither are the predictions."""
    states, metrics = [], iter([0.2, 0.8, 0.1])

    def judged(network: Any, *_: Any) -> dict[str, float]:
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return {"accuracy": next(metrics), "f1": 0.0}

    monkeypatch.setattr(fitting, "evaluate", judged)
    data = write_data("entailment", tmp_path / "data", (16, 8, 8))
    config = dataclasses.replace(QUICK, epochs=3)
    out = tmp_path / "out"
    result = finetune(model, out, task=task("entailment"), data=data, config=config)
    assert_same_bits(result.model.state_dict(), states[1])
    assert_same_bits(folder.load(out)[0].state_dict(), states[1])
    assert result.validation["accuracy"] == 0.8
    asked = [one.texts for one in examples("entailment", 8, 2)]
    labels = [one.label for one in Classifier(out, impl="torch")(asked)]
    assert labels == [one.label for one in result.answers]


def test_without_a_test_part_the_validation_part_is_judged(model: Path, tmp_path: Path) -> None:
    """And without either, what is held out of the training part."""
    data = write_data("classification", tmp_path / "data", (40, 8, 8))
    config = dataclasses.replace(QUICK, epochs=1, validation_fraction=0.25, train_examples=20)
    for files, validation, training in ((("train", "validation"), 8, 20), (("train",), 10, 20)):
        own = dataclasses.replace(
            task("classification"), files={name: FILES[name] for name in files}
        )
        out = tmp_path / "-".join(files)
        result = finetune(model, out, task=own, data=data, config=config)
        found = json.loads((out / "results.json").read_text())
        assert found["examples"] == {
            "training": training, "validation": validation, "test": 0, "truncated": 0,
        }  # fmt: skip
        assert found["test"] == result.test == {}
        assert len(result.answers) == validation
        right = [a.label for a in result.answers]
        lines = (out / "predictions.tsv").read_text().splitlines()[1:]
        assert [line.split("\t")[1] for line in lines] == right


def test_examples_that_are_too_long_are_cut_and_counted(model: Path, tmp_path: Path) -> None:
    data = write_data("classification", tmp_path / "data", (8, 4, 4))
    with (data / "train").open("a") as file:
        file.write(f"{'long ' * 20}\t+\n")
    config = dataclasses.replace(QUICK, epochs=1)
    result = finetune(
        model, tmp_path / "out", task=task("classification"), data=data, config=config
    )
    assert result.truncated == 1


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_run_that_is_stopped_leaves_its_best_model(model: Path, tmp_path: Path) -> None:
    data = write_data("choice", tmp_path / "data", (24, 8, 8))

    def observer(record: dict[str, Any], done: float) -> None:
        if record["step"] == 3 and "loss" in record:  # one before the end of the second epoch
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "out"
    config = dataclasses.replace(QUICK, batch_size=12, log_interval=1)
    result = finetune(model, out, task=task("choice"), data=data, config=config, observer=observer)
    assert result.stopped
    assert read_log(out)[-1]["step"] == 3
    assert json.loads((out / "results.json").read_text())["stopped"] is True
    assert not (out / "predictions.tsv").exists()  # nor was the test part answered
    assert result.answers == []
    assert_same_bits(folder.load(out)[0].state_dict(), result.model.state_dict())
    assert not list(out.glob(".*"))


def test_a_run_that_diverges_keeps_the_best_model_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data("entailment", tmp_path / "data", (16, 8, 8))
    rate = fitting.learning_rate
    monkeypatch.setattr(
        fitting, "learning_rate", lambda c, step, n: rate(c, step, n) if step < 2 else 1e30
    )
    out = tmp_path / "out"
    config = dataclasses.replace(QUICK, batch_size=8)  # two steps an epoch
    with pytest.raises(DivergedError, match="try a lower learning_rate"):
        finetune(model, out, task=task("entailment"), data=data, config=config)
    kept, _ = folder.load(out)
    assert all(tensor.isfinite().all() for tensor in kept.state_dict().values())
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "model"]
    with pytest.raises(ValueError, match=r"already holds a run \(model\)"):
        finetune(model, out, task=task("entailment"), data=data, config=QUICK)


def test_an_untied_model_and_gpt2s_blocks_are_fine_tuned_too(tmp_path: Path) -> None:
    model = GPT(GPT2)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(256, 32) / 10)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model", tokenizer="bytes")
    data = write_data("similarity", tmp_path / "data", (16, 8, 8))
    config = dataclasses.replace(QUICK, epochs=2, dtype="bfloat16")
    result = finetune(
        tmp_path / "model", tmp_path / "out", task=task("similarity"), data=data, config=config
    )
    head = result.model.body.lm_head.weight
    assert head is not result.model.body.transformer.wte.weight
    loaded, _ = folder.load(tmp_path / "out")
    assert_same_bits(loaded.state_dict(), result.model.state_dict())
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


# What is refused


def test_a_folder_that_holds_a_run_is_refused(model: Path, tmp_path: Path) -> None:
    data = write_data("entailment", tmp_path / "data", (4, 2, 2))
    for name in ("results.json", "model", "checkpoint.pt"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("{}")
        with pytest.raises(ValueError, match=f"out: .* already holds a run .{name}., name another"):
            finetune(model, out, task=task("entailment"), data=data, config=QUICK)
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == "{}"
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        finetune(model, data / "train", task=task("entailment"), data=data, config=QUICK)


def _spoil(name: str, text: str) -> Any:
    def spoil(base: Path) -> dict[str, Any]:
        with (base / "data" / name).open("a") as file:
            file.write(text)
        return {}

    return spoil


def _forget_tokenizer(base: Path) -> dict[str, Any]:
    config = json.loads((base / "model" / "config.json").read_text())
    kept = {key: value for key, value in config.items() if value != "bytes"}
    assert kept != config
    (base / "model" / "config.json").write_text(json.dumps(kept))
    return {}


def _shrink(base: Path) -> dict[str, Any]:
    GPT(dataclasses.replace(GPT1, vocab_size=100)).save_pretrained(base / "model")
    return {"tokenizer": "bytes"}


def _shorten(base: Path) -> dict[str, Any]:
    GPT(dataclasses.replace(GPT1, block_size=4)).save_pretrained(base / "model", tokenizer="bytes")
    return {}


def _set(**changes: Any) -> Any:
    return lambda base: {"config": dataclasses.replace(QUICK, **changes)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda base: {"task": "race"}, ValueError, "task must be one of mctest, .* got 'race'"),
        (lambda base: {"task": base / "a.toml"}, FileNotFoundError, r"task: .*a\.toml does not ex"),
        (lambda base: {"data": base / "nothere"}, FileNotFoundError, "nothere is not a folder"),
        (lambda base: {"data": base}, FileNotFoundError, "data: .*train does not exist"),
        (_spoil("train", "a,b,x\n"), ValueError, "train, line 10 has the label 'x', one of e, n"),
        (_spoil("test", "a,b\n"), ValueError, "test has 2 columns in line 6, but 3 names"),
        (lambda base: {"model": base / "gone"}, FileNotFoundError, "model: .*gone does not exist"),
        (lambda base: {"model": base / "data"}, FileNotFoundError, r"holds no model, neither"),
        (lambda base: {"tokenizer": "gpt9"}, ValueError, "tokenizer name must be"),
        (_forget_tokenizer, ValueError, r"256 tokens are of, name it .* \(perhaps bytes\)"),
        (_shrink, ValueError, "bytes has 256 tokens, more than the model's 100"),
        (_shorten, ValueError, "a sequence of 2 texts needs a context of at least 5 tokens"),
        (_set(transfer="3"), ValueError, "transfer is 3, but the model has 2 blocks"),
        (_set(train_examples=9), ValueError, "train_examples is 9"),
        (_set(device="tpu"), ValueError, "device"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    change: Any, error: type[Exception], message: str, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    write_data("entailment", tmp_path / "data", (8, 4, 4))
    given: dict[str, Any] = {
        "model": tmp_path / "model",
        "task": task("entailment"),
        "data": tmp_path / "data",
        "config": QUICK,
    }
    given.update(change(tmp_path))
    with pytest.raises(error, match=message) as caught:
        finetune(given.pop("model"), tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install 'gptkernels\[finetune\]'"):
        finetune(tmp_path / "nothere", tmp_path / "out", task="sst-2", config=FinetuneConfig())
    assert not (tmp_path / "out").exists()
