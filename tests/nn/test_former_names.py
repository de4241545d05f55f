"""Whole models that were pickled under former module names still load, with a warning."""

from __future__ import annotations

import importlib
import io
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from gptkernels import GPT, MLP, CausalSelfAttention, GPTConfig, LayerNorm, TransformerLayer
from gptkernels.nn import layers, transformer_layer

FORMER = {layers: "gptkernels.layers", transformer_layer: "gptkernels.transformer_layer"}
TINY = GPTConfig(vocab_size=16, block_size=8, n_layer=2, n_head=2, n_embd=16)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _pickled_under_former_names(model: nn.Module) -> bytes:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for module, former in FORMER.items():
            importlib.import_module(former)
            for kind in vars(module).values():
                if isinstance(kind, type) and kind.__module__ == module.__name__:
                    patch.setattr(kind, "__module__", former)
        stream = io.BytesIO()
        torch.save(model, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("make", "x", "module"),
    [
        (lambda: GPT(TINY), torch.arange(8)[None], layers),
        (lambda: MLP(8, 16), torch.randn(3, 8), layers),
        (lambda: LayerNorm(8), torch.randn(3, 8), layers),
        (lambda: CausalSelfAttention(16, 2), torch.randn(1, 5, 16), layers),
        (lambda: TransformerLayer(16, 2, 32, dropout=0.0), torch.randn(5, 1, 16), layers),
        (
            lambda: TransformerLayer(16, 2, 32, dropout=0.0),
            torch.randn(5, 1, 16),
            transformer_layer,
        ),
    ],
)
def test_a_pickle_under_former_names_loads(
    make: Callable[[], nn.Module], x: Tensor, module: ModuleType
) -> None:
    model = make()
    content = _pickled_under_former_names(model)
    assert FORMER[module].encode() in content
    if module is transformer_layer:  # what pickles name has to stay, private or not
        assert b"_SelfAttention" in content
    assert module.__name__.encode() not in content
    for former in FORMER.values():
        sys.modules.pop(former, None)
    sentence = re.escape(f"{FORMER[module]} is now {module.__name__}")
    with pytest.warns(DeprecationWarning, match=f"^{sentence}$"):
        loaded = torch.load(io.BytesIO(content), weights_only=False)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(("module", "former"), FORMER.items())
def test_a_former_name_is_the_module_itself(module: ModuleType, former: str) -> None:
    assert importlib.import_module(former) is module


def test_a_layer_pickled_when_self_attn_held_parameters_alone() -> None:
    layer, x = TransformerLayer(16, 2, 32, dropout=0.0), torch.randn(5, 1, 16)
    layer.impl = "torch"
    wanted = layer(x)
    del layer.d_model, layer.self_attn.num_heads, layer.self_attn.dropout, layer.self_attn._impl
    del layer.norm1.normalized_shape, layer.norm2.normalized_shape
    loaded = pickle.loads(pickle.dumps(layer))
    assert torch.equal(loaded(x), wanted)
    assert loaded.self_attn.impl == "torch"
