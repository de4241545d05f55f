"""gptkernels: fused causal attention, LayerNorm, GELU-MLP and linear + cross-entropy for PyTorch,
and a reference GPT built on them.

Importing this package imports nothing else: a public name loads its module when it is first used.
So the import works without torch, without Triton and without a GPU, and never initialises CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "attention": "gptkernels.ops.attention.dense",
    "attention_varlen": "gptkernels.ops.attention.varlen",
    "attention_decode": "gptkernels.ops.attention.decode",
    "layer_norm": "gptkernels.ops.layer_norm.op",
    "gelu_mlp": "gptkernels.ops.gelu_mlp.op",
    "linear_cross_entropy": "gptkernels.ops.linear_cross_entropy.op",
    "LayerNorm": "gptkernels.nn.layers",
    "MLP": "gptkernels.nn.layers",
    "CausalSelfAttention": "gptkernels.nn.layers",
    "LinearCrossEntropy": "gptkernels.nn.cross_entropy",
    "MultiheadAttention": "gptkernels.nn.multihead",
    "TransformerLayer": "gptkernels.nn.transformer_layer",
    "accelerate": "gptkernels.dropin.accelerate",
    "restore": "gptkernels.dropin.accelerate",
    "flex_attention": "gptkernels.dropin.flex.op",
    "GPT": "gptkernels.gpt.model",
    "GPTConfig": "gptkernels.gpt.config",
    "GPTForCausalLM": "gptkernels.gpt.causal_lm",
    "tune": "gptkernels.tuning.tuner",
}
_MODULES = ("flash_attn_interface", "tuning")

# Without GPTForCausalLM and flex_attention: `from gptkernels import *` does not need transformers,
# and does not load PyTorch's compiler.
__all__ = [
    "GPT",
    "MLP",
    "CausalSelfAttention",
    "GPTConfig",
    "LayerNorm",
    "LinearCrossEntropy",
    "MultiheadAttention",
    "TransformerLayer",
    "accelerate",
    "attention",
    "attention_decode",
    "attention_varlen",
    "flash_attn_interface",
    "gelu_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "restore",
    "tune",
    "tuning",
]

if TYPE_CHECKING:
    from gptkernels import flash_attn_interface as flash_attn_interface
    from gptkernels import tuning as tuning
    from gptkernels.dropin.accelerate import accelerate, restore
    from gptkernels.dropin.flex.op import flex_attention as flex_attention
    from gptkernels.gpt.causal_lm import GPTForCausalLM as GPTForCausalLM
    from gptkernels.gpt.config import GPTConfig
    from gptkernels.gpt.model import GPT
    from gptkernels.nn.cross_entropy import LinearCrossEntropy
    from gptkernels.nn.layers import MLP, CausalSelfAttention, LayerNorm
    from gptkernels.nn.multihead import MultiheadAttention
    from gptkernels.nn.transformer_layer import TransformerLayer
    from gptkernels.ops.attention.decode import attention_decode
    from gptkernels.ops.attention.dense import attention
    from gptkernels.ops.attention.varlen import attention_varlen
    from gptkernels.ops.gelu_mlp.op import gelu_mlp
    from gptkernels.ops.layer_norm.op import layer_norm
    from gptkernels.ops.linear_cross_entropy.op import linear_cross_entropy
    from gptkernels.tuning.tuner import tune


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"gptkernels.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
