"""The four tasks that come with the package, on the data that they are for: what is read, and that
a model of two blocks can be fine-tuned on a few examples of each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from finetune_cases import GPT1, QUICK, pretrained
from harness import DATA

from gptkernels.gpt.finetuning.finetune import finetune
from gptkernels.gpt.finetuning.reading import read_split
from gptkernels.gpt.finetuning.task import Task, load_task, names

# Of each part, how often each right answer comes.
ENTAILMENT = ("entailment", "neutral", "contradiction")
CLASSES = {
    "sst-2": {"train": (29780, 37569), "test": (428, 444)},
    "sick-entailment": {
        "train": (1299, 2536, 665),
        "validation": (144, 282, 74),
        "test": (1414, 2793, 720),
    },
}
COUNTS = {
    "sick-relatedness": {"train": 4500, "validation": 500, "test": 4927},
    "mctest": {"train": 1200, "validation": 200, "test": 600},
}


def data_of(task: Task) -> Path:
    folder = DATA / task.folder
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: set GPTKERNELS_DATA to a folder that holds it")
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_every_example_has_its_class(name: str) -> None:
    task = load_task(name)
    assert task.classes == (ENTAILMENT if "sick" in name else ("negative", "positive"))
    assert task.files.keys() == CLASSES[name].keys()
    for split, counts in CLASSES[name].items():
        examples = read_split(task, data_of(task), split)
        found = Counter(example.target for example in examples)
        assert tuple(found[i] for i in range(len(counts))) == counts
        assert all(all(example.texts) for example in examples)


@pytest.mark.parametrize("name", COUNTS)
def test_every_example_has_its_number_or_its_choice(name: str) -> None:
    task = load_task(name)
    for split, count in COUNTS[name].items():
        examples = read_split(task, data_of(task), split)
        assert len(examples) == count
        lowest, highest = task.range or (0, 3)
        assert {min(e.target for e in examples), max(e.target for e in examples)} == {
            lowest,
            highest,
        }
        if task.choice:
            assert {len(example.choices) for example in examples} == {4}
            assert not any("\\newline" in example.texts[0] for example in examples)


def test_an_example_of_each_task() -> None:
    first = {
        name: read_split(load_task(name), data_of(load_task(name)), "test")[0] for name in names()
    }
    assert first["sst-2"].texts == ("one long string of cliches .",)
    assert first["sst-2"].target == 0  # negative
    for name, target in (("sick-entailment", 1), ("sick-relatedness", 3.3)):
        one, other = first[name].texts
        assert one == "There is no boy playing outdoors and there is no man smiling"
        assert other.startswith("A group of kids is playing in a yard and an old man is standing")
        assert first[name].target == target
    assert len(first["mctest"].texts) == 1
    assert len(first["mctest"].choices) == 4


@pytest.mark.parametrize("name", names())
def test_a_few_examples_of_each_task_train_a_model(name: str, tmp_path: Path) -> None:
    task = load_task(name)
    few = tmp_path / "few"
    few.mkdir()
    for path in data_of(task).iterdir():
        with path.open(encoding="utf-8") as lines:
            (few / path.name).write_text("".join(islice(lines, 9)), encoding="utf-8")
    shape = dataclasses.replace(GPT1, block_size=64)
    pretrained(shape).save_pretrained(tmp_path / "model", tokenizer="bytes")
    config = dataclasses.replace(QUICK, epochs=2, train_examples=6, validation_fraction=0.2)
    result = finetune(tmp_path / "model", tmp_path / "out", task=name, data=few, config=config)
    assert result.test.keys() == result.majority.keys() == set(task.metrics)
    assert all(-1 <= value <= 1 for value in result.test.values())
    assert result.truncated > 0  # 64 bytes are few
