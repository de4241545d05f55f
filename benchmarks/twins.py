"""The CUDA C++ kernels on a GPU beside the same kernels in the emulator, on the same inputs.

    python -m benchmarks.twins --op attention --results FILE

The emulator cannot check machine code, and a GPU shows neither races nor stray reads: where both
agree, what the emulator finds right is what a GPU runs. Every case of the parity table, its
gradients and its dropout mask included; the emulated run is a process of its own, on the CPU. A
result passes where the two are as near to each other as parity asks either to be to the truth.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import gptkernels
from benchmarks import child_environment
from gptkernels.bench import OPERATORS, dry_run
from gptkernels.bench.results import Row, recorded
from gptkernels.core import native, philox
from gptkernels.core.arguments import new_file
from gptkernels.truth import baseline, parity, reference, verify

Results = dict[tuple[str, str], dict[str, Tensor]]  # (case, dtype) -> outputs and gradients


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a result differs, or one of the two cannot run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.twins", description=__doc__)
    parser.add_argument("--op", choices=OPERATORS, required=True)
    parser.add_argument("--results", type=new_file, required=True)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    seed = verify.fresh_seed() if options.seed is None else options.seed
    if options.save:
        torch.save(results(options.op, options.device, seed), options.results)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        emulated = emulate(options.op, seed, Path(folder) / "emulated.pt")
    failed = 0
    for row in recorded(rows(options.op, options.device, seed, emulated), options.results):
        if row["status"] != "pass":
            print(row, flush=True)
            failed += 1
    return 1 if failed else 0


def emulate(op: str, seed: int, path: Path) -> Results:
    """`results` of the emulator, from a process that runs it. Raises CalledProcessError."""
    command = [sys.executable, "-P", "-m", "benchmarks.twins", "--save", f"--op={op}"]
    command += [f"--seed={seed}", "--device=cpu", f"--results={path}"]
    # The emulator stands for the GPU that is here, so that both run the same kernels.
    added = {"GPTKERNELS_EMULATE": "1", native.ARCH_VARIABLE: dry_run.machine_here().arch}
    subprocess.run(command, env=child_environment(**added), check=True)
    return torch.load(path, weights_only=True)


def results(op: str, device: str, seed: int) -> Results:
    """What `impl="cuda"` gives for each case and dtype, on the CPU."""
    return {
        (case.name, verify.dtype_name(dtype)): _named(case, _run(case, "cuda", dtype, device, seed))
        for case, dtype in itertools.product(_cases(op), verify.DTYPES)
    }


def rows(op: str, device: str, seed: int, emulated: Results) -> Iterator[Row]:
    """One row for each case, dtype and tensor."""
    for case, dtype in itertools.product(_cases(op), verify.DTYPES):
        name = verify.dtype_name(dtype)
        ours = _run(case, "cuda", dtype, device, seed)
        plain, truth = (
            _named(case, _run(case, impl, dtype, device, seed, ours.cotangents))
            for impl in ("baseline", "reference")
        )
        for tensor, result in _named(case, ours).items():
            expected = emulated[case.name, name][tensor]
            k = parity.K_GRADIENT if tensor.startswith("d ") else parity.K_FORWARD
            limit = parity.compare(result, plain[tensor], truth[tensor], k=k).limit
            difference = parity.compare(result, result, expected.double(), k=k).error
            yield {
                "op": op,
                "case": case.name,
                "dtype": name,
                "tensor": tensor,
                "status": "pass" if difference <= limit < float("inf") else "fail",
                "difference": difference,
                "limit": limit,
                "equal": (result == expected).double().mean().item(),
                "seed": seed,
            }


def _cases(op: str) -> list[verify.Case]:
    return [case for case in verify.CASES if case.op == op]


def _run(
    case: verify.Case,
    impl: str,
    dtype: torch.dtype,
    device: str,
    seed: int,
    cotangents: list[Tensor] | None = None,
) -> parity.Results:
    """The same inputs on every device, which the reference takes in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device=device, dtype=dtype)

    inputs = case.inputs(randn)
    if impl == "reference":
        inputs = {name: parity.upcast(value) for name, value in inputs.items()}
    rng = torch.tensor([seed, 0], device=device)
    module = {"cuda": gptkernels, "baseline": baseline, "reference": reference}[impl]
    options = dict(case.options)
    if impl == "cuda":
        options |= {**case.op_options, "impl": impl}
    elif "dropout_p" in options:
        options["rng"] = rng
    function = functools.partial(getattr(module, case.op), **options)
    # PyTorch draws different numbers on each device.
    with mock.patch.object(philox, "draw", return_value=rng):
        return parity.run(function, inputs, "gradient" in case.directions, generator, cotangents)


def _named(case: verify.Case, found: parity.Results) -> dict[str, Tensor]:
    """Outputs by name and gradients as "d x", on the CPU."""
    named = dict(zip(case.outputs, found.outputs, strict=True))
    named |= {f"d {name}": value for name, value in found.gradients.items()}
    return {name: value.detach().cpu() for name, value in named.items()}


if __name__ == "__main__":
    sys.exit(main())
