"""What a forward pass keeps for the backward pass: the budget of a block, held to the byte."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import IMPLEMENTATIONS, of
from hypothesis import given
from hypothesis import strategies as st
from models import shaken
from rich.console import Console
from torch import Tensor, nn

from gptkernels import GPT, GPTConfig, LayerNorm, layer_norm
from gptkernels.core.choice import unavailable
from gptkernels.gpt.training.activations import measured
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.progress import ProgressBar
from gptkernels.gpt.training.train import train
from gptkernels.nn import layers
from gptkernels.ops.layer_norm.norm_linear import norm_linear

B, T, C, H, F_INNER = 2, 16, 32, 2, 96
CONFIG = GPTConfig(
    61, block_size=T, n_layer=2, n_head=H, n_embd=C, n_inner=F_INNER, layer_norm_eps=1e-3
)


ON_CPU = [of(impl, device="cpu") for impl in IMPLEMENTATIONS]  # PyTorch's first


def kept(config: GPTConfig, impl: str, recompute: str, dtype: torch.dtype) -> int:
    model = GPT(config).set_impl(impl).set_recompute(recompute).to(dtype)
    tokens = torch.randint(config.vocab_size, (B, T))
    with measured(model) as activations:
        model(tokens, tokens.clone())
    return activations.bytes


def budget(dropout: float, recompute: str, dtype: torch.dtype) -> int:
    """Of one block: the pre-activation, the MLP's input, q, k and v, attention's out and lse, and
    two tensors of the residual stream, each with its mean and deviation."""
    if recompute == "block":
        return B * T * C * dtype.itemsize
    rows, fp32 = B * T, torch.float32.itemsize
    wide = (F_INNER if recompute == "none" else 0) + C + 3 * C + C + 2 * C
    seeds = 3 * 2 * torch.int64.itemsize if dropout else 0  # of attention and two residual adds
    return rows * wide * dtype.itemsize + (B * H * T + 2 * 2 * rows) * fp32 + seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_keeps_its_budget_and_no_byte_more(
    norm: str, dropout: float, recompute: str, dtype: torch.dtype
) -> None:
    config = dataclasses.replace(CONFIG, norm=norm, dropout=dropout)
    deeper = dataclasses.replace(config, n_layer=3)
    one_more = kept(deeper, "torch", recompute, dtype) - kept(config, "torch", recompute, dtype)
    wanted = budget(dropout, recompute, dtype)
    if recompute == "block" and norm == "pre":
        wanted *= 2  # its input is the branch and the stream, which its LayerNorm adds
    assert one_more == wanted


@pytest.mark.parametrize("impl", ON_CPU[1:])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_kernels_keep_no_more(norm: str, impl: str) -> None:
    config = dataclasses.replace(CONFIG, norm=norm, dropout=0.2, n_layer=1)
    deeper = dataclasses.replace(config, n_layer=2)
    one_more = kept(deeper, impl, "none", torch.float32) - kept(config, impl, "none", torch.float32)
    assert one_more <= budget(0.2, "none", torch.float32)


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_computing_the_norm_again_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, norm: str, impl: str, autocast: bool
) -> None:
    """Loss and gradients are those of a c_attn that keeps its input."""
    if autocast and (reason := unavailable(impl, "cpu", torch.bfloat16)):
        pytest.skip(reason)
    config = dataclasses.replace(CONFIG, norm=norm, dropout=0.2)
    model = shaken(GPT(config).set_impl(impl), 0.1)
    tokens = torch.randint(config.vocab_size, (1, T - 3))

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, tokens)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    ours = run()
    monkeypatch.setattr(layers, "norm_linear", lambda y, w, b, **norm: F.linear(y, w, b))
    for name, a, b in zip(
        ["loss", *(name for name, _ in model.named_parameters())], ours, run(), strict=True
    ):
        assert torch.equal(a, b), name


@given(
    rows=st.sampled_from([(), (0,), (1,), (7,), (2, 5), (2, 0, 3)]),
    width=st.integers(2, 40),  # PyTorch transposes the gradient's product for a y of one element
    outputs=st.integers(1, 40),
    bias=st.booleans(),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_norm_linear_is_linear(
    rows: tuple[int, ...],
    width: int,
    outputs: int,
    bias: bool,
    trained: tuple[bool, bool, bool],
    seed: int,
) -> None:
    """The bits of F.linear, whichever of y, w and b get gradients."""
    torch.manual_seed(seed)
    source = torch.randn(*rows, width)
    norm = {"norm_weight": torch.randn(width), "norm_bias": torch.randn(width) if bias else None}
    y = layer_norm(source, norm["norm_weight"], norm["norm_bias"], eps=0.1)
    w, b = torch.randn(outputs, width), torch.randn(outputs) if bias else None
    inputs = [x for x in (y, w, b) if x is not None]
    for x, wanted in zip(inputs, trained, strict=False):
        x.requires_grad_(wanted)
    z, plain = norm_linear(y, w, b, source=source, eps=0.1, **norm), F.linear(y, w, b)
    assert torch.equal(z, plain)
    assert z.requires_grad == plain.requires_grad
    differentiated = [x for x in inputs if x.requires_grad]
    if not differentiated:
        return
    dz = torch.randn(z.shape)
    for ours, theirs in zip(
        torch.autograd.grad(z, differentiated, dz),
        torch.autograd.grad(plain, differentiated, dz),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_norm_linear_refuses_a_second_derivative() -> None:
    """The gradient of w depends on the norm's parameters, since it is computed from y."""
    norm, linear, x = LayerNorm(8), nn.Linear(8, 4), torch.randn(3, 8)
    y, s = norm(x, prenorm=True)
    z = norm_linear(y, linear.weight, linear.bias, source=s, norm_weight=norm.weight)
    (dw,) = torch.autograd.grad(z.sum(), linear.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(dw.square().sum() + norm.weight.sum(), norm.weight)


def test_training_reports_its_activations(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 20)
    model = dataclasses.replace(CONFIG, vocab_size=256)
    config = TrainConfig(
        steps=3, batch_size=B, accumulation=2, warmup_steps=1, log_interval=1, device="cpu"
    )
    shown = io.StringIO()
    with ProgressBar(Console(file=shown)) as bar:
        result = train([text], tmp_path / "run", model=model, config=config, observer=bar)
    wanted = kept(model, config.impl, "none", torch.float32)
    first, *others = result.records
    assert "activation_bytes" not in first
    assert [record["activation_bytes"] for record in others] == [wanted] * 3
    said = f"memory    {wanted / 2**20:.1f} MiB of activations in a micro-batch\n"
    assert shown.getvalue().count(said) == 1
