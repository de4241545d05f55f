"""What is said to a name that this package does not have: to one of flash-attn's why, to another
the nearest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from gptkernels.core.names import hint

_NO_RMS_NORM = "gptkernels has no RMSNorm; torch.nn.functional.rms_norm is PyTorch's"
_NO_ROTARY = "gptkernels has no rotary embedding: rotate q and k before the call"
_NO_SUBSET = "gptkernels has no LayerNorm of a subset of rows: index the rows before the call"
_INTERNAL = "it is internal to flash-attn's kernels"

_REASONS = {
    **dict.fromkeys(
        (
            "rms_norm", "rms_norm_fn", "RMSNorm", "DropoutAddRMSNorm", "dropout_add_rms_norm",
            "dropout_add_rms_norm_subset", "dropout_add_rms_norm_parallel_residual",
        ),
        _NO_RMS_NORM,
    ),
    **dict.fromkeys(
        ("RotaryEmbedding", "apply_rotary_emb", "apply_rotary_emb_func", "apply_rotary_emb_qkv_",
         "apply_rotary_emb_kv_", "apply_rotary_emb_torch"),
        _NO_ROTARY,
    ),
    "dropout_add_layer_norm_subset": _NO_SUBSET,
    "index_first_axis_residual": "call index_first_axis, and keep its input",
    "CrossEntropyLoss": "gptkernels.linear_cross_entropy computes the head and its loss as one",
    "cross_entropy_loss": "gptkernels.linear_cross_entropy computes the head and its loss as one",
    "FusedDense": "torch.nn.Linear is PyTorch's",
    "FusedMLP": "gptkernels.MLP is this package's",
    "MHA": "gptkernels.CausalSelfAttention and MultiheadAttention are this package's",
    "flash_attn_gpu": _INTERNAL,
}  # fmt: skip


class MissingNameError(ImportError, NotImplementedError):
    """A name of flash-attn that is missing here. It is an ImportError too, so that code which
    tries an import and goes on without it does so."""


def refuse(module: str, name: str, known: Iterable[str]) -> NoReturn:
    """Raises MissingNameError for a name that flash-attn has, AttributeError for any other."""
    reason = _REASONS.get(name)
    if reason is None and name.startswith(("_flash_attn", "_wrapped_flash_attn", "FlashAttn")):
        reason = _INTERNAL
    if reason is not None:
        sentence = f"{module} has no {name}, which flash-attn has: {reason}"
        raise MissingNameError(sentence, name=name, path=module)
    raise AttributeError(f"module {module!r} has no attribute {name!r}{hint(name, known)}")
