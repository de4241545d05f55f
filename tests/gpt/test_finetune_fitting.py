"""The loop of fine-tuning: its settings, the learning rate, what moves, and which epoch is kept."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finetune_cases import GPT1, QUICK, encoded, pretrained, task, task_model
from torch import Tensor
from training import assert_same_bits

from gptkernels.gpt.finetuning import answers, fitting
from gptkernels.gpt.finetuning.batches import Encoded, collate, epoch
from gptkernels.gpt.finetuning.config import FinetuneConfig, learning_rate
from gptkernels.gpt.finetuning.fitting import Fit
from gptkernels.gpt.finetuning.parts import Parts, baseline
from gptkernels.gpt.finetuning.task_model import TaskModel, transferred
from gptkernels.gpt.training.diverged import DivergedError

SHORT = dataclasses.replace(QUICK, batch_size=8)  # three batches an epoch
TRAINING, VALIDATION = encoded("entailment", 20, 1), encoded("entailment", 8, 2)


def state_of(model: TaskModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fit_of(config: FinetuneConfig, records: list[Any] | None = None, **more: Any) -> Fit:
    model = task_model("entailment", dropout=config.head_dropout)
    observer = None if records is None else lambda record, done: records.append((record, done))
    return Fit(model, TRAINING, VALIDATION, config, more.pop("observer", observer), **more)


# Settings


def test_the_defaults_are_the_papers() -> None:
    """Section 4.1: "learning rate of 6.25e-5 and a batchsize of 32", "3 epochs", "warmup over 0.2%
    of training", "λ was set to 0.5", "a rate of 0.1", and w = 0.01 on all non bias or gain
    weights."""
    config = FinetuneConfig()
    assert (config.learning_rate, config.batch_size, config.epochs) == (6.25e-5, 32, 3)
    assert (config.lm_coefficient, config.warmup_fraction) == (0.5, 0.002)
    assert config.dropout == config.head_dropout == 0.1
    assert config.weight_decay == 0.01
    assert (config.transfer, config.freeze_body) == ("all", False)


def test_the_learning_rate_rises_and_falls_linearly() -> None:
    """Section 4.1: "a linear learning rate decay schedule with warmup over 0.2% of training"."""
    config = FinetuneConfig(learning_rate=8.0)
    rates = [learning_rate(config, step, 2000) for step in range(2000)]
    assert rates[:5] == pytest.approx([2.0, 4.0, 6.0, 8.0, 8.0])  # 0.2% are 4 steps
    assert rates[4 + 998] == pytest.approx(4.0)  # halfway between them and the end
    assert rates[-1] == pytest.approx(8.0 / 1996)
    falls = [after - before for before, after in pairwise(rates[4:])]
    assert falls == pytest.approx([-8.0 / 1996] * 1995)
    none = dataclasses.replace(config, warmup_fraction=0.0)
    assert [learning_rate(none, step, 4) for step in range(4)] == [8.0, 6.0, 4.0, 2.0]


@pytest.mark.parametrize("fraction", [0.0, 0.002, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 500])
def test_the_learning_rate_is_never_above_the_highest(fraction: float, steps: int) -> None:
    config = FinetuneConfig(learning_rate=2.0, warmup_fraction=fraction)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert max(rates) == pytest.approx(2.0)
    assert max(rates) <= 2.0
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, at least 1 is wanted"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0, more than 0 is wanted"),
        ({"learning_rate": math.nan}, "learning_rate is nan, a finite number is wanted"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction is 1\.5, at most 1 is wanted"),
        ({"lm_coefficient": -0.5}, r"lm_coefficient is -0\.5, at least 0 is wanted"),
        ({"dropout": 1.0}, r"dropout is 1\.0, less than 1 is wanted"),
        ({"head_dropout": -0.1}, r"head_dropout is -0\.1, at least 0 is wanted"),
        ({"transfer": "some"}, "transfer is 'some', all, none or a number of blocks is wanted"),
        ({"transfer": "-1"}, "transfer is '-1', all, none or a number"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0, between 0 and 1 is wanted"),
        ({"train_examples": 0}, "train_examples is 0, at least 1 is wanted"),
        ({"dtype": "float16"}, "dtype is 'float16', float32 or bfloat16 is wanted"),
        ({"seed": 2**63}, "seed is 9223372036854775808, less than"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**changes)


def test_a_setting_of_a_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError, match="transfer is 3, str is wanted"):
        FinetuneConfig(transfer=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="freeze_body is 1, bool is wanted"):
        FinetuneConfig(freeze_body=1)  # type: ignore[arg-type]


# What moves


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_frozen_body_keeps_every_bit_but_the_new_tokens_embeddings(tied: bool) -> None:
    body = transferred(pretrained(GPT1, tied=tied), "all", 0.1)
    model = TaskModel(task("entailment"), body, 0.1)
    before = state_of(model)
    config = dataclasses.replace(SHORT, epochs=2, freeze_body=True, weight_decay=0.5)
    Fit(model, TRAINING, VALIDATION, config).run()
    for name, tensor in model.state_dict().items():
        if name.startswith("head."):
            assert (tensor != before[name]).all(), name
        elif name.endswith(("wte.weight", "lm_head.weight")):
            assert torch.equal(tensor[:256], before[name][:256]), name
            assert (tensor[256:] != before[name][256:]).any(1).all(), name
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("frozen", [True, False])
def test_matrices_alone_decay_and_no_embedding_of_which_rows_are_frozen(frozen: bool) -> None:
    model = task_model("entailment")
    if frozen:
        model.freeze_body()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = (
        {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
        for group in model.parameter_groups(0.25)
    )
    assert set(decayed.values()) == {0.25}
    assert set(others.values()) == {0.0}
    if frozen:
        assert set(decayed) == {"head.weight"}
        assert set(others) == {"head.bias", "body.transformer.wte.weight"}
        return
    assert decayed.keys() | others.keys() == set(names.values())
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2}
    assert decayed.keys() == matrices


def test_every_parameter_moves_where_none_is_frozen() -> None:
    fit = fit_of(dataclasses.replace(SHORT, epochs=1))
    before = state_of(fit.model)
    fit.run()
    for name, tensor in fit.model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name


def test_steps_are_those_of_a_written_out_loop() -> None:
    """With dropout, the learning rate of each step, clipping, and decay of matrices alone."""
    config = dataclasses.replace(SHORT, epochs=1, clip=0.5, weight_decay=0.1)
    body = transferred(pretrained(GPT1), "all", 0.2).set_impl("torch")
    model = TaskModel(task("entailment"), body, 0.3)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    Fit(model, TRAINING, VALIDATION, config).run()

    torch.manual_seed(1)
    matrices = [p for p in twin.parameters() if p.dim() == 2]
    others = [p for p in twin.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        fused=True,
    )
    twin.train()
    parts = epoch(TRAINING, 8, torch.Generator().manual_seed(config.seed))
    for step, part in enumerate(parts):
        batch = collate(part, number=False)
        scores, hidden = twin(batch)
        following = hidden.flatten(0, 1)[batch.places]
        loss = F.cross_entropy(scores, batch.targets)
        (loss + 0.5 * twin.body.loss(following, batch.following)).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, 3)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(model.state_dict(), twin.state_dict())


def test_steps_follow_the_learning_rate_and_are_logged() -> None:
    records: list[Any] = []
    fit = fit_of(dataclasses.replace(SHORT, epochs=2, log_interval=2), records)
    assert fit.run() is False
    steps = [record for record, _ in records if "loss" in record]
    # Each second step, and the last one of an epoch.
    assert [record["step"] for record in steps] == [2, 3, 4, 6]
    assert [record["learning_rate"] for record in steps] == [
        learning_rate(fit.config, record["step"] - 1, 6) for record in steps
    ]
    for record in steps:
        together = record["task_loss"] + 0.5 * record["lm_loss"]
        assert record["loss"] == pytest.approx(together, rel=1e-5)
    judged = [(record["step"], record["epoch"]) for record, _ in records if "epoch" in record]
    assert judged == [(3, 1), (6, 2)]
    assert [done for _, done in records] == [record["step"] / 6 for record, _ in records]


def test_gradients_are_clipped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *given: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    one = dataclasses.replace(SHORT, epochs=1, batch_size=32)
    for clip in (0.0, 0.01):
        torch.manual_seed(0)
        fit_of(dataclasses.replace(one, clip=clip)).run()
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


# What is kept


@pytest.mark.parametrize(
    ("metrics", "best"), [([0.5, 0.9, 0.9, 0.1], 1), ([0.0, 0.0, 0.0], 0), ([0.1, 0.2, 0.3], 2)]
)
def test_the_best_epoch_is_kept_and_of_equal_ones_the_earliest(
    metrics: list[float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Tensor]] = []
    kept: list[int] = []

    def judged(model: TaskModel, *_: Any) -> dict[str, float]:
        states.append(state_of(model))
        return {"accuracy": metrics[len(states) - 1], "f1": -metrics[len(states) - 1]}

    monkeypatch.setattr(fitting, "evaluate", judged)
    config = dataclasses.replace(SHORT, epochs=len(metrics), head_dropout=0.0)
    fit = fit_of(config, on_best=lambda: kept.append(len(states) - 1))
    fit.run()
    assert kept == [i for i in range(len(metrics)) if metrics[i] > max([-1.0, *metrics[:i]])]
    assert fit.best["accuracy"] == metrics[best]
    now = fit.model.state_dict()
    same = [all(torch.equal(state[name], now[name]) for name in now) for state in states]
    assert same == [i == best for i in range(len(metrics))]
    assert not fit.model.training


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_signal_stops_after_the_step_and_the_best_model_is_kept(at: int) -> None:
    """Even in the first epoch, whose model is then kept as it is, and not judged."""
    records: list[dict[str, Any]] = []
    kept: list[int] = []
    heard: list[int] = []

    def observer(record: dict[str, Any], done: float) -> None:
        records.append(record)
        if record["step"] == at and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    config = dataclasses.replace(SHORT, epochs=9, log_interval=1)
    fit = fit_of(
        config,
        observer=observer,
        on_best=lambda: kept.append(records[-1]["step"]),
        on_signal=lambda: heard.append(records[-1]["step"]),
    )
    assert fit.run() is True
    assert records[-1]["step"] == at
    assert heard == [at]
    assert kept == [min(at, 3)]
    judged = [record["validation_accuracy"] for record in records if "epoch" in record]
    assert judged == ([fit.best["accuracy"]] if at > 3 else [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_an_epoch_whose_judging_a_signal_cuts_short_is_not_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches, in_order = [], answers.in_order

    def counted(*given: Any) -> Iterator[Any]:
        for batch in in_order(*given):
            batches.append(batch)
            if len(batches) == judged + 1:  # the first batch of the second epoch's
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    config = dataclasses.replace(SHORT, epochs=2, batch_size=2)
    judged = len(list(in_order(VALIDATION, 2)))
    monkeypatch.setattr(answers, "in_order", counted)
    records: list[Any] = []
    fit = fit_of(config, records)
    assert fit.run() is True
    assert len(batches) == judged + 1
    (epoch_1,) = (record for record, _ in records if "epoch" in record)
    assert epoch_1["validation_accuracy"] == fit.best["accuracy"]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_signal_after_the_last_step_is_remembered() -> None:
    def observer(record: dict[str, Any], done: float) -> None:
        if done == 1.0 and "epoch" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    fit = fit_of(SHORT, observer=observer)
    assert fit.run() is False
    assert fit.asked_to_stop


def test_gradients_that_are_not_finite_end_the_run_before_it_is_judged() -> None:
    fit = fit_of(dataclasses.replace(SHORT, epochs=1, batch_size=len(TRAINING)))  # one step
    fit.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match="gradient norm is"):
        fit.run()
    assert not fit.best


@pytest.mark.parametrize("transfer", ["none", "0", "1"])
def test_blocks_that_begin_at_random_are_not_frozen(transfer: str) -> None:
    with pytest.raises(ValueError, match="all, where freeze_body is set, is wanted"):
        FinetuneConfig(freeze_body=True, transfer=transfer)


@pytest.mark.parametrize("log_interval", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run(log_interval: int) -> None:
    config = dataclasses.replace(SHORT, log_interval=log_interval)
    fit = fit_of(config)
    with torch.no_grad():
        fit.model.body.transformer.wpe.weight[1] = math.inf
    with pytest.raises(DivergedError, match=r"diverged by step [13], loss is nan: try a lower"):
        fit.run()
    assert not fit.best


# Parts


def numbered(count: int, target: float = 0) -> list[Encoded]:
    return [Encoded([[i, i]], target) for i in range(count)]


def test_a_validation_part_is_held_out_where_there_is_none() -> None:
    parts = Parts(numbered(40), [], numbered(3, 1))
    drawn = parts.drawn(FinetuneConfig(validation_fraction=0.25))
    assert (len(drawn.training), len(drawn.validation)) == (30, 10)
    together = sorted(one.rows[0][0] for one in [*drawn.training, *drawn.validation])
    assert together == list(range(40))
    assert drawn.test == drawn.judged == parts.test
    assert drawn == parts.drawn(FinetuneConfig(validation_fraction=0.25))
    assert drawn != parts.drawn(FinetuneConfig(validation_fraction=0.25, seed=1))
    tiny = Parts(numbered(2), [], []).drawn(FinetuneConfig(validation_fraction=0.01))
    assert (len(tiny.training), len(tiny.validation)) == (1, 1)
    assert tiny.judged == tiny.validation


def test_a_part_of_the_training_examples_is_drawn_by_the_seed() -> None:
    parts = Parts(numbered(50), numbered(5), [])
    drawn = [
        parts.drawn(FinetuneConfig(train_examples=n, seed=seed)).training
        for n, seed in ((10, 1), (20, 1), (10, 2))
    ]
    assert [len(part) for part in drawn] == [10, 20, 10]
    assert drawn[0] == drawn[1][:10]  # more examples: the same ones, and others
    assert drawn[0] != drawn[2]
    assert parts.drawn(FinetuneConfig()).validation == parts.validation
    with pytest.raises(ValueError, match=r"50 of the training .* but train_examples is 51"):
        parts.drawn(FinetuneConfig(train_examples=51))
    with pytest.raises(ValueError, match=r"0 of the .*, 1 are held out .* one is needed"):
        Parts(numbered(1), [], []).drawn(FinetuneConfig())


def test_the_baseline_is_the_training_parts_most_frequent_answer_or_mean() -> None:
    training = [Encoded([[1, 1]], target) for target in (2, 1, 1, 0, 2, 2)]
    judged = [Encoded([[1, 1]], target) for target in (2, 0, 2, 1)]
    found = baseline(task("entailment"), Parts(training, judged, []))
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx((2 * 2 / (2 * 2 + 2)) / 3)
    numbers = baseline(task("similarity"), Parts(training, judged, []))
    assert numbers == {"pearson": 0.0, "spearman": 0.0}
