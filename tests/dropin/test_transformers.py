"""Accelerated models of transformers in what people do with them: caches, Trainer, peft, compile,
checkpointing, several processes."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, command
from torch import Tensor, nn

import gptkernels
from benchmarks.families import LANGUAGE_MODELS, Size, logits
from gptkernels.dropin.swap import is_swapped

transformers = pytest.importorskip("transformers")
registered = pytest.importorskip("gptkernels.dropin.transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V = Size().vocabulary


def gpt2(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = LANGUAGE_MODELS["GPT-2"](Size(dropout=dropout))
    return model.eval()


def both(dropout: float = 0.0) -> tuple[Any, Any]:
    """A model, and its accelerated copy."""
    model = gpt2(dropout)
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    return model, ours


def tokens_of(T: int = 17) -> Tensor:
    return torch.randint(3, V, (2, T))


def worst(model: nn.Module, ours: nn.Module) -> float:
    """The largest difference of a gradient."""
    pairs = zip(model.parameters(), ours.parameters(), strict=True)
    return max(float((p.grad - q.grad).abs().max()) for p, q in pairs if p.grad is not None)


# attn_implementation="gptkernels"


def test_a_folder_is_loaded_with_this_attention(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours = load(tmp_path, attn_implementation="gptkernels").eval()
    assert ours.config._attn_implementation == "gptkernels"
    tokens = tokens_of()
    assert torch.allclose(ours(tokens).logits, model(tokens).logits, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    assert "gptkernels" not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}], ids=str
)
def test_caches(how: dict[str, Any], padded: bool) -> None:
    model, ours = both()
    tokens = tokens_of()
    there = torch.ones_like(tokens)
    there[0, : 5 * padded] = 0
    given = {"max_new_tokens": 9, "do_sample": False, "attention_mask": there, **how}
    wanted, found = (m.generate(tokens, **given) for m in (model, ours))
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_sliding_window(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=6, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    ours = copy.deepcopy(model)
    report = gptkernels.accelerate(ours, impl="cpu")
    assert "MistralAttention" in {row.module for row in report.swapped}
    tokens = tokens_of()
    there = torch.ones_like(tokens)
    there[0, :5] = 0
    for mask in (torch.ones_like(tokens), there, there.flip(1)):
        y, z = (m(tokens, attention_mask=mask).logits[mask.bool()] for m in (model, ours))
        assert torch.allclose(y, z, atol=1e-5)
    given = {"max_new_tokens": 9, "do_sample": False, "attention_mask": there, "pad_token_id": 2}
    wanted, found = (m.generate(tokens, **given, **how) for m in (model, ours))
    assert torch.equal(wanted, found)


def test_sinks_and_values_of_another_width() -> None:
    """gpt-oss has a sink for each head, and every other layer sees a window."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=V, hidden_size=64, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=6, num_local_experts=2,
        num_experts_per_tok=1, layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("gptkernels")
    tokens = tokens_of()
    there = torch.ones_like(tokens)
    there[0, :5] = 0
    for mask in (None, there):
        model.zero_grad(), ours.zero_grad()
        y, z = (m(tokens, attention_mask=mask).logits for m in (model, ours))
        seen = torch.ones_like(tokens).bool() if mask is None else mask.bool()
        assert torch.allclose(y[seen], z[seen], atol=1e-5)
        for logits_ in (y, z):
            logits_[seen].square().sum().backward()
        assert worst(model, ours) < 1e-3
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 4)
    out, _ = registered.attention(model.model.layers[0].self_attn, q, k, v, None)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(out, wanted.transpose(1, 2), atol=1e-5)


def test_what_a_mask_becomes() -> None:
    there = torch.ones(2, 9, dtype=torch.bool)
    given = {
        "batch_size": 2, "q_length": 9, "kv_length": 9, "q_offset": 0, "kv_offset": 0,
        "mask_function": registered.causal_mask_function, "config": gpt2().config,
    }  # fmt: skip
    if transformers.__version__.startswith("4"):
        given["cache_position"] = torch.arange(9)
        del given["q_length"], given["q_offset"]
    assert registered.mask(**given, attention_mask=there) is None
    there[0, 6:] = False
    assert registered.mask(**given, attention_mask=there).tolist() == [6, 9]
    there[0, 0] = False
    assert registered.mask(**given, attention_mask=there).shape == (2, 9)
    # A model that may cut its mask gets one with four dimensions.
    other = {**given, "config": transformers.BertConfig()}
    assert registered.mask(**other, attention_mask=there).shape == (2, 1, 9, 9)
    one = {**given, "allow_is_causal_skip": False}
    assert registered.mask(**one, attention_mask=there).shape == (2, 1, 9, 9)
    assert registered.mask(**{**given, "local_size": 4}, attention_mask=there).shape[1:] == (
        1, 9, 9,
    )  # fmt: skip


def test_what_it_does_not_have_is_refused_by_name() -> None:
    model, ours = both()
    tokens = tokens_of()
    with pytest.raises(NotImplementedError, match="'gptkernels' has no output_attentions; use"):
        ours(tokens, output_attentions=True)
    q = torch.randn(1, 2, 5, 8)
    module = model.transformer.h[0].attn
    for name in ("position_bias", "cache"):
        with pytest.raises(NotImplementedError, match=f"has no {name}"):
            registered.attention(module, q, q, q, None, **{name: torch.ones(1)})
    wide = q.repeat(1, 1, 1, 33)
    for v, more in ((wide, {}), (wide[..., :264], {"s_aux": torch.zeros(2)})):
        with pytest.raises(NotImplementedError, match="has heads of up to 256, got 264"):
            registered.attention(module, q, q, v, None, **more)
    gptkernels.restore(ours)
    assert ours.config._attn_implementation == "sdpa"
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager(tokens, output_attentions=True).attentions[0] is not None


def test_weights_of_older_families_come_from_their_own_method() -> None:
    model = LANGUAGE_MODELS["GPT-Neo"](Size()).eval()
    gptkernels.accelerate(model, impl="cpu")
    tokens = tokens_of()
    attentions = model(tokens, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 4, 17, 17)] * 2


def test_models_that_do_not_run_by_sdpa_are_left_alone() -> None:
    """Eager attention gets a mask that says all: "sdpa" may be told less. Splinter's encoder would
    become causal."""
    config = transformers.SplinterConfig(
        vocab_size=V, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=96,
    )  # fmt: skip
    for model in (transformers.SplinterModel(config).eval(), gpt2()):
        model.set_attn_implementation("eager")
        ours = copy.deepcopy(model)
        report = gptkernels.accelerate(ours)
        assert "runs attn_implementation='eager', not 'sdpa'" in {row.why for row in report.left}
        tokens = tokens_of()
        assert torch.allclose(ours(tokens)[0], model(tokens)[0], atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_an_encoder_stays_one(impl: str) -> None:
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=256, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=160,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ours = copy.deepcopy(model)
    report = gptkernels.accelerate(ours, impl=impl)
    assert "BertSelfAttention" in {row.module for row in report.swapped}
    tokens = tokens_of(150)
    there = torch.ones_like(tokens)
    there[0, 90:] = 0
    for mask in (torch.ones_like(tokens), there, there.flip(1)):
        y, z = (m(tokens, attention_mask=mask)[0][mask.bool()] for m in (model, ours))
        assert torch.allclose(y, z, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_what_only_sdpa_has_goes_on_by_sdpa(impl: str) -> None:
    """A bias for each pair of positions."""
    config = transformers.T5Config(
        vocab_size=V, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl=impl)
    tokens = tokens_of()
    y, z = (m(tokens, labels=tokens).logits for m in (model, ours))
    assert torch.allclose(y, z, atol=1e-5)


def test_calls_of_attention() -> None:
    """Rotary embeddings under autocast leave q and k in float32 beside a v in bfloat16. A static
    cache has places past its keys. Heads may lie apart."""
    _, ours = both()
    module = ours.transformer.h[0].attn
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    plain = torch.nn.functional.scaled_dot_product_attention
    wanted = plain(q, k, v, is_causal=True).transpose(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = registered.attention(module, q, k, v.bfloat16(), None)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), wanted, atol=0.05)
    longer = [torch.cat([x, torch.full((2, 4, 5, 16), torch.nan)], 2) for x in (k, v)]
    found, _ = registered.attention(module, q, *longer, None)
    assert torch.allclose(found, wanted, atol=1e-5)
    apart = torch.stack([q, q], -1)[..., 0]
    assert torch.allclose(registered.attention(module, apart, k, v, None)[0], wanted, atol=1e-5)


def test_a_mask_of_ones_own_is_all_that_hides() -> None:
    """GPT-J's attention has no triangle: with a mask that hides nothing it sees what follows."""
    model = LANGUAGE_MODELS["GPT-J"](Size()).eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    tokens = tokens_of()
    everything = torch.zeros(2, 1, 17, 17)
    y, z = (m(tokens, attention_mask=everything).logits for m in (model, ours))
    assert torch.allclose(y, z, atol=1e-5)
    assert not torch.allclose(y, model(tokens).logits, atol=1e-3)


def test_two_models_with_one_config() -> None:
    one = gpt2()
    other = type(one)(one.config).eval()
    tokens = tokens_of()
    wanted = [m(tokens).logits for m in (one, other)]
    for model in (one, other):
        gptkernels.accelerate(model, impl="cpu")
    gptkernels.restore(one)
    found = [m(tokens).logits for m in (one, other)]
    for y, z in zip(wanted, found, strict=True):
        assert torch.allclose(y, z, atol=1e-5)
    # What is not swapped runs by the same config, and has what "sdpa" has.
    assert one.double()(tokens).logits.dtype == torch.float64
    gptkernels.restore(other)
    assert one.config._attn_implementation == "sdpa"


def test_another_choice_of_attention_since_is_kept() -> None:
    _, ours = both()
    ours.set_attn_implementation("eager")
    assert ours(tokens_of(), output_attentions=True).attentions[0] is not None
    gptkernels.restore(ours)
    assert ours.config._attn_implementation == "eager"


def test_a_pickle_is_loaded_elsewhere(tmp_path: Path) -> None:
    model, ours = both()
    tokens = tokens_of()
    torch.save((ours, tokens), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, tokens = torch.load(sys.argv[1], weights_only=False);"
        "torch.save(model(tokens).logits, sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = command(
        sys.executable, "-c", code, tmp_path / "model.pt", tmp_path / "out.pt", env=environment
    )
    assert result.returncode == 0, result.stderr
    assert torch.allclose(torch.load(tmp_path / "out.pt"), model(tokens).logits, atol=1e-5)


# Tools around a model


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    texts = [{"input_ids": t, "labels": t} for t in torch.randint(3, V, (12, 16))]

    def trainer(model: Any) -> Any:
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1,
            save_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return transformers.Trainer(model, args, train_dataset=texts, eval_dataset=texts)

    def accelerated() -> Any:
        model = gpt2(0.1)
        gptkernels.accelerate(model, impl="cpu")
        return model

    ours = accelerated()
    running = trainer(ours)
    running.train()
    loss = running.evaluate()["eval_loss"]
    running.save_model(str(tmp_path / "last"))
    elsewhere = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    assert not any(is_swapped(module) for module in elsewhere.modules())
    assert trainer(elsewhere).evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    again = accelerated()
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = zip(ours.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("first", ["accelerate", "peft"])
def test_lora(first: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )

    def adapted(accelerated: bool) -> Any:
        model = gpt2()
        if accelerated and first == "accelerate":
            gptkernels.accelerate(model, impl="cpu")
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config).eval()
        if accelerated and first == "peft":
            report = gptkernels.accelerate(model, impl="cpu")
            assert {r.module: r.why for r in report.left} == {
                "GPT2MLP": "c_fc is a peft.tuners.lora.layer.Linear"
            }
        return model

    model, ours = adapted(False), adapted(True)
    tokens = tokens_of()
    for network in (model, ours):
        network(tokens, labels=tokens).loss.backward()
    assert worst(model, ours) < 1e-6
    merged = ours.merge_and_unload()
    assert torch.allclose(merged(tokens).logits, model(tokens).logits, atol=1e-5)


def test_compiled_into_one_graph() -> None:
    model, ours = both()
    tokens = tokens_of()
    gptkernels.accelerate(ours)
    for network in (model.train(), ours.train()):
        network.zero_grad()
    compiled = torch.compile(ours, fullgraph=True)
    for network in (compiled, model):
        network(tokens).logits.square().mean().backward()
    assert worst(model, ours) < 1e-6


def test_exported() -> None:
    model, ours = both()
    tokens = tokens_of()
    program = torch.export.export(ours, (tokens,), {"use_cache": False}, strict=False)
    found = program.module()(tokens, use_cache=False).logits
    assert torch.allclose(found, model(tokens).logits, atol=1e-5)


def test_checkpointing_recomputes_the_same_dropout() -> None:
    _, ours = both(dropout=0.2)
    again = copy.deepcopy(ours)
    again.gradient_checkpointing_enable()
    tokens = tokens_of()
    for network in (ours, again):
        torch.manual_seed(3)
        network.train()(tokens, labels=tokens).loss.backward()
    assert worst(ours, again) == 0


_PROCESS = """
import copy, os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import gptkernels
from benchmarks.families import LANGUAGE_MODELS, Size

dist.init_process_group("gloo")
torch.manual_seed(0)
model = LANGUAGE_MODELS["GPT-2"](Size())
tokens = torch.randint(3, Size().vocabulary, (2, 17))
model(tokens, labels=tokens).loss.backward()
wanted = [p.grad for p in model.parameters()]

def check(network):
    network(tokens, labels=tokens).loss.backward()
    found = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in network.parameters()]
    assert max((p - q).abs().max() for p, q in zip(wanted, found, strict=True)) < 1e-6

model.zero_grad()
wanted = [w.clone() for w in wanted]
ours = copy.deepcopy(model)
gptkernels.accelerate(ours, impl="cpu")
sharded = copy.deepcopy(ours)
check(DistributedDataParallel(ours))
mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
for block in sharded.transformer.h:
    fully_shard(block.mlp, mesh=mesh)
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
check(sharded)
dist.destroy_process_group()
"""


def test_two_processes() -> None:
    """DistributedDataParallel, and FSDP2 of blocks and of swapped modules."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    common["PYTHONPATH"] = str(ROOT)
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PROCESS], env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], said


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_heads_too_wide_for_the_op_are_left_to_the_original(family: str) -> None:
    torch.manual_seed(0)
    model = LANGUAGE_MODELS[family](Size(heads=1, width=264, tokens=16)).eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours)
    tokens = tokens_of(9)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours(tokens)), logits(model(tokens)))


def test_transformers_is_not_imported_for_other_models() -> None:
    code = (
        "import sys, torch, gptkernels; gptkernels.accelerate(torch.nn.LayerNorm(4));"
        "gptkernels.GPT;"
        "sys.exit('transformers' in sys.modules)"
    )
    assert command(sys.executable, "-c", code).returncode == 0
