"""Modules inside a layer that are hooked, replaced or parametrised: outputs and gradients are those
of the same change in plain PyTorch, over two steps of training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import shaken
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.nn.utils import prune, weight_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from gptkernels import GPT, MLP, GPTConfig, LayerNorm, TransformerLayer
from gptkernels.nn.layers import set_impl
from gptkernels.nn.plain import not_plain
from gptkernels.truth import plain_gpt

# A hook on the backward pass of a model's first module warns that its input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

C, T = 16, 5
Change = Callable[[nn.Module], nn.Module | None]


class Lora(nn.Module):
    """An adapter that offers the weight of what it wraps, as peft's does."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        generator = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.b = nn.Parameter(0.1 * torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Twice(nn.Module):
    """Around another module, or as a parametrization."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Identity()

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return self.inner(2 * x, *rest, **named)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def subclass(module: Any) -> nn.Module:
    made = Scaled(module.in_features, module.out_features)
    made.load_state_dict(module.state_dict())
    return made


def pruned(module: nn.Module, name: str = "weight") -> None:
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(getattr(module, name).shape, generator=generator) < 0.5
    prune.custom_from_mask(module, name, mask)


def parametrized(module: nn.Module, name: str = "bias") -> None:
    register_parametrization(module, name, Twice())


def forward_hook(module: nn.Module) -> None:
    def scale(_: Any, __: Any, out: Any) -> Any:
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    module.register_forward_hook(scale)


def forward_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, given: (2 * given[0], *given[1:]))


def in_place_pre_hook(module: nn.Module) -> None:
    def scale(_: Any, given: Any) -> None:
        given[0].mul_(2)

    module.register_forward_pre_hook(scale)


def doubled(_: Any, gradients: Any, *__: Any) -> Any:
    return tuple(None if gradient is None else 2 * gradient for gradient in gradients)


def backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(doubled)


def backward_pre_hook(module: nn.Module) -> None:
    module.register_full_backward_pre_hook(doubled)


def own_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *given, **named: 2 * forward(*given, **named)  # type: ignore[assignment]


HOOKS: list[Change] = [
    forward_hook,
    forward_pre_hook,
    backward_hook,
    backward_pre_hook,
    own_forward,
]
ON_LINEAR: list[Change] = [Lora, subclass, pruned, parametrized, weight_norm, spectral_norm, *HOOKS]
ON_NORM: list[Change] = [lambda _: nn.RMSNorm(C), pruned, parametrized, *HOOKS]


def changed(model: nn.Module, name: str, change: Change) -> None:
    """Applies the change to the submodule of this name, or puts what it returns in its place."""
    torch.manual_seed(3)
    made = change(model.get_submodule(name))
    if made is not None:
        model.set_submodule(name, made)


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns outputs and gradients of two steps, and the output in evaluation."""
    found = []
    parameters = list(model.parameters())
    for _ in range(2):
        y = model(x)
        gradients = torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)
        found += [y.detach(), *(g for g in gradients if g is not None)]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0 if gradient is None else 0.02 * gradient)
    with torch.no_grad():
        return [*found, model.eval()(x)]


def assert_twins(ours: nn.Module, plain: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(trained(ours, x), trained(plain, x))


def mlps() -> tuple[MLP, nn.Module]:
    ours, plain = shaken(MLP(C, 24)), plain_gpt.MLP(plain_gpt.PlainConfig(n_embd=C, n_inner=24))
    plain.load_state_dict(ours.state_dict())
    return set_impl(ours, "torch"), plain  # rounds as plain PyTorch does


def layers(norm_first: bool, activation: Any = "gelu") -> tuple[TransformerLayer, nn.Module]:
    sizes = dict(d_model=C, nhead=2, dim_feedforward=24, dropout=0.0, activation=activation)
    plain = shaken(nn.TransformerEncoderLayer(**sizes, norm_first=norm_first))
    ours = TransformerLayer(**sizes, norm_first=norm_first)
    ours.load_state_dict(plain.state_dict())
    return set_impl(ours, "torch"), plain


def gpts(norm: str) -> tuple[GPT, nn.Module]:
    config = GPTConfig(vocab_size=31, block_size=8, n_layer=2, n_head=2, n_embd=C, norm=norm)
    ours, plain = shaken(GPT(config)), plain_gpt.PlainGPT(config)
    plain.load_state_dict(ours.state_dict())
    return set_impl(ours, "torch"), plain


def of(changes: list[Change]) -> Any:
    return pytest.mark.parametrize("change", changes, ids=lambda change: change.__name__)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", ["c_fc", "c_proj"])
@of(ON_LINEAR)
def test_mlp(name: str, change: Change) -> None:
    ours, plain = mlps()
    for model in (ours, plain):
        changed(model, name, change)
    assert ours.not_fused()["mlp"].startswith(name)
    assert_twins(ours, plain, torch.randn(2, T, C))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("linear1", change) for change in ON_LINEAR),
        *(("linear2", change) for change in (Lora, forward_hook)),
        *((name, change) for name in ("norm1", "norm2") for change in ON_NORM),
        *(("self_attn", change) for change in HOOKS if change is not own_forward),
        ("self_attn", lambda module: pruned(module, "in_proj_weight")),
        ("self_attn", lambda module: parametrized(module, "in_proj_bias")),
    ],
)
def test_transformer_layer(norm_first: bool, name: str, change: Change) -> None:
    ours, plain = layers(norm_first)
    for model in (ours, plain):
        changed(model, name, change)
    assert_twins(ours, plain, torch.randn(T, 2, C))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((f"h.{i}.{name}", change) for i, name in enumerate(["ln_1", "ln_2"]) for change in HOOKS),
        ("h.1.ln_1", lambda _: nn.LayerNorm(C)),
        ("h.0.ln_2", lambda _: nn.RMSNorm(C)),
        *(("h.1.attn.c_attn", change) for change in (Lora, pruned, *HOOKS)),
        *(("h.1.attn", change) for change in (Twice, in_place_pre_hook, *HOOKS)),
        ("h.0.mlp.c_fc", Lora),
    ],
)
def test_gpt(norm: str, name: str, change: Change) -> None:
    """c_attn may compute its input again only if that is what the norm gave."""
    ours, plain = gpts(norm)
    for model in (ours, plain):
        changed(model.transformer, name, change)
    assert_twins(ours, plain, torch.randint(31, (2, T)))


@of([forward_hook, in_place_pre_hook, backward_hook])
def test_a_hooked_block(change: Change) -> None:
    """GPT-1's second block: the norm of the first gave its input, before the hook."""
    ours, plain = gpts("post")
    number = 0 if change is forward_hook else 1
    for model in (ours, plain):
        changed(model.transformer, f"h.{number}", change)
    assert_twins(ours, plain, torch.randint(31, (2, T)))


def scale_linear(module: nn.Module, _: Any, out: Tensor) -> Tensor | None:
    return 2 * out if type(module) is nn.Linear else None


def test_hooks_of_all_modules() -> None:
    pair = mlps()
    handle = of_all_modules.register_module_forward_hook(scale_linear)
    try:
        assert_twins(*pair, torch.randn(2, T, C))
    finally:
        handle.remove()


def test_a_class_whose_forward_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, pair = nn.Linear.forward, mlps()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    assert_twins(*pair, torch.randn(2, T, C))


def test_an_activation_is_what_it_is_now() -> None:
    ours, plain = layers(False)
    for model in (ours, plain):
        model.activation = torch.relu
    assert_twins(ours, plain, torch.randn(T, 2, C))

    class Doubled(nn.GELU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert_twins(*layers(False, Doubled()), torch.randn(T, 2, C))


def test_a_hooked_layer_compiles_whole() -> None:
    ours, plain = layers(False)
    for model in (ours, plain):
        changed(model, "norm1", forward_hook)
        changed(model, "linear1", Lora)
        changed(model, "self_attn", lambda module: pruned(module, "in_proj_weight"))
    x = torch.randn(T, 2, C)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x))


def test_a_plain_module_stays_fused() -> None:
    """Also where its parameters are swapped, frozen or moved, and under torch.compile."""
    mlp, seen = MLP(C, 24).requires_grad_(False).bfloat16(), []
    assert mlp.not_fused() == {}

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x: Tensor) -> Tensor:
        seen.append(not_plain(mlp.c_fc, nn.Linear))
        return 2 * x

    traced(torch.ones(1))
    assert seen == [None]
    assert not_plain(LayerNorm(C), LayerNorm) is None
