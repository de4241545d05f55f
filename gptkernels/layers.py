"""Deprecated: the former name of `gptkernels.nn.layers`, which models pickled whole still hold."""

import sys
import warnings

from gptkernels.nn import layers

warnings.warn("gptkernels.layers is now gptkernels.nn.layers", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = layers
