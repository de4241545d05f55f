"""Language models whose logits wait for their loss, beside the same models untouched: losses and
gradients, in every form in which people write the loss; and that nobody notices who looks at the
logits."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, FP32, name_of, of
from models import shaken
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gptkernels
from benchmarks.families import LANGUAGE_MODELS, OTHERS, Size
from gptkernels.core import choice
from gptkernels.dropin import logits as dropin
from gptkernels.dropin.logits import Logits
from gptkernels.dropin.swap import is_swapped
from gptkernels.truth.parity import K_GRADIENT, compare

# The logits have more numbers than all else: there are more tokens than a hidden state is wide, and
# more classes than an MLP is.
B, T, C, V = 2, 24, 16, 101
SIZE = Size(layers=1, heads=2, width=C, tokens=T, vocabulary=V)


class Small(nn.Module):
    """An embedding and a head."""

    def __init__(self, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(V, C), nn.Linear(C, V, bias)
        nn.init.normal_(self.wte.weight, std=0.2)  # so that logits are about 1, tied or not
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        logits: Tensor = self.head(self.wte(tokens))
        return logits


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=C, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=T, pad_token_id=2,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def gpt2() -> nn.Module:
    pytest.importorskip("transformers")
    return LANGUAGE_MODELS["GPT-2"](SIZE)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "nanoGPT": lambda: OTHERS["nanoGPT"](SIZE),
    "small": Small,
    "tied": lambda: Small(tied=True, bias=False),
}
THEIRS = ("GPT-2", "Llama")  # of transformers
Twins = tuple[Any, Any]


def twins(model: nn.Module | None = None, *, impl: str = "torch") -> Twins:
    """A model in training, and its accelerated copy."""
    model = shaken(Small() if model is None else model).train()
    ours = copy.deepcopy(model)
    gptkernels.accelerate(ours, impl=impl)
    return model, ours


def batch(T: int = T) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T)."""
    return torch.randint(3, V, (B, T)), torch.randint(4, V, (B, T))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Those of the parameters, which then have none."""
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def pooled(model: nn.Module) -> Tensor:
    """All gradients as one vector: the largest error of a few numbers is luck."""
    return torch.cat([g.flatten() for g in gradients(model).values() if g is not None])


def assert_right(
    results: Callable[[Any], tuple[Tensor, Tensor]], model: Any, ours: Any, dtype: torch.dtype
) -> None:
    """Of loss and gradients, where the head computes in `dtype`."""
    (loss, found), (plain_loss, plain) = results(ours), results(model)
    true_loss, true = results(copy.deepcopy(model).double())
    assert loss.dtype == plain_loss.dtype
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), true_loss.double(), rtol=rounding, atol=0)
    measured = compare(found, plain, true.double(), k=K_GRADIENT)
    assert measured.passed, measured


def same(model: nn.Module, ours: nn.Module, step: Callable[[Any], Any]) -> Any:
    """Asserts that step(model), which may go backward, and the gradients are the same for both.
    Returns what it gives for ours."""
    wanted, found = step(model), step(ours)
    close(found, wanted)
    close(gradients(ours), gradients(model))
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A list that gets the options of each call of the op, and whether autocast was on."""
    seen: list[dict[str, Any]] = []
    op = dropin.linear_cross_entropy

    def spy(x: Tensor, *given: Any, **options: Any) -> Tensor:
        assert not isinstance(x, Logits)
        loss = op(x, *given, **options)
        seen.append({**options, "rows": len(x), "autocast": torch.is_autocast_enabled("cpu")})
        return loss

    monkeypatch.setattr(dropin, "linear_cross_entropy", spy)
    return seen


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that PyTorch makes. The head must be called
    before: below a mode it gives logits at once."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, list | tuple) else [out]:
            if isinstance(made, Tensor) and not made.is_meta:
                self.numbers = max(self.numbers, made.numel())
        return out


def watched(model: Any, name: str, step: Callable[[Any], Any]) -> int:
    """The numbers in the largest tensor that step(model) makes once the head was called."""
    with contextlib.ExitStack() as stack:
        mode = Largest()
        head = model.get_submodule(name)
        hook = head.register_forward_hook(lambda *_: stack.enter_context(mode) and None)
        step(model)
    hook.remove()
    assert mode.numbers
    return mode.numbers


# The loss of whole models


def with_labels(tokens: Tensor, targets: Tensor, **given: Any) -> Callable[[Any], Tensor]:
    def step(model: Any) -> Tensor:
        loss: Tensor = model(tokens, labels=targets, **given).loss
        loss.backward()
        return loss

    return step


def as_nanogpt(tokens: Tensor, targets: Tensor) -> Callable[[Any], Tensor]:
    def step(model: Any) -> Tensor:
        logits = model(tokens)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        loss.backward()
        return loss

    return step


def step_of(name: str) -> Callable[[Any], Tensor]:
    tokens, targets = batch()
    targets[:, ::5] = -100 if name in THEIRS else -1
    return (with_labels if name in THEIRS else as_nanogpt)(tokens, targets)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize("impl", [of(impl, device="cpu") for impl in ("torch", "cpu")])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_of_a_model(
    name: str, impl: str, dtype: torch.dtype, calls: list[Any]
) -> None:
    model, ours = twins(MODELS[name]().to(dtype), impl=impl)
    step = step_of(name)

    def results(network: nn.Module) -> tuple[Tensor, Tensor]:
        return step(network).detach(), pooled(network)

    assert_right(results, model, ours, dtype)
    assert [call["impl"] for call in calls] == [impl]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_model_are_never_in_memory(name: str) -> None:
    model, ours = twins(MODELS[name]())
    head = "head" if name in ("small", "tied") else "lm_head"
    step = step_of(name)
    assert watched(model, head, step) >= B * T * V
    assert watched(ours, head, step) < B * (T - 1) * V


@pytest.mark.parametrize("name", THEIRS)
def test_labels_of_transformers(name: str, calls: list[Any]) -> None:
    model, ours = twins(MODELS[name]())
    tokens, labels = batch()
    labels[0, :9] = -100
    for given in ({"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(17)}):
        same(model, ours, with_labels(tokens, labels, **given))
    assert [call["reduction"] for call in calls] == ["sum"] * 2
    weights = torch.rand(B, T)

    def looking(network: Any) -> Tensor:
        """At the logits too, as for metrics."""
        out = network(tokens, labels=labels)
        confident = (out.logits.softmax(-1).amax(-1) * weights).sum()
        (out.loss + confident).backward()
        return out.loss

    same(model, ours, looking)
    assert len(calls) == 3


# Every form of the loss


def ce(logits: Tensor, targets: Tensor, **given: Any) -> Tensor:
    return F.cross_entropy(logits, targets, **given)


def rows(targets: Tensor) -> Tensor:
    return targets.reshape(-1)


Loss = Callable[[Tensor, Tensor], Tensor]
FORMS: dict[str, Loss] = {
    "view": lambda y, t: ce(y.view(-1, y.size(-1)), t.view(-1)),
    "view of all sizes": lambda y, t: ce(y.view(B * T, V), t.view(-1)),
    "by *shape": lambda y, t: ce(y.reshape(-1, *y.shape[2:]), rows(t)),
    "shifted, reshape": lambda y, t: ce(y[:, :-1].reshape(-1, V), rows(t[:, 1:])),
    "shifted, keeping all": lambda y, t: ce(y[:, :-1, :].flatten(0, 1), rows(t[:, 1:])),
    "shifted, contiguous": lambda y, t: ce(y[..., :-1, :].contiguous().view(-1, V), rows(t[:, 1:])),
    "flatten": lambda y, t: ce(y.flatten(0, 1), t.flatten()),
    "flatten by name": lambda y, t: ce(y.flatten(start_dim=0, end_dim=-2), t.flatten()),
    "torch.flatten": lambda y, t: ce(torch.flatten(y, end_dim=1), t.flatten()),
    "torch.reshape": lambda y, t: ce(torch.reshape(y, (-1, V)), t.flatten()),
    "float": lambda y, t: ce(y.float().view(-1, V), rows(t)),
    "to": lambda y, t: ce(y.view(-1, V).to(torch.float32), rows(t)),
    "named": lambda y, t: F.cross_entropy(input=y.view(-1, V), target=rows(t)),
    "smoothed": lambda y, t: nn.CrossEntropyLoss(
        label_smoothing=0.1, ignore_index=int(t[0, 0]), reduction="sum"
    )(y.view(-1, V), rows(t)),
    "each row": lambda y, t: (
        nn.CrossEntropyLoss(reduction="none")(y.view(-1, V), rows(t)) * torch.linspace(0, 1, B * T)
    ).sum(),
    "none counts": lambda y, t: ce(y.view(-1, V), torch.full((B * T,), -100)),
    "one text": lambda y, t: ce(y[0], t[0]),
    "text by text": lambda y, t: ce(y[0], t[0]) + ce(y[-1], t[-1]),
    "last token": lambda y, t: ce(y[:, -1], t[:, -1]),
    "every second token": lambda y, t: ce(y[:, ::2].flatten(0, 1), rows(t[:, ::2])),
    "in parts": lambda y, t: (
        ce(y[:, :7].flatten(0, 1), rows(t[:, :7])) + ce(y[:, 7:].flatten(0, 1), rows(t[:, 7:]))
    ),
    "all columns": lambda y, t: ce(y[..., :V].view(-1, V), rows(t)),
    "many shapes": lambda y, t: ce(y.view(-1, V).view(T, B, V)[3:].flatten(0, 1), rows(t)[3 * B :]),
    "twice": lambda y, t: (
        ce(y.view(-1, V), rows(t)) + ce(y.view(-1, V), rows(t), label_smoothing=0.5)
    ),
}


def looked(y: Tensor, look: Callable[[Tensor], Any]) -> Tensor:
    look(y)
    return y


def changed(y: Tensor, t: Tensor, change: Callable[[Tensor], Any], before: bool = False) -> Tensor:
    """The loss of logits that were changed in place; of a view that was made before, say."""
    flat = y.view(-1, V) if before else None
    change(y)
    return ce(y.view(-1, V) if flat is None else flat, rows(t))


def setting(y: Tensor) -> None:
    y[..., 3] = -torch.inf


def of_a_copy(y: Tensor, t: Tensor) -> Tensor:
    """A copy does not see what happens to the logits afterwards."""
    shifted = y[:, :-1].contiguous().view(-1, V)
    y.mul_(3)
    return ce(shifted, rows(t[:, 1:])) + y.square().mean()


def of_a_view(y: Tensor, t: Tensor) -> Tensor:
    """The logits see what happens to a view of them."""
    y.view(-1, V)[:9].mul_(3)
    return ce(y.view(-1, V), rows(t))


def under_no_grad(y: Tensor, t: Tensor) -> Tensor:
    """A view that was made without gradients passes none on."""
    with torch.no_grad():
        flat = y.view(-1, V)
        assert not ce(flat, rows(t)).requires_grad
    return ce(flat, rows(t)) + ce(y.view(-1, V), rows(t), label_smoothing=0.5)


class Square(torch.autograd.Function):
    """Somebody's own function, which gets the logits as they are."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 2 * y * dy


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "masked_fill_": lambda y: y.masked_fill_(torch.arange(V) < 4, -1e4),
    "a column": setting,
    "mul_": lambda y: y.mul_(0.5),
    "+=": lambda y: y.__iadd__(torch.linspace(0, 1, V)),
    "F.relu_": lambda y: F.relu(y, inplace=True),
    "out=": lambda y: torch.mul(y.detach(), 2.0, out=y.detach()),
    "data": lambda y: y.data.clamp_(-0.1, 0.1),
}
LOOKS: dict[str, Loss] = {
    "argmax before": lambda y, t: ce(
        looked(y, torch.no_grad()(lambda y: y.argmax(-1))).view(-1, V), rows(t)
    ),
    "argmax in inference mode": lambda y, t: ce(
        looked(y, torch.inference_mode()(lambda y: y.argmax(-1))).view(-1, V), rows(t)
    ),
    "a view, looked at": lambda y, t: ce(
        looked(y.view(-1, V), torch.no_grad()(lambda y: y.argmax(-1))), rows(t)
    ),
    "views without gradients": under_no_grad,
    "arithmetic": lambda y, t: ce((y / 0.7).view(-1, V), rows(t)),
    "arithmetic from the left": lambda y, t: ce((2 * y - y.mean()).view(-1, V), rows(t)),
    "softmax": lambda y, t: y.softmax(-1).square().sum(),
    "log_softmax": lambda y, t: -y.log_softmax(-1).gather(-1, t[..., None]).mean(),
    "nll_loss": lambda y, t: F.nll_loss(F.log_softmax(y.view(-1, V), -1), rows(t)),
    "transposed": lambda y, t: ce(y.transpose(1, 2), t),
    "mT": lambda y, t: ce(y.mT, t),
    "class weights": lambda y, t: ce(
        y.view(-1, V), rows(t), weight=torch.linspace(0.1, 2, V, dtype=y.dtype)
    ),
    "probabilities": lambda y, t: ce(y.view(-1, V), F.one_hot(rows(t), V).to(y.dtype)),
    "their own probabilities": lambda y, t: ce(y.view(-1, V), y.view(-1, V).softmax(-1)),
    "size_average": lambda y, t: ce(y.view(-1, V), rows(t), reduce=True),
    "a mask": lambda y, t: ce(y[t > 9], t[t > 9]),
    "indices": lambda y, t: ce(y[:, torch.tensor([0, 5])].flatten(0, 1), rows(t[:, [0, 5]])),
    "a list": lambda y, t: ce(y[:, [0, 5]].flatten(0, 1), rows(t[:, [0, 5]])),
    "a new dimension": lambda y, t: ce(y[None, 0, -1], t[0, -1:]),
    "some columns": lambda y, t: ce(y[..., :10].reshape(-1, 10), rows(t) % 10),
    "as many columns as a hidden state has": lambda y, t: (
        ce(y[..., :C].flatten(0, 1), rows(t) % C) + ce(y.view(-1, V)[:, :C], rows(t) % C)
    ),
    "columns of a view": lambda y, t: ce(y.view(-1, V)[:, 1:], rows(t) - 1),
    "another last size": lambda y, t: ce(y.view(-1, V * T), t[:, 0]),
    "as flat numbers": lambda y, t: y.flatten().square().mean(),
    "permuted": lambda y, t: ce(y.permute(1, 0, 2).reshape(-1, V), rows(t.t())),
    "stacked": lambda y, t: ce(torch.stack([y, y * 2]).view(-1, V), rows(t).repeat(2)),
    "cat of views": lambda y, t: ce(torch.cat([y[0], y[1, 3:]]), torch.cat([t[0], t[1, 3:]])),
    "unbound": lambda y, t: torch.stack([ce(*z) for z in zip(y.unbind(), t, strict=True)]).sum(),
    "iterated": lambda y, t: torch.stack([ce(*z) for z in zip(y, t, strict=True)]).sum(),
    "detached": lambda y, t: ce(y.view(-1, V) - y.detach().view(-1, V).amax(), rows(t)),
    "a function of one's own": lambda y, t: Square.apply(y).mean(),
    "a function of one's own, in another shape": lambda y, t: Square.apply(y[0]).mean(),
    "fp64": lambda y, t: ce(y.double().view(-1, V), rows(t)),
    "to fp64": lambda y, t: ce(y.to(dtype=torch.float64).view(-1, V), rows(t)),
    "of a copy": of_a_copy,
    "of a view": of_a_view,
    "of a clone": lambda y, t: ce(y.clone().view(-1, V), rows(t)),
    **{
        f"{name}, {'before' if before else 'after'}": lambda y, t, change=change, before=before: (
            changed(y, t, change, before)
        )
        for name, change in CHANGES.items()
        for before in (False, True)
    },
}  # fmt: skip


def backward_of(loss: Loss, tokens: Tensor, targets: Tensor) -> Callable[[Any], Tensor]:
    def step(model: Any) -> Tensor:
        found = loss(model(tokens), targets)
        found.backward()
        return found

    return step


@pytest.mark.parametrize("form", FORMS)
def test_forms_without_logits_in_memory(form: str, calls: list[Any]) -> None:
    model, ours = twins()
    step = backward_of(FORMS[form], *batch())
    same(model, ours, step)
    assert calls
    sizes = [watched(network, "head", step) for network in (model, ours)]
    assert sizes[0] >= V * calls[-1]["rows"] or form == "none counts"
    assert sizes[1] <= max(V, B * T) * C


@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_at_the_logits_gets_them(look: str, calls: list[Any]) -> None:
    model, ours = twins()
    same(model, ours, backward_of(LOOKS[look], *batch()))
    assert not calls


def test_a_column_of_as_many_tokens_as_classes(calls: list[Any]) -> None:
    """It looks like a row of logits."""
    model, ours = twins()
    tokens, targets = batch(V)
    for column in ((..., 0), (slice(None), slice(None), 5), (0, ..., -1)):
        for function in (torch.square, Square.apply):
            loss = lambda y, t, at=column, f=function: f(y[at]).mean()  # noqa: E731
            same(model, ours, backward_of(loss, tokens, targets))
    same(model, ours, backward_of(lambda y, t: ce(y[..., 0], t[:, 0]), tokens, targets))
    assert not calls
    # Dimension 1 has the classes, and as many tokens as classes are no classes.
    same(model, ours, backward_of(lambda y, t: ce(y, t), tokens, targets))
    assert not calls


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens_at_all(reduction: str) -> None:
    model, ours = twins()
    tokens = torch.randint(3, V, (0,))

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return ce(y, t, reduction=reduction).sum() + ce(y.view(-1, V), t, reduction=reduction).sum()

    same(model, ours, backward_of(loss, tokens, tokens))


def test_both_the_loss_and_the_logits(calls: list[Any]) -> None:
    """A loss before somebody looks, and one after."""
    model, ours = twins()
    tokens, targets = batch()

    def both(y: Tensor, t: Tensor) -> Tensor:
        first = ce(y.view(-1, V), rows(t))
        entropy = -(y.softmax(-1) * y.log_softmax(-1)).sum(-1).mean()
        return first + entropy + ce(y.view(-1, V), rows(t), label_smoothing=0.1)

    same(model, ours, backward_of(both, tokens, targets))
    assert len(calls) == 1


# Precision


@pytest.mark.parametrize("inside", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_autocast_is_that_of_the_head(
    inside: tuple[bool, bool], wide: bool, calls: list[Any]
) -> None:
    model, ours = twins()
    tokens, targets = batch()

    def narrow(on: bool) -> Any:
        return torch.autocast("cpu", BF16, enabled=on)

    def results(network: Any) -> tuple[Tensor, Tensor]:
        true = network.head.weight.dtype == torch.float64
        with narrow(inside[0] and not true):
            y = network(tokens)
        with narrow(inside[1] and not true):
            loss = ce((y.float() if wide and not true else y).view(-1, V), rows(targets))
        loss.backward()
        return loss.detach(), pooled(network)

    assert_right(results, model, ours, BF16 if inside[0] else FP32)
    assert [call["autocast"] for call in calls] == [inside[0]]
    with narrow(inside[0]):
        logits = [network(tokens) for network in (model, ours)]
    with narrow(inside[1]):
        seen = [y + 0 for y in logits]
    assert seen[0].dtype == seen[1].dtype == (BF16 if inside[0] else FP32)
    assert torch.equal(*seen)


@pytest.mark.parametrize("form", ["view", "float", "to", "each row", "shifted, contiguous"])
def test_a_loss_has_the_dtype_of_pytorchs(form: str, calls: list[Any]) -> None:
    model, ours = twins(Small().to(BF16))
    y = backward_of(FORMS[form], *batch())
    found, wanted = y(ours), y(model)
    assert found.dtype == wanted.dtype
    assert torch.allclose(found.float(), wanted.float(), rtol=0.03)
    assert all(p.grad.dtype == BF16 for p in ours.parameters())
    assert calls


# Training loops


def test_gradients_of_micro_batches_add_up(calls: list[Any]) -> None:
    model, ours = twins()
    batches = [batch() for _ in range(4)]

    def step(network: Any) -> Tensor:
        total = torch.zeros(())
        for tokens, targets in batches:
            loss = ce(network(tokens).view(-1, V), rows(targets)) / 4
            loss.backward()
            total += loss.detach()
        return total

    same(model, ours, step)
    assert len(calls) == 4


def test_backward_twice() -> None:
    model, ours = twins()
    tokens, targets = batch()

    def step(network: Any) -> Tensor:
        loss = ce(network(tokens).view(-1, V), rows(targets))
        loss.backward(retain_graph=True)
        (3 * loss).backward()
        return loss

    same(model, ours, step)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["the head", "with its loss"])
def test_checkpointed(reentrant: bool, whole: bool, calls: list[Any]) -> None:
    model, ours = twins()
    tokens, targets = batch()

    def step(network: Any) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            y: Tensor = network.head(x)
            return ce(y.view(-1, V), rows(targets)) if whole else y

        found = checkpoint(inner, network.wte(tokens), use_reentrant=reentrant)
        loss: Tensor = found if whole else ce(found.view(-1, V), rows(targets))
        loss.backward()
        return loss

    same(model, ours, step)
    # Without gradients, as at first, the head gives logits.
    assert bool(calls) == (whole or not reentrant)


def test_checkpointed_model_of_transformers(calls: list[Any]) -> None:
    model, ours = twins(gpt2())
    for network in (model, ours):
        network.gradient_checkpointing_enable()
    same(model, ours, with_labels(*batch()))
    assert calls


def test_some_steps_of_an_optimizer(calls: list[Any]) -> None:
    model, ours = twins(Small(tied=True))
    batches = [batch() for _ in range(3)]
    for network in (model, ours):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        for tokens, targets in batches:
            optimizer.zero_grad()
            as_nanogpt(tokens, targets)(network)
            optimizer.step()
    close(ours.state_dict(), model.state_dict())
    assert len(calls) == 3


CHANGED = "have changed since, by an optimizer's step say: look at them before, or call"


@pytest.mark.parametrize("what", ["weight", "bias", "hidden"])
@pytest.mark.parametrize(
    "look", [lambda y: y + 1, FORMS["view"], lambda y: y[:, :2]], ids=["look", "loss", "cut"]
)
def test_what_changed_before_anybody_looked_is_said(what: str, look: Any) -> None:
    """Also of logits in another shape, be their hidden states a view or a copy."""
    _, ours = twins()
    tokens, targets = batch()
    strided = nn.Parameter(torch.randn(T, B, C)).transpose(0, 1)  # its rows are copied
    for hidden in (ours.wte(tokens), strided):
        logits = ours.head(hidden)
        each = (logits, logits.view(-1, V)) if look is not FORMS["view"] else (logits,)
        with torch.no_grad():
            (hidden if what == "hidden" else getattr(ours.head, what)).add_(1.0)
        for y in each:
            with pytest.raises(RuntimeError, match=CHANGED):
                look(y, targets) if look is FORMS["view"] else look(y)


def test_what_was_computed_before_a_step_stays() -> None:
    _, ours = twins()
    tokens, targets = batch()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    y, other = ours(tokens), ours(tokens)
    seen, loss = y + 0, ce(other.view(-1, V), rows(targets))
    value = loss.item()
    loss.backward()
    optimizer.step()
    assert torch.equal(y, seen)
    assert loss.item() == value
    with pytest.raises(RuntimeError, match=CHANGED):
        ce(other.view(-1, V), rows(targets))


# Those who look


def test_facts_need_no_logits() -> None:
    model, ours = twins()
    tokens, _ = batch()
    y, z = model(tokens), ours(tokens)
    assert isinstance(z, Logits)
    assert isinstance(z, Tensor)
    assert torch.is_tensor(z)
    for fact in (
        lambda y: (y.shape, y.size(), y.size(-1), y.size(dim=1), y.dim(), y.ndim, len(y)),
        lambda y: (y.dtype, y.device, y.layout, y.requires_grad, y.is_cpu, y.is_cuda, y.numel()),
    ):
        assert fact(z) == fact(y)
    assert z._found is None
    assert torch.equal(z, y)
    for fact in (lambda y: y.is_leaf, lambda y: y.stride(), repr, lambda y: f"{y.mean():.3f}"):
        assert fact(z) == fact(y)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the error that it raises."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def saved(y: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    loaded: Tensor = torch.load(file)
    return loaded


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y.numpy(),
        lambda y: copy.deepcopy(y),
        lambda y: y.detach().numpy().tolist(),
        lambda y: y.tolist(),
        lambda y: float(y[0, 0, 0]),
        lambda y: bool(y),
        lambda y: y.view(-1, V + 1),
        lambda y: y.flatten(2, 1),
        lambda y: y[7],
        lambda y: y[..., :-1, :, :, :],
        lambda y: y.backward(),
        lambda y: y.view(torch.int32).sum().item(),
        lambda y: ce(y.view(-1, V), torch.full((B * T,), V)),
        lambda y: ce(y.view(-1, V), torch.full((B * T,), -3)),
        lambda y: ce(y.view(-1, V), torch.zeros(B * T + 1, dtype=torch.int64)),
        lambda y: ce(y.view(-1, V), torch.zeros(B * T, dtype=torch.int32)),
        lambda y: ce(y.view(-1, V), torch.zeros(B * T, dtype=torch.int64), label_smoothing=2.0),
        lambda y: ce(y.view(-1, V), torch.zeros(B * T, dtype=torch.int64), reduction="average"),
        lambda y: ce(y, torch.zeros(B, T, dtype=torch.int64)),
    ],
)  # fmt: skip
def test_errors_and_numbers_are_pytorchs(use: Callable[[Tensor], Any]) -> None:
    model, ours = twins()
    tokens, _ = batch()
    found, wanted = (outcome(lambda n=n: use(n(tokens))) for n in (ours, model))
    assert found == wanted
    assert not isinstance(found, Tensor)


@pytest.mark.parametrize(
    "kept", [saved, copy.copy, lambda y: pickle.loads(pickle.dumps(y)), lambda y: y.data]
)
def test_copies_are_plain_tensors(kept: Callable[[Tensor], Tensor]) -> None:
    model, ours = twins()
    tokens, _ = batch()
    found = kept(ours(tokens))
    assert type(found) is Tensor
    assert torch.equal(found, kept(model(tokens)))


def test_gradients_by_hand() -> None:
    model, ours = twins()
    tokens, _ = batch()
    dy = torch.randn(B, T, V)
    parameters = [list(network.parameters()) for network in (model, ours)]
    wanted = torch.autograd.grad(model(tokens), parameters[0], dy)
    close(torch.autograd.grad(ours(tokens), parameters[1], dy), wanted)
    close(torch.autograd.grad([ours(tokens)], parameters[1], [dy]), wanted)
    same(model, ours, lambda network: network(tokens).backward(dy))
    same(model, ours, lambda network: network(tokens).view(-1, V).backward(gradient=dy.view(-1, V)))
    same(model, ours, lambda network: torch.autograd.backward([network(tokens)], [dy]))


def test_hooks_of_logits_come_before_the_loss() -> None:
    model, ours = twins()
    tokens, targets = batch()

    def step(network: Any) -> list[Tensor]:
        seen: list[Any] = []
        y = network(tokens)
        y.retain_grad()
        y.register_hook(lambda dy: seen.append(dy) or dy * 2)
        flat = y.view(-1, V)
        flat.register_hook(seen.append)
        ce(flat, rows(targets)).backward()
        return [*seen, y.grad]

    assert len(same(model, ours, step)) == 3
    y = ours(tokens)
    flat = y.view(-1, V)
    with torch.no_grad():
        ce(flat, rows(targets))
    y.register_hook(lambda _: None)  # that loss has no gradients
    y = ours(tokens)
    flat = y.view(-1, V)
    ce(flat, rows(targets))
    late_grad: list[Any] = [lambda: y.grad, lambda: torch.autograd.grad(y.sum(), [flat])]
    for late in (
        y.retain_grad, flat.retain_grad, lambda: y.register_hook(lambda _: None), *late_grad
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="a loss of these logits was computed before"):
            late()


def test_a_view_of_some_tokens_is_refused_as_pytorch_does() -> None:
    """Their rows do not lie side by side."""
    for network in twins():
        y = network(batch()[0])
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            y[:, :-1].view(-1, V)
        assert y[:, :-1].reshape(-1, V).shape == (y.shape[0] * (y.shape[1] - 1), V)


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    """By the loss, and by an autograd.Function that gets the logits as they are."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y * 2

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> Tensor:
            return dy[0] * 2

    hidden = nn.Parameter(torch.randn(6, C), requires_grad=frozen == "head")
    model = nn.ModuleDict({"wte": nn.Embedding(V, C), "head": nn.Linear(C, V)})
    model["head"].requires_grad_(frozen == "body")
    gptkernels.accelerate(model)
    leaves = [p for p in (hidden, *model["head"].parameters()) if p.requires_grad]
    targets = torch.randint(V, (6,))
    for loss in (ce, lambda y, t: ce(Twice.apply(y), t)):
        found = torch.autograd.grad(loss(model["head"](hidden), targets), leaves)
        plain = loss(F.linear(hidden, model["head"].weight, model["head"].bias), targets)
        for mine, wanted in zip(found, torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(mine, wanted)


def test_a_function_that_changes_its_argument_is_refused() -> None:
    """It would be done to memory that is not there."""
    _, ours = twins()
    tokens, _ = batch()
    said = pytest.raises(NotImplementedError, match="before they were computed; call gptkernels")
    with said, torch._C.DisableTorchFunctionSubclass():  # as a call from C++
        ours(tokens).mul_(2.0)


# Hooks, and calls of other kinds


def doubled(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return 2 * out


@pytest.mark.parametrize("name", ["head", ""])
@pytest.mark.parametrize(
    ("kind", "hook", "waits"),
    [
        ("forward_pre_hook", lambda module, given: None, True),
        ("forward_hook", lambda module, given, out: None, True),
        ("forward_hook", lambda module, given, out: out.view(T, B, V), True),
        ("forward_hook", doubled, False),
        ("full_backward_hook", lambda module, dx, dy: None, False),
        ("full_backward_pre_hook", lambda module, dy: (3 * dy[0],), False),
    ],
)  # fmt: skip
def test_hooks_of_modules(name: str, kind: str, hook: Any, waits: bool, calls: list[Any]) -> None:
    model, ours = twins()
    for network in (model, ours):
        getattr(network.get_submodule(name), f"register_{kind}")(hook)
    same(model, ours, as_nanogpt(*batch()))
    assert bool(calls) == waits


def test_a_hook_that_changes_the_hidden_states(calls: list[Any]) -> None:
    model, ours = twins()
    for network in (model, ours):
        network.head.register_forward_pre_hook(lambda module, given: (given[0] * 1.5,))
    same(model, ours, as_nanogpt(*batch()))
    assert len(calls) == 1


def plain(model: Any, *given: Any) -> Tensor:
    found: Tensor = model(*given)
    assert type(found) is Tensor
    return found


def test_no_waiting_without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ours = twins()
    tokens, _ = batch()
    assert type(ours(tokens)) is Logits
    with torch.no_grad():
        assert torch.equal(plain(ours, tokens), model(tokens))
    with torch.inference_mode():
        plain(ours, tokens)
    with Largest():  # and whatever else watches PyTorch's calls
        plain(ours, tokens)
    plain(ours.eval(), tokens)
    ours.train().requires_grad_(False)
    plain(ours, tokens)
    plain(ours.head, torch.randn(C, requires_grad=True))
    ours.requires_grad_(True)
    plain(ours.head, torch.randn(C))  # one row has no batch
    assert type(ours(tokens)) is Logits
    plain(copy.deepcopy(ours).double(), tokens)
    gptkernels.accelerate(ours, losses=False)
    plain(ours, tokens)
    gptkernels.accelerate(ours)
    monkeypatch.setattr(choice.cpu, "unavailable", lambda device: "not built")
    plain(ours, tokens)


def test_a_class_that_is_patched_later(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = twins()
    tokens, _ = batch()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 7 * x)
    assert torch.equal(plain(ours, tokens), 7 * ours.wte(tokens))


def test_auto_waits_where_a_kernel_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = twins(impl="auto")
    tokens, _ = batch()
    monkeypatch.setattr(choice, "automatic", lambda device: "cpu")
    assert type(ours(tokens)) is Logits
    monkeypatch.setattr(choice, "automatic", choice_of_switch)
    monkeypatch.setenv("GPTKERNELS_IMPL", "torch")
    plain(ours, tokens)


def choice_of_switch(device: str) -> str:
    return "torch" if choice.switched_off() else "cpu"


def test_transforms_and_other_parameters(calls: list[Any]) -> None:
    model, ours = twins()
    tokens, targets = batch()
    state = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}

    def loss(state: Any, network: Any) -> Tensor:
        y = functional_call(network, state, (tokens,))
        return ce(y.view(-1, V), rows(targets))

    close(loss(state, ours), loss(state, model))
    assert len(calls) == 1
    detached = {name: p.detach() for name, p in state.items()}
    close(*(torch.func.grad(loss)(detached, network) for network in (ours, model)))
    each = [torch.func.vmap(network)(tokens) for network in (ours, model)]
    close(*each)
    assert len(calls) == 1


@pytest.mark.parametrize("whole", [True, False], ids=["with its loss", "the loss alone"])
def test_compiled(whole: bool) -> None:
    model, ours = twins()
    tokens, targets = batch()

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return ce(y.view(-1, V), rows(t))

    def step(network: Any) -> Tensor:
        def losses(x: Tensor, t: Tensor) -> Tensor:
            return loss(network(x), t)

        function = losses if whole else loss
        if network is ours:
            torch.compiler.reset()
            function = torch.compile(function, backend="aot_eager", fullgraph=whole)
        found = function(tokens if whole else network(tokens), targets)
        found.backward()
        return found

    same(model, ours, step)


@pytest.mark.parametrize("name", THEIRS)
def test_generated_tokens_are_the_same_in_training_mode(name: str) -> None:
    model, ours = twins(MODELS[name]())
    tokens, _ = batch(5)
    there = torch.ones_like(tokens)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "attention_mask": there}
    wanted, found = (network.generate(tokens, **given) for network in (model, ours))
    assert torch.equal(found, wanted)


def test_a_trainer_of_transformers(tmp_path: Path, calls: list[Any]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    texts = [{"input_ids": t, "labels": t} for t in torch.randint(3, V, (8, 9))]
    model, ours = twins(gpt2())
    for network in (model, ours):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, seed=0,
            gradient_accumulation_steps=2, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        transformers.Trainer(network, args, train_dataset=texts).train()
    assert len(calls) == 4
    close(ours.state_dict(), model.state_dict())


# Which layers are heads


def swapped_head(model: nn.Module) -> bool:
    return isinstance(model, dropin.Head)


def test_a_head_has_an_output_for_each_row_of_the_largest_embedding() -> None:
    """Of positions there may be as many as a block's inner layer has outputs."""
    model = nn.ModuleDict({
        "wte": nn.Embedding(V, C), "wpe": nn.Embedding(8, C), "head": nn.Linear(C, V),
        "wide": nn.Linear(V + 1, V), "square": nn.Linear(V, V), "other": nn.Linear(C, V + 1),
        "classes": nn.Linear(C, 8), "inner": nn.Linear(4, 8),
    })  # fmt: skip
    report = gptkernels.accelerate(model)
    assert {name for name in model if swapped_head(model[name])} == {"head"}
    title = "logits with their cross-entropy"
    assert {row.name for row in report.swapped if title in row.why} == {"head"}
    assert title in str(report)
    gptkernels.accelerate(model, losses=False)
    assert not any(swapped_head(module) for module in model.modules())
    assert is_swapped(model["head"])  # few rows of it are still read once
    gptkernels.accelerate(model, mlps=False)
    assert {name for name in model if is_swapped(model[name])} == {"head"}


def test_without_an_embedding_there_is_no_head() -> None:
    model = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, V))
    assert "cross-entropy" not in str(gptkernels.accelerate(model))


@pytest.mark.parametrize("name", MODELS)
def test_heads_of_models(name: str) -> None:
    model = MODELS[name]()
    report = gptkernels.accelerate(model)
    heads = [row.name for row in report.swapped if "cross-entropy" in row.why]
    assert heads == ["head" if name in ("small", "tied") else "lm_head"]


def test_a_restored_model_makes_logits_again() -> None:
    _, ours = twins()
    tokens, _ = batch()
    gptkernels.restore(ours)
    assert type(ours.head) is nn.Linear
    plain(ours, tokens)


def test_copies_of_an_accelerated_model_wait_too(calls: list[Any]) -> None:
    model, ours = twins(Small(tied=True))
    step = as_nanogpt(*batch())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.head.weight is twin.wte.weight
        same(model, twin, step)
    assert len(calls) == 2
