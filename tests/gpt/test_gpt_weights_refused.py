"""Hugging Face folders that are refused, in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_folders  # noqa: F401 (skips without what it needs)
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptkernels import GPT


def test_dropout_of_the_folder(folder: Path) -> None:
    edit(folder, attn_pdrop=0.2)
    with pytest.raises(ValueError, match=r"must be equal, got 0\.1, 0\.2 and 0\.1"):
        GPT.from_pretrained(folder)
    assert GPT.from_pretrained(folder, dropout=0.3).config.dropout == 0.3


@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ("torch_dtype", r"has no argument torch_dtype: .* \.to\(dtype\) casts the GPT"),
        ("device_map", r"has no argument device_map: .* \.to\(device\) moves the GPT"),
        ("dropuot", "unexpected keyword argument 'dropuot'; did you mean 'dropout'"),
    ],
)
def test_keywords_of_transformers(keyword: str, said: str) -> None:
    with pytest.raises(TypeError, match=rf"^from_pretrained\(\) .*{said}"):
        GPT.from_pretrained("nowhere", **{keyword: None})  # type: ignore[arg-type]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llama"},
            "model_type must be one of 'gpt2', 'openai-gpt', 'gptkernels', got 'llama'",
        ),
        (
            {"activation_function": "relu"},
            "activation_function must be one of gelu_new, .* got 'relu'",
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights must be true, got false"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx must be false",
        ),
        ({"add_cross_attention": True}, "add_cross_attention must be false, got true"),
        ({"tie_word_embeddings": False}, "the weights lack lm_head.weight, which"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings must be true or false, got "no"'),
        ({"hidden_size": 48}, "hidden_size and n_embd are one setting, got 48 and 24"),
        ({"num_attention_heads": 2}, "num_attention_heads and n_head are one setting, got 2 and 3"),
        ({"rotary_dim": 8}, "rotary_dim is not known here, so what it may change .* got 8"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps is not known here"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is not known .* {"bits": 4}'),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is not known here"),
        ({"pruned_heads": {"0": [1]}}, r'pruned_heads must be {}, got {"0": \[1\]}'),
        ({"is_encoder_decoder": True}, "is_encoder_decoder must be false, got true"),
        (
            {"model_type": "openai-gpt", "activation_function": None, "n_inner": 40},
            "n_inner is not known here",
        ),
        ({"n_embd": "24"}, "n_embd must be an int, got '24'"),
        ({"n_head": 5}, "n_head must divide n_embd, got n_embd=24 and n_head=5"),
        (
            {"vocab_size": 66},
            r"wte.weight must have shape \(66, 24\) by its configuration, got \(67, 24\)",
        ),
        (
            {"n_positions": 25},
            r"wpe.weight must have shape \(25, 24\) by its configuration, got \(24, 24\)",
        ),
        (
            {"n_inner": None},
            r"c_fc.weight must have shape \(96, 24\) by its configuration, got \(40, 24\)",
        ),
        ({"n_layer": 3}, r"the weights lack transformer.h.2.ln_1.weight"),
        ({"n_layer": 1}, r"the weights hold transformer.h.1.\S+, which"),
        ({"bias": False}, '"bias": false, but transformer.h.0.attn.c_attn.bias is not zero'),
    ],
)
def test_config_that_asks_for_something_else(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state[name] = to(state.get(name, torch.zeros(67, 24)))
        save_file(state, folder / "model.safetensors")

    return changed


def pickled(content: Any, size: int | None = None) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")
        truncate("pytorch_model.bin", size or 10**9)(folder)

    return changed


def binary(content: bytes) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return changed


def sharded(weight_map: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))

    return changed


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "folder must be an existing folder, got "),
        (unlink("config.json"), FileNotFoundError, "config.json is missing"),
        (write("config.json", b""), ValueError, "config.json is not a JSON file"),
        (write("config.json", b"\xff\xfe{"), ValueError, "config.json is not a JSON file"),
        (write("config.json", b"[1]"), ValueError, "must hold a JSON object, got a list"),
        (write("config.json", POINTER), ValueError, r"config\.json is a Git LFS pointer"),
        (write("model.safetensors", POINTER), ValueError, r"safetensors is a Git LFS pointer"),
        (binary(POINTER), ValueError, r"model\.bin is a Git LFS pointer, .* with git lfs pull"),
        (write("adapter_config.json", b"{}"), ValueError, "holds an adapter .* merge it into"),
        (unlink("model.safetensors"), FileNotFoundError, "must hold model.safetensors, its shards"),
        (write("model.safetensors", b""), ValueError, "not a complete safetensors file"),
        (write("model.safetensors", b"PK" * 99), ValueError, "not a complete safetensors file"),
        (truncate("model.safetensors", 40_000), ValueError, "not a complete safetensors file"),
        (truncate("model.safetensors", 100), ValueError, "not a complete safetensors file"),
        (
            change("transformer.x.weight", Tensor.clone),
            ValueError,
            "hold transformer.x.weight, which",
        ),
        (change("lm_head.weight", Tensor.clone), ValueError, "lm_head.weight must equal"),
        (
            change("transformer.h.0.attn.c_attn.lora_A.weight", Tensor.clone),
            ValueError,
            r"hold transformer\.\S+lora_A\.weight, a part of an adapter: merge it",
        ),
        (
            change("module.transformer.wte.weight", Tensor.clone),
            ValueError,
            r"hold transformer\.wte\.weight twice, as (module\.)?transformer\.\S+ and ",
        ),
        (change("wte.weight", Tensor.clone), ValueError, r"hold transformer\.wte\.weight twice"),
        (change("transformer.ln_f.bias", Tensor.int), ValueError, "must be float32, .* got int32"),
        (
            change("transformer.h.0.mlp.c_fc.weight", lambda t: t.t().contiguous()),
            ValueError,
            "must have shape",
        ),
        (
            change("transformer.h.0.mlp.c_fc.weight", lambda t: t[0].clone()),
            ValueError,
            "must have shape",
        ),
        (
            change("transformer.wte.weight", Tensor.bfloat16),
            ValueError,
            r"must have the dtype of transformer\.\S+, (float32|bfloat16), got (float32|bfloat16)",
        ),
        (
            change("transformer.ln_f.bias", Tensor.half),
            ValueError,
            r"must have the dtype of transformer\.\S+, (float32|float16), got (float32|float16)",
        ),
        (
            change("score.weight", Tensor.clone),
            ValueError,
            "the weights hold score.weight, which its configuration does not ask for",
        ),
        (
            pickled({"wte.weight": torch.eye(4).to_sparse()}),
            ValueError,
            r"wte\.weight must be a dense tensor, got one torch\.sparse_coo",
        ),
        (
            pickled({"wte.weight": torch.empty(4, device="meta")}),
            ValueError,
            r"wte\.weight must be a dense tensor, got one without numbers",
        ),
        (pickled([1, 2]), ValueError, "must hold a dictionary of tensors"),
        (pickled({0: torch.ones(2)}), ValueError, "must hold a dictionary of tensors by name"),
        (pickled({"wte.weight": 1}), ValueError, "must hold a dictionary of tensors by name"),
        # A string cut in its length, a text, a list's end where none began: struct.error, KeyError
        # and IndexError inside the unpickler.
        (binary(b"\x80\x02X\x05"), ValueError, r"not a complete PyTorch file .* alone \(.+\)"),
        (binary(b"hello\n"), ValueError, r"not a complete PyTorch file .* alone \(.+\)"),
        (binary(b"\x80\x02e."), ValueError, r"not a complete PyTorch file .* alone \(.+\)"),
        (pickled({"wte.weight": torch.ones(999)}, 900), ValueError, "not a complete PyTorch file"),
        (pickled({"wte.weight": torch.ones(999)}, 1), ValueError, "not a complete PyTorch file"),
        (sharded([1]), ValueError, "weight_map must name a file for each tensor"),
        (
            sharded({"transformer.wte.weight": "gone.safetensors"}),
            FileNotFoundError,
            "gone.safetensors, which is missing",
        ),
        (
            sharded({"transformer.wte.weight": "../x.safetensors"}),
            ValueError,
            "files in the folder itself",
        ),
        (
            sharded({"transformer.y": "shard.safetensors"}),
            ValueError,
            "places transformer.y in shard",
        ),
    ],
)
def test_broken_folders(
    folder: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)
