"""How fast training is: tokens per second, and MFU, the share of the machine's arithmetic it uses.

    FLOP per token = 6 N + 12 L C T        (forward 2, backward 4; Chowdhery et al. 2022, app. B)
        N  parameters that multiply activations: all but the position table (the tied token
           table counts once, as the head)
        L layers, C model width, T context: scores and weighted values, causality not deducted
    MFU = FLOP per token * tokens per second / peak FLOP per second

The peak is the documented dense rate of a known GPU at the dtype of the products. On a CPU nobody
documents one, so it is measured: the best rate of a large square matrix product with as many
threads as the run has. Elsewhere the peak is unknown, and the MFU is None rather than a guess.
"""

from __future__ import annotations

import re
import time

import torch
from torch import nn

# Dense TFLOP/s without sparsity, from NVIDIA's data sheets: (name as the driver spells it, bf16
# with fp32 accumulation, fp32 on CUDA cores, since fp32 is computed here without tf32). The first
# name that occurs as whole words in the device's name decides, so longer names come first.
_PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 75.0),
    ("GH200", 989.4, 66.9),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.5, 51.2),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 311.9, 19.5),
    ("L40S", 362.1, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("A40", 149.7, 37.4),
    ("A10", 125.0, 31.2),
)


def flops_per_token(model: nn.Module, n_layer: int, n_embd: int, block_size: int) -> float:
    """Floating-point operations one token of a training step takes: 6 N + 12 L C T (see above)."""
    parameters = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.endswith("wpe.weight")
    )
    return 6.0 * parameters + 12.0 * n_layer * n_embd * block_size


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most FLOP per second that `device` reaches at `dtype`; None when unknown."""
    if device.type == "cpu":
        return _measured_matmul_rate(dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, bf16, fp32 in _PEAK_TFLOPS:
        if re.search(rf"\b{known}\b", name):
            return 1e12 * (fp32 if dtype == torch.float32 else bf16)
    return None


class Speed:
    """Tokens per second, and MFU by the FLOP of a token and the machine's peak, if it is known."""

    def __init__(self, flops: float, peak: float | None) -> None:
        self._flops, self._peak = flops, peak
        self.restart(0)

    def restart(self, tokens: int) -> None:
        """Count from now on, when `tokens` tokens have been trained on."""
        self._tokens, self._start = tokens, time.perf_counter()

    def read(self, tokens: int) -> dict[str, float | None]:
        """What it was since `restart`, now that `tokens` tokens have been trained on."""
        speed = (tokens - self._tokens) / (time.perf_counter() - self._start)
        mfu = None if self._peak is None else speed * self._flops / self._peak
        return {"tokens_per_s": speed, "mfu": mfu}


def _measured_matmul_rate(dtype: torch.dtype, size: int = 512, seconds: float = 0.3) -> float:
    """FLOP per second of the fastest of many (size, size) products on the CPU.

    They are small enough that even on a busy machine some run without interruption.
    """
    # A generator of its own: measuring must not change the numbers that training draws.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(dtype)
    b = torch.randn(size, size, generator=generator).to(dtype)
    torch.mm(a, b)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
