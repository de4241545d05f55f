"""A linear layer of few rows by the CPU kernel, which reads the weights once
(csrc/cpu/linear/params.h).

Such are those of generation: a step takes one row of each text through every weight of the model. A
row gets the same bits whatever rows are beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core import products
from gptkernels.core.cpu import DTYPE_CODES, address, module

MOST_ROWS = 16  # what the kernel takes at most
# Of a transposed weight: how many rows it takes in less time than PyTorch (docs/cpu.md).
TRANSPOSED_ROWS = {
    torch.float32: range(2, 17),
    torch.bfloat16: range(1, 9),
    torch.float16: range(1, 9),
}


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Returns x w^T + b, (M, N), for x (M, K), w (N, K) and b (N,) or None, of one dtype and on the
    CPU: by the kernel if M is at most MOST_ROWS and the strides allow it, else by PyTorch. A
    transposed view, as of Conv1D's weight, is read as it lies."""
    (M, K), N = x.shape, w.shape[0]
    transposed = w.stride(1) != 1 and w.stride(0) == 1
    takes = M in TRANSPOSED_ROWS[x.dtype] if transposed else w.stride(1) == 1
    if not (takes and 0 < M <= MOST_ROWS and K > 0 and N > 0):
        return products.linear(x, w, b)
    if x.stride(1) != 1:
        x = x.contiguous()
    if b is not None:
        b = b.contiguous()
    y = x.new_empty((M, N))
    module().linear(
        x.data_ptr(), w.data_ptr(), address(b), y.data_ptr(), M, N, K, x.stride(0),
        w.stride(int(transposed)), DTYPE_CODES[x.dtype], transposed, torch.get_num_threads(),
    )  # fmt: skip
    return y
