"""Accelerated models beside the same models untouched: logits, losses, gradients, padding and
generated tokens, by every implementation that can run here. The table in README.md is that of these
tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import BF16, FP32, ROOT, of
from torch import Tensor, nn

import gptkernels
from benchmarks.families import HEADS, LANGUAGE_MODELS, OTHERS, Size, logits
from gptkernels.truth.parity import K_FORWARD, K_GRADIENT, compare

FAMILIES = {**LANGUAGE_MODELS, **HEADS, **OTHERS}
# What runs natively here runs every family; the interpreter and the emulator take one of each kind.
NATIVE = [of(impl, device="cpu") for impl in ("torch", "cpu")]
INTERPRETED = ("GPT-2", "GPT-Neo", "GPT-BigCode", "nanoGPT")
PADDED = (*LANGUAGE_MODELS, "GPT-2, two heads", "GPT-2, answers")
SLOW = [of("triton"), of("cuda")]
SMALL = Size()
SMALLEST = Size(layers=2, heads=2, width=32, tokens=24, vocabulary=37)

every_family = pytest.mark.parametrize("family", FAMILIES)


def made(family: str, size: Size = SMALL) -> nn.Module:
    """A model whose biases are not 0, and whose norms have weights other than 1."""
    if family in LANGUAGE_MODELS or family in HEADS:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = FAMILIES[family](size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens_of(size: Size, T: int = 33) -> Tensor:
    return torch.randint(3, size.vocabulary, (2, T))


def results(model: nn.Module, tokens: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the gradients of a loss in all parameters as one vector."""
    found = logits(model(tokens, **given))
    target = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((found * target).sum(), parameters, allow_unused=True)
    known = [g.flatten() for g in gradients if g is not None]
    return found.detach(), torch.cat(known)


def assert_like(family: str, impl: str, dtype: torch.dtype, size: Size, T: int) -> None:
    model = made(family, size).train().to(dtype)
    ours, true = copy.deepcopy(model), copy.deepcopy(model).double()
    report = gptkernels.accelerate(ours, impl=impl)
    assert len({row.module for row in report.swapped}) >= 3
    tokens = tokens_of(size, T)
    # Pooled, since the largest error of a few numbers is luck.
    for name, k, result, plain, truth in zip(
        ("logits", "gradients"), (K_FORWARD, K_GRADIENT),
        results(ours, tokens), results(model, tokens), map(Tensor.double, results(true, tokens)),
        strict=True,
    ):  # fmt: skip
        measured = compare(result, plain, truth, k=k, name=name)
        assert measured.passed, measured


@every_family
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", NATIVE)
def test_results_are_those_of_the_model(family: str, impl: str, dtype: torch.dtype) -> None:
    assert_like(family, impl, dtype, SMALL, 33)


@pytest.mark.parametrize("family", INTERPRETED)
@pytest.mark.parametrize("impl", SLOW)
def test_the_kernels_for_a_gpu(family: str, impl: str) -> None:
    assert_like(family, impl, FP32, SMALLEST, 17)


@pytest.mark.parametrize("family", [*LANGUAGE_MODELS, *OTHERS])
def test_dropout_drops_as_much(family: str) -> None:
    """Logits with dropout are scattered around those without as the model's are."""
    size = Size(dropout=0.3)
    model = made(family, size).train()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    tokens = tokens_of(size).repeat(16, 1)

    def scatter(network: nn.Module) -> Tensor:
        with torch.no_grad():
            found = logits(network(tokens)).double()
            return (found - logits(network.eval()(tokens))).flatten(1).std(0).mean()

    assert scatter(ours) / scatter(model) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("family", PADDED)
@pytest.mark.parametrize("side", ["left", "right", "within"])
@pytest.mark.parametrize("impl", ["auto", *NATIVE])
def test_padding(family: str, side: str, impl: str) -> None:
    model = made(family).eval()
    ours, true = copy.deepcopy(model), copy.deepcopy(model).double()
    gptkernels.accelerate(ours, impl=impl)
    tokens = tokens_of(SMALL)
    there = torch.ones_like(tokens)
    there[0, {"left": slice(9), "right": slice(-9, None), "within": slice(5, 12)}[side]] = 0
    given = {"attention_mask": there}
    with torch.no_grad():
        # What a padding token gives is nobody's business.
        found = [logits(m(tokens, **given))[there.bool()] for m in (ours, model, true)]
    measured = compare(*found[:2], found[2].double(), k=K_FORWARD)
    assert measured.passed, measured


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@pytest.mark.parametrize("impl", ["auto", *NATIVE])
def test_greedy_tokens(family: str, impl: str) -> None:
    """Of two texts, one padded on the left; and in one chunk more after a cache."""
    model = made(family).eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl=impl)
    tokens = tokens_of(SMALL, 13)
    there = torch.ones_like(tokens)
    there[0, :4] = 0
    for given in ({"attention_mask": there}, {}):
        wanted, found = (
            m.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=2, **given)
            for m in (model, ours)
        )
        assert torch.equal(wanted, found)
    if family == "OpenAI-GPT":  # it has no cache
        return
    with torch.no_grad():
        caches = [m(tokens, use_cache=True).past_key_values for m in (model, ours)]
        more = tokens_of(SMALL, 7)
        wanted, found = (
            m(more, past_key_values=cache).logits
            for m, cache in zip((model, ours), caches, strict=True)
        )
    assert torch.allclose(wanted, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", NATIVE)
def test_classes_of_padded_texts(impl: str) -> None:
    """The head of a text is that of its last token."""
    model = made("GPT-2, classes").eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl=impl)
    tokens = tokens_of(SMALL)
    tokens[0, -9:] = 2
    labels = torch.tensor([0, 1])
    for network in (model, ours):
        network.zero_grad()
        network(tokens, attention_mask=tokens != 2, labels=labels).loss.backward()
    for (name, wanted), found in zip(model.named_parameters(), ours.parameters(), strict=True):
        if wanted.grad is not None:
            assert torch.allclose(wanted.grad, found.grad, rtol=1e-3, atol=1e-6), name


def rows() -> list[str]:
    """The table in README.md: which families the tests above run, and how."""
    native = ", ".join(f"`{parameter.values[0]}`" for parameter in NATIVE)
    columns = {
        "logits and gradients, float32, bfloat16": (FAMILIES, native),
        "padding": ((*PADDED, "GPT-2, classes"), native),
        "generate": (LANGUAGE_MODELS, native),
        "Triton, CUDA C++": (INTERPRETED, "interpreter, emulator"),
    }
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for family in FAMILIES:
        cells = (f" {how} |" if family in run else " |" for run, how in columns.values())
        lines.append(f"| {family} |{''.join(cells)}")
    return lines


def test_the_table_names_the_families_that_are_tested() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(rows()) in page
