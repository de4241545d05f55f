"""What `impl="cuda"` would launch for a problem: `gptkernels info --explain` tells it, benchmarks
predict from it. No GPU is needed and nothing is launched: the launchers themselves are asked.
"""

from __future__ import annotations

from gptkernels.bench.dry_run.launches import Direction, DryRun, Launched, Problem
from gptkernels.bench.dry_run.machine import MACHINES, Machine, machine_here
from gptkernels.bench.dry_run.problems import (
    attention,
    attention_decode,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
    transformer_layer,
)

__all__ = [
    "MACHINES",
    "Direction",
    "DryRun",
    "Launched",
    "Machine",
    "Problem",
    "attention",
    "attention_decode",
    "gelu_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "machine_here",
    "transformer_layer",
]
