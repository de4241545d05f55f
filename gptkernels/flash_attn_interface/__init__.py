"""flash-attn's functions under their own names, with their own signatures.

    from flash_attn import flash_attn_func                          # before
    from gptkernels.flash_attn_interface import flash_attn_func     # after

The names, the order, the defaults and the results are those of flash-attn 2.8
(https://github.com/Dao-AILab/flash-attention); the work is done by `gptkernels.attention`,
`attention_varlen`, `attention_decode` and `layer_norm` with impl="auto", so they run on a CPU too.
An argument that cannot be honoured raises NotImplementedError and names itself;
docs/flash_attn.md lists them. A name of flash-attn that is missing here says so when it is
imported (`missing`). What may return one tensor or several is typed as Any, as in flash-attn, where
nothing has types: code that moves over passes its type checks as before.
"""

from __future__ import annotations

from typing import Any

from gptkernels.flash_attn_interface import missing
from gptkernels.flash_attn_interface.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from gptkernels.flash_attn_interface.dense import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from gptkernels.flash_attn_interface.kvcache import flash_attn_with_kvcache
from gptkernels.flash_attn_interface.norms import (
    DropoutAddLayerNorm,
    dropout_add_layer_norm,
    dropout_add_layer_norm_parallel_residual,
    layer_norm,
    layer_norm_fn,
    layer_norm_linear_fn,
)
from gptkernels.flash_attn_interface.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "DropoutAddLayerNorm",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_parallel_residual",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "index_put_first_axis",
    "layer_norm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def __getattr__(name: str) -> Any:
    missing.refuse(__name__, name, __all__)
