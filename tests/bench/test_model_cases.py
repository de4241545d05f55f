"""The cases of whole models: who takes part, that all compute the same, and what is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gptkernels.bench.case import BASELINE, Call, Case
from gptkernels.bench.cases import gpt, gpt_first_token, gpt_generate, gpt_training
from gptkernels.bench.peers import packages
from gptkernels.core.choice import IMPLEMENTATIONS, automatic
from gptkernels.gpt.config import GPTConfig

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
MODULES = [gpt_training, gpt_generate, gpt_first_token]
TINY = gpt.Model("tiny", GPTConfig(vocab_size=61, block_size=32, n_layer=1, n_head=2, n_embd=32))

every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)


def case_of(module: Any, shape: Any = None, dtype: torch.dtype = FP32, device: Any = CPU) -> Case:
    """The only case of a shape, by default of the small one."""
    (case,) = module.cases(shape or module.shapes("cpu", "quick")[0], dtype, device, ["torch"])
    return case


def made(case: Case) -> dict[str, Callable[[], Call]]:
    return {BASELINE: case.plain, **case.ours, **case.peers}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("uncompiled")
def test_every_step_gives_the_loss_and_the_gradients(device: torch.device) -> None:
    pytest.importorskip("transformers")
    before = torch.get_rng_state()
    case = case_of(gpt_training, device=device)
    assert case.check is not None
    makers = made(case)
    assert list(makers) == [
        "pytorch", "auto", "torch", "torch.compile of ours", "nanoGPT-shaped, torch.compile",
        "transformers", "transformers, torch.compile",
    ]  # fmt: skip
    for name, make in makers.items():
        error, limit = case.check(make()())
        assert error <= limit, f"{name}: {error:.1e} is beyond {limit:.1e}"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_wrong_loss_or_gradient_is_found() -> None:
    case = case_of(gpt_training, dtype=BF16)
    assert case.check is not None
    loss, gradients = case.ours["auto"]()()
    error, limit = case.check((loss, gradients))
    assert error <= limit
    error, limit = case.check((1.1 * loss, gradients))
    assert error > limit
    error, limit = case.check((loss, [*gradients[:-1], gradients[-1] + 0.1]))
    assert error > limit


def test_a_compiled_step_gives_the_same() -> None:
    case = case_of(gpt_training, gpt_training.Shape(TINY, 2, 32))
    loss, gradients = case.plain()()
    compiled_loss, compiled = case.ours[gpt_training.COMPILED]()()
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(list(compiled), list(gradients), atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("module", "compiled"),
    [
        (gpt_generate, ["transformers", "transformers, static cache, torch.compile"]),
        (
            gpt_first_token,
            ["nanoGPT-shaped, torch.compile", "transformers", "transformers, torch.compile"],
        ),
    ],
)
def test_all_choose_the_same_tokens(module: Any, compiled: list[str], device: torch.device) -> None:
    pytest.importorskip("transformers")
    before = torch.get_rng_state()
    shape = module.shapes("cpu", "quick")[0]
    case = case_of(module, device=device)
    makers = made(case)
    assert list(makers) == ["pytorch", "auto", "torch", *compiled]
    found: dict[str, Tensor] = {name: make()() for name, make in makers.items()}
    expected = found.pop(BASELINE)
    assert expected.shape == (1, shape.prompt + shape.new)
    for name, tokens in found.items():
        assert torch.equal(tokens, expected), name
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("uncompiled")
def test_several_texts_are_continued_alike() -> None:
    case = case_of(gpt_generate, gpt_generate.Shape(TINY, 8, 8, 12))
    expected, *others = (make()() for make in made(case).values())
    assert expected.shape == (8, 20)
    assert all(torch.equal(tokens, expected) for tokens in others)
    assert len(expected[:, 8:].unique()) > 4  # or a model that repeats itself would do


def test_many_texts_have_no_baseline_on_a_cpu() -> None:
    case = case_of(gpt_generate, gpt_generate.Shape(TINY, 64, 8, 2))
    with pytest.raises(NotImplementedError, match="takes a CPU too long for 64 of them"):
        case.plain()
    assert case.ours["auto"]()().shape == (64, 10)


def test_a_step_counts_the_operations_of_its_tokens() -> None:
    weights = 124_439_808 - 1024 * 768  # but of the position table
    case = case_of(gpt_training, gpt_training.shapes("cuda", "default")[0], BF16)
    assert case.flops == (6 * weights + 6 * 12 * 768 * 1024) * 8 * 1024
    assert case.tokens == 8 * 1024
    assert case.sizes == {"layers": 12, "C": 768, "T": 1024, "B": 8}
    assert (case.shape, case.series) == ("GPT-2 124M B8 T1024", "GPT-2 124M")


def test_generation_counts_what_any_implementation_must_do() -> None:
    weights, head = 124_439_808 - 1024 * 768, 50257 * 768
    case = case_of(gpt_generate, gpt_generate.Shape(gpt.GPT2_124M, 8, 32, 3), BF16)
    # The second token sees 32 cached ones, the third 33.
    assert case.bytes_moved == 2 * (3 * weights + 8 * 2 * 12 * 768 * (32 + 33))
    pairs = sum(range(1, 35))
    products = 2 * (weights - head) * 34 + 2 * head * 3
    assert case.flops == 8 * (products + 4 * 12 * 768 * pairs)
    assert case.tokens == 8 * 3
    assert case.sizes == {"layers": 12, "C": 768, "B": 8, "prompt": 32, "new": 3}


def test_a_first_token_counts_its_prompt() -> None:
    weights, head = 124_439_808 - 1024 * 768, 50257 * 768
    case = case_of(gpt_first_token, gpt_first_token.shapes("cuda", "quick")[0], BF16)
    assert case.bytes_moved == 2 * weights
    pairs = 512 * 513 // 2
    assert case.flops == 2 * (weights - head) * 512 + 2 * head + 4 * 12 * 768 * pairs
    assert case.tokens == 512


@every_module
def test_every_peer_can_be_named(module: Any) -> None:
    assert case_of(module).peers.keys() <= set(packages.names())


@every_module
def test_transformers_is_left_out_where_it_is_not_installed(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda name: False)
    assert not [name for name in case_of(module).peers if name.startswith("transformers")]


@every_module
def test_broken_transformers_say_so_when_their_turn_comes(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "transformers.py").write_text("raise AttributeError('no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    packages._attempt.cache_clear()
    peers = case_of(module).peers
    theirs = [name for name in peers if name.startswith("transformers")]
    assert len(theirs) == 2
    for name in theirs:
        with pytest.raises(ImportError, match="does not import: AttributeError: no such symbol"):
            peers[name]()
    packages._attempt.cache_clear()


@every_module
def test_an_implementation_that_cannot_run_is_skipped(module: Any) -> None:
    shape = module.shapes("cpu", "quick")[0]
    (case,) = module.cases(shape, FP32, CPU, IMPLEMENTATIONS)
    assert {"triton", "cuda"} <= case.skipped.keys()
    assert not case.skipped.keys() & case.ours.keys()
    assert "auto" in case.ours
    assert automatic("cpu") not in case.ours  # it would be the same again


@pytest.mark.parametrize(
    ("module", "device_type", "level", "expected"),
    [
        (gpt_training, "cuda", "quick", ["GPT-2 124M B8 T1024"]),
        (gpt_training, "cuda", "default", ["GPT-2 124M B8 T1024"]),
        (
            gpt_training, "cuda", "full",
            ["GPT-2 124M B8 T1024", "GPT-2 350M B8 T1024", "GPT-2 774M B8 T1024"],
        ),
        (gpt_training, "cpu", "quick", ["GPT 4M B4 T256"]),
        (gpt_training, "cpu", "default", ["GPT-2 124M B1 T1024", "GPT 7M B4 T256"]),
        (
            gpt_training, "cpu", "full",
            ["GPT-2 124M B1 T1024", "GPT 7M B4 T256"],
        ),
        (gpt_generate, "cuda", "quick", ["GPT-2 124M B1 prompt 128 new 64"]),
        (gpt_generate, "cpu", "quick", ["GPT 4M B1 prompt 32 new 16"]),
        (
            gpt_generate, "cpu", "full",
            [f"GPT-2 124M B{batch} prompt 32 new 16" for batch in (1, 8, 64)],
        ),
        (gpt_first_token, "cpu", "quick", ["GPT 4M B1 prompt 128 new 1"]),
        (
            gpt_first_token, "cuda", "default",
            ["GPT-2 124M B1 prompt 512 new 1", "GPT-2 124M B1 prompt 1000 new 1"],
        ),
    ],
)  # fmt: skip
def test_shapes(module: Any, device_type: str, level: str, expected: list[str]) -> None:
    assert [str(shape) for shape in module.shapes(device_type, level)] == expected


@every_module
def test_dtypes(module: Any) -> None:
    assert list(module.dtypes("cuda", "full")) == [BF16]
    assert list(module.dtypes("cpu", "quick")) == [BF16]
    assert list(module.dtypes("cpu", "default")) == [BF16, FP32]
