"""GPT.from_pretrained of a model in memory, and of a name that stands for nothing here."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import CONFIG, randomize, theirs
from torch import Tensor, nn

import gptkernels
from gptkernels import GPT, GPTConfig
from gptkernels.truth.plain_gpt import PlainGPT

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

TOKENS = torch.arange(48).view(2, 24)
SHAPE = {"vocab_size": 67, "n_positions": 24, "n_layer": 2, "n_head": 3, "n_embd": 24}


def bare_gpt2() -> Any:
    return theirs().transformer


def gpt1(**changes: Any) -> Any:
    config = transformers.OpenAIGPTConfig(**SHAPE, **changes)
    return randomize(transformers.OpenAIGPTLMHeadModel(config)).eval()


def bare_gpt1() -> Any:
    return gpt1().transformer


def untied_gpt2() -> Any:
    return theirs(tie_word_embeddings=False)


def untied_gpt1() -> Any:
    return gpt1(tie_word_embeddings=False)


def wrapped() -> Any:
    compiled = nn.Module()  # as torch.compile wraps, without the seconds that its import takes
    compiled._orig_mod = theirs()
    return nn.DataParallel(compiled)


def accelerated() -> Any:
    model = theirs()
    gptkernels.accelerate(model)
    return model


def assert_close(ours: Tensor, other: Tensor) -> None:
    assert (ours - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    "make", [theirs, untied_gpt2, bare_gpt2, gpt1, untied_gpt1, bare_gpt1, wrapped, accelerated]
)
def test_it_computes_what_the_model_of_transformers_does(make: Any) -> None:
    other = make()
    ours = GPT.from_pretrained(other)
    inner = other if make is not wrapped else other.module._orig_mod
    with torch.no_grad():
        found = inner(TOKENS)
        if "logits" in found:
            assert_close(ours(TOKENS), found.logits)
        else:
            assert_close(ours.hidden_states(TOKENS), found.last_hidden_state)
    assert not ours.training
    assert all(parameter.is_contiguous() for parameter in ours.parameters())
    tied = ours.lm_head.weight is ours.transformer.wte.weight
    assert tied == (make not in (untied_gpt2, untied_gpt1))


def test_its_weights_are_copies_in_their_dtype() -> None:
    # Of one column: a transposed weight is contiguous without being copied.
    other = theirs(n_embd=1, n_head=1, n_inner=1).bfloat16()
    for module in other.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    before = copy.deepcopy(other.state_dict())
    ours = GPT.from_pretrained(other)
    assert ours.lm_head.weight.dtype == torch.bfloat16
    assert ours.transformer.ln_f.weight.dtype == torch.float32
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_dropout_is_its_configs_unless_it_is_given() -> None:
    other = theirs(attn_pdrop=0.3)
    with pytest.raises(ValueError, match=r"^GPT2LMHeadModel: embd_pdrop, attn_pdrop and resid_"):
        GPT.from_pretrained(other)
    assert GPT.from_pretrained(other, dropout=0.2).config == replace(CONFIG, dropout=0.2)
    assert GPT.from_pretrained(theirs()).config.dropout == 0.1


@dataclass
class NanoConfig:
    """The fields of nanoGPT's GPTConfig."""

    block_size: int = 24
    vocab_size: int = 67
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 24
    dropout: float = 0.25
    bias: bool = True


def test_a_model_of_nanogpt() -> None:
    """Its parameters have our names; its formulas are those of PlainGPT."""
    fields = vars(NanoConfig())
    other: Any = randomize(PlainGPT(GPTConfig(**fields, approximate="none"))).eval()
    other.config = NanoConfig()
    ours = GPT.from_pretrained(other)
    assert ours.config == GPTConfig(**fields, approximate="none")
    assert_close(ours(TOKENS), other(TOKENS))
    assert GPT.from_pretrained(other, dropout=0.0).config.dropout == 0.0
    other.config.rope = True
    with pytest.raises(ValueError, match="PlainGPT: model_args hold rope, which is not known here"):
        GPT.from_pretrained(other)


def with_adapter() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        theirs(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )


def with_a_key(model: Any) -> Any:
    model.config.rope_theta = torch.float32  # which is no JSON
    return model


class Sharded(Tensor):
    pass


def of_a_class_of_its_own() -> Any:
    model = theirs()
    weight = model.transformer.ln_f.weight
    model.transformer.ln_f.weight = nn.Parameter(weight.detach().as_subclass(Sharded))
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (with_adapter, ValueError, "^PeftModel holds an adapter: merge it into its model first"),
        (lambda: with_a_key(theirs()), ValueError, "^GPT2LMHeadModel: rope_theta is not known"),
        (
            lambda: theirs(scale_attn_by_inverse_layer_idx=True),
            ValueError,
            "^GPT2LMHeadModel: scale_attn_by_inverse_layer_idx must be false, got true",
        ),
        (
            lambda: transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**SHAPE)),
            ValueError,
            r"the weights hold score\.weight, which its configuration does not ask for",
        ),
        (
            lambda: theirs().to("meta"),
            ValueError,
            r"GPT2LMHeadModel: transformer\.wte\.weight must be a dense tensor, got one without",
        ),
        (
            of_a_class_of_its_own,
            ValueError,
            r"transformer\.ln_f\.weight must be a plain tensor, got a Sharded",
        ),
        (lambda: nn.Linear(2, 2), TypeError, "which has a config, is wanted, got a Linear"),
        (lambda: GPT(CONFIG), TypeError, "is wanted, got a GPT of this package"),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        GPT.from_pretrained(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("gpt2", "hf download openai-community/gpt2 config.json model.safetensors tokenizer.json"),
        ("distilbert/distilgpt2", "hf download distilbert/distilgpt2 config.json model"),
        ("somebody/their-gpt2", "hf download somebody/their-gpt2 --local-dir their-gpt2"),
        ("run", None),
        ("here/run", None),
        ("../gpt2-tuned", None),
    ],
)
def test_a_name_of_the_hub_is_answered_with_what_downloads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str | None
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"an existing folder, got {name}") as caught:
        GPT.from_pretrained(name)
    assert (command is None) == ("hf download" not in str(caught.value))
    if command is not None:
        assert f"(nothing is downloaded here; to get it from the Hugging Face hub: {command}" in (
            str(caught.value)
        )
        assert str(caught.value).endswith(f" --local-dir {Path(name).name})")
