"""What attention's forward and backward pass take beside their tensors, on a CPU, by length.

    python -m benchmarks.attention_memory [--dtype bfloat16] [--heads 12] [--width 64]

Each figure is from a process of its own: the most memory that it had (ru_maxrss) after the passes
over T tokens, less the same after passes over one token, and less q, k, v, out, lse and the
gradients of all. In MB, for impl="cpu" and for PyTorch's F.scaled_dot_product_attention.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from typing import cast

import torch
import torch.nn.functional as F

import gptkernels

LENGTHS = (1024, 4096, 16384)
CANDIDATES = ("cpu", "plain")


def run(candidate: str, tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """Both passes, causal."""
    q, k, v = (
        torch.ones(1, tokens, heads, width, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    if candidate == "plain":
        plain = F.scaled_dot_product_attention
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out = plain(heads_first[0], heads_first[1], heads_first[2], is_causal=True).transpose(1, 2)
    else:
        out = cast("torch.Tensor", gptkernels.attention(q, k, v, impl="cpu"))
    out.backward(torch.ones_like(out))


def most_kb(candidate: str, tokens: int, options: argparse.Namespace) -> int:
    """The most memory of a process that runs the passes over so many tokens."""
    words = [candidate, tokens, options.heads, options.width, options.dtype]
    child = [sys.executable, "-m", "benchmarks.attention_memory", "--child", *map(str, words)]
    return int(subprocess.run(child, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Prints one line for each length."""
    parser = argparse.ArgumentParser("python -m benchmarks.attention_memory", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        candidate, tokens, heads, width, name = options.child
        run(candidate, int(tokens), int(heads), int(width), getattr(torch, name))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    dtype = getattr(torch, options.dtype)
    for tokens in LENGTHS:
        # q, k, v, out, the gradients of the four; lse.
        numbers = 8 * tokens * options.heads * options.width
        tensors = numbers * dtype.itemsize + 4 * tokens * options.heads
        found = []
        for candidate in CANDIDATES:
            more = most_kb(candidate, tokens, options) - most_kb(candidate, 1, options)
            found.append(f"{candidate} {(more * 1024 - tensors) / 1e6:7.1f} MB")
        print(f"T {tokens:<6} tensors {tensors / 1e6:7.1f} MB    beside them: {'   '.join(found)}")


if __name__ == "__main__":
    main()
