from __future__ import annotations

import copy
import dataclasses
import math
import re
import runpy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, FP16, IMPLEMENTATIONS, name_of, of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from gptkernels import GPT, GPTConfig
from gptkernels.core import philox
from gptkernels.truth import baseline, plain_gpt, reference
from gptkernels.truth.parity import K_FORWARD, K_GRADIENT, assert_parity, compare

SMALL = GPTConfig(vocab_size=37, block_size=16, n_layer=2, n_head=2, n_embd=16)


def batch(
    config: GPTConfig, B: int = 2, T: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    T = config.block_size if T is None else T
    tokens = torch.randint(config.vocab_size, (B, T + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def parameters(config: GPTConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Parameters large enough that each one matters, by name with the dots replaced."""
    state = {name: p.detach() for name, p in GPT(config).named_parameters()}
    return {
        name.replace(".", "__"): (tensor + 0.2 * torch.randn(tensor.shape)).to(dtype)
        for name, tensor in state.items()
    }


def twin_of_plain(config: GPTConfig) -> GPT:
    """The model with the plain one's operators: beside them the error of a kernel, carried through
    a whole model, is random."""
    return GPT(config).set_impl("torch")


def with_parameters(model: Any, tokens: Tensor, targets: Tensor | None = None) -> Any:
    """The model as a function of its parameters alone."""

    def function(**named: Tensor) -> Tensor:
        named = {name.replace("__", "."): tensor for name, tensor in named.items()}
        return functional_call(model, named, (tokens, targets), tie_weights=True)

    return function


# Configuration


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"norm": "middle"}, ValueError, "norm must be 'pre' or 'post', got 'middle'"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 2.5}, TypeError, r"window must be an int, got 2\.5"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"block_size": -4}, ValueError, "block_size must be at least 1, got -4"),
        ({"n_layer": True}, TypeError, "n_layer must be an int, got True"),
        ({"n_embd": 16.0}, TypeError, r"n_embd must be an int, got 16\.0"),
        ({"n_inner": 0}, ValueError, "n_inner must be at least 1, got 0"),
        ({"n_head": 5}, ValueError, "n_head must divide n_embd, got n_embd=768 and n_head=5"),
        ({"n_head": 1}, ValueError, "at most 512, got 768 / 1 = 768"),
        ({"approximate": "relu"}, ValueError, "approximate must be 'tanh' or 'none', got 'relu'"),
        ({"layer_norm_eps": 0.0}, ValueError, r"layer_norm_eps must be positive .* got 0\.0"),
        ({"layer_norm_eps": math.nan}, ValueError, "layer_norm_eps must be positive .* got nan"),
        ({"layer_norm_eps": "1"}, TypeError, "layer_norm_eps must be a number, got '1'"),
        ({"dropout": 1.1}, ValueError, r"dropout must be between 0 and 1, got 1\.1"),
        ({"dropout": math.nan}, ValueError, "dropout must be between 0 and 1, got nan"),
        ({"dropout": "0"}, TypeError, "dropout must be a number, got '0'"),
        ({"bias": 1}, TypeError, "bias must be True or False, got 1"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GPTConfig(**fields)


def test_unknown_name_and_frozen() -> None:
    with pytest.raises(
        ValueError,
        match=r"one of mini, gpt1, gpt2, gpt2-medium, gpt2-large, .*, gpt3-175B, got 'gpt5'",
    ):
        GPTConfig.named("gpt5")
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layer = 3  # type: ignore[misc]
    assert dataclasses.replace(SMALL, n_embd=32).d_inner == 128


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(
    # Of a parameter with a few elements the largest error is luck, PyTorch's too.
    heads=st.sampled_from([(12, 4), (6, 8), (3, 20), (1, 50)]),
    n_inner=st.sampled_from([None, 43]),
    approximate=st.sampled_from(["tanh", "none"]),
    bias=st.booleans(),
    norm=st.sampled_from(["pre", "post"]),
    window=st.sampled_from([None, 1, 3, 16]),
    eps=st.sampled_from([1e-5, 0.1]),
    T=st.integers(1, 16),
    seed=st.integers(0, 2**32),
)
def test_logits_and_gradients_are_those_of_the_plain_gpt(
    dtype: torch.dtype, heads: tuple[int, int], eps: float, T: int, seed: int, **fields: Any
) -> None:
    torch.manual_seed(seed)
    n_head, width = heads
    config = GPTConfig(29, 16, 2, n_head, n_head * width, layer_norm_eps=eps, **fields)
    tokens, _ = batch(config, 2, T, seed)
    twin = with_parameters(plain_gpt.PlainGPT(config), tokens)
    ours = with_parameters(twin_of_plain(config), tokens)
    assert_parity(ours, twin, twin, parameters(config, dtype))


def test_loss_is_that_of_the_plain_gpt() -> None:
    tokens, targets = batch(SMALL)
    targets[0, 3:9] = -100
    model, plain = twin_of_plain(SMALL), plain_gpt.PlainGPT(SMALL)
    plain.load_state_dict(model.state_dict())
    loss = model(tokens, targets)
    assert loss.shape == ()
    twin = with_parameters(plain, tokens, targets)
    assert_parity(with_parameters(model, tokens, targets), twin, twin, parameters(SMALL))
    counted = targets != -100
    by_hand = F.cross_entropy(model(tokens)[counted], targets[counted])
    torch.testing.assert_close(loss, by_hand)


def test_logits_depend_on_no_later_token() -> None:
    model = GPT(SMALL)
    tokens, _ = batch(SMALL)
    changed = tokens.clone()
    changed[:, 9] = (tokens[:, 9] + 1) % SMALL.vocab_size
    logits, other = model(tokens), model(changed)
    assert torch.equal(logits[:, :9], other[:, :9])
    assert (logits[:, 9:] != other[:, 9:]).any(-1).all()


def test_dtypes() -> None:
    tokens, targets = batch(SMALL)
    model = GPT(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens).dtype == torch.bfloat16
        loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    half = model.to(torch.bfloat16)
    assert half(tokens).dtype == torch.bfloat16
    assert half(tokens, targets).dtype == torch.float32


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_a_common_token_adds_up(dtype: torch.dtype, compiled: bool) -> None:
    wte = GPT(SMALL).to(dtype).transformer.wte
    embed = torch.compile(wte, fullgraph=True, backend="aot_eager") if compiled else wte
    embed(torch.full((4096,), 3)).sum().backward()
    assert (wte.weight.grad[3] == 4096).all()
    assert wte.weight.grad.sum() == 4096 * SMALL.n_embd


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_autocast_is_no_worse_than_the_plain_gpts(norm: str) -> None:
    """All parameters are one vector here: after several layers in bf16 the worst of the 16 numbers
    of a single bias is random."""
    config = dataclasses.replace(SMALL, norm=norm, n_layer=4)
    tokens, _ = batch(config)
    plain = plain_gpt.PlainGPT(config)
    named = parameters(config)
    sizes = [tensor.numel() for tensor in named.values()]

    def of_vector(model: Any, autocast: bool) -> Any:
        function = with_parameters(model, tokens)

        def call(vector: Tensor) -> Tensor:
            parts = zip(named, vector.split(sizes), strict=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return function(**{name: part.view_as(named[name]) for name, part in parts})

        return call

    vector = torch.cat([tensor.flatten() for tensor in named.values()])
    ours, plains = of_vector(twin_of_plain(config), True), of_vector(plain, True)
    assert_parity(ours, plains, of_vector(plain, False), dict(vector=vector))


@pytest.mark.parametrize(
    ("impl", "norm"),
    [*(of(impl, "pre", device="cpu") for impl in IMPLEMENTATIONS), ("torch", "post")],
)
def test_every_implementation_with_and_without_dropout(impl: str, norm: str) -> None:
    config = GPTConfig(29, 18, n_layer=2, n_head=2, n_embd=16, dropout=0.3, norm=norm)
    tokens, targets = batch(config)
    model = GPT(config).set_impl(impl)
    named = parameters(config)
    plain = with_parameters(plain_gpt.PlainGPT(config).eval(), tokens, targets)
    assert_parity(with_parameters(model.eval(), tokens, targets), plain, plain, named)

    def ours(**named: Tensor) -> Tensor:
        torch.manual_seed(11)
        return with_parameters(model.train(), tokens, targets)(**named)

    def twin(ops: Any) -> Any:
        return lambda **named: dropped_loss(ops, config, named, tokens, targets)

    assert_parity(ours, twin(baseline), twin(reference), named)


def dropped_loss(
    ops: Any, config: GPTConfig, named: dict[str, Tensor], tokens: Tensor, targets: Tensor
) -> Tensor:
    """The loss with dropout, written out: on the embedding, the attention, and each branch."""
    torch.manual_seed(11)
    p, H = config.dropout, config.n_head
    get = {name.removeprefix("transformer__"): tensor for name, tensor in named.items()}.__getitem__

    def drop(x: Tensor) -> Tensor:
        keep = philox.elementwise_keep(philox.draw("cpu"), p, x.shape)
        return torch.where(keep, x * philox.scale(p), 0)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get(f"{name}__weight"), get(f"{name}__bias"))

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, get(f"{name}__weight"), get(f"{name}__bias"))

    def attend(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(x, f"{name}__c_attn").unflatten(-1, (3, H, -1)).unbind(-3)
        attended = ops.attention(q, k, v, dropout_p=p, rng=philox.draw("cpu")).flatten(-2)
        return drop(linear(attended, f"{name}__c_proj"))

    def mlp(x: Tensor, name: str) -> Tensor:
        inner = F.gelu(linear(x, f"{name}__c_fc"), approximate="tanh")
        return drop(linear(inner, f"{name}__c_proj"))

    x = get("wte__weight")[tokens] + get("wpe__weight")[: tokens.shape[1]]
    if config.norm == "post":
        # Before no LayerNorm, whose contract it would be: PyTorch's own mask, that of fp32.
        x = x * F.dropout(torch.ones(x.shape), p)
        for i in range(config.n_layer):
            x = norm(x + attend(x, f"h__{i}__attn"), f"h__{i}__ln_1")
            x = norm(x + mlp(x, f"h__{i}__mlp"), f"h__{i}__ln_2")
    else:
        x = drop(x)
        for i in range(config.n_layer):
            x = x + attend(norm(x, f"h__{i}__ln_1"), f"h__{i}__attn")
            x = x + mlp(norm(x, f"h__{i}__ln_2"), f"h__{i}__mlp")
        x = norm(x, "ln_f")
    logits = x @ get("wte__weight").t()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_every_residual_add_is_inside_a_layer_norm() -> None:
    config = dataclasses.replace(SMALL, n_layer=3, dropout=0.1)
    model, (tokens, _) = GPT(config), batch(config)
    with Counting() as mode:
        model(tokens)
    counts = mode.counts
    assert counts["gptkernels.layer_norm_fwd.default"] == 2 * 3 + 1
    assert (
        counts["gptkernels.attention_fwd.default"] == counts["gptkernels.gelu_mlp_fwd.default"] == 3
    )
    assert counts["aten.add.Tensor"] == 1  # the two embeddings
    assert not any("dropout" in name or "clone" in name for name in counts)


# Parameters


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_tied_head(bias: bool) -> None:
    config = dataclasses.replace(SMALL, n_layer=1, bias=bias)
    model = GPT(config)
    both = ("weight", "bias") if bias else ("weight",)
    layers = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    expected = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    expected |= {f"transformer.h.0.{layer}.{kind}" for layer in layers for kind in both}
    expected |= {f"transformer.ln_f.{kind}" for kind in both}
    assert model.state_dict().keys() == expected
    assert model.lm_head.weight is model.transformer.wte.weight
    assert copy.deepcopy(model).state_dict().keys() == expected
    plain = plain_gpt.PlainGPT(config)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


class Adapted(nn.Module):
    """A layer inside an adapter, as peft wraps it: its weight is the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Any:
        return self.layer.weight


def test_it_moves_with_another_module_as_its_head() -> None:
    for other in (nn.Identity(), Adapted(GPT(SMALL).lm_head), None):
        model = GPT(SMALL)
        model.lm_head = Adapted(model.lm_head) if other is None else other
        model.to(BF16)
        assert {p.dtype for p in model.parameters()} == {BF16}
    assert model.lm_head.weight is model.transformer.wte.weight


def test_set_impl_reaches_every_layer() -> None:
    model = GPT(SMALL)
    assert model.set_impl("torch") is model
    layers = [module for module in model.modules() if hasattr(module, "impl")]
    assert len(layers) == 2 * 4 + 1
    assert {layer.impl for layer in layers} == {"torch"}
    with pytest.raises(ValueError, match="impl must be one of auto, torch, triton, cuda, cpu, got"):
        model.set_impl("fast")


# Use


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_model_compiles_whole(norm: str) -> None:
    config = dataclasses.replace(SMALL, norm=norm)
    model, plain = GPT(config), plain_gpt.PlainGPT(config)
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (16, 9):
        tokens, targets = batch(SMALL, T=T)
        results = []
        for twin in (compiled, plain, copy.deepcopy(plain).double()):
            loss = twin(tokens, targets)
            gradients = torch.autograd.grad(loss, list(twin.parameters()))
            results.append((loss.detach(), *gradients))
        for i, (ours, plains, truth) in enumerate(zip(*results, strict=True)):
            measured = compare(ours, plains, truth, k=K_GRADIENT if i else K_FORWARD)
            assert measured.passed, measured


@pytest.mark.parametrize(("norm", "recompute"), [("pre", "block"), ("post", "mlp")])
def test_it_compiles_whole_while_it_recomputes(norm: str, recompute: str) -> None:
    config = dataclasses.replace(SMALL, norm=norm, window=3, dropout=0.2)
    model = GPT(config).set_recompute(recompute)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, model):
        torch.manual_seed(1)
        loss = run(*batch(config))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results)  # the traced form of impl="torch" rounds elsewhere


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokens", "targets", "error", "message"),
    [
        ([[1]], None, TypeError, r"tokens must be a torch\.Tensor, got list"),
        ([[1]], zeros(1, 1), TypeError, r"tokens must be a torch\.Tensor, got list"),
        (zeros(1, 1), [[1]], TypeError, r"targets must be a torch\.Tensor, got list"),
        (zeros(1, 4).float(), None, TypeError, "tokens must be int64, got float32"),
        (zeros(1, 4).int(), None, TypeError, "tokens must be int64, got int32"),
        (zeros(4), None, ValueError, r"tokens must have shape \(B, T\) with T >= 1, got \(4,\)"),
        (zeros(2, 0), None, ValueError, r"with T >= 1, got \(2, 0\)"),
        (zeros(1, 17), None, ValueError, "tokens must fit into block_size=16, got T=17"),
        (torch.tensor([[0, 37]]), None, ValueError, r"tokens must lie in 0\.\.\.36 .*, got 37"),
        (torch.tensor([[0, -1]]), None, ValueError, r"tokens must lie in 0\.\.\.36 .*, got -1"),
        (zeros(1, 4), zeros(1, 4).float(), TypeError, "targets must be int64, got float32"),
        (zeros(1, 4), zeros(4), ValueError, r"shape of tokens, \(1, 4\), got \(4,\)"),
        (zeros(1, 1), zeros(1, 1) + 37, ValueError, r"targets must .* or be -100, got 37"),
        (zeros(1, 1), zeros(1, 1) - 1, ValueError, r"targets must .* or be -100, got -1"),
    ],
)
def test_bad_input(tokens: Any, targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GPT(SMALL)(tokens, targets)


def test_the_plain_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(plain_gpt.__file__, run_name="__main__")
    title, *rows = capsys.readouterr().out.splitlines()
    assert "fp64" in title
    found = {}
    for row in rows:
        dtype, *name = re.split(r" loss ", row)[0].split()
        found[dtype, *name] = [float(x) for x in re.findall(r"\d\.\de[-+]\d+", row)]
    ours, plain = ("gptkernels.GPT",), ("plain", "PyTorch")
    for dtype, most in (("float32", 1e-5), ("bfloat16", 0.05)):
        assert max(found[dtype, *ours]) < most
        assert found[dtype, *ours][1] < 2 * found[dtype, *plain][1]
