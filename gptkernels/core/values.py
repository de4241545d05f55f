"""Whether a check may look at what a tensor holds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor


def readable(tensor: Tensor) -> bool:
    """Whether `tensor` has values that can be read without waiting: on a CPU, since a GPU would
    have to finish first; not under a compiler or tracer, or inside vmap, which have none yet."""
    return (
        tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, FakeTensor)
        and not _functorch.is_functorch_wrapped_tensor(tensor)
    )
