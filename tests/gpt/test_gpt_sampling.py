"""From logits to tokens: each step against transformers', and the draw against its distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptkernels.core import philox
from gptkernels.gpt.generation import sampling
from gptkernels.gpt.generation.sampling import Sampler, Sampling
from gptkernels.truth.parity import K_FORWARD, compare

SEEDS = st.integers(0, 2**32)


def full(value: float, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((rows,), value, dtype=dtype)


def processed(logits: Tensor, seen: Tensor, wanted: Sampling) -> Tensor:
    """All steps of one setting, on every row."""
    R = len(logits)
    scores = sampling.penalise(logits, seen, full(wanted.repetition_penalty, R, torch.float32))
    scores = sampling.cool(scores, full(wanted.temperature, R))
    scores = sampling.keep_top_k(scores, full(wanted.top_k or 0, R, torch.int64), 99)
    scores = sampling.keep_top_p(scores, full(wanted.top_p or 1, R))
    return sampling.keep_min_p(scores, full(wanted.min_p or 0, R, torch.float32))


@settings(max_examples=50)
@given(
    rows=st.integers(1, 4),
    V=st.sampled_from([1, 2, 7, 60]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 5, 99]),
    top_p=st.sampled_from([None, 0.01, 0.5, 0.93, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.7]),
    seed=SEEDS,
)
@example(
    rows=3, V=7, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.7, seed=0
)
@example(
    rows=3, V=7, temperature=1.0, top_k=4, top_p=0.7, min_p=0.05, repetition_penalty=0.5, seed=0
)
def test_the_distribution_is_that_of_transformers(
    rows: int, V: int, seed: int, **options: Any
) -> None:
    processors = pytest.importorskip("transformers").generation.logits_process
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, V, generator=generator)
    text = torch.randint(V, (rows, 3), generator=generator)
    wanted = Sampling(**options)

    def theirs(scores: Tensor) -> Tensor:
        steps = [
            processors.RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty),
            processors.TemperatureLogitsWarper(wanted.temperature),
        ]
        if wanted.top_k is not None:
            steps.append(processors.TopKLogitsWarper(wanted.top_k))
        if wanted.top_p is not None and wanted.top_p < 1:
            steps.append(processors.TopPLogitsWarper(wanted.top_p))
        if wanted.min_p is not None:
            steps.append(processors.MinPLogitsWarper(wanted.min_p))
        for step in steps:
            scores = step(text, scores)
        return scores

    seen = torch.zeros(rows, V, dtype=torch.bool).scatter(1, text, True)
    ours = processed(logits, seen, wanted)
    baseline, truth = theirs(logits.clone()), theirs(logits.double())
    # Scores say which tokens are kept: a probability that is kept may still be 0 in fp32.
    assert torch.equal(ours > -math.inf, truth > -math.inf)
    measured = compare(ours.softmax(-1), baseline.softmax(-1), truth.softmax(-1), k=K_FORWARD)
    assert measured.passed, measured


def test_a_tie_keeps_all_of_it() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    kept = sampling.keep_top_k(scores, torch.tensor([2]), 2)
    assert (kept > -math.inf).tolist() == [[False, True, True, True]]
    kept = sampling.keep_top_p(scores, torch.tensor([0.1], dtype=torch.float64))
    assert int((kept > -math.inf).sum()) == 1


def test_a_top_p_of_one_changes_nothing() -> None:
    """Not even what is lost in the rounding of sums: a row may stand beside others that cut."""
    scores = torch.tensor([[0.0] + [-20.0] * 9 + [-60.0]])
    assert torch.equal(sampling.keep_top_p(scores, full(1.0, 1)), scores)
    kept = sampling.keep_top_p(scores.expand(2, -1), torch.tensor([1.0, 0.9], dtype=torch.float64))
    assert torch.equal(kept[0], scores[0])
    assert int((kept[1] > -math.inf).sum()) == 1


@pytest.mark.parametrize("tiny", [1e-30, 1e-40, 1e-50, 5e-324])  # normal, subnormal, 0 in fp32
def test_a_tiny_temperature_is_greedy(tiny: float) -> None:
    logits = torch.randn(3, 40)
    scores = sampling.cool(logits, full(tiny, 3))
    for u in (0.0, 0.5, 1 - 2**-53):
        assert torch.equal(sampling.draw(scores, full(u, 3)), logits.argmax(-1))


def test_draws_follow_the_distribution() -> None:
    count, V = 20_000, 30
    scores = 2 * torch.randn(1, V)
    scores[0, ::3] = -math.inf
    u = philox.uniform(torch.arange(count), torch.zeros(count).long(), torch.zeros(count).long())
    drawn = torch.bincount(sampling.draw(scores.expand(count, V), u), minlength=V)
    expected = scores[0].double().softmax(0)
    assert (drawn[::3] == 0).all()
    spread = 6 * (count * expected * (1 - expected)).sqrt() + 1  # six standard deviations
    assert ((drawn - count * expected).abs() <= spread).all()


def test_the_ends_of_the_unit_interval() -> None:
    scores = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    assert sampling.draw(scores, full(0.0, 1)).tolist() == [1]
    assert sampling.draw(scores, full(1 - 2**-53, 1)).tolist() == [3]
    even = torch.zeros(1, 60_000)
    assert sampling.draw(even, full(1 - 2**-53, 1)).tolist() == [59_999]


def test_uniform_numbers_are_their_own_streams() -> None:
    """One number for each (seed, sample, position), whatever stands beside it."""
    n = 1000
    zero, counted = torch.zeros(n).long(), torch.arange(n)
    sets = [
        philox.uniform(*given)
        for given in (
            (counted, zero, zero), (zero, counted, zero), (zero, zero, counted),
            (counted << 32, zero, zero),
        )
    ]  # fmt: skip
    for u in sets:
        assert ((u >= 0) & (u < 1)).all()
        assert abs(float(u.mean()) - 0.5) < 6 / math.sqrt(12 * n)
    everything = torch.cat([u[1:] for u in sets])
    assert len(everything.unique()) == len(everything)
    for i in (0, 1, 500):
        alone = philox.uniform(counted[i : i + 1], zero[:1], zero[:1])
        assert torch.equal(alone, sets[0][i : i + 1])
    # Random123's published vector for the zero key and counter: words 0x6627e8d5, 0xe169c58d.
    published = ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    assert float(sets[0][0]) == published


MIXED = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.7, top_k=3),
    Sampling(top_p=0.6, repetition_penalty=1.4),
    Sampling(temperature=2.0, top_k=20, top_p=0.9, min_p=0.02),
    Sampling(temperature=0, repetition_penalty=3.0),
    Sampling(min_p=0.3),
]


def test_a_row_is_chosen_by_its_own_settings() -> None:
    """Beside others, and in another slot: the same tokens and log-probabilities, bit for bit."""
    V, R = 50, len(MIXED)
    device = torch.device("cpu")
    logits = 3 * torch.randn(4, R, V)
    text = torch.randint(V, (R, 6))

    def choose(order: list[int], slots: int) -> dict[int, list[Any]]:
        sampler = Sampler(slots, V, device)
        got: dict[int, list[Any]] = {i: [] for i in order}
        for slot, i in enumerate(order):
            sampler.begin(slot, MIXED[i], 5, i, text[i].tolist())
        for step in logits:
            mine = torch.randn(slots, V)
            mine[: len(order)] = step[order]
            tokens, logprobs = sampler.choose(mine)
            for slot, i in enumerate(order):
                got[i].append((int(tokens[slot]), float(logprobs[slot])))
        return got

    together = choose(list(range(R)), R)
    assert choose(list(reversed(range(R))), R) == together
    for i in range(R):
        assert choose([i], R)[i] == together[i]
    chosen = torch.tensor([[token for token, _ in together[i]] for i in range(R)]).T[..., None]
    ours = torch.tensor([[logprob for _, logprob in together[i]] for i in range(R)]).T
    plain, truth = (x.log_softmax(-1).gather(-1, chosen)[..., 0] for x in (logits, logits.double()))
    measured = compare(ours, plain, truth, k=K_FORWARD)
    assert measured.passed, measured


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, "temperature must be finite and at least 0, got -0.5"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.5}, TypeError, r"top_k must be an int, got 2\.5"),
        ({"top_p": 0.0}, ValueError, "top_p must lie above 0 and at most at 1"),
        ({"top_p": 1.5}, ValueError, "top_p must lie above 0 and at most at 1"),
        ({"top_p": "0.9"}, TypeError, r"top_p must be a number, got '0\.9'"),
        ({"min_p": -0.1}, ValueError, r"min_p must lie in 0\.\.\.1 or be None, got -0\.1"),
        ({"min_p": math.nan}, ValueError, "min_p must lie in"),
        ({"min_p": True}, TypeError, "min_p must be a number, got True"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be positive and finite"),
        ({"repetition_penalty": None}, TypeError, "repetition_penalty must be a number, got None"),
    ],
)
def test_settings_are_checked(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Sampling(**options)
