"""Registers every op with PyTorch. A process that loads an exported graph, or a package of
AOTInductor, whose ops are those of `torch.ops.gptkernels`, imports this first."""

from gptkernels.core import masks
from gptkernels.ops.attention import decode, dense
from gptkernels.ops.gelu_mlp import op as gelu_mlp
from gptkernels.ops.layer_norm import op as layer_norm
from gptkernels.ops.linear_cross_entropy import op as linear_cross_entropy

__all__ = ["decode", "dense", "gelu_mlp", "layer_norm", "linear_cross_entropy", "masks"]
