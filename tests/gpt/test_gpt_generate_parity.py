"""Generation beside transformers' `generate`, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import shaken

from gptkernels import GPT
from gptkernels.gpt.generation import beam
from gptkernels.gpt.generation.engine import Request
from gptkernels.gpt.generation.generate import stream
from gptkernels.gpt.generation.sampling import Sampling
from gptkernels.truth.parity import K_FORWARD, compare

pytest.importorskip("safetensors", reason="needs the package safetensors")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")

SHAPE = {"vocab_size": 67, "n_positions": 40, "n_layer": 2, "n_head": 3, "n_embd": 24}
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [1], [60, 2, 60], list(range(20)), [66] * 5]


@pytest.fixture(scope="module", params=["gpt2", "openai-gpt"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model of transformers', and ours of the folder that it wrote, with the same
    operators."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(**SHAPE, bos_token_id=None, eos_token_id=None)
        theirs = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.OpenAIGPTConfig(**SHAPE)
        theirs = transformers.OpenAIGPTLMHeadModel(config)
    folder: Path = tmp_path_factory.mktemp(request.param)
    shaken(theirs, 0.3).save_pretrained(folder)
    return GPT.from_pretrained(folder).set_impl("torch"), theirs.eval()


def by_transformers(theirs: Any, prompt: list[int], new: int, **options: Any) -> Any:
    return theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=new,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_with_and_without_a_penalty(models: Any, penalty: float) -> None:
    """Prompts of different lengths at once, and the log-probabilities with them."""
    ours, theirs = models
    wanted = Sampling(temperature=0, repetition_penalty=penalty)
    got: dict[int, list[Any]] = {}
    for event in stream(ours, [Request(prompt, 18, wanted) for prompt in PROMPTS]):
        got.setdefault(event.request, []).append(event)
    for i, prompt in enumerate(PROMPTS):
        result = by_transformers(theirs, prompt, 18, do_sample=False, repetition_penalty=penalty)
        tokens = torch.tensor([event.token for event in got[i]])
        assert tokens.tolist() == result.sequences[0, len(prompt) :].tolist()
        logprobs = torch.tensor([event.logprob for event in got[i]])
        text = torch.cat([torch.tensor(prompt), tokens])[None, :-1]
        with torch.no_grad():
            truth = theirs.double()(text).logits[0, len(prompt) - 1 :].log_softmax(-1)
            theirs.float()
        at = (torch.arange(18), tokens)
        plain = torch.cat(result.logits).log_softmax(-1)
        measured = compare(logprobs, plain[at], truth[at], k=K_FORWARD)
        assert measured.passed, measured


def test_processors_that_leave_one_token(models: Any) -> None:
    """Sampled by transformers, and so beside all of its processors; yet nothing is left to
    chance."""
    ours, theirs = models
    for options in (
        {"top_k": 1, "temperature": 2.0, "repetition_penalty": 1.5},
        {"top_p": 1e-6, "top_k": 9, "min_p": 0.2},
        {"min_p": 1.0, "temperature": 3.0},
    ):
        everything = {"top_k": 0, **options}
        for prompt in PROMPTS[:3]:
            result = by_transformers(theirs, prompt, 8, do_sample=True, **everything)
            mine = ours.generate(torch.tensor([prompt]), 8, seed=1, **options)
            assert torch.equal(mine, result.sequences)


def test_eos_ends_a_text_where_theirs_ends(models: Any) -> None:
    ours, theirs = models
    free = ours.generate(torch.tensor([PROMPTS[0]]), 12, temperature=0)[0].tolist()
    eos = free[len(PROMPTS[0]) + 4]
    result = by_transformers(theirs, PROMPTS[0], 12, do_sample=False, eos_token_id=eos)
    mine = ours.generate(torch.tensor([PROMPTS[0]]), 12, temperature=0, eos=eos)
    assert torch.equal(mine, result.sequences)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
def test_beams(models: Any, width: int, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the penalty that transformers has."""
    ours, theirs = models
    monkeypatch.setattr(beam, "_penalty", lambda length, alpha: length**alpha)
    options = {"num_beams": width, "length_penalty": alpha, "early_stopping": "never"}
    for prompt in PROMPTS[:3]:
        greedy = beam.beam_search(ours, prompt, 3, width=1, alpha=0.0).tokens
        for eos in greedy[1:]:
            found = beam.beam_search(ours, prompt, 6, width=width, alpha=alpha, eos=eos).tokens
            wanted = (
                by_transformers(theirs, prompt, 6, do_sample=False, eos_token_id=eos, **options)
                .sequences[0, len(prompt) :]
                .tolist()
            )
            assert [*found, *[0] * (len(wanted) - len(found))] == wanted
