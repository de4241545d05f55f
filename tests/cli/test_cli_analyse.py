"""`gptkernels analyse`: what it prints and leaves behind, and one sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.finetuning.analyses import study

SHAPE = GPTConfig(vocab_size=256, block_size=40, n_layer=1, n_head=2, n_embd=8)
QUICK = ["--epochs", "1", "--batch-size", "8", "--device", "cpu", "--impl", "torch"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "sst-2"
    folder.mkdir(parents=True)
    for name, size in (("train.tsv", 12), ("dev.tsv", 4)):
        rows = [f"{i % 2}\t{'ab'[i % 2]} film " for i in range(size)]
        (folder / name).write_text("label\tsentence\n" + "\n".join(rows) + "\n")
    return folder.parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    GPT(SHAPE).save_pretrained(tmp_path / "model", tokenizer="bytes")
    return tmp_path / "model"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    for step in ("0", "10"):
        folder = tmp_path / "run" / "snapshots" / step
        GPT(SHAPE).save_pretrained(folder, tokenizer="bytes")
    return tmp_path / "run"


def records(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())["records"]
    return found


def table(text: str) -> list[str]:
    """The lines of the table of sst-2, its head first."""
    _, found = text.split("\nsst-2 accuracy (test)")
    head, *lines = found.splitlines()
    assert head.split() == ["mean", "±", "deviation"]
    return [line for line in lines if " ± " in line]


def test_layers(call: Any, model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["analyse", "layers", model, "--task", "sst-2", "--data", data]
    arguments += ["--out", tmp_path / "out", *QUICK, "--seeds", "4,5"]
    result = call(*arguments, "--lm-coefficient", "0.25")
    assert result.code == 0, result.err
    found = records(tmp_path / "out" / "layers.json")
    made = [(record["config"]["seed"], record["config"]["transfer"]) for record in found]
    assert made == [(seed, transfer) for seed in (4, 5) for transfer in ("none", "0", "1")]
    assert {record["config"]["lm_coefficient"] for record in found} == {0.25}
    assert {record["config"]["batch_size"] for record in found} == {8}
    assert (tmp_path / "out" / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert [row.split()[0] for row in table(result.out)] == ["none", "0", "1"]
    score = found[0]["score"]
    assert f" 17%  sst-2, none, seed 4: test accuracy {score:.4f}\n" in result.out
    assert " 17%  sst-2, none, seed 4, epoch 1, validation accuracy " in result.out
    assert "100%  sst-2, 1, seed 5: test accuracy" in result.out


def test_ablations_go_on(
    call: Any, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["analyse", "ablations", model, "--task", "sst-2", "--data", data]
    arguments += ["--out", tmp_path / "out", *QUICK, "--seeds", "1"]
    fitted, made = study.fitted, []

    def once(network: Any, parts: Any, config: Any, observer: Any, **more: Any) -> Any:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(config)
        return fitted(network, parts, config, observer, **more)

    monkeypatch.setattr(study, "fitted", once)
    assert call(*arguments).code == 130
    assert len(records(tmp_path / "out" / "ablations.json")) == 1
    monkeypatch.setattr(study, "fitted", fitted)
    result = call(*arguments)
    assert result.code == 0, result.err
    assert "seed 1: " in result.out
    assert "sst-2, full, seed 1:" not in result.out  # made before
    names = ["full", "without the auxiliary loss", "without pre-training", "majority"]
    assert [row.split("  ")[0] for row in table(result.out)] == list(names)
    assert (tmp_path / "out" / "ablations.png").is_file()


def test_zero_shot(call: Any, trained: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["analyse", "zero-shot", trained, "--task", "sst-2", "--out", tmp_path / "out"]
    result = call(*arguments, "--data", data, "--examples", "3", "--device", "cpu")
    assert result.code == 0, result.err
    found = records(tmp_path / "out" / "zero_shot.json")
    assert [(record["step"], record["examples"]) for record in found] == [(0, 3), (10, 3)]
    accuracy = found[1]["metrics"]["accuracy"]
    assert f"100%  step 10, sst-2: accuracy {accuracy:.4f}, chance 0.5000\n" in result.out
    assert "lost their beginnings" not in result.out
    assert (tmp_path / "out" / "zero_shot.png").read_bytes().startswith(b"\x89PNG")


def test_texts_that_were_cut_are_counted(
    call: Any, trained: Path, data: Path, tmp_path: Path
) -> None:
    with (data / "sst-2" / "dev.tsv").open("a") as file:
        file.write(f"1\t{'long ' * 20}\n")
    arguments = ["analyse", "zero-shot", trained, "--task", "sst-2", "--out", tmp_path / "out"]
    result = call(*arguments, "--data", data, "--device", "cpu")
    assert "texts that were too long lost their beginnings, 2 times" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layers", "MODEL", "--task", "none"], "task must be one of mctest"),
        (["layers", "MODEL", "--task", "sst-2", "--seeds", "1,b"], "is no list of numbers"),
        (["layers", "MODEL", "--task", "sst-2", "--seeds", "1,1"], "different numbers"),
        (["layers", "MODEL", "--task", "sst-2", "--transfer", "1"], "No such option"),
        (["ablations", "MODEL", "--task", "sst-2", "--seed", "1"], "No such option"),
        (["ablations", "MODEL", "--task", "sst-2", "--task", "sst-2"], "named once"),
        (["ablations", "MODEL", "--task", "sst-2", "--epochs", "0"], "epochs is 0"),
        (["ablations", "MODEL"], "Missing option '--task'"),
        (["zero-shot", "MODEL", "--task", "sst-2"], "has no snapshots/"),
        (["zero-shot", "RUN", "--task", "sick-relatedness"], "has no [zero_shot]"),
        (["zero-shot", "RUN", "--task", "mctest"], "mctest is not a folder"),
        (["zero-shot", "RUN", "--task", "sst-2", "--examples", "0"], "examples is 0"),
        (["zero-shot", "RUN", "--task", "sst-2", "--dtype", "int8"], "dtype is 'int8'"),
        (["zero-shot", "--task", "sst-2"], "Missing argument"),
    ],
)
def test_bad_input(
    call: Any, model: Path, trained: Path, data: Path, tmp_path: Path, arguments: list[str],
    words: str,
) -> None:  # fmt: skip
    places = {"MODEL": model, "RUN": trained}
    given = [places.get(argument, argument) for argument in arguments]
    out = tmp_path / "out"
    result = call("analyse", *given, "--data", data, "--out", out)
    assert result.code == 2
    assert result.err.startswith("gptkernels: ")
    assert result.err.count("\n") == 1, result.err
    assert words in result.err
    assert not out.exists()


@pytest.mark.parametrize("name", ["layers", "ablations", "zero-shot"])
def test_an_out_that_is_a_file(
    call: Any, model: Path, trained: Path, data: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").write_text("a file")
    subject = trained if name == "zero-shot" else model
    result = call(
        "analyse", name, subject, "--task", "sst-2", "--data", data, "--out", tmp_path / "out"
    )
    assert result.code == 2
    assert "out must be a folder" in result.err


def test_help_names_the_three(call: Any) -> None:
    result = call("analyse", "--help")
    assert result.code == 0
    for name in ("layers", "zero-shot", "ablations"):
        assert f"\n  {name} " in result.out
