"""GPT-3's recipes: the paper's numbers, and steps that come to its tokens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptkernels.gpt.training import config as settings
from gptkernels.gpt.training.config import TrainConfig, learning_rate, micro_batches
from gptkernels.gpt.training.recipes import GPT3, recipe_config

# Brown et al., 2020, table 2.1: tokens in a step, learning rate.
TABLE = {
    "gpt3-125M": (0.5e6, 6.0e-4),
    "gpt3-350M": (0.5e6, 3.0e-4),
    "gpt3-760M": (0.5e6, 2.5e-4),
    "gpt3-1.3B": (1e6, 2.0e-4),
    "gpt3-2.7B": (1e6, 1.6e-4),
    "gpt3-6.7B": (2e6, 1.2e-4),
    "gpt3-13B": (2e6, 1.0e-4),
    "gpt3-175B": (3.2e6, 0.6e-4),
}


def trained_on(config: TrainConfig, tokens: int) -> list[int]:
    """The tokens after each step of `config`, of `tokens` in a micro-batch."""
    counts = range(config.steps)
    steps = itertools.accumulate(
        counts, lambda seen, _: seen + tokens * micro_batches(config, seen), initial=0
    )
    return list(steps)


def test_there_is_a_recipe_for_each_model_of_the_table() -> None:
    assert list(GPT3) == list(TABLE)
    ramps = [recipe.ramp_tokens for recipe in GPT3.values()]
    assert ramps == sorted(ramps)
    assert (ramps[0], ramps[-1]) == (4 * 10**9, 12 * 10**9)  # "between 4-12 billion tokens"


@pytest.mark.parametrize("name", ["gpt3-125M", "gpt3-6.7B", "gpt3-175B"])
def test_a_recipe_comes_to_the_papers_tokens(name: str) -> None:
    config = recipe_config(name, 2048)
    batch_tokens, rate = TABLE[name]
    micro = config.batch_size * 2048
    seen = trained_on(config, micro)
    whole = micro * config.accumulation
    assert whole == pytest.approx(batch_tokens, rel=0.05)
    assert seen[1] == 2**15
    assert seen[-1] - seen[-2] == whole
    for steps, tokens in (
        (config.warmup_steps, 375e6),
        (config.decay_steps, 260e9),
        (config.steps, 300e9),
    ):
        assert seen[steps - 1] < tokens <= seen[steps]
    assert learning_rate(config, config.warmup_steps - 1) == pytest.approx(rate)
    assert learning_rate(config, config.warmup_steps) == pytest.approx(rate)
    for step in (config.decay_steps, config.steps - 1):
        assert learning_rate(config, step) == pytest.approx(rate / 10)
    half = (config.warmup_steps + config.decay_steps) // 2
    assert learning_rate(config, half) == pytest.approx(0.55 * rate, rel=1e-3)
    assert (config.beta1, config.beta2, config.clip, config.weight_decay) == (0.9, 0.95, 1.0, 0.1)


@given(
    name=st.sampled_from(list(TABLE)),
    batch_size=st.integers(1, 2000),
    block_size=st.sampled_from([128, 1024, 2048]),
)
def test_micro_batches_of_any_size_make_the_papers_steps(
    name: str, batch_size: int, block_size: int
) -> None:
    config = recipe_config(name, block_size, batch_size=batch_size)
    micro = batch_size * block_size
    wanted = GPT3[name].batch_tokens
    assert wanted == pytest.approx(TABLE[name][0], rel=0.05)
    assert abs(micro * config.accumulation - wanted) <= max(micro / 2, micro - wanted)
    assert config.ramp_start <= config.accumulation
    assert abs(micro * config.ramp_start - 2**15) <= max(micro / 2, micro - 2**15)


def test_settings_that_are_given_win() -> None:
    paper = recipe_config("gpt3-13B", 2048)
    short = recipe_config("gpt3-13B", 2048, steps=1000, minutes=5.0)
    assert (short.steps, short.minutes) == (1000, 5.0)
    assert (short.decay_steps, short.warmup_steps) == (paper.decay_steps, paper.warmup_steps)
    micro = 16 * 2048
    own = dict(accumulation=3, ramp_start=2, ramp_tokens=10 * micro, warmup_steps=7, decay_steps=8)
    config = recipe_config("gpt3-13B", 2048, **own, beta2=0.5)
    assert {name: getattr(config, name) for name in own} == own
    assert config.beta2 == 0.5
    assert config.steps == 5 + -(-(300 * 10**9 - 10 * micro) // (3 * micro))
    assert recipe_config("gpt3-13B", 2048, learning_rate=1e-3).rates == (1e-3, 1e-4)


def test_a_recipe_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe must be one of gpt3-125M, .*, got 'gpt2'"):
        recipe_config("gpt2", 1024)
    with pytest.raises(ValueError, match="ramp_start is 99, at most accumulation=16 is wanted"):
        recipe_config("gpt3-125M", 2048, ramp_start=99)


@pytest.mark.parametrize(
    "settings",
    [{"ramp_tokens": 0, "batch_size": 4}, {"accumulation": 1}, {"batch_size": 512}],
    ids=str,
)
def test_steps_that_cannot_grow_have_no_ramp(settings: dict[str, int]) -> None:
    config = recipe_config("gpt3-125M", 2048, **settings)
    assert (config.ramp_tokens, config.ramp_start) == (0, 1)
    step = config.accumulation * config.batch_size * 2048
    assert config.steps == -(-300 * 10**9 // step)


def test_steps_of_one_size_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Billions of them, of a token or two."""
    calls = 0

    def counted(config: TrainConfig, tokens: int) -> int:
        nonlocal calls
        calls += 1
        assert calls < 10
        return micro_batches(config, tokens)

    monkeypatch.setattr(settings, "micro_batches", counted)
    config = recipe_config("gpt3-125M", 1, batch_size=1, accumulation=2, ramp_start=1)
    assert config.steps == 4 * 10**9 + 148 * 10**9
    assert config.warmup_steps == 375 * 10**6
