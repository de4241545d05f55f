from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from models import shaken
from torch import Tensor, nn
from torch.func import functional_call

from gptkernels import MultiheadAttention
from gptkernels.nn.layers import set_impl
from gptkernels.truth.parity import assert_parity

WIDTH, HEADS, B, Tq, Tk = 24, 3, 2, 5, 7
WIDTHS = {"kdim": 10, "vdim": 14}


def pair(**options: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Returns our module, which runs PyTorch's operators, and PyTorch's, with the same
    parameters."""
    theirs = shaken(nn.MultiheadAttention(WIDTH, HEADS, **options))
    ours = MultiheadAttention(WIDTH, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return set_impl(ours, "torch"), theirs


def inputs(
    keys: int, batch: int | None, batch_first: bool = False, kdim: int = WIDTH, vdim: int = WIDTH
) -> dict[str, Tensor]:
    """Returns query, key and value."""
    sizes = {"query": (Tq, WIDTH), "key": (keys, kdim), "value": (keys, vdim)}
    drawn = {name: torch.randn(batch or 1, *size) for name, size in sizes.items()}
    if batch is None:
        return {name: x[0] for name, x in drawn.items()}
    return drawn if batch_first else {name: x.transpose(0, 1) for name, x in drawn.items()}


def hidden(*shape: int, added: bool = False) -> Tensor:
    """Returns a random mask that never hides the first key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return torch.where(mask, -torch.inf, torch.randn(shape)) if added else mask


FUTURE = torch.ones(Tq, Tq, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("options", "keys", "batch", "call"),
    [
        ({}, Tk, B, {}),
        ({"batch_first": True}, Tk, B, {"attn_mask": hidden(Tq, Tk)}),
        ({"batch_first": True, "bias": False, **WIDTHS}, Tk, B,
         {"key_padding_mask": hidden(B, Tk)}),
        (WIDTHS, Tk, B, {"attn_mask": hidden(B * HEADS, Tq, Tk, added=True)}),
        (WIDTHS, Tk, None, {"key_padding_mask": hidden(Tk), "attn_mask": hidden(Tq, Tk)}),
        ({}, Tq, B, {"attn_mask": FUTURE, "is_causal": True}),
        ({}, Tq, B, {"attn_mask": FUTURE, "is_causal": True, "key_padding_mask": hidden(B, Tq)}),
    ],
    ids=["cross", "masked", "padded", "added to scores of each head", "one text", "causal",
         "causal and padded"],
)  # fmt: skip
def test_results_and_gradients_are_those_of_the_module_it_replaces(
    dtype: torch.dtype,
    options: dict[str, Any],
    keys: int,
    batch: int | None,
    call: dict[str, Any],
) -> None:
    ours, theirs = pair(**options)

    def function(module: nn.Module) -> Any:
        def called(query: Tensor, key: Tensor, value: Tensor, **parameters: Tensor) -> Tensor:
            named = {name.replace("__", "."): p for name, p in parameters.items()}
            given = {
                name: mask.to(query.dtype) if isinstance(mask, Tensor) and mask.is_floating_point()
                else mask for name, mask in call.items()
            }  # fmt: skip
            given["need_weights"] = False
            return functional_call(module, named, (query, key, value), given)[0]

        return called

    widths = {name: options.get(name, WIDTH) for name in WIDTHS}
    drawn = inputs(keys, batch, options.get("batch_first", False), **widths)
    drawn |= {name.replace(".", "__"): p.detach() for name, p in ours.named_parameters()}
    assert_parity(
        function(ours.to(dtype)),
        function(theirs.to(dtype)),
        function(copy.deepcopy(theirs).double()),
        {name: x.to(dtype) for name, x in drawn.items()},
    )


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch", [B, None])
def test_weights_are_those_of_the_module_it_replaces(average: bool, batch: int | None) -> None:
    ours, theirs = pair()
    x = inputs(Tq, batch)
    call = {"average_attn_weights": average, "key_padding_mask": hidden(*[B] * bool(batch), Tq)}
    torch.testing.assert_close(ours(**x, **call), theirs(**x, **call))
    # Without a mask is_causal is enough here.
    found = ours(**x, **call, is_causal=True)
    torch.testing.assert_close(found, theirs(**x, **call, attn_mask=FUTURE))
    out, none = ours(**x, **call, is_causal=True, need_weights=False)
    torch.testing.assert_close(out, found[0])
    assert none is None
    ours.impl = "triton"
    with pytest.raises(NotImplementedError, match=r"^need_weights=True runs with impl='torch' or"):
        ours(**x)


def test_inputs_that_are_one_tensor_and_autocast() -> None:
    ours, theirs = pair(batch_first=True)
    x, other = torch.randn(2, B, Tq, WIDTH)
    for given in ((x, x, x), (x, other, x), (other, x, x), (x, x, other)):
        found, wanted = (module(*given, need_weights=False)[0] for module in (ours, theirs))
        torch.testing.assert_close(found, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x, x, x, need_weights=False)[0].dtype == theirs(x, x, x)[0].dtype


def test_it_is_made_as_the_module_it_replaces() -> None:
    theirs, ours = nn.MultiheadAttention, MultiheadAttention
    made, wanted = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert {k: p.default for k, p in made.items()} == {k: p.default for k, p in wanted.items()}
    called, wanted = (inspect.signature(kind.forward).parameters for kind in (ours, theirs))
    assert {k: p.default for k, p in called.items()} == {k: p.default for k, p in wanted.items()}
    for options in ({}, {"bias": False}, WIDTHS, {"kdim": WIDTH}):
        torch.manual_seed(1)
        plain = theirs(WIDTH, HEADS, **options).state_dict()
        torch.manual_seed(1)
        module = ours(WIDTH, HEADS, **options)
        assert isinstance(module, theirs)
        assert list(module.state_dict()) == list(plain)
        torch.testing.assert_close(dict(module.state_dict()), dict(plain), rtol=0, atol=0)


def test_dropout_falls_in_training_only_and_follows_the_seed() -> None:
    ours, _ = pair(dropout=0.5)
    x = inputs(Tk, B)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours(**x, need_weights=False)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    ours.eval()
    assert torch.equal(run(1), run(2))


def test_it_compiles_whole() -> None:
    ours, theirs = pair(**WIDTHS)
    x = inputs(Tk, B, **WIDTHS)
    mask = hidden(Tq, Tk)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    found = compiled(**x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(found, theirs(**x, attn_mask=mask, need_weights=False))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"add_bias_kv": True}, NotImplementedError, "^add_bias_kv must be False"),
        ({"add_zero_attn": True}, NotImplementedError, "^add_zero_attn must be False"),
        ({"num_heads": 5}, ValueError, "^num_heads must divide embed_dim, got embed_dim=24"),
        ({"embed_dim": 1026, "num_heads": 2}, ValueError, "embed_dim / num_heads must be at most"),
        ({"dropout": 2.0}, ValueError, "^dropout must be between 0 and 1"),
        ({"kdim": 0}, ValueError, "^kdim must be at least 1, got 0"),
        ({"vdim": 1.0}, TypeError, r"^vdim must be an int, got 1\.0"),
        ({"batch_first": 1}, TypeError, "^batch_first must be a bool, got 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiheadAttention(**{"embed_dim": WIDTH, "num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, r"^query must be a torch\.Tensor, got list"),
        (
            {"query": torch.zeros(Tq, B, 23)},
            ValueError,
            r"^query must have .*24.* got \(5, 2, 23\)",
        ),
        ({"key": torch.zeros(Tk, WIDTH)}, ValueError, r"^key must have .*, got \(7, 24\)"),
        ({"key": torch.zeros(Tk, 3, WIDTH)}, ValueError, "^key must have the batch of query, 2, g"),
        (
            {"value": torch.zeros(6, B, WIDTH)},
            ValueError,
            r"^value must have the tokens and .* key",
        ),
        ({"is_causal": True}, ValueError, "^is_causal without attn_mask needs as many keys as qu"),
        ({"attn_mask": torch.zeros(5, 4)}, ValueError, r"^attn_mask must have shape \(5, 7\) or"),
        ({"key_padding_mask": torch.zeros(7, 2)}, ValueError, r"^key_padding_mask must have shape"),
    ],
)
def test_bad_inputs(call: dict[str, Any], error: type[Exception], message: str) -> None:
    ours, _ = pair()
    with pytest.raises(error, match=message):
        ours(**{**inputs(Tk, B), "need_weights": False, **call})
