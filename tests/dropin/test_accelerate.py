"""`accelerate` and `restore`: what they change, what they leave, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, FP32
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import gptkernels
from benchmarks.families import OTHERS, MinBlock, NanoAttention, NanoBlock, NanoNorm, NewGELU, Size
from gptkernels.dropin import mlp, probe
from gptkernels.dropin.swap import is_swapped, subclass

ADD_IMPL = pytest.mark.parametrize("impl", ["torch", "cpu"])


def block(**size: Any) -> NanoBlock:
    torch.manual_seed(0)
    return NanoBlock(Size(**size), bias=True)


def x_of(T: int = 9, width: int = 64) -> Tensor:
    return torch.randn(2, T, width)


def swapped(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_swapped(module)}


# What stays


def test_a_model_keeps_everything_but_its_classes() -> None:
    model = block()
    parameters, state = dict(model.named_parameters()), model.state_dict()
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    gptkernels.accelerate(model)
    assert swapped(model) == {
        "ln_1", "ln_2", "attn", "attn.c_attn", "attn.c_proj", "mlp", "mlp.c_fc", "mlp.c_proj",
    }  # fmt: skip
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in now)
    assert list(model.state_dict()) == list(state)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    for module, kind in zip(model.modules(), classes, strict=True):
        assert isinstance(module, kind)
        assert type(module).__name__ == kind.__name__
        assert type(module).__module__ == kind.__module__
    gptkernels.restore(model)
    assert [type(module) for module in model.modules()] == classes
    gptkernels.restore(model)  # there is nothing more to undo
    assert not swapped(model)


def test_copies_and_pickles_are_accelerated_too() -> None:
    model = block()
    gptkernels.accelerate(model, impl="cpu")
    x = x_of()
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert swapped(twin) == swapped(model)
        assert torch.equal(twin(x), y)
        gptkernels.restore(twin)
        assert not swapped(twin)
    kind = type(model.mlp)
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert "gptkernels impl='cpu'" in repr(model)


class Mine(subclass(mlp.MLP, nn.Sequential, "cpu", ())):  # type: ignore[misc]
    """A subclass of a new class."""


def test_somebodys_subclass_of_a_new_class_is_pickled_by_name() -> None:
    assert pickle.loads(pickle.dumps(Mine)) is Mine


def test_a_second_call_starts_anew() -> None:
    model = block()
    first = gptkernels.accelerate(model)
    assert gptkernels.accelerate(model).rows == first.rows
    gptkernels.accelerate(model, impl="torch", attention=False, mlps=False)
    assert swapped(model) == {"ln_1", "ln_2"}
    gptkernels.restore(model)
    assert type(model.ln_1) is NanoNorm


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"norms": False, "mlps": False}, {"attn"}),
        ({"attention": False, "mlps": False}, {"ln_1", "ln_2"}),
        ({"attention": False, "norms": False},
         {"mlp", "mlp.c_fc", "mlp.c_proj", "attn.c_attn", "attn.c_proj"}),
    ],
)  # fmt: skip
def test_parts_can_be_left_out(given: dict[str, bool], names: set[str]) -> None:
    model = block()
    report = gptkernels.accelerate(model, **given)
    assert swapped(model) == names == {row.name for row in report.swapped}


def test_a_model_may_move_and_change_its_dtype_afterwards() -> None:
    model = block()
    gptkernels.accelerate(model, impl="cpu")
    x = x_of().to(BF16)
    moved = copy.deepcopy(model).to(BF16)
    assert moved(x).dtype == BF16
    assert swapped(moved) == swapped(model)
    meta = copy.deepcopy(model).to("meta")
    with pytest.raises(RuntimeError, match="impl='cpu': it runs on CPU tensors"):
        meta(x_of().to("meta"))


def test_shared_modules_and_tied_parameters_stay_so() -> None:
    norm = nn.LayerNorm(8)
    model = nn.ModuleDict({"a": norm, "b": norm, "c": nn.Linear(8, 5), "d": nn.Embedding(5, 8)})
    model["c"].weight = model["d"].weight
    report = gptkernels.accelerate(model)
    assert [row.name for row in report.swapped] == ["a", "c"]
    assert model["a"] is model["b"]
    assert model["c"].weight is model["d"].weight


# What is left alone, at once or later


def test_hooks_are_called_as_before() -> None:
    model, said = block(), []
    x = x_of()
    for name in ("mlp", "attn", "ln_1", "attn.c_attn", "attn.resid_dropout"):
        hook = lambda module, given, out, name=name: said.append(name)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    model.get_submodule("mlp.c_fc").register_forward_hook(lambda module, given, out: 1.5 * out)
    y, order = model(x), list(said)
    report = gptkernels.accelerate(model)
    reasons = {row.name: row.why for row in report.left}
    assert reasons == {"mlp": "c_fc has hooks"}
    assert said == order  # by nobody else
    said.clear()
    assert torch.allclose(model(x), y, atol=1e-5)
    assert said == order


def doubled(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return 2 * out


@pytest.mark.parametrize(
    ("path", "inside"), [("mlp.c_fc", "mlp"), ("mlp.gelu", "mlp"), ("attn.attn_dropout", "attn")]
)
def test_a_child_that_is_hooked_later_is_called(path: str, inside: str) -> None:
    model = block(dropout=0.0)
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    x, called = x_of(), []
    if path == "attn.attn_dropout":  # nanoGPT's own forward calls it without flash alone
        model.attn = ours.attn = None  # type: ignore[assignment]
        model.attn = NanoAttention(Size(), bias=True, flash=False)
        ours.attn = copy.deepcopy(model.attn)
        gptkernels.accelerate(ours, impl="cpu")
    before = ours(x)
    for network in (model, ours):
        network.get_submodule(path).register_forward_hook(doubled)
    ours.get_submodule(path).register_forward_hook(lambda *_: called.append(path))
    assert torch.allclose(ours(x), model(x), atol=1e-5)
    assert called == [path]
    assert not torch.allclose(ours(x), before, atol=1e-3)


class Halving(nn.Linear):
    """A linear layer of a user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def parametrised(model: NanoBlock) -> None:
    parametrizations.weight_norm(model.mlp.c_fc)


def pruned(model: NanoBlock) -> None:
    prune.random_unstructured(model.mlp.c_proj, "weight", amount=0.5)


def subclassed(model: NanoBlock) -> None:
    model.mlp.c_proj = Halving(256, 64)


def quantised(model: NanoBlock) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def another_forward(model: NanoBlock) -> None:
    model.mlp.forward = lambda x: 3 * x  # type: ignore[method-assign]


def another_activation(model: NanoBlock) -> None:
    model.mlp.gelu = nn.ReLU()


CHANGES = [parametrised, pruned, subclassed, another_forward, another_activation]


@pytest.mark.parametrize("change", [*CHANGES, quantised])
@pytest.mark.filterwarnings("ignore:.*quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization:UserWarning")
def test_what_was_changed_before_is_left_alone(change: Any) -> None:
    model = block().eval()
    change(model)
    x = x_of()
    with torch.no_grad():
        y = model(x)
        report = gptkernels.accelerate(model, impl="cpu")
        assert torch.allclose(model(x), y, atol=1e-5)
    assert "ln_1" in swapped(model)
    assert "mlp" not in swapped(model)
    if change is not quantised:
        assert "mlp" in {row.name for row in report.left}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_afterwards_runs_as_it_is_then(change: Any) -> None:
    model = block().eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    for network in (model, ours):
        torch.manual_seed(3)
        change(network)
    x = x_of()
    assert torch.allclose(model(x), ours(x), atol=1e-5)


def test_layers_of_this_package_stay_as_they_are() -> None:
    model = nn.Sequential(nn.LayerNorm(64), gptkernels.MLP(64, 256))
    report = gptkernels.accelerate(model)
    assert swapped(model) == {"0"}
    assert [(row.name, row.why) for row in report.left] == [("1", "a layer of gptkernels")]


# What a module computes decides, not how it is called


class Wrong(nn.Module):
    """Has an MLP's parts."""

    def __init__(self, between: bool = False) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)
        self.drop, self.between = nn.Dropout(0.5), between

    def forward(self, x: Tensor) -> Tensor:
        if self.between:
            return self.c_proj(self.drop(self.act(self.c_fc(x))))
        return self.drop(self.c_proj(self.act(self.c_fc(x)))) + x


class Functional(nn.Module):
    """Drops out by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gelu, self.down = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(self.gelu(self.up(x)), 0.5, self.training))


class Numbered(Functional):
    """Drops out by a function and a number, as an attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(self.gelu(self.up(x)), self.dropout, self.training))


class Deaf(NanoAttention):
    """Has a number for its dropout, and drops nothing."""

    def forward(self, x: Tensor) -> Tensor:
        training, self.training = self.training, False
        y = super().forward(x)
        self.training = training
        return y


class InEvaluation(Functional):
    """Does something else in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gelu(self.up(x))) * (1 if self.training else 2)


class ClippedGELU(nn.Module):
    """transformers' "gelu_10"."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x).clip(-10, 10)


class ChannelNorm(NanoNorm):
    """Norms another dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


def banded() -> NanoAttention:
    """Sees the last 20 tokens."""
    module = NanoAttention(Size(), bias=True, flash=False)
    module.mask = module.mask - module.mask.tril(-20)
    return module


class Failing(Functional):
    """Cannot be run by itself."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("a context that is not there")


class ScaledNorm(NanoNorm):
    """A norm with another eps."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-2)


class OddGELU(nn.Module):
    """A GELU by the logistic function."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Bidirectional(NanoAttention):
    """Sees what follows."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).movedim(-2, -4).unbind(-2)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Wrong(), "its forward is not linear, GELU, linear and a dropout"),
        (Wrong(between=True), "its forward is not linear, GELU, linear and a dropout"),
        (Functional(), "its forward is not linear, GELU, linear and a dropout"),
        (Numbered(), "its forward is not linear, GELU, linear and a dropout"),
        (InEvaluation(), "its forward is not linear, GELU, linear and a dropout"),
        (ClippedGELU(), "it is another function than GELU, exact or by tanh"),
        (ChannelNorm(8, bias=True), "its forward is not that of a LayerNorm with an eps of 1e-5"),
        (banded(), "it has a buffer that is no causal mask"),
        (Deaf(Size(dropout=0.5), bias=True, flash=True),
         "its forward is not causal self-attention between c_attn and c_proj"),
        (Failing(), "its forward is not linear, GELU, linear and a dropout"),
        (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)),
         "its forward is not linear, GELU, linear and a dropout"),
        (ScaledNorm(8, bias=True), "its forward is not that of a LayerNorm with an eps of 1e-5"),
        (OddGELU(), "it is another function than GELU, exact or by tanh"),
        (Bidirectional(Size(), bias=True, flash=False),
         "its forward is not causal self-attention between c_attn and c_proj"),
        (nn.LayerNorm((3, 4)), "only a LayerNorm of the last dimension with a weight is fused"),
        (nn.LayerNorm(4, elementwise_affine=False),
         "only a LayerNorm of the last dimension with a weight is fused"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True),
         "add_bias_kv and add_zero_attn are not fused"),
        (nn.MultiheadAttention(514, 2), "heads are wider than 256"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_what_only_looks_like_it_is_left_alone(model: nn.Module, why: str) -> None:
    holder = nn.ModuleDict({"it": model, "norm": nn.LayerNorm(3)})
    report = gptkernels.accelerate(holder)
    assert [(row.name, row.why) for row in report.left if row.name == "it"] == [("it", why)]
    assert "it" not in swapped(holder)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@ADD_IMPL
def test_a_sequence_of_linear_gelu_linear(impl: str, approximate: str, bias: bool) -> None:
    model = nn.Sequential(
        nn.Linear(40, 70, bias=bias), nn.GELU(approximate), nn.Linear(70, 40), nn.Dropout(0.5)
    )
    ours = copy.deepcopy(model)
    report = gptkernels.accelerate(ours, impl=impl)
    assert report.swapped[0].name == ""
    x = torch.randn(300, 40)
    for network in (model, ours):
        torch.manual_seed(1)
        network.y = network(x)
    assert torch.allclose(model.y, ours.y, atol=1e-5)
    assert float((ours.y == 0).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_layers_that_are_alike_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with the same class, sizes and settings; a buffer may differ, and is looked at."""
    ran, run = [], probe._agrees
    monkeypatch.setattr(probe, "_agrees", lambda *given: ran.append(1) or run(*given))
    found = probe.Probe(nn.Module())
    for module in (Wrong(), Wrong(), Wrong(between=True)):
        mlp.match(module, found)
    assert len(ran) == 4  # by tanh and exactly, of two kinds


class Scaled(Functional):
    """Has a setting of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self._scale * self.down(self.gelu(self.up(x)))


class Sleeping(Functional):
    """Has a dropout by a function that drops nothing today."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(self.gelu(self.up(x)), self.drop_p, self.training))


def test_settings_decide() -> None:
    model = nn.ModuleList([Scaled(1.0), Scaled(2.0), Scaled(1.0), Sleeping()])
    gptkernels.accelerate(model)
    assert {"0", "2"} == swapped(model) & set("0123")


def test_a_default_device_changes_nothing() -> None:
    model = block()
    with torch.device("meta"):
        gptkernels.accelerate(model)
    assert "mlp" in swapped(model)
    assert "attn" in swapped(model)


def test_a_sequence_that_is_changed_later() -> None:
    def sequence() -> nn.Sequential:
        torch.manual_seed(0)
        layers = (nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.Dropout(0.0))
        return nn.Sequential(*layers)

    x = x_of(width=8)
    for change in (
        lambda m: m.append(nn.ReLU()), lambda m: m[:-1], lambda m: m[:3], lambda m: m[:2],
        lambda m: m.insert(0, nn.ReLU()), lambda m: m.pop(3) and m,
    ):  # fmt: skip
        model, ours = sequence(), sequence()
        gptkernels.accelerate(ours, impl="cpu")
        assert torch.allclose(change(ours)(x), change(model)(x), atol=1e-6)


def test_a_module_is_traced_as_before() -> None:
    model = block().eval()
    gptkernels.accelerate(model)
    traced = torch.fx.symbolic_trace(nn.Sequential(model.ln_1, model.mlp))
    x = x_of()
    assert torch.allclose(traced(x), model.mlp(model.ln_1(x)), atol=1e-5)


def test_a_probe_changes_nothing() -> None:
    model = block(dropout=0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    gptkernels.accelerate(model)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert model.attn.dropout == 0.5


# Calls that the ops do not take are the original's


class Named(nn.Module):
    """An MLP whose children and attributes have names that this package uses too."""

    names = facts = None
    parts = original_class = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act, self.original = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)
        self.impl, self.approximate, self.what = "fast", True, None

    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.original(self.act(self.linear(hidden)))


def test_names_of_the_users_are_the_users() -> None:
    model = Named()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    assert is_swapped(ours)
    x = x_of(width=8)
    assert torch.allclose(ours(x), model(x), atol=1e-6)
    assert torch.allclose(ours(x, 2.0), model(x, 2.0), atol=1e-6)
    assert torch.allclose(ours(hidden=x), model(x), atol=1e-6)
    assert ours.get_submodule("linear") is ours.linear
    assert (ours.impl, ours.approximate, ours.parts) == ("fast", True, 3)
    assert len(list(ours.parameters())) == 4
    norm = nn.LayerNorm(8)
    gptkernels.accelerate(norm, impl="cpu")
    assert torch.allclose(norm(input=x), F.layer_norm(x, (8,)), atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_tensors_that_the_ops_do_not_take(impl: str) -> None:
    model = block().eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl=impl)
    x = x_of()
    lying = torch.randn(2, 64, 9).transpose(1, 2)
    assert torch.allclose(ours(lying), model(lying), atol=1e-5)
    wide = [m.double()(x.double()) for m in (ours, model)]
    assert torch.allclose(*wide)
    each = [torch.func.vmap(m.float())(x[:, None]) for m in (ours, model)]
    assert torch.allclose(*each, atol=1e-5)
    nested = torch.nested.nested_tensor([torch.randn(3, 64), torch.randn(5, 64)])
    with torch.no_grad():
        found = ours.mlp.c_fc(nested).unbind()
    assert [tuple(part.shape) for part in found] == [(3, 256), (5, 256)]


def test_a_model_in_fp64_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="runs in float32, bfloat16 and float16, this model has"):
        gptkernels.accelerate(block().double(), impl="cpu")


def test_a_dropout_has_a_mode_of_its_own() -> None:
    """As for Monte Carlo dropout: the model evaluates, its dropouts drop."""
    model = NanoAttention(Size(dropout=0.5), bias=True, flash=False)
    gptkernels.accelerate(model, impl="cpu")
    x = x_of()
    model.eval()
    assert torch.equal(model(x), model(x))
    model.attn_dropout.train()
    assert not torch.equal(model(x), model(x))
    model.train().attn_dropout.eval()
    model.resid_dropout.eval()
    assert torch.equal(model(x), model(x))


def test_a_class_that_is_patched_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block()
    gptkernels.accelerate(model, impl="cpu")
    monkeypatch.setattr(type(block().mlp), "forward", lambda self, x: 7 * x)
    x = x_of()
    assert torch.equal(model.mlp(x), 7 * x)


def test_what_was_wrapped_afterwards_is_not_restored_in_silence() -> None:
    model = block()
    gptkernels.accelerate(model)
    parametrizations.weight_norm(model.mlp.c_fc)
    before = repr(model)
    for function in (gptkernels.restore, gptkernels.accelerate):
        with pytest.raises(RuntimeError, match=r"mlp\.c_fc was wrapped after accelerate"):
            function(model)
    assert repr(model) == before


# Precision and dispatch


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_auto_takes_the_kernels_where_there_is_enough_to_compute(dtype: torch.dtype) -> None:
    size = {"width": 256, "heads": 4, "tokens": 300}
    layer = nn.TransformerEncoderLayer(256, 4, 512, 0.0, "gelu", batch_first=True)
    for model in (block(**size), nn.TransformerEncoder(layer, 1)):
        model = model.to(dtype)
        ours = copy.deepcopy(model)
        gptkernels.accelerate(ours)
        x = torch.randn(2, 300, 256, dtype=dtype)
        with torch.profiler.profile() as seen:
            y = ours(x)
        names = {event.key for event in seen.key_averages()}
        assert {"gptkernels::attention_fwd", "gptkernels::gelu_mlp_fwd"} <= names
        adds = isinstance(model, nn.TransformerEncoder)
        assert ("gptkernels::layer_norm_fwd" in names) == (adds or dtype == BF16)
        assert torch.allclose(y, model(x), atol=1e-5 if dtype == FP32 else 0.1)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_few_rows_of_a_linear_layer(dtype: torch.dtype) -> None:
    model = nn.Linear(64, 48).to(dtype)
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    with torch.no_grad():
        for rows in (0, 1, 5, 16, 17):
            x = torch.randn(rows, 64, dtype=dtype)
            assert torch.allclose(ours(x), model(x), rtol=2e-2, atol=1e-2)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    assert ours(x).requires_grad


def test_autocast_gives_the_dtypes_of_the_model() -> None:
    model = block().eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    x = x_of()
    with torch.autocast("cpu", dtype=BF16):
        y, z = model(x), ours(x)
    assert y.dtype == z.dtype
    assert torch.allclose(y, z, atol=0.1)


def test_auto_asks_nothing_of_a_compiler() -> None:
    model = block().eval()
    gptkernels.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for T in (9, 11):
        x = x_of(T)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


# Refused


def test_refused_arguments() -> None:
    model = block()
    for given, error, message in (
        ({"impl": "fast"}, ValueError, "impl must be"),
        ({"norms": 1}, TypeError, "norms must be"),
    ):
        with pytest.raises(error, match=message):
            gptkernels.accelerate(model, **given)
    for function in (gptkernels.accelerate, gptkernels.restore):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
            function({})
    assert not swapped(model)


def test_a_model_with_nothing_to_swap_is_told_what_is_looked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"nothing to swap: .*nn\.LayerNorm.*it saw .*Conv2d"):
        gptkernels.accelerate(model)


def test_an_impl_that_cannot_run_is_refused_before_anything_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = block()
    gptkernels.accelerate(model, impl="torch")
    monkeypatch.setattr(
        "gptkernels.dropin.accelerate.unavailable", lambda *given: "there is no compiler"
    )
    with pytest.raises(RuntimeError, match="impl='cpu': there is no compiler"):
        gptkernels.accelerate(model, impl="cpu")
    assert "impl='torch'" in repr(model)


@pytest.mark.parametrize("accelerated", [False, True])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, accelerated: bool
) -> None:
    model = block()
    if accelerated:
        gptkernels.accelerate(model, impl="torch")
    before = repr(model)

    def failing(module: nn.Module, probe: Any) -> None:
        if type(module) is nn.Linear:
            raise KeyboardInterrupt

    monkeypatch.setattr("gptkernels.dropin.mlp.match", failing)
    with pytest.raises(KeyboardInterrupt):
        gptkernels.accelerate(model)
    assert repr(model) == before


def test_the_report_shows_like_modules_in_a_line() -> None:
    report = gptkernels.accelerate(OTHERS["minGPT"](Size()))
    text = str(report)
    assert text.splitlines()[0] == "gptkernels, impl='auto': 18 modules swapped, 0 left alone"
    assert "2 x NewGELU" in text
    assert "h.0.attn ..." in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    one = gptkernels.accelerate(nn.Linear(2, 2))
    assert str(one).startswith("gptkernels, impl='auto': 1 module swapped, 0 left alone\n")


@pytest.mark.parametrize("widths", [{}, {"kdim": 24, "vdim": 40}], ids=str)
def test_masks_of_multihead_attention(widths: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(64, 4, batch_first=True, **widths).eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    q = torch.randn(2, 9, 64)
    k, v = torch.randn(2, 12, model.kdim), torch.randn(2, 12, model.vdim)
    hidden = torch.rand(9, 12) < 0.3
    hidden[:, 0] = False
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, 8:] = True
    each = hidden.repeat(8, 1, 1)
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    added = torch.randn(9, 12)
    for given in (
        {}, {"attn_mask": hidden}, {"key_padding_mask": padding}, {"attn_mask": each},
        {"attn_mask": added}, {"attn_mask": hidden, "key_padding_mask": padding},
        {"attn_mask": added, "key_padding_mask": torch.zeros(2, 12).masked_fill(padding, -1e9)},
    ):  # fmt: skip
        y, z = (m(q, k, v, need_weights=False, **given)[0] for m in (model, ours))
        assert torch.allclose(y, z, atol=1e-5), given
    y, z = (m(q, k[:, :9], v[:, :9], attn_mask=causal, is_causal=True, need_weights=False)[0]
            for m in (model, ours))  # fmt: skip
    assert torch.allclose(y, z, atol=1e-5)
    for given in ({}, {"need_weights": True}):
        (y, seen), (z, w) = (m(q, k, v, **given) for m in (model, ours))
        assert torch.allclose(y, z, atol=1e-5)
        assert torch.allclose(seen, w, atol=1e-5)
    unbatched = [m(q[0], k[0], v[0], need_weights=False)[0] for m in (model, ours)]
    assert torch.allclose(*unbatched, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_of_pytorch(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(
        64, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerDecoder(layer, 2)
    ours = copy.deepcopy(model)
    report = gptkernels.accelerate(ours, impl="cpu")
    assert {"TransformerDecoderLayer", "MultiheadAttention"} <= {r.module for r in report.swapped}
    x, memory = torch.randn(2, 9, 64), torch.randn(2, 7, 64)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    y, z = (m(x, memory, mask, memory_key_padding_mask=padding) for m in (model, ours))
    assert torch.allclose(y, z, atol=1e-5)


def test_an_encoder_layer_that_is_called_without_a_mask_is_not_causal_in_silence() -> None:
    model = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True)
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    for network in (model, ours):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            network(x_of(), is_causal=True)


@pytest.mark.parametrize(
    ("activation", "given", "whats"),
    [
        ("gelu", {}, {"residual adds with LayerNorm as one op each"}),
        ("gelu", {"norms": False}, {"linear, GELU, linear as one op"}),
        ("relu", {"norms": False}, set()),
    ],
)
def test_parts_of_an_encoder_layer(activation: str, given: Any, whats: set[str]) -> None:
    model = nn.TransformerEncoderLayer(64, 4, 128, 0.0, activation, batch_first=True)
    report = gptkernels.accelerate(model, **given)
    assert {row.why for row in report.swapped if row.name == ""} == whats


def test_an_encoder_layer_takes_padding_and_nested_tensors() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl="cpu")
    x, padding = torch.randn(3, 9, 64), torch.zeros(3, 9, dtype=torch.bool)
    padding[1, 4:] = True
    for grad in (False, True):  # without gradients PyTorch makes a nested tensor
        with torch.set_grad_enabled(grad):
            y, z = (m(x, src_key_padding_mask=padding) for m in (model, ours))
        assert torch.allclose(y[~padding], z[~padding], atol=1e-5)


def test_written_out_gelus_become_one_operator() -> None:
    model = MinBlock(Size())
    ours = MinBlock(Size())
    ours.load_state_dict(model.state_dict())
    gptkernels.accelerate(ours)
    assert "mlp.act" in swapped(ours)
    x = torch.randn(50, 64)
    assert torch.allclose(NewGELU()(x), ours.mlp["act"](x), atol=1e-6)
