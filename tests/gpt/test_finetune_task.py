"""Tasks: those that come with the package, a user's own, and descriptions that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_cases import CONTENTS, FILES, TRANSFORMATIONS, task

from gptkernels.gpt.finetuning.task import ZeroShot, as_dict, load_task, names, task_of


def test_four_tasks_come_with_the_package() -> None:
    assert names() == ("mctest", "sick-entailment", "sick-relatedness", "sst-2")
    kinds = [load_task(name).transformation for name in names()]
    assert kinds == ["choice", "entailment", "similarity", "classification"]
    assert load_task("sst-2").classes == ("negative", "positive")
    assert load_task("sst-2").zero_shot == ZeroShot(" very", (" negative", " positive"))
    assert load_task("sick-entailment").outputs == 3
    assert load_task("sick-relatedness").range == (1, 5)
    assert load_task("mctest").outputs == load_task("sick-relatedness").outputs == 1


@pytest.mark.parametrize("name", [*names(), *TRANSFORMATIONS])
def test_a_task_comes_back_from_json(name: str) -> None:
    one = task(name) if name in TRANSFORMATIONS else load_task(name)
    assert task_of(name, json.loads(json.dumps(as_dict(one)))) == one
    assert task_of(name, as_dict(one)) == one


OWN = """
transformation = "entailment"
metrics = ["f1"]
format = "csv"
texts = [1, "b"]
label = 2

[labels]
y = "same"
n = "other"
yes = "same"

[files]
train = "train.csv"
"""


def test_a_users_own_task_is_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(OWN)
    own = load_task(tmp_path / "mine.toml")
    assert (own.name, own.texts, own.label) == ("mine", (1, "b"), 2)
    assert own.classes == ("same", "other")  # whose places are the indices
    assert load_task(str(tmp_path / "mine.toml")) == own
    with pytest.raises(FileNotFoundError, match=r"task: .*other\.toml does not exist"):
        load_task(tmp_path / "other.toml")
    (tmp_path / "mine.toml").write_text("transformation =")
    with pytest.raises(ValueError, match=r"task: .*mine\.toml is not TOML"):
        load_task(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_bytes(b'folder = "caf\xe9"')
    with pytest.raises(ValueError, match=r"task: .*mine\.toml is not TOML"):
        load_task(tmp_path / "mine.toml")


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"one of mctest, .*, or the path .* got 'race'"):
        load_task("race")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "classification",
            {"transformation": "qa"},
            "transformation must be one of classifica",
        ),
        ("classification", {"transformation": 3}, "transformation must be a string, got 3"),
        ("classification", {"format": "xml"}, "format must be one of tsv, .*, got 'xml'"),
        ("classification", {"metrics": ["bleu"]}, "a metric must be one of accuracy, f1, matthews"),
        ("classification", {"metrics": ["pearson"]}, "a metric must be one of accuracy"),
        ("classification", {"metrics": []}, "metrics must name at least one"),
        ("classification", {"metrics": "f1"}, "metrics must be a list of strings, got 'f1'"),
        ("classification", {"textz": ["a"]}, "textz is not known there"),
        ("classification", {"name": "a"}, "name is not known there"),
        ("classification", {"format": None}, "format is missing"),
        ("classification", {"metrics": None, "files": None}, "files, metrics is missing"),
        ("classification", {"texts": ["a", "b"]}, "classification needs 1 texts, got 2"),
        ("classification", {"texts": [1.5]}, r"texts must be a list of columns, .* got \[1\.5\]"),
        ("classification", {"label": ["a"]}, r"label must be a column, .* got \['a'\]"),
        ("classification", {"choices": ["a"]}, "choices are for the transformation choice"),
        ("classification", {"labels": None}, "either labels or a range is wanted"),
        ("classification", {"range": [0, 1]}, "either labels or a range is wanted"),
        ("classification", {"labels": {"a": "b", "c": "b"}}, "labels must name at least two"),
        ("classification", {"labels": ["a", "b"]}, "labels must be a table of strings, got"),
        ("classification", {"labels": {"a": 1, "b": 2}}, "labels must be a table of strings, got"),
        ("classification", {"files": {"test": "a"}}, "files must name the train part"),
        (
            "classification",
            {"files": {"train": "a", "dev": "b"}},
            "a split in files must be one",
        ),
        ("classification", {"files": ["train"]}, "files must be a table of strings"),
        ("classification", {"files": {"train": 1}}, "files must be a table of strings"),
        ("classification", {"format": "mctest"}, "format mctest holds choices"),
        ("classification", {"zero_shot": {}}, "an answer for each of the 2 classes"),
        ("classification", {"zero_shot": {"answers": ["a"]}}, "an answer for each of the 2 classe"),
        ("classification", {"zero_shot": {"asked": 1}}, "zero_shot: asked is not known there"),
        ("classification", {"zero_shot": {"answers": "a"}}, "zero_shot: answers must be a list"),
        ("classification", {"zero_shot": "a"}, "zero_shot must be a table"),
        ("entailment", {"texts": ["a"]}, "entailment needs 2 texts, got 1"),
        ("similarity", {"texts": []}, "similarity needs 2 texts, got 0"),
        ("similarity", {"range": [1, 1]}, r"range must be \[lowest, highest\]"),
        ("similarity", {"range": [1]}, r"range must be \[lowest, highest\], got \[1\]"),
        ("similarity", {"range": [0, float("inf")]}, r"range must be \[lowest, highest\]"),
        ("similarity", {"range": [0, True]}, r"range must be \[lowest, highest\]"),
        ("similarity", {"metrics": ["accuracy"]}, "a metric must be one of pearson, spearman"),
        ("similarity", {"zero_shot": {}}, "zero_shot needs"),
        ("choice", {"labels": {"0": "a", "1": "b"}}, "labels of a choice stand for numbers from 0"),
        ("choice", {"metrics": ["f1"]}, "a metric must be one of accuracy, got 'f1'"),
        ("choice", {"choices": []}, "choice needs texts and choices"),
        ("choice", {"texts": []}, "choice needs texts and choices"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused_in_one_sentence(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    content = {"transformation": kind, "files": FILES, **CONTENTS[kind], **changes}
    with pytest.raises(ValueError, match=message) as caught:
        task_of("own", {key: value for key, value in content.items() if value is not None})
    assert str(caught.value).startswith("task own: ")


def test_the_data_are_named_or_below_the_folder_of_all_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sst = load_task("sst-2")
    (tmp_path / "sst-2").mkdir()
    monkeypatch.setenv("GPTKERNELS_DATA", str(tmp_path))
    assert sst.data_folder(None) == tmp_path / "sst-2"
    assert sst.data_folder(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"data: .*nothere is not a folder"):
        sst.data_folder(tmp_path / "nothere")
    monkeypatch.delenv("GPTKERNELS_DATA")
    with pytest.raises(FileNotFoundError, match=r"train\.tsv, or set GPTKERNELS_DATA .* sst-2$"):
        sst.data_folder(None)
