"""Deprecated: the former name of `gptkernels.nn.transformer_layer`, which pickled layers hold."""

import sys
import warnings

from gptkernels.nn import transformer_layer

warnings.warn(
    "gptkernels.transformer_layer is now gptkernels.nn.transformer_layer",
    DeprecationWarning,
    stacklevel=2,
)
sys.modules[__name__] = transformer_layer
