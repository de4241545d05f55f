"""Whole models that were pickled under former module names still load, with a warning."""

from __future__ import annotations

import copy
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
    _unlike_pytorchs(layer)
    loaded = pickle.loads(pickle.dumps(layer))
    assert torch.equal(loaded(x), wanted)
    assert loaded.self_attn.impl == "torch"


def _unlike_pytorchs(layer: TransformerLayer) -> None:
    """Takes away what the layer has since its parts are nn.LayerNorm and nn.MultiheadAttention."""
    for norm in (layer.norm1, layer.norm2):
        del norm.elementwise_affine
    attention = layer.self_attn
    for name in ("embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "head_dim", "add_zero_attn",
                 "bias_k", "bias_v"):  # fmt: skip
        delattr(attention, name)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        del attention._parameters[name]
    if attention.in_proj_bias is None:
        del attention._parameters["in_proj_bias"]
        vars(attention)["in_proj_bias"] = None


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_pickled_when_its_parts_were_not_pytorchs(bias: bool) -> None:
    layer, x = TransformerLayer(16, 2, 32, dropout=0.5, bias=bias), torch.randn(5, 1, 16)
    fresh = copy.deepcopy(layer)
    _unlike_pytorchs(layer)
    loaded = pickle.loads(pickle.dumps(layer))
    for module, twin in zip(loaded.modules(), fresh.modules(), strict=True):
        assert type(module) is type(twin)
        assert vars(module).keys() <= vars(twin).keys() | {"in_proj_bias"}
        assert {k: v for k, v in vars(twin).items() if not k.startswith("_")}.items() <= (
            vars(module).items()
        )
        assert vars(twin)["_parameters"].keys() <= {*module._parameters, "in_proj_bias"}
    assert torch.equal(loaded.eval()(x), fresh.eval()(x))
    out, weights = loaded.self_attn(x, x, x)  # by PyTorch's own forward
    assert torch.allclose(out, loaded.self_attn(x, x, x, need_weights=False)[0], atol=1e-5)
    assert weights.shape == (1, 5, 5)
