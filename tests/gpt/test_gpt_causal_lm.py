"""GPTForCausalLM beside transformers' own GPT-2 of the same weights: forward, generate, Trainer,
pipelines, saving and loading."""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import CONFIG, theirs
from models import shaken
from torch import Tensor
from torch.nn.functional import cross_entropy

import gptkernels
from gptkernels import GPT, GPTConfig

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
from gptkernels.gpt.causal_lm import GPTForCausalLM, GPTKernelsConfig  # noqa: E402

TOKENS = torch.arange(18).view(2, 9) * 3 % 67
PADDED = torch.ones_like(TOKENS)
PADDED[1, 6:] = 0  # on the right
NONE = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def made() -> tuple[Any, GPTForCausalLM]:
    other = theirs(**NONE)
    return other, GPTForCausalLM(GPT.from_pretrained(other))


@pytest.fixture
def other(made: tuple[Any, GPTForCausalLM]) -> Any:
    return copy.deepcopy(made[0])


@pytest.fixture
def ours(made: tuple[Any, GPTForCausalLM]) -> GPTForCausalLM:
    return copy.deepcopy(made[1])


def assert_close(ours: Tensor, other: Tensor) -> None:
    assert (ours - other).abs().max() <= 1e-5 * other.abs().max()


def test_its_name_is_public() -> None:
    assert gptkernels.GPTForCausalLM is GPTForCausalLM
    assert "GPTForCausalLM" in dir(gptkernels)
    assert "GPTForCausalLM" not in gptkernels.__all__


def test_without_transformers_it_says_so_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gptkernels.gpt.causal_lm")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs the package 'transformers' \(4"):
        importlib.import_module("gptkernels.gpt.causal_lm")


# forward


@pytest.mark.parametrize("items", [None, 5])
def test_logits_losses_and_gradients_are_transformers(
    ours: GPTForCausalLM, other: Any, items: int | None
) -> None:
    """Padded on the right, labels shifted and ignored, and summed for gradient accumulation."""
    labels = TOKENS.masked_fill(PADDED == 0, -100)
    given = {"attention_mask": PADDED, "labels": labels, "num_items_in_batch": items}
    y, z = ours(TOKENS, **given), other(TOKENS, **given)
    assert_close(y.logits[PADDED.bool()], z.logits[PADDED.bool()])
    assert_close(y.loss, z.loss)
    for output in (y, z):
        output.loss.backward()
    assert_close(ours.model.transformer.wte.weight.grad, other.transformer.wte.weight.grad)


def test_a_sum_of_no_labels_is_zero(ours: GPTForCausalLM) -> None:
    labels = torch.full_like(TOKENS, -100)
    assert ours(TOKENS, labels=labels, num_items_in_batch=3).loss.item() == 0


def test_what_forward_returns(ours: GPTForCausalLM) -> None:
    every = ours(TOKENS).logits
    as_tuple = ours(TOKENS, return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], every)
    assert_close(ours(TOKENS, logits_to_keep=2).logits, every[:, -2:])
    assert_close(ours(TOKENS, logits_to_keep=torch.tensor([3])).logits, every[:, 3:4])
    assert ours.train()(TOKENS, labels=TOKENS).logits is None
    assert ours(TOKENS).logits is not None


@pytest.mark.parametrize(
    "name",
    ["position_ids", "past_key_values", "inputs_embeds", "token_type_ids", "output_attentions"],
)
def test_what_forward_does_not_have_is_refused_by_name(ours: GPTForCausalLM, name: str) -> None:
    assert ours(TOKENS, **{name: None}).logits is not None
    with pytest.raises(NotImplementedError, match=f"forward has no {name}"):
        ours(TOKENS, **{name: TOKENS})
    with pytest.raises(NotImplementedError, match="forward has no use_cache"):
        ours(TOKENS, use_cache=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": PADDED.flip(1)}, "padding must be on the right of each row"),
        ({"attention_mask": PADDED[:, 1:]}, r"attention_mask must have the shape of input_ids, \("),
        (
            {"attention_mask": PADDED, "labels": TOKENS},
            "labels must be -100 behind tokens that attention_mask hides",
        ),
        ({"labels": TOKENS[:, 1:]}, r"labels must have the shape of input_ids, \(2, 9\), got"),
    ],
)
def test_what_would_not_be_right_is_refused(
    ours: GPTForCausalLM, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours(TOKENS, **given)


# generate


@pytest.mark.parametrize(
    "how",
    [
        {"max_new_tokens": 9},
        {"max_length": 14},
        {"max_new_tokens": 9, "repetition_penalty": 1.3},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=4, num_beams=1)},
        {"max_new_tokens": 4, "num_beams": 1, "use_cache": False, "stopping_criteria": None},
    ],
    ids=["new", "length", "penalty", "config", "neutral"],
)
def test_greedy_tokens_are_transformers(
    ours: GPTForCausalLM, other: Any, how: dict[str, Any]
) -> None:
    """Padded on the left."""
    given = {"attention_mask": PADDED.flip(1), **how}
    other.generation_config.pad_token_id = ours.generation_config.pad_token_id = 0
    found = ours.generate(input_ids=TOKENS, **given)
    assert torch.equal(found, other.generate(TOKENS, **given))


def test_a_padded_row_gives_what_it_gives_alone_past_the_context(ours: GPTForCausalLM) -> None:
    found = ours.generate(TOKENS, attention_mask=PADDED.flip(1), max_new_tokens=30)
    assert torch.equal(found[1:, 3:], ours.generate(TOKENS[1:, 3:], max_new_tokens=30))


def test_rows_end_and_are_filled_up_as_transformers_does(ours: GPTForCausalLM, other: Any) -> None:
    end = int(other.generate(TOKENS, max_new_tokens=3, do_sample=False)[0, -1])
    given = {"max_new_tokens": 9, "eos_token_id": end, "pad_token_id": 1}
    given["attention_mask"] = torch.ones_like(TOKENS)
    wanted = other.generate(TOKENS, **given)
    assert (wanted == 1).any()
    assert torch.equal(ours.generate(TOKENS, **given), wanted)
    ours.generation_config.eos_token_id = end
    assert torch.equal(ours.generate(TOKENS, max_new_tokens=9, pad_token_id=1), wanted)
    # Without a mask, the places of the pad_token_id are padding.
    given["attention_mask"] = None
    tokens = TOKENS.clone()
    tokens[1, :3] = 1
    assert torch.equal(ours.generate(tokens, **given), other.generate(tokens, **given))


def test_samples(ours: GPTForCausalLM) -> None:
    given = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "top_k": 2}
    torch.manual_seed(3)
    first = ours.generate(TOKENS, **given)
    torch.manual_seed(3)
    assert torch.equal(ours.generate(TOKENS, **given), first)
    assert torch.equal(first[:, :9], TOKENS.repeat_interleave(3, 0))
    assert len(first[:, 9:].unique(dim=0)) > 2
    likeliest = ours(first[:, :9]).logits[:, -1].topk(2).indices
    assert (likeliest == first[:, 9:10]).any(1).all()
    # Nearly uniform, and among the 50 likeliest, as in transformers where nothing is said.
    given = {"do_sample": True, "num_return_sequences": 48, "temperature": 100.0}
    wild = ours.generate(TOKENS, max_new_tokens=1, **given)[:, 9].view(2, 48)
    likeliest = ours(TOKENS).logits[:, -1].topk(50).indices
    assert torch.isin(wild[0], likeliest[0]).all()
    assert ours.generate(TOKENS, do_sample=True, top_k=0).shape == (2, 29)
    one = ours.generate(TOKENS, do_sample=True, max_new_tokens=6, top_k=1)
    assert torch.equal(one, ours.generate(TOKENS, max_new_tokens=6))


class Streamer:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, tokens: Tensor) -> None:
        self.got += tokens.flatten().tolist()

    def end(self) -> None:
        self.got.append("end")


def test_a_streamer_gets_the_prompt_and_each_token(ours: GPTForCausalLM) -> None:
    streamer = Streamer()
    found = ours.generate(TOKENS[:1], max_new_tokens=4, streamer=streamer)
    assert streamer.got == [*found[0].tolist(), "end"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"num_beams": 2}, NotImplementedError, "generate has no num_beams"),
        ({"stop_strings": ["a"]}, NotImplementedError, "generate has no stop_strings"),
        ({"logits_processor": [1]}, NotImplementedError, "generate has no logits_processor"),
        ({"min_new_tokens": 2}, NotImplementedError, "generate has no min_new_tokens"),
        ({"foo": 1}, NotImplementedError, "generate has no foo$"),
        ({"topk": 1}, NotImplementedError, r"generate has no topk; did you mean 'top_k'\?"),
        ({"attention_mask": PADDED}, ValueError, "padding must be on the left of each row"),
        ({"attention_mask": 0 * PADDED}, ValueError, "before at least one token"),
        ({"attention_mask": PADDED[:1]}, ValueError, "must have the shape of input_ids"),
        ({"eos_token_id": [1, 2]}, ValueError, r"eos_token_id must be one id, got \[1, 2\]"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences needs do_sample=True"),
        ({"max_length": 9}, ValueError, "more than the 9 tokens of input_ids, got 9"),
        ({"streamer": Streamer()}, ValueError, "a streamer takes one text, got 2"),
        ({"input_ids": None}, ValueError, "continues input_ids of at least one token, got none"),
        ({"inputs": TOKENS}, ValueError, "inputs and input_ids are the same argument, got both"),
    ],
)
def test_what_generate_refuses(
    ours: GPTForCausalLM, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ours.generate(**{"input_ids": TOKENS, **given})


# Saving and loading


@pytest.mark.parametrize(("tied", "shard"), [(True, "50GB"), (False, "20KB")])
def test_what_is_saved_is_loaded_by_each(tmp_path: Path, tied: bool, shard: str) -> None:
    network = GPT.from_pretrained(theirs(tie_word_embeddings=tied), dropout=0.25)
    ours = GPTForCausalLM(network, eos_token_id=5)
    ours.save_pretrained(tmp_path, max_shard_size=shard)
    wanted = ours(TOKENS).logits
    auto = transformers.AutoModelForCausalLM.from_pretrained
    for load in (GPTForCausalLM.from_pretrained, auto):
        again = load(tmp_path)
        assert torch.equal(again(TOKENS).logits, wanted)
        assert not again.training
        assert again.model.config == replace(CONFIG, dropout=0.25)
        assert again.config.eos_token_id == again.generation_config.eos_token_id == 5
        assert again.config.tie_word_embeddings is tied
    assert torch.equal(GPT.from_pretrained(tmp_path)(TOKENS), wanted)
    assert torch.equal(GPT.from_pretrained(ours)(TOKENS), wanted)


def test_options_of_from_pretrained(tmp_path: Path, ours: GPTForCausalLM) -> None:
    ours.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM.from_pretrained
    changed = auto(tmp_path, dtype=torch.bfloat16, dropout=0.5)
    assert changed.dtype == torch.bfloat16
    assert changed.model.config.dropout == changed.config.dropout == 0.5
    with pytest.raises(NotImplementedError, match="from_pretrained has no device_map"):
        auto(tmp_path, device_map="auto")
    for wrong in ("nonsense", "load"):
        with pytest.raises(ValueError, match=f"^dtype must be 'auto' or a dtype .*, got '{wrong}'"):
            GPTForCausalLM.from_pretrained(tmp_path, dtype=wrong)
    with pytest.raises(ValueError, match=r"^config must be that of .*, got GPTConfig\(.*n_layer=1"):
        auto(tmp_path, n_layer=1)


def test_a_folder_of_gpt2(tmp_path: Path, other: Any) -> None:
    other.config.eos_token_id = 7
    other.save_pretrained(tmp_path)
    again = GPTForCausalLM.from_pretrained(tmp_path)
    assert_close(again(TOKENS).logits, other(TOKENS).logits)
    assert again.config.eos_token_id == 7
    again.model.save_pretrained(tmp_path / "back")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert_close(back(TOKENS).logits, other(TOKENS).logits)


def test_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, window=3)
    torch.manual_seed(5)
    wanted = GPT(config).state_dict()
    torch.manual_seed(5)
    ours = GPTForCausalLM(config)
    assert ours.training
    # GPT's own initial weights, and GPT-2's end of text for GPT-2's vocabulary.
    assert all(torch.equal(t, wanted[name]) for name, t in ours.model.state_dict().items())
    assert ours.config.shape() == config
    assert ours.config.eos_token_id == ours.generation_config.eos_token_id == 50256
    small = GPTKernelsConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, eos_token_id=3)
    again = transformers.AutoModelForCausalLM.from_config(small)
    assert isinstance(again, GPTForCausalLM)
    assert again.generation_config.eos_token_id == 3
    with pytest.raises(TypeError, match="has all settings, got eos_token_id"):
        GPTForCausalLM(small, eos_token_id=4)
    for name in ("n_layer", "hidden_size", "tie_word_embeddings"):
        with pytest.raises(TypeError, match=f"^{name} is what the source says"):
            GPTForCausalLM(config, **{name: 4})
    with pytest.raises(TypeError, match=r"got a str; GPT\.from_pretrained makes a GPT of others'"):
        GPTForCausalLM("folder")
    small.tie_word_embeddings = False
    with pytest.raises(ValueError, match="tie_word_embeddings must be true for a new GPT"):
        GPTForCausalLM(small)


@pytest.mark.parametrize("tokens", [70, 60])
def test_other_numbers_of_tokens(ours: GPTForCausalLM, tokens: int) -> None:
    given = TOKENS % 60
    wanted = ours(given).logits[..., :60]
    ours.resize_token_embeddings(tokens)
    found = ours(given).logits
    assert found.shape[-1] == ours.model.config.vocab_size == tokens
    assert torch.equal(found[..., :60], wanted)
    assert ours.model.lm_head.weight is ours.model.transformer.wte.weight


# Trainer and pipelines


def test_gradient_checkpointing_recomputes_blocks(ours: GPTForCausalLM) -> None:
    again = copy.deepcopy(ours)
    again.gradient_checkpointing_enable()
    assert again.model.transformer.recompute_blocks
    for model in (ours.train(), again.train()):
        model(TOKENS, labels=TOKENS).loss.backward()
    for p, q in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    again.gradient_checkpointing_disable()
    assert not again.model.transformer.recompute_blocks
    with pytest.raises(NotImplementedError, match="recomputes every block, without options"):
        again.gradient_checkpointing_enable({"preserve_rng_state": False})


def test_trainer(tmp_path: Path, ours: GPTForCausalLM) -> None:
    """Two steps of two micro-batches each are those of a loop by hand."""
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(67, (8, 12), generator=generator)
    labels = rows.masked_fill(torch.rand(8, 12, generator=generator) < 0.3, -100)
    texts = [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]
    by_hand = copy.deepcopy(ours.model).train()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=2, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0.0, train_sampling_strategy="sequential", report_to=[], use_cpu=True,
        disable_tqdm=True, save_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(ours, args, train_dataset=texts, eval_dataset=texts)
    trainer.train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for x, y in zip(rows.split(4), labels.split(4), strict=True):
        by_hand(x[:, :-1], y[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(ours.model.parameters(), by_hand.parameters(), strict=True):
        assert_close(p, q)
    assert trainer.predict(texts).predictions.shape == (8, 12, 67)
    again = GPTForCausalLM(GPT(CONFIG))
    transformers.Trainer(again, args, train_dataset=texts).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    for p, q in zip(again.parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q)


def test_trainer_smooths_the_labels_that_come_next(tmp_path: Path, ours: GPTForCausalLM) -> None:
    """It shifts them for the classes that it knows by name, and takes others' as they are."""
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    found = transformers.Trainer(ours, args).compute_loss(
        ours, {"input_ids": TOKENS, "labels": TOKENS}
    )
    logits = ours(TOKENS).logits[:, :-1].flatten(0, 1)
    assert_close(found, cross_entropy(logits, TOKENS[:, 1:].flatten(), label_smoothing=0.1))


def test_pipeline(tmp_path: Path) -> None:
    """A folder of the model and its tokenizer; prompts of two lengths, alone and in one batch."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate([*"abcdefgh", "<pad>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left"
    )
    config = GPTConfig(vocab_size=9, block_size=16, n_layer=2, n_head=2, n_embd=16)
    network = shaken(GPT(config)).eval()
    GPTForCausalLM(network).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert isinstance(pipeline.model, GPTForCausalLM)
    prompts = ["a b c", "d e"]
    given = {"max_new_tokens": 20, "do_sample": False, "return_tensors": True}
    for size in (1, 2):
        found = pipeline(prompts, batch_size=size, **given)
        for prompt, (one,) in zip(prompts, found, strict=True):
            tokens = fast(prompt, return_tensors="pt").input_ids
            wanted = network.generate(tokens, 20, temperature=0)[0].tolist()
            assert list(one["generated_token_ids"])[-len(wanted) :] == wanted
