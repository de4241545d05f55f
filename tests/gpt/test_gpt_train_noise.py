"""The gradient noise scale, held to problems whose own is known, and what a log says of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from training import SHORT, TINY, Interrupted, interrupt_at, unclocked

from gptkernels import GPT
from gptkernels.gpt.training.learner import Learner
from gptkernels.gpt.training.noise import NoiseScale
from gptkernels.gpt.training.train import resume, train
from gptkernels.truth.plain_gpt import PlainGPT

pytest.importorskip("matplotlib", reason="needs the package matplotlib")
pytest.importorskip("safetensors", reason="needs the package safetensors")
pytestmark = pytest.mark.usefixtures("undrawn")

CPU = torch.device("cpu")


class Given:
    """Batches as they are given, for a step that nothing interrupts."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._left = iter(batches)

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self._left)

    def state_dict(self) -> dict[str, Any]:
        return {}


SMALL = dataclasses.replace(TINY, n_layer=1)
BATCHED = dataclasses.replace(SHORT, accumulation=3, log_interval=4, checkpoint_interval=3)


@given(
    trace=st.floats(1e-3, 1e3),
    square=st.floats(1e-3, 1e3),
    small=st.integers(1, 64),
    times=st.integers(2, 64),
)
def test_norms_of_the_expected_size_give_back_the_noise_scale(
    trace: float, square: float, small: int, times: int
) -> None:
    noise, large = NoiseScale(CPU), small * times
    squares = torch.tensor([square + trace / n for n in (small, large)], dtype=torch.float64)
    first, norm = squares.sqrt()
    noise.add(first, norm, small, large)
    assert noise.sums.tolist() == pytest.approx([trace, square], rel=1e-5)
    assert noise.read() == pytest.approx(trace / square, rel=1e-5)


@pytest.mark.parametrize(("small", "times"), [(1, 2), (2, 4)])
def test_a_linear_problem_has_the_noise_scale_of_its_inputs(small: int, times: int) -> None:
    """The loss w . x has the gradient x: with x drawn from N(m, diag(s^2)), the noise scale is
    sum(s^2) / |m|^2, here 112.38 / 16 = 7.02."""
    generator = torch.Generator().manual_seed(2)
    mean, deviation = torch.full((64,), -0.5), torch.linspace(0.5, 2.0, 64)
    steps, large = 3000, small * times
    x = mean + deviation * torch.randn(steps, large, 64, generator=generator)
    noise = NoiseScale(CPU)
    norms = x[:, :small].mean(1).norm(dim=1), x.mean(1).norm(dim=1)
    for pair in zip(*norms, strict=True):
        noise.add(*pair, small, large)
    assert deviation.square().sum() == pytest.approx(112.38, rel=1e-4)
    assert noise.read() == pytest.approx(112.38 / 16, rel=0.04)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gpt_has_the_noise_scale_of_its_windows_gradients(dtype: str) -> None:
    """Each of n windows once as the first micro-batch: the sums over these steps are then exactly
    n times the sample variance of the windows' gradients and what it leaves of their mean's square.
    """
    windows = 5
    shape = dataclasses.replace(SMALL, dropout=0.0)
    torch.manual_seed(7)
    model = GPT(shape)
    drawn = torch.randint(256, (windows, shape.block_size + 1))
    truth = PlainGPT(shape).double()
    truth.load_state_dict(model.state_dict())

    def gradient(ids: Tensor) -> Tensor:
        loss = F.cross_entropy(truth(ids[None, :-1]).flatten(0, 1), ids[1:])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*truth.parameters()])])

    gradients = torch.stack([gradient(ids) for ids in drawn])
    trace = gradients.var(0).sum()
    square = gradients.mean(0).square().sum() - trace / windows

    config = dataclasses.replace(SHORT, batch_size=1, accumulation=windows, dtype=dtype)
    learner = Learner(model, config, CPU, drawn.flatten(), drawn.flatten())
    rolled = [drawn.roll(-i, 0)[j : j + 1] for i in range(windows) for j in range(windows)]
    learner.batches = Given((ids[:, :-1], ids[:, 1:]) for ids in rolled)  # type: ignore[assignment]
    for _ in range(windows):
        learner.step(0.0, windows)
    rel = 1e-4 if dtype == "float32" else 1e-2
    assert learner.noise.sums.tolist() == pytest.approx(
        [windows * trace.item(), windows * square.item()], rel=rel
    )
    assert learner.noise.read() == pytest.approx((trace / square).item(), rel=2 * rel)


def test_a_step_that_was_skipped_is_left_out() -> None:
    noise = NoiseScale(CPU)
    good = torch.tensor(3.0), torch.tensor(2.0)
    noise.add(*good, 1, 4)
    before = noise.sums.clone()
    for norms in ((good[0], torch.tensor(math.inf)), (torch.tensor(math.nan), good[1])):
        noise.add(*norms, 1, 4)
    assert torch.equal(noise.sums, before)
    noise.restart()
    assert noise.read() is None
    noise.add(torch.tensor(3.0), torch.tensor(1.0), 1, 4)  # |G|^2 = (4 - 9) / 3
    assert noise.read() is None


def test_a_step_reads_no_value_of_a_tensor() -> None:
    """A GPU would be waited for; a meta tensor has none to read."""
    noise = NoiseScale(torch.device("meta"))
    noise.add(torch.zeros((), device="meta"), torch.zeros((), device="meta"), 1, 4)
    with pytest.raises(NotImplementedError):
        noise.read()


def test_a_log_has_the_noise_scale_of_its_steps_in_tokens(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    add = NoiseScale.add

    def spy(self: NoiseScale, first: Tensor, norm: Tensor, small: int, large: int) -> None:
        assert (small, large) == (4, 12)
        seen.append((first.item() ** 2, norm.item() ** 2))
        add(self, first, norm, small, large)

    monkeypatch.setattr(NoiseScale, "add", spy)
    records = train([text], tmp_path / "run", model=SMALL, config=BATCHED).records
    assert len(seen) == 12
    for i, record in enumerate(records[1:]):
        steps = seen[4 * i : 4 * i + 4]
        trace = sum((a - b) / (1 / 4 - 1 / 12) for a, b in steps)
        square = sum((12 * b - 4 * a) / 8 for a, b in steps)
        assert record["noise_scale"] == pytest.approx(16 * trace / square)
        assert record["gradient_norm"] == pytest.approx(math.sqrt(steps[-1][1]))


def test_a_resumed_log_has_the_same_and_steps_of_one_micro_batch_have_none(
    text: Path, tmp_path: Path
) -> None:
    whole = train([text], tmp_path / "whole", model=SMALL, config=BATCHED)
    assert all(record["noise_scale"] is not None for record in whole.records[1:])
    with pytest.raises(Interrupted):  # after the checkpoint of step 6, two steps past a line
        train([text], tmp_path / "part", model=SMALL, config=BATCHED, observer=interrupt_at(8))
    assert unclocked(resume(tmp_path / "part").records) == unclocked(whole.records)
    single = dataclasses.replace(BATCHED, accumulation=1, steps=4)
    records = train([text], tmp_path / "single", model=SMALL, config=single).records
    assert all(record["noise_scale"] is None for record in records[1:])
    line = (tmp_path / "single" / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["noise_scale"] is None


def test_the_losss_scale_and_skipped_steps_change_no_noise_scale(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scale so large that the first steps are skipped, and with one that is not."""
    config = dataclasses.replace(
        BATCHED, dtype="float16", learning_rate=1e-30, steps=8, log_interval=8, batch_size=2
    )
    found = []
    for name, scale in (("large", 2.0**24), ("small", 2.0**10)):
        scaler = partial(torch.amp.GradScaler, init_scale=scale)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        shape = dataclasses.replace(SMALL, dropout=0.0)
        found.append(train([text], tmp_path / name, model=shape, config=config).records[-1])
        monkeypatch.undo()
    assert found[0]["skipped_steps"] > 0
    assert found[1]["skipped_steps"] == 0
    assert found[0]["noise_scale"] == pytest.approx(found[1]["noise_scale"], rel=0.8)


def test_a_checkpoint_of_before_there_were_noise_scales_resumes(text: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(BATCHED, steps=2)
    train([text], tmp_path / "run", model=SMALL, config=config)
    path = tmp_path / "run" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    del content["since_log"]["noise"]
    torch.save(content, path)
    assert resume(tmp_path / "run", steps=4).records[-1]["noise_scale"] is not None
