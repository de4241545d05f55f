"""What a training step is made of: schedule, decay groups, accumulation, clipping, FLOPs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from training import SHORT, TINY

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.training import data
from gptkernels.gpt.training.config import TrainConfig, learning_rate
from gptkernels.gpt.training.learner import parameter_groups
from gptkernels.gpt.training.throughput import Speed, flops_per_token, petaflop_s_days
from gptkernels.gpt.training.train import TrainResult, resume, train
from gptkernels.truth.parity import compare
from gptkernels.truth.plain_gpt import PlainGPT


def test_schedule_warms_up_and_falls_by_half_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.2)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)  # half way down
    assert rates[35] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    # With a time limit the clock takes over where it is ahead of the steps.
    timed = dataclasses.replace(config, minutes=1.0)
    assert learning_rate(timed, 10, seconds=30.0) == pytest.approx(0.6)
    assert learning_rate(timed, 110, seconds=0.0) == pytest.approx(0.2)
    assert learning_rate(timed, 20, seconds=90.0) == pytest.approx(0.2)
    assert learning_rate(dataclasses.replace(config, warmup_steps=0), 0) == 1.0


@pytest.mark.parametrize("decay_steps", [1, 10])
def test_a_rate_that_falls_before_it_has_risen_is_refused(decay_steps: int) -> None:
    sentence = f"decay_steps is {decay_steps}, 0 or more than warmup_steps=10 is wanted"
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(warmup_steps=10, decay_steps=decay_steps)


def test_matrices_decay_biases_and_norms_do_not() -> None:
    model = GPT(TINY)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all("ln_" in names[p] or names[p].endswith("bias") for p in kept["params"])
    assert all(names[p].endswith("weight") and "ln_" not in names[p] for p in decayed["params"])
    everything = decayed["params"] + kept["params"]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


def test_weight_decay_shrinks_matrices_alone() -> None:
    model = GPT(TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_flops_per_token_counts_gpt2_as_the_formula_says() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.named("gpt2"))
    counted = 124_439_808 - 1024 * 768
    assert flops_per_token(model, 12, 768, 1024) == 6 * counted + 12 * 12 * 768 * 1024


def test_a_day_at_a_petaflop_a_second_is_a_petaflop_s_day(
    finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    """GPT-3 took 3.64e+03 of them for 300B tokens (Brown et al., 2020, table D.1), by 6 N alone."""
    assert petaflop_s_days(1e9, 86_400 * 10**6) == 1.0
    assert petaflop_s_days(6 * 174_600e6, 300 * 10**9) == pytest.approx(3.64e3, rel=1e-3)
    out, result = finished
    one = flops_per_token(result.model, TINY.n_layer, TINY.n_embd, TINY.block_size)
    for record in result.records[1:]:
        assert record["petaflop_s_days"] == one * record["tokens"] / 8.64e19
    assert result.petaflop_s_days == result.records[-1]["petaflop_s_days"]
    (tmp_path / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes())
    more = resume(tmp_path, steps=18)
    assert more.petaflop_s_days == pytest.approx(1.5 * result.petaflop_s_days)


@pytest.mark.parametrize(("peak", "mfu"), [(1e12, 0.5), (1e11, None), (None, None)])
def test_the_mfu_is_a_share_or_unknown(
    peak: float | None, mfu: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e9 FLOP a token at 500 tokens a second."""
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = Speed(1e9, peak).read(1000)
    assert found == {"tokens_per_s": 500.0, "mfu": mfu}


def test_accumulation_equals_one_big_batch(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of 4 micro-batches of 2, held to the fp64 gradients of a batch of 8."""
    model = dataclasses.replace(TINY, dropout=0.0)
    config = dataclasses.replace(
        SHORT, steps=1, batch_size=2, accumulation=4, clip=0.0, learning_rate=1e-3, warmup_steps=0
    )
    accumulated: list[Tensor] = []

    def capture(parameters: Any, limit: float) -> Tensor:
        assert limit == math.inf
        accumulated.extend(p.grad.clone() for p in parameters)
        return torch.tensor(1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", capture)
    result = train([text], tmp_path / "a", model=model, config=config)
    torch.manual_seed(config.seed)
    initial = GPT(model).state_dict()
    tokens, _ = data.split(
        data.tokenize(data.read_text([text]), ByteTokenizer()), 0.1, model.block_size
    )
    x, y = next(data.Batches(tokens, model.block_size, 8, config.seed))

    def big_batch(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        plain = PlainGPT(model).to(dtype)
        plain.load_state_dict(initial)
        loss = F.cross_entropy(plain(x).flatten(0, 1), y.flatten())
        return loss.detach(), list(torch.autograd.grad(loss, list(plain.parameters())))

    (truth_loss, truth), (baseline_loss, baseline) = map(big_batch, (torch.float64, torch.float32))
    loss = torch.tensor(result.records[1]["loss"])
    assert compare(loss, baseline_loss, truth_loss, k=2.0).passed
    for triple in zip(accumulated, baseline, truth, strict=True):
        measurement = compare(*triple, k=3.0)
        assert measurement.passed, str(measurement)


def test_clipping_bounds_the_norm_and_logs_it_unclipped(text: Path, tmp_path: Path) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *args: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item())
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        config = dataclasses.replace(SHORT, steps=2, log_interval=1, clip=0.01)
        result = train([text], tmp_path / "out", model=TINY, config=config)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert all(record["gradient_norm"] > 0.1 for record in result.records[1:])
