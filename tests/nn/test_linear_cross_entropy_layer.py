"""`LinearCrossEntropy`; the loss of a head that a model has already; and GPT's loss, which is
that."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, DTYPES, FP32, IMPLEMENTATIONS, name_of, of
from models import shaken
from op_inputs import linear_cross_entropy_inputs
from right import assert_same
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import gptkernels
from gptkernels import GPT, GPTConfig, LinearCrossEntropy
from gptkernels.core import native
from gptkernels.gpt.model import RECOMPUTE
from gptkernels.nn import cross_entropy
from gptkernels.nn.cross_entropy import call_cross_entropy
from gptkernels.nn.layers import set_impl
from gptkernels.truth import baseline, reference
from gptkernels.truth.parity import assert_parity

C, V = 16, 37
Options = dict[str, Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """A list that gets the options of each call of the op."""
    seen: list[Options] = []
    op = cross_entropy.linear_cross_entropy

    def spy(*given: Any, **options: Any) -> Tensor:
        seen.append(options)
        return op(*given, **options)

    monkeypatch.setattr(cross_entropy, "linear_cross_entropy", spy)
    return seen


def inputs(dtype: torch.dtype = FP32, bias: bool = False) -> dict[str, Any]:
    return linear_cross_entropy_inputs(3, 7, C, V, dtype=dtype, bias=bias)


def with_parameters(layer: nn.Module, targets: Tensor) -> Callable[..., Tensor]:
    """The layer as a function of x and its parameters."""

    def function(x: Tensor, **named: Tensor) -> Tensor:
        return functional_call(layer, named, (x, targets))

    return function


# The layer


@pytest.mark.parametrize("bias", [False, True])
def test_state_is_that_of_a_linear_layer(bias: bool) -> None:
    torch.manual_seed(5)
    plain = nn.Linear(C, V, bias)
    torch.manual_seed(5)
    layer = LinearCrossEntropy(C, V, bias)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert_same(list(layer.parameters()), list(plain.parameters()))
    layer.load_state_dict(shaken(plain).state_dict())
    assert_same(list(layer.parameters()), list(plain.parameters()))
    assert "16, 37" in repr(layer)
    assert f"bias={bias}, reduction='mean'" in repr(layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_index": 3},
        {"label_smoothing": 0.3},
        {"z_loss": 0.1},
        {"softcap": 1.5},
        {"reduction": "sum"},
        {"reduction": "none"},
    ],
    ids=str,
)
def test_options_are_those_of_the_op(options: Options, dtype: torch.dtype) -> None:
    """By PyTorch's operators: beside those the error of a kernel on one number is luck."""
    bias = "z_loss" in options
    layer = set_impl(LinearCrossEntropy(C, V, bias, **options), "torch")
    tensors = inputs(dtype, bias)
    targets = tensors.pop("targets").clamp(min=0)
    targets[0, :4] = options.get("ignore_index", -100)
    if not bias:
        del tensors["bias"]

    def of_truth(module: Any) -> Callable[..., Tensor]:
        return lambda **named: module.linear_cross_entropy(**named, targets=targets, **options)

    function = with_parameters(layer, targets)
    assert_parity(function, of_truth(baseline), of_truth(reference), tensors)
    loss = function(**tensors)
    assert loss.dtype == FP32
    assert loss.shape == (targets.shape if options.get("reduction") == "none" else ())
    plain = with_parameters(set_impl(LinearCrossEntropy(C, V, bias), "torch"), targets)
    assert torch.equal(loss, plain(**tensors)) == (not options)


@pytest.mark.parametrize("impl", [of(impl, device="cpu") for impl in IMPLEMENTATIONS])
def test_implementations(impl: str) -> None:
    tensors = inputs()
    layer, plain = LinearCrossEntropy(C, V), nn.Linear(C, V, bias=False)
    set_impl(layer, impl).load_state_dict(plain.state_dict())
    loss = layer(tensors["x"], tensors["targets"])
    wanted = F.cross_entropy(plain(tensors["x"]).flatten(0, 1), tensors["targets"].flatten())
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_the_implementation_is_the_layers(
    calls: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LinearCrossEntropy(C, V)
    tensors = inputs()
    given = tensors["x"], tensors["targets"]
    for impl in ("auto", "torch"):
        set_impl(layer, impl)(*given)
        copy.deepcopy(layer)(*given)
        pickle.loads(pickle.dumps(layer))(*given)
        assert [call["impl"] for call in calls[-3:]] == [impl] * 3
    assert len(calls) == 6
    monkeypatch.setattr(native, "EMULATED", False)
    with pytest.raises(RuntimeError, match="impl='cuda': it runs on CUDA tensors"):
        set_impl(layer, "cuda")(*given)
    with pytest.raises(ValueError, match="impl must be one of auto"):
        set_impl(layer, "fast")


def test_a_weight_that_is_the_embedding_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.head = nn.Embedding(V, C), LinearCrossEntropy(C, V)
            self.head.weight = self.wte.weight

    model = set_impl(Model(), "torch")
    assert len(list(model.parameters())) == 1
    tokens = torch.randint(V, (2, 9))
    model.head(model.wte(tokens[:, :-1]), tokens[:, 1:]).backward()
    w = model.wte.weight.detach().clone().requires_grad_()
    logits = F.linear(F.embedding(tokens[:, :-1], w), w)
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(model.wte.weight.grad, w.grad)


def test_a_layer_that_is_narrowed_and_autocast() -> None:
    layer = set_impl(LinearCrossEntropy(C, V), "torch")
    tensors = inputs()
    x, targets = tensors["x"], tensors["targets"]
    wide = layer(x, targets)
    narrow = copy.deepcopy(layer).to(BF16)(x.to(BF16), targets)
    with torch.autocast("cpu", BF16):
        autocast = layer(x, targets)
    for loss in (narrow, autocast):
        assert loss.dtype == FP32
        assert loss != wide
        torch.testing.assert_close(loss, wide, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((0, V), ValueError, "d_model must be at least 1, got 0"),
        ((C, 0), ValueError, "classes must be at least 1, got 0"),
        ((C, 37.0), TypeError, r"classes must be an int, got 37\.0"),
        (("16", V), TypeError, "d_model must be an int, got '16'"),
    ],
)
def test_sizes_that_are_no_counts(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearCrossEntropy(*given)


def test_errors_are_those_of_the_op() -> None:
    x, targets = torch.randn(5, C), torch.randint(V, (5,))
    for options, message in (
        ({"reduction": "average"}, "reduction must be 'none', 'sum' or 'mean', got 'average'"),
        ({"label_smoothing": 1.5}, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"softcap": -1.0}, r"softcap must be at least 0 and finite, got -1\.0"),
        ({"z_loss": math.inf}, "z_loss must be at least 0 and finite, got inf"),
    ):
        layer = LinearCrossEntropy(C, V, **options)  # raises nothing yet
        with pytest.raises(ValueError, match=message):
            layer(x, targets)
    layer = LinearCrossEntropy(C, V)
    with pytest.raises(ValueError, match=r"targets must have shape \(5,\)"):
        layer(x, targets[:4])
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.\.36 \(V - 1\) or be ignore_"):
        layer(x, targets + V)


def test_accelerate_leaves_the_layer_alone() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(V, C), "n": nn.LayerNorm(C)})
    model["loss"] = LinearCrossEntropy(C, V)
    report = gptkernels.accelerate(model)
    assert [(row.name, row.why) for row in report.left] == [("loss", "a layer of gptkernels")]
    assert type(model["loss"]) is LinearCrossEntropy


# Somebody's head


class Adapted(nn.Module):
    """A linear layer and what an adapter adds, as LoRA does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(C, 2, False), nn.Linear(2, V, False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.base(x) + self.b(self.a(x))
        return added


class Capped(nn.Linear):
    """A linear layer of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(super().forward(x) / 3)


def hooked(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda module, given, out: 2 * out)
    return head


def another_forward(head: nn.Linear) -> nn.Module:
    forward = head.forward
    head.forward = lambda x: forward(x).flip(-1)  # type: ignore[method-assign]
    return head


def accelerated(head: nn.Linear) -> nn.Module:
    model = nn.ModuleDict({"wte": nn.Embedding(V, C), "head": head})
    gptkernels.accelerate(model, impl="torch")
    assert type(head) is not nn.Linear
    return head


HEADS: dict[str, tuple[Callable[[nn.Linear], nn.Module], bool]] = {
    "plain": (lambda head: head, True),
    "accelerated": (accelerated, True),
    "hooked": (hooked, False),
    "parametrised": (parametrizations.weight_norm, False),
    "adapted": (Adapted, False),
    "a subclass": (lambda head: Capped(C, V), False),
    "another forward": (another_forward, False),
    "fp64": (lambda head: head.double(), False),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_heads_that_are_more_than_a_linear_layer_are_called(
    name: str, bias: bool, calls: list[Options]
) -> None:
    make, plain = HEADS[name]
    head = shaken(make(nn.Linear(C, V, bias)))
    tensors = inputs()
    targets = tensors["targets"]
    x = tensors["x"].to(next(head.parameters()).dtype).requires_grad_()
    given = [x, *head.parameters()]
    loss = call_cross_entropy(head, x, targets, "torch")
    found = torch.autograd.grad(loss, given)
    assert [call["impl"] for call in calls] == ["torch"] * plain
    wanted = F.cross_entropy(head(x).flatten(0, 1) + 0, targets.flatten())
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, given))


@pytest.mark.parametrize("make", [lambda head: head, Adapted], ids=["plain", "adapted"])
def test_a_loss_in_bf16_is_summed_in_fp32(make: Any) -> None:
    head = make(nn.Linear(C, V)).to(BF16)
    tensors = inputs(BF16)
    loss = call_cross_entropy(head, tensors["x"], tensors["targets"], "torch")
    wide = F.cross_entropy(head(tensors["x"]).float().flatten(0, 1), tensors["targets"].flatten())
    torch.testing.assert_close(loss, wide, rtol=1e-6, atol=0)
    assert loss.dtype == FP32


# GPT's


CONFIG = GPTConfig(vocab_size=V, block_size=12, n_layer=2, n_head=2, n_embd=C)


def batch() -> tuple[Tensor, Tensor]:
    targets = torch.randint(V, (2, 12))
    targets[0, :3] = -100
    return torch.randint(V, (2, 12)), targets


def results(model: GPT, tokens: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss and its gradients."""
    loss = model(tokens, targets)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt_with_a_hooked_head_has_the_same_loss(tied: bool, calls: list[Options]) -> None:
    model = shaken(GPT(CONFIG)).set_impl("torch")
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn(V, C))
    given = batch()
    plain = results(model, *given)
    assert len(calls) == 1
    model.lm_head.register_forward_hook(lambda module, x, out: None)
    torch.testing.assert_close(results(model, *given), plain)
    assert len(calls) == 1


def test_a_gpts_loss_runs_by_its_implementation(calls: list[Options]) -> None:
    model, given = GPT(CONFIG), batch()
    for impl in ("auto", "torch"):
        model.set_impl(impl)(*given)
        assert calls[-1]["impl"] == impl
    assert len(calls) == 2
    model(given[0])
    assert len(calls) == 2


@pytest.mark.parametrize("what", RECOMPUTE)
def test_recomputation_leaves_the_loss_as_it_is(what: str, calls: list[Options]) -> None:
    model, given = shaken(GPT(CONFIG)).set_impl("torch"), batch()
    assert_same(
        results(model.set_recompute(what), *given), results(model.set_recompute("none"), *given)
    )
    assert len(calls) == 2
