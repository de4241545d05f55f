"""How layers are made: factory arguments as PyTorch's have, and keywords that they do not have."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import nn

import gptkernels
from gptkernels import (
    GPT,
    MLP,
    CausalSelfAttention,
    GPTConfig,
    LayerNorm,
    LinearCrossEntropy,
    MultiheadAttention,
    TransformerLayer,
)
from gptkernels.nn.layers import FusedModule

LAYERS: dict[Any, tuple[Any, ...]] = {
    LayerNorm: (8,),
    MLP: (8, 16),
    CausalSelfAttention: (8, 2),
    MultiheadAttention: (8, 2),
    TransformerLayer: (8, 2, 16),
    LinearCrossEntropy: (8, 9, True),
}
TINY = (GPTConfig(vocab_size=9, block_size=4, n_layer=1, n_head=2, n_embd=8),)


def test_every_layer_is_here() -> None:
    exported = {getattr(gptkernels, name) for name in gptkernels.__all__}
    assert LAYERS.keys() == {
        kind for kind in exported if isinstance(kind, type) and issubclass(kind, FusedModule)
    }


@pytest.mark.parametrize("kind", [*LAYERS, GPT], ids=lambda kind: kind.__name__)
def test_a_layer_is_made_where_and_as_it_is_wanted(kind: Any) -> None:
    given = LAYERS.get(kind, TINY)
    with torch.device("meta"):  # what is made elsewhere first, and moved, is seen
        made = kind(*given, device="cpu", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("cpu", torch.bfloat16)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "to", None)
        nowhere = kind(*given, device="meta")
    assert {(p.device.type, p.dtype) for p in nowhere.parameters()} == {("meta", torch.float32)}
    empty = nn.utils.skip_init(kind, *given, dtype=torch.float16)
    twin = kind(*given)
    assert {(p.device.type, p.dtype) for p in empty.parameters()} == {("cpu", torch.float16)}
    names, wanted = ([name for name, _ in m.named_parameters()] for m in (empty, twin))
    assert names == wanted  # a tied parameter is still one


def test_layer_norm_is_pytorchs() -> None:
    ours, theirs = (inspect.signature(kind).parameters for kind in (LayerNorm, nn.LayerNorm))
    assert list(ours) == list(theirs)
    assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}
    for size in (8, (8,), [2, 8], torch.Size((2, 8))):
        for options in ((), (1e-3,), (1e-5, False), (1e-5, True, False)):
            layer, plain = LayerNorm(size, *options), nn.LayerNorm(size, *options)
            assert isinstance(layer, nn.LayerNorm)
            assert layer.state_dict().keys() == plain.state_dict().keys()
            for name in ("normalized_shape", "eps", "elementwise_affine"):
                assert getattr(layer, name) == getattr(plain, name)
    with torch.no_grad():
        layer.weight.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(2, 8))


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_a_keyword_of_another_package_is_answered(kind: Any) -> None:
    own = inspect.signature(kind).parameters
    for keyword, sentence in kind._elsewhere.items():
        assert keyword not in own, keyword
        renamed = re.match(r"it is called (\w+) here", sentence)
        assert renamed is None or renamed[1] in own, keyword
        message = f"{kind.__name__}() has no argument {keyword}: {sentence}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            kind(*LAYERS[kind], **{keyword: 1})


def test_a_keyword_that_is_mistyped_and_those_of_a_subclass() -> None:
    with pytest.raises(TypeError, match=r"^MLP\(\) got .* 'aproximate'; did you mean 'approxim"):
        MLP(8, 16, aproximate="none")  # type: ignore[call-arg]

    class Named(MLP):
        def __init__(self, width: int, name: str) -> None:
            super().__init__(width, width)
            self.name = name

    class Open(MLP):
        def __init__(self, **options: Any) -> None:
            super().__init__(8, 8)
            self.options = options

    assert Named(8, name="a").name == "a"
    assert Open(hidden_size=8).options == {"hidden_size": 8}
