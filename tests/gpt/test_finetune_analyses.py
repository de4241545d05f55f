"""The analyses of GPT-1's paper: what each run begins with, what is kept, and what is drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptkernels import GPT, GPTConfig
from gptkernels.core.lock import alone_in

pytest.importorskip("safetensors", reason="needs the package safetensors")
pytest.importorskip("scipy", reason="needs the package scipy")
pytest.importorskip("sklearn", reason="needs the package scikit-learn")
pytest.importorskip("matplotlib", reason="needs the package matplotlib")

from matplotlib import image
from matplotlib.figure import Figure

from gptkernels.gpt.finetuning import parts as parts_module
from gptkernels.gpt.finetuning.analyses import plots, snapshots, study
from gptkernels.gpt.finetuning.analyses.ablations import ablations, summary
from gptkernels.gpt.finetuning.analyses.layers import layers
from gptkernels.gpt.finetuning.analyses.records import Records
from gptkernels.gpt.finetuning.analyses.spread import markdown, metrics_of, summarise
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.finetune import FinetuneResult, finetune
from gptkernels.gpt.finetuning.reading import read_split
from gptkernels.gpt.finetuning.task import load_task
from gptkernels.gpt.finetuning.task_model import TaskModel
from gptkernels.gpt.finetuning.zero_shot import guesses, questions
from gptkernels.gpt.tokenizer import ByteTokenizer

SHAPE = GPTConfig(vocab_size=256, block_size=20, n_layer=2, n_head=2, n_embd=8)
QUICK = FinetuneConfig(
    epochs=1, batch_size=10, learning_rate=3e-3, log_interval=1, device="cpu", impl="torch"
)
VARIANTS = ["full", "without the auxiliary loss", "without pre-training"]
MOOD = """
folder = "moods"
transformation = "classification"
metrics = ["accuracy", "f1"]
format = "tsv"
texts = ["text"]
[labels]
0 = "low"
1 = "high"
[files]
train = "train.tsv"
test = "test.tsv"
[zero_shot]
prompt = " so"
answers = [" low", " high"]
"""
CLOSE = """
folder = "pairs"
transformation = "similarity"
metrics = ["pearson"]
format = "tsv"
texts = ["one", "two"]
range = [0, 1]
[files]
train = "train.tsv"
validation = "valid.tsv"
"""


class World:
    """A model, two tasks and their data; the runs that are made, and the figures that are drawn."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data, self.model, self.out = folder / "data", folder / "model", folder / "out"
        self.mood, self.close = str(folder / "mood.toml"), str(folder / "close.toml")
        Path(self.mood).write_text(MOOD)
        Path(self.close).write_text(CLOSE)
        draw = random.Random(0)
        for name, sizes in {"moods": (20, 9), "pairs": (16, 8)}.items():
            (self.data / name).mkdir(parents=True)
            for file, size in zip(("train", "test"), sizes, strict=True):
                rows = ["label\ttext" if name == "moods" else "label\tone\ttwo"]
                for _ in range(size):
                    texts = ["".join(draw.choices("abcd", k=5)) for _ in range(2)]
                    row = [str(draw.randrange(2)), *texts]
                    rows.append("\t".join(row[:2] if name == "moods" else row))
                (self.data / name / f"{file}.tsv").write_text("\n".join(rows) + "\n")
        (self.data / "pairs" / "test.tsv").rename(self.data / "pairs" / "valid.tsv")
        torch.manual_seed(1)
        self.pretrained = GPT(SHAPE)
        self.pretrained.save_pretrained(self.model, tokenizer="bytes")
        self.begun: list[tuple[FinetuneConfig, dict[str, torch.Tensor]]] = []
        self.figures: list[Figure] = []
        self.after: Callable[[FinetuneResult], FinetuneResult] = lambda result: result
        self.fitted = study.fitted

        def spied(
            network: TaskModel, parts: Any, config: Any, observer: Any, **more: Any
        ) -> FinetuneResult:
            state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
            self.begun.append((config, state))
            return self.after(self.fitted(network, parts, config, observer, **more))

        class Kept(Figure):  # type: ignore[misc]
            def __init__(figure, **options: Any) -> None:  # noqa: N805
                super().__init__(**options)
                self.figures.append(figure)

        monkeypatch.setattr(study, "fitted", spied)
        monkeypatch.setattr(plots, "figure_class", lambda: Kept)

    def untrained(self, network: TaskModel, *given: Any, **more: Any) -> FinetuneResult:
        """Stands for `fitted` where what a run finds is of no interest."""
        found = {"accuracy": 0.5, "f1": 0.25}
        return FinetuneResult(network, found, found, found, [], 0, 1.0, False, False)

    def study(self, analyse: Any, **given: Any) -> Any:
        default = {"tasks": {self.mood: QUICK}, "seeds": [1], "data": self.data}
        return analyse(self.model, self.out, **{**default, **given})

    def kept(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.out / name).read_text())["records"]
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def taken(world: World, state: dict[str, torch.Tensor]) -> list[str]:
    """Which parts of the pre-trained model a run begins with."""
    same: dict[str, bool] = {}
    for name, tensor in world.pretrained.transformer.state_dict().items():
        if tensor.dim() == 2:  # others begin with the same ones and zeros anyway
            part = name.split(".")[1] if name.startswith("h.") else name.split(".")[0]
            own = state[f"body.transformer.{name}"][: len(tensor)]
            same[part] = same.get(part, True) and torch.equal(own, tensor)
    return sorted(part for part, whole in same.items() if whole)


def unclocked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if k not in ("seconds", "cpu_seconds")}
        for record in records
    ]


# ---- which runs are made


def test_layers_take_one_more_each_time(world: World) -> None:
    found = world.study(layers, seeds=[1, 2])
    assert [record["variant"] for record in found.records] == ["none", "0", "1", "2"] * 2
    assert [config.seed for config, _ in world.begun] == [1] * 4 + [2] * 4
    parts = [taken(world, state) for _, state in world.begun]
    assert parts == [[], ["wpe", "wte"], ["0", "wpe", "wte"], ["0", "1", "wpe", "wte"]] * 2
    heads = [state["head.weight"] for _, state in world.begun]
    assert not torch.equal(heads[0], heads[4])  # of the two seeds
    assert not found.stopped
    assert found.records == world.kept("layers.json")


def test_ablations_take_one_thing_away(world: World) -> None:
    config = dataclasses.replace(QUICK, lm_coefficient=0.25, seed=99)
    found = world.study(ablations, tasks={world.mood: config, world.close: QUICK}, seeds=[7, 8])
    assert [(r["config"]["seed"], r["task"], r["variant"]) for r in found.records] == [
        (seed, task, variant) for seed in (7, 8) for task in ("mood", "close")
        for variant in VARIANTS
    ]  # fmt: skip
    for number, (config, state) in enumerate(world.begun):
        weight = 0.25 if number % 6 < 3 else 0.5
        assert config.lm_coefficient == (0 if number % 3 == 1 else weight)
        assert taken(world, state) == ([] if number % 3 == 2 else ["0", "1", "wpe", "wte"])
        assert config.seed == (7 if number < 6 else 8)


def test_a_record_is_what_finetune_finds(world: World, tmp_path: Path) -> None:
    found = world.study(ablations, tasks={world.mood: QUICK, world.close: QUICK})
    for task, folder, part in ((world.mood, "moods", "test"), (world.close, "pairs", "validation")):
        config = dataclasses.replace(QUICK, seed=1)
        alone = finetune(
            world.model, tmp_path / folder, task=task, data=world.data / folder, config=config
        )
        record = next(r for r in found.records if r["task"] == Path(task).stem)
        assert record["config"] == dataclasses.asdict(config)
        assert (record["validation"], record["test"]) == (alone.validation, alone.test)
        assert record["majority"] == alone.majority
        assert record["part"] == part
        assert record["score"] == getattr(alone, part)[record["metric"]]
        assert record["seconds"] > 0
        assert record["cpu_seconds"] > 0
    assert record["examples"] == {"training": 16, "validation": 8, "test": 0, "truncated": 0}


def test_data_and_model_are_read_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    loads = study.load
    monkeypatch.setattr(study, "load", lambda *given: read.append("model") or loads(*given))
    monkeypatch.setattr(
        parts_module,
        "read_split",
        lambda task, folder, split: read.append(split) or read_split(task, folder, split),
    )
    world.fitted = world.untrained
    world.study(ablations, seeds=[1, 2])
    assert read == ["model", "train", "test"]


def test_an_observer_sees_every_step_and_run(world: World) -> None:
    seen: list[tuple[dict[str, Any], float]] = []
    world.study(ablations, observer=lambda record, done: seen.append((record, done)))
    shares = [done for _, done in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    runs = [(record["variant"], done) for record, done in seen if "score" in record]
    assert runs == [(name, (i + 1) / 3) for i, name in enumerate(VARIANTS)]
    steps = [record for record, _ in seen if "loss" in record]
    assert {(r["task"], r["variant"], r["seed"]) for r in steps} == {
        ("mood", v, 1) for v in VARIANTS
    }


# ---- what was interrupted goes on


def test_an_interrupted_analysis_goes_on(world: World, tmp_path: Path) -> None:
    whole = world.study(ablations, seeds=[1, 2])

    def killed(result: FinetuneResult) -> FinetuneResult:
        if len(world.begun) == 2:
            raise KeyboardInterrupt
        return result

    world.out = tmp_path / "other"
    world.begun.clear()
    world.after = killed
    with pytest.raises(KeyboardInterrupt):
        world.study(ablations, seeds=[1, 2])
    assert len(world.kept("ablations.json")) == 1
    assert not (world.out / "ablations.png").exists()
    again = world.study(ablations, seeds=[1, 2])
    assert len(world.begun) == 2 + 5  # the first one is not made again
    assert unclocked(again.records) == unclocked(whole.records)
    assert again.records == world.kept("ablations.json")
    world.study(ablations, seeds=[1, 2])
    assert len(world.begun) == 7


def test_a_run_that_a_signal_stopped_is_not_kept(world: World) -> None:
    world.fitted = world.untrained
    world.after = lambda result: dataclasses.replace(result, stopped=len(world.begun) == 2)
    found = world.study(ablations)
    assert found.stopped
    assert [record["variant"] for record in found.records] == ["full"]
    assert found.records == world.kept("ablations.json")
    assert not world.figures
    assert not world.study(ablations).stopped
    assert len(world.begun) == 4


@pytest.mark.parametrize("changed", ["config", "seed", "model", "data"])
def test_a_run_of_other_settings_is_another_run(world: World, changed: str) -> None:
    world.fitted = world.untrained
    world.study(ablations)
    settings = {"tasks": {world.mood: QUICK}, "seeds": [1]}
    match changed:
        case "config":
            settings["tasks"] = {world.mood: dataclasses.replace(QUICK, learning_rate=1e-3)}
        case "seed":
            settings["seeds"] = [2]
        case "model":
            with torch.no_grad():
                world.pretrained.transformer.h[1].mlp.c_fc.bias[3] += 1e-3
            world.pretrained.save_pretrained(world.model, tokenizer="bytes")
        case _:
            file = world.data / "moods" / "test.tsv"
            file.write_text(file.read_text() + "1\tone more\n")
    found = world.study(ablations, **settings)
    assert len(world.begun) == 6
    assert len(found.records) == 3  # those that were asked for
    assert len(world.kept("ablations.json")) == 6  # the others stay


# ---- means, deviations, tables, figures


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6))
def test_the_spread_is_that_of_the_sample(scores: list[float]) -> None:
    records = [{"variant": "v", "task": "t", "score": score} for score in scores]
    spread = summarise(records)["v"]["t"]
    assert math.isclose(spread.mean, np.mean(scores), abs_tol=1e-12)
    expected = np.std(scores, ddof=1) if len(scores) > 1 else 0.0
    assert math.isclose(spread.deviation, expected, abs_tol=1e-12)


def some_records() -> list[dict[str, Any]]:
    return [
        {
            "variant": variant, "task": task, "metric": metric, "part": "test",
            "score": base + 0.1 * seed, "majority": {metric: 0.2 + 0.1 * seed},
        }
        for seed in (0, 2)
        for task, metric, base in (("mood", "accuracy", 0.5), ("close", "pearson", 0.0))
        for variant in VARIANTS
    ]  # fmt: skip


def test_the_table_has_a_row_for_each_variant_and_the_majority() -> None:
    records = some_records()
    assert markdown(summary(records), metrics_of(records)).splitlines() == [
        "| | mood accuracy (test) | close pearson (test) |",
        "| --- | ---: | ---: |",
        "| full | 0.6000 ± 0.1414 | 0.1000 ± 0.1414 |",
        "| without the auxiliary loss | 0.6000 ± 0.1414 | 0.1000 ± 0.1414 |",
        "| without pre-training | 0.6000 ± 0.1414 | 0.1000 ± 0.1414 |",
        "| majority | 0.3000 ± 0.1414 | 0.3000 ± 0.1414 |",
    ]


def assert_picture(path: Path) -> None:
    pixels = image.imread(path)
    assert pixels.shape[:2] == (540, 960)
    assert pixels[..., :3].min() < 0.2  # something is drawn


def test_the_bars_are_means_with_deviations(world: World) -> None:
    records = some_records()
    plots.draw_bars(summary(records), metrics_of(records), world.model / "bars.png")
    assert_picture(world.model / "bars.png")
    (axes,) = world.figures[0].axes
    bars = [c for c in axes.containers if hasattr(c, "patches")]
    heights = [[bar.get_height() for bar in group] for group in bars]
    assert np.allclose(heights, [[0.6, 0.1]] * 3 + [[0.3, 0.3]])
    ends = [group.errorbar.lines[2][0].get_segments()[0][:, 1] for group in bars]
    assert np.allclose(ends[0], [0.6 - 0.1 * math.sqrt(2), 0.6 + 0.1 * math.sqrt(2)])
    middles = [[bar.get_center()[0] for bar in group] for group in bars]
    assert (np.diff(middles, axis=0) > 0).all()
    assert np.allclose(np.mean(middles, axis=0), [0, 1])
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "mood\naccuracy (test)", "close\npearson (test)",
    ]  # fmt: skip


def test_layers_draw_a_line_for_each_task(world: World) -> None:
    found = world.study(layers, tasks={world.mood: QUICK, world.close: QUICK}, seeds=[1, 2])
    assert_picture(world.out / "layers.png")
    (axes,) = world.figures[0].axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["none", "0", "1", "2"]
    assert [line.get_label() for line in axes.lines] == list(metrics_of(found.records).values())
    for line, band, task in zip(axes.lines, axes.collections, ("mood", "close"), strict=True):
        scores = np.array([r["score"] for r in found.records if r["task"] == task]).reshape(2, 4)
        mean, deviation = scores.mean(0), scores.std(0, ddof=1)
        assert np.allclose(line.get_ydata(), mean)
        corners = band.get_paths()[0].vertices
        for x in range(4):
            heights = corners[corners[:, 0] == x, 1]
            assert np.isclose(heights.min(), mean[x] - deviation[x])
            assert np.isclose(heights.max(), mean[x] + deviation[x])


def test_ablations_draw_what_they_kept(world: World) -> None:
    found = world.study(ablations)
    assert_picture(world.out / "ablations.png")
    (axes,) = world.figures[0].axes
    bars = [c for c in axes.containers if hasattr(c, "patches")]
    majority = found.records[0]["majority"]["accuracy"]
    assert [bar.get_label() for bar in bars] == [*VARIANTS, "majority"]
    assert np.allclose(
        [group[0].get_height() for group in bars], [*(r["score"] for r in found.records), majority]
    )


# ---- snapshots


@pytest.fixture
def kept_run(world: World) -> Path:
    """A training run's folder with models of three steps, and what else may lie there."""
    run = world.model.with_name("run")
    for step in (100, 0, 20):
        torch.manual_seed(step)
        GPT(SHAPE).save_pretrained(run / "snapshots" / str(step), tokenizer="bytes")
    (run / "snapshots" / ".20.tmp").mkdir()
    return run


QUIET = snapshots.ZeroShotConfig(batch_size=4, device="cpu", impl="torch")


def ask(world: World, *models: Path, **given: Any) -> list[dict[str, Any]]:
    default = {"tasks": [world.mood], "data": world.data, "config": QUIET}
    return snapshots.zero_shot(models, world.out, **{**default, **given})


def test_snapshots_are_asked_step_by_step(
    world: World, kept_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def right(model: GPT, task: Any, questions: Any, *given: Any) -> list[int]:
        """Right about one more example with each call, of the last ones that are asked."""
        asked.append(model.transformer.wte.weight.detach().clone())
        wrong = len(questions) - 2 * len(asked)
        return [int(one.target) ^ (i < wrong) for i, one in enumerate(questions)]

    monkeypatch.setattr(snapshots, "guesses", right)
    seen = []
    records = ask(world, kept_run, observer=lambda record, done: seen.append((record, done)))
    assert [record["step"] for record in records] == [0, 20, 100]
    for step, weight in zip((0, 20, 100), asked, strict=True):
        torch.manual_seed(step)
        assert torch.equal(weight, GPT(SHAPE).transformer.wte.weight)
    assert [r["metrics"]["accuracy"] for r in records] == [2 / 9, 4 / 9, 6 / 9]
    assert [r["chance"] for r in records] == [0.5] * 3
    assert np.allclose([r["share"] for r in records], [-5 / 9, -1 / 9, 1 / 3])
    assert records[0]["metrics"].keys() == {"accuracy", "f1"}
    assert seen == [(record, (i + 1) / 3) for i, record in enumerate(records)]
    assert records == world.kept("zero_shot.json")
    assert_picture(world.out / "zero_shot.png")
    line, chance = world.figures[0].axes[0].lines
    assert line.get_xdata().tolist() == [0, 20, 100]
    assert np.allclose(line.get_ydata(), [r["share"] for r in records])
    assert set(chance.get_ydata()) == {0}
    assert ask(world, kept_run) == records
    assert len(asked) == 3  # nobody is asked again
    more = ask(world, kept_run, config=dataclasses.replace(QUIET, examples=4))
    assert [r["examples"] for r in more] == [4] * 3


def test_models_named_by_their_steps(world: World, kept_run: Path) -> None:
    one, other = kept_run / "snapshots" / "20", kept_run / "snapshots" / "0"
    assert [record["step"] for record in ask(world, one, other)] == [0, 20]
    assert [record["truncated"] for record in ask(world, one)] == [0]


def test_the_score_is_that_of_the_guesses(world: World, kept_run: Path) -> None:
    (record,) = ask(world, kept_run / "snapshots" / "20")
    task = load_task(world.mood)
    asked = questions(
        task, read_split(task, world.data / "moods", "test"), ByteTokenizer(), SHAPE.block_size
    )
    network = GPT.from_pretrained(kept_run / "snapshots" / "20").set_impl("torch")
    found = guesses(network, task, asked, 4, torch.float32)
    right = sum(guess == one.target for guess, one in zip(found, asked, strict=True))
    assert record["metrics"]["accuracy"] == right / 9


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"seeds": []}, ValueError, "seeds must be one or more different numbers"),
        ({"seeds": [3, 3]}, ValueError, "seeds must be one or more different numbers"),
        ({"seeds": [-1]}, ValueError, "seed is -1"),
        ({"tasks": {}}, ValueError, "tasks must be one or more of different names"),
        ({"tasks": {"moods": QUICK}}, ValueError, "task must be one of"),
        ({"tasks": {"sst-2": QUICK}}, FileNotFoundError, "sst-2 is not a folder"),
        ({"config": {"train_examples": 99}}, ValueError, "19 of the training part's 20 examples"),
        ({"config": {"lm_coefficient": 0.0}}, ValueError, "lm_coefficient is 0 for"),
        ({"config": {"transfer": "none"}}, ValueError, "transfer is none for"),
        ({"config": {"transfer": "3"}}, ValueError, "the model has 2 blocks"),
    ],
)
def test_settings_that_fit_nothing(
    world: World, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    if "config" in given:
        given = {"tasks": {world.mood: dataclasses.replace(QUICK, **given["config"])}}
    with pytest.raises(error, match=words):
        world.study(ablations, **given)
    assert not world.out.exists()
    assert not world.begun


def test_the_last_task_is_checked_before_the_first_run(world: World) -> None:
    tasks = {world.mood: QUICK, world.close: dataclasses.replace(QUICK, train_examples=17)}
    with pytest.raises(ValueError, match="16 of the training part's 16 examples"):
        world.study(layers, tasks=tasks)
    assert not world.begun


def test_two_tasks_of_one_name(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mood.toml").write_text(MOOD)
    tasks = {world.mood: QUICK, str(tmp_path / "other" / "mood.toml"): QUICK}
    with pytest.raises(ValueError, match="tasks must be one or more of different names"):
        world.study(layers, tasks=tasks)


def test_an_out_that_cannot_be_used(world: World) -> None:
    world.out.write_text("a file")
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        world.study(layers)
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        ask(world, world.model)
    world.out.unlink()
    with alone_in("out", world.out), pytest.raises(ValueError, match="is in use by"):
        world.study(layers)
    world.out.mkdir()
    for content in ("[]", '{"runs": []}', '{"records": [1]}', "{"):
        (world.out / "layers.json").write_text(content)
        with pytest.raises(ValueError, match=r"layers\.json"):
            world.study(layers)
        assert (world.out / "layers.json").read_text() == content
    assert not world.begun


def test_models_of_no_step(world: World, kept_run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"models: .* is not a folder"):
        ask(world, kept_run / "snapshots" / "7")
    with pytest.raises(ValueError, match="model has no snapshots/ and no step of its own"):
        ask(world, world.model)
    with pytest.raises(ValueError, match="20 has no snapshots/ and no step of its own"):
        ask(world, kept_run / "snapshots" / "20", kept_run / "snapshots" / "20")
    for step in ("0", "20", "100"):
        (kept_run / "snapshots" / step).rename(kept_run / f"step{step}")
    with pytest.raises(ValueError, match="there are no snapshots; train with --snapshot-interval"):
        ask(world, kept_run)
    with pytest.raises(ValueError, match=r"task close has no \[zero_shot\]"):
        ask(world, kept_run, tasks=[world.mood, world.close])
    assert not world.out.exists()


def test_records_are_found_by_all_their_settings(tmp_path: Path) -> None:
    records = Records(tmp_path / "some.json")
    records.add({"a": 1, "b": (2, 3), "score": 0.5})
    again = Records(tmp_path / "some.json")
    assert again.find({"a": 1, "b": (2, 3)}) == {"a": 1, "b": [2, 3], "score": 0.5}
    assert again.find({"a": 1, "b": (2, 4)}) is None
    assert again.find({"a": 1, "c": None}) is not None  # what is not there is nothing
