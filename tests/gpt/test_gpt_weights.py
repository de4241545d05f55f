"""Weights: Hugging Face folders and nanoGPT checkpoints, both ways."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import CONFIG, randomize, theirs
from torch import Tensor

from gptkernels import GPT, GPTConfig
from gptkernels.gpt import layouts, weights
from gptkernels.gpt.weights import read_tokenizer
from gptkernels.truth import plain_gpt

pytest.importorskip("safetensors", reason="needs the package safetensors")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # noqa: E402


def assert_close(ours: Tensor, other: Tensor) -> None:
    assert (ours - other).abs().max() <= 1e-5 * other.abs().max()


def assert_same_model(ours: GPT, other: Any) -> None:
    """Logits and gradients within 1e-5 relative, and the same greedy tokens."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(67, (3, 24), generator=generator)
    ours.zero_grad()
    other.zero_grad()
    logits, other_logits = ours(tokens), other(tokens).logits
    assert_close(logits, other_logits)
    ours(tokens[:, :-1], tokens[:, 1:]).backward()
    other(tokens, labels=tokens).loss.backward()
    for name, parameter in ours.named_parameters():
        gradient = other.get_parameter(name).grad
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            gradient = gradient.t()
        assert_close(parameter.grad, gradient)
    greedy = other.generate(
        tokens[:, :6],
        attention_mask=torch.ones_like(tokens[:, :6]),
        max_new_tokens=18,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(ours.generate(tokens[:, :6], 18, temperature=0), greedy)


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, CONFIG),
        (
            {"n_inner": None, "activation_function": "gelu"},
            replace(CONFIG, n_inner=None, approximate="none"),
        ),
        (
            {"layer_norm_epsilon": 0.1, "reorder_and_upcast_attn": True},
            replace(CONFIG, layer_norm_eps=0.1),
        ),
    ],
    ids=["gelu_new", "gelu", "epsilon"],
)
@pytest.mark.parametrize("shard", ["50GB", "20KB"], ids=["one-file", "sharded"])
def test_transformers_to_ours(
    tmp_path: Path, changes: dict[str, Any], config: GPTConfig, shard: str
) -> None:
    other = theirs(**changes)
    other.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "50GB")
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == replace(config, dropout=0.1)
    assert not ours.training
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert_same_model(ours, other)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, approximate="none", n_inner=None, layer_norm_eps=1e-3, dropout=0.25),
        replace(CONFIG, bias=False),
    ],
    ids=["tanh", "erf", "no-bias"],
)
def test_ours_to_transformers_and_back(tmp_path: Path, config: GPTConfig) -> None:
    ours = randomize(GPT(config)).eval()
    ours.save_pretrained(tmp_path / "new" / "folder")
    other, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (
        other.config.resid_pdrop
        == other.config.embd_pdrop
        == other.config.attn_pdrop
        == config.dropout
    )
    assert_same_model(ours, other)
    back = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert back.config == config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def assign(model: GPT) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] *= 1.5
    model.load_state_dict(state, assign=True)


def new_head(model: GPT) -> None:
    model.lm_head = torch.nn.Linear(24, 67, bias=False)


@pytest.mark.parametrize("untie", [assign, new_head])
@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, bias=False), replace(CONFIG, window=5)],
    ids=["gpt2", "no-bias", "gptkernels"],
)
def test_a_head_of_its_own_is_saved_and_read_back(
    tmp_path: Path, config: GPTConfig, untie: Callable[[GPT], None]
) -> None:
    ours = randomize(GPT(config)).eval()
    untie(ours)
    tokens = torch.arange(24).view(1, 24)
    ours.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert torch.equal(back(tokens), ours(tokens))
    assert back.lm_head.weight is not back.transformer.wte.weight
    if config.window is None:
        assert_same_model(back, transformers.GPT2LMHeadModel.from_pretrained(tmp_path))


def test_an_untied_head_of_transformers(tmp_path: Path) -> None:
    other = theirs(tie_word_embeddings=False)
    other.save_pretrained(tmp_path)
    assert_same_model(GPT.from_pretrained(tmp_path), other)


def test_a_head_that_is_the_embedding_again_is_tied(tmp_path: Path) -> None:
    ours = randomize(GPT(CONFIG))
    ours.load_state_dict({name: t.clone() for name, t in ours.state_dict().items()}, assign=True)
    ours.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    back = GPT.from_pretrained(tmp_path)
    assert back.lm_head.weight is back.transformer.wte.weight


def test_other_names_of_settings(folder: Path) -> None:
    """Those that transformers takes too: a default in place of any gives another model."""
    path = folder / "config.json"
    given, expected = json.loads(path.read_text()), GPT.from_pretrained(folder)
    for name, other in (
        ("n_embd", "hidden_size"),
        ("n_positions", "max_position_embeddings"),
        ("n_head", "num_attention_heads"),
        ("n_layer", "num_hidden_layers"),
    ):
        given[other] = given.pop(name)
    path.write_text(json.dumps(given))
    assert transformers.AutoConfig.from_pretrained(folder).n_head == expected.config.n_head
    assert GPT.from_pretrained(folder).config == expected.config
    # null is as good as not given, and some keys are for other programs.
    given |= {"n_embd": None, "tie_word_embeddings": None, "transformers.js_config": {"dtype": 1}}
    path.write_text(json.dumps(given))
    assert GPT.from_pretrained(folder).config == expected.config


def test_a_byte_order_mark_is_no_part_of_config_json(folder: Path) -> None:
    expected = GPT.from_pretrained(folder).config
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert GPT.from_pretrained(folder).config == expected


def test_every_key_of_a_config_of_transformers_is_known(tmp_path: Path) -> None:
    """With every key that its classes have, not only those that differ from a default."""
    shape = {"vocab_size": 67, "n_positions": 24, "n_layer": 2, "n_head": 3, "n_embd": 24}
    for kind in (transformers.GPT2Config, transformers.OpenAIGPTConfig):
        given = kind(**shape, attn_implementation="eager").to_dict()
        given |= transformers.GenerationConfig()._get_default_generation_params()
        config, tied = layouts.read(tmp_path / "config.json", given)
        assert (config.n_embd, config.n_head, tied) == (24, 3, True)


GPT1 = replace(CONFIG, n_inner=None, norm="post")


def theirs_gpt1() -> Any:
    """A random OpenAIGPTLMHeadModel of GPT1's shape."""
    torch.manual_seed(0)
    shape = {"vocab_size": 67, "n_positions": 24, "n_layer": 2, "n_head": 3, "n_embd": 24}
    model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**shape))
    return randomize(model).eval()


def gpt1_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of ours with the names of theirs."""
    for other, ours in (("tokens_embed", "wte"), ("positions_embed", "wpe")):
        state = {name.replace(f".{ours}.", f".{other}."): value for name, value in state.items()}
    return state


def assert_same_gpt1(ours: GPT, other: Any) -> None:
    """Logits and gradients within 1e-5 relative."""
    tokens = torch.randint(67, (3, 24), generator=torch.Generator().manual_seed(2))
    assert_close(ours(tokens), other(tokens).logits)
    ours(tokens[:, :-1], tokens[:, 1:]).backward()
    other(tokens, labels=tokens).loss.backward()
    for name, parameter in gpt1_names(dict(ours.named_parameters())).items():
        gradient = other.get_parameter(name).grad
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert_close(parameter.grad, gradient.t() if linear else gradient)


def test_gpt1_both_ways(tmp_path: Path) -> None:
    other = theirs_gpt1()
    other.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert ours.config == replace(GPT1, dropout=0.1)
    assert_same_gpt1(ours, other)
    ours.save_pretrained(tmp_path / "ours")
    back, report = transformers.OpenAIGPTLMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = GPT.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert_same_gpt1(again, back)


def test_gpt1_as_it_was_published(tmp_path: Path) -> None:
    """Without prefixes, with causal masks, and a head of its own that equals the embedding."""
    other = theirs_gpt1()
    other.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
    (tmp_path / "model.safetensors").unlink()
    torch.save(bare, tmp_path / "pytorch_model.bin")
    assert_same_gpt1(GPT.from_pretrained(tmp_path), other)


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, window=5),
        replace(CONFIG, norm="post", window=1, dropout=0.25),
        replace(CONFIG, norm="post"),  # n_inner is not GPT-1's
        replace(GPT1, bias=False),
        replace(GPT1, approximate="none"),
    ],
    ids=["window", "post-window", "n_inner", "no-bias", "erf"],
)
def test_what_only_we_can_read(tmp_path: Path, config: GPTConfig) -> None:
    ours = randomize(GPT(config)).eval()
    ours.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert back.config == config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert GPT.from_pretrained(tmp_path, dropout=0.5).config == replace(config, dropout=0.5)
    # Nobody else may take it for a model that it is not.
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    assert given["model_type"] == "gptkernels"
    assert "gptkernels" not in CONFIG_MAPPING_NAMES
    del given["window"]
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=r"config\.json: window must be given"):
        GPT.from_pretrained(tmp_path)


NANOGPT: dict[str, Any] = {
    "vocab_size": 67, "block_size": 24, "n_layer": 2, "n_head": 3, "n_embd": 24
}  # fmt: skip


def nanogpt_checkpoint(path: Path, prefix: str = "", **changes: Any) -> GPT:
    """Writes what nanoGPT's train.py saves; returns the model whose weights it has."""
    model = randomize(GPT(GPTConfig(**NANOGPT, approximate="none", bias=False)))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
    content = {
        "model": state,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {**NANOGPT, "bias": False, "dropout": 0.2},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "compile": True, "learning_rate": 6e-4},
    }
    content.update(changes)
    torch.save(content, path)
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpt_checkpoints(tmp_path: Path, prefix: str) -> None:
    expected = nanogpt_checkpoint(tmp_path / "ckpt.pt", prefix)
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert ours.config == replace(expected.config, dropout=0.2)
    assert not ours.training
    tokens = torch.arange(24).view(1, 24)
    assert torch.equal(ours(tokens), expected(tokens))
    # The same numbers from the formulas that nanoGPT writes out.
    plain = plain_gpt.PlainGPT(expected.config).eval()
    plain.load_state_dict(ours.state_dict())
    assert_close(ours(tokens), plain(tokens))
    assert GPT.from_pretrained(tmp_path / "ckpt.pt", dropout=0.0).config.dropout == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": None}, "not a checkpoint of nanoGPT: it has no dictionary 'model_args'"),
        ({"model": {"transformer.wte.weight": 3}}, "must hold tensors alone"),
        ({"model_args": {"n_layer": 2}}, "model_args lack vocab_size, block_size, n_head"),
        (
            {"model_args": {**NANOGPT, "bias": False, "rope": True}},
            "model_args hold rope, which is not known here",
        ),
        ({"model": {}}, r"the weights lack transformer\.wte\.weight"),
    ],
)
def test_what_is_no_nanogpt_checkpoint(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    nanogpt_checkpoint(tmp_path / "ckpt.pt", **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path / "ckpt.pt")


def test_no_nanogpt_checkpoint_runs_code(tmp_path: Path) -> None:
    torch.save({"model": Evil(tmp_path / "ran"), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="not a complete PyTorch file of tensors alone"):
        GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


def test_the_tokenizers_name_is_kept_for_us_and_skipped_by_transformers(tmp_path: Path) -> None:
    ours = randomize(GPT(CONFIG)).eval()
    ours.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path) is None
    ours.save_pretrained(tmp_path, tokenizer="bytes")
    assert read_tokenizer(tmp_path) == "bytes"
    assert_same_model(ours, transformers.GPT2LMHeadModel.from_pretrained(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"bytes"', "7"))
    with pytest.raises(ValueError, match="gptkernels_tokenizer must be a name, got 7"):
        read_tokenizer(tmp_path)


def test_saving_over_a_model_replaces_it(tmp_path: Path) -> None:
    GPT(CONFIG).save_pretrained(tmp_path)
    model = randomize(GPT(replace(CONFIG, n_layer=1)))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1  # what the umask gives, to both
    assert torch.equal(GPT.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    GPT(CONFIG).to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {dtype}


def test_norms_may_have_a_dtype_of_their_own(tmp_path: Path) -> None:
    model = GPT(CONFIG).to(torch.bfloat16)
    for name, module in model.named_modules():
        if ".ln_" in name:
            module.float()
    model.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    tokens = torch.arange(24).view(1, 24)
    assert back(tokens).dtype == torch.bfloat16
    assert torch.equal(back(tokens), model.eval()(tokens))


@pytest.mark.parametrize(
    ("cast", "message"),
    [
        (GPT.double, "wte.weight must be float32, bfloat16 or float16, got float64"),
        (
            lambda model: model.transformer.wpe.half(),
            "wpe.weight must have the dtype of transformer.wte.weight, float32, got float16",
        ),
        (
            lambda model: setattr(model, "lm_head", torch.nn.Linear(24, 67)),
            "the model: the weights hold lm_head.bias, which its configuration does not ask for",
        ),
        (
            lambda model: setattr(model, "lm_head", torch.nn.Linear(24, 70, bias=False)),
            r"the model: lm_head.weight must have shape \(67, 24\) .* got \(70, 24\)",
        ),
        (
            lambda model: model.transformer.h.pop(1),
            "the model: the weights lack transformer.h.1.ln_1.weight, which",
        ),
    ],
)
def test_what_would_not_load_is_not_saved(
    tmp_path: Path, cast: Callable[[GPT], Any], message: str
) -> None:
    model = GPT(CONFIG)
    cast(model)
    with pytest.raises((TypeError, ValueError), match=message):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_windows_maps_no_weights_of_a_model_in_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There no file can be replaced that is mapped, as it is when a model is saved over."""
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("nothing tells here what is mapped")
    model = GPT.from_pretrained(folder)
    assert str(folder / "model.safetensors") in mapped.read_text()
    del model
    monkeypatch.setattr(weights, "WINDOWS", True)
    model = GPT.from_pretrained(folder)
    assert str(folder / "model.safetensors") not in mapped.read_text()
    model.save_pretrained(folder)


def test_a_model_is_saved_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(
            NotADirectoryError, match=r"^folder must be a folder, but \S+ is a file"
        ):
            GPT(CONFIG).save_pretrained(path)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failed_save_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="No space left"):
        GPT(CONFIG).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_bare_names_old_masks_and_a_stored_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(24, 24, dtype=torch.uint8).tril().view(1, 1, 24, 24)
    bare["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    expected = GPT.from_pretrained(folder).state_dict()
    save_file(bare, folder / "model.safetensors")
    found = GPT.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "_orig_mod.module.",
        "base_model.model.",
        "base_model.model._orig_mod.",
        "module.base_model.model.",
        "model.",
        "_forward_module.model._orig_mod.",
    ],
)
def test_names_of_wrappers_are_taken_off(folder: Path, prefix: str) -> None:
    expected = GPT.from_pretrained(folder).state_dict()
    state = load_file(folder / "model.safetensors")
    inside = {
        name.replace(".attn.", ".attn._checkpoint_wrapped_module.").replace(
            "transformer.h.1.", "transformer.h.1._orig_mod."
        ): tensor
        for name, tensor in state.items()
    }
    wrapped = {prefix + name: tensor for name, tensor in inside.items()}
    if prefix == "module.":  # as torch.optim.swa_utils.AveragedModel has it
        wrapped["n_averaged"] = torch.tensor(3)
    save_file(wrapped, folder / "model.safetensors")
    found = GPT.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_head_alone_stands_for_the_embedding_too(folder: Path) -> None:
    """As in files of safetensors' save_model, which drops one of two names for one tensor."""
    expected = GPT.from_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    save_file(state, folder / "model.safetensors")
    tokens = torch.arange(24).view(1, 24)
    assert torch.equal(GPT.from_pretrained(folder)(tokens), expected(tokens))
    # An untied model needs both.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"the weights lack transformer\.wte\.weight"):
        GPT.from_pretrained(folder)


def test_pytorch_file_of_tensors_alone(folder: Path) -> None:
    expected = GPT.from_pretrained(folder).state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = GPT.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_no_pickle_runs_code(folder: Path, tmp_path: Path) -> None:
    torch.save({"transformer.wte.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="not a complete PyTorch file of tensors alone"):
        GPT.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_missing_extra_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT.from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for use in (GPT.from_pretrained, model.save_pretrained):
        with pytest.raises(ImportError, match=r"'safetensors': pip install 'gptkernels\[gpt\]'$"):
            use(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
