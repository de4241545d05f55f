"""All peers, the packages that they come from, and which of these are here."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch

from gptkernels.bench.peers import Peers
from gptkernels.core.errors import in_a_line
from gptkernels.core.externals import is_there


@dataclass(frozen=True)
class _Package:
    """Where a peer comes from.

    Args:
        distribution: its name on a package index.
        module: what the peer's functions are in.
        signs: the modules that are there where it is installed.
    """

    distribution: str
    module: str
    signs: tuple[str, ...]


_FLASH_2 = ("flash_attn.flash_attn_interface",)
# FlashAttention-2 and -4 share the folder flash_attn. Some releases of the former hold an
# unfinished copy of the latter, which cannot run without the CUTLASS DSL.
_PACKAGES = {
    "FlashAttention-2": _Package("flash-attn", "flash_attn", _FLASH_2),
    "FlashAttention-3": _Package("flash-attn-3", "flash_attn_interface", ("flash_attn_interface",)),
    "FlashAttention-4": _Package(
        "flash-attn-4", "flash_attn.cute", ("flash_attn.cute.interface", "cutlass")
    ),
    "xformers": _Package("xformers", "xformers.ops", ("xformers",)),
    "TransformerEngine": _Package(
        "transformer-engine", "transformer_engine.pytorch", ("transformer_engine",)
    ),
    "Liger": _Package("liger-kernel", "liger_kernel.ops.layer_norm", ("liger_kernel",)),
    "quack": _Package("quack-kernels", "quack", ("quack",)),
    "flash-attn Triton": _Package("flash-attn", "flash_attn.ops.triton.layer_norm", _FLASH_2),
    # Of whole models: `cases.gpt` makes these.
    "transformers": _Package("transformers", "transformers", ("transformers",)),
}
_PYTORCH = (
    "SDPA cuDNN",
    "SDPA flash",
    "SDPA efficient",
    "SDPA math",
    "SDPA nested",
    "SDPA, padded",
    "FlexAttention",
    "torch.compile",
    "torch.compile max-autotune",
    "addmm with GELU",
    "logits in fp32",
    "nanoGPT-shaped",
)
# Ways in which whole models run, which `cases.gpt` adds to their names.
_WAYS = ("torch.compile", "static cache, torch.compile")


def found() -> list[dict[str, Any]]:
    """All peers, as a results file lists them: name, package, version, status ("here", "absent" or
    "broken") and the reason of the latter two. Imports those that are installed."""
    pytorch: dict[str, Any] = {"package": "torch", "version": torch.__version__}
    pytorch |= {"status": "here", "reason": None}
    return [{"name": name, **pytorch} for name in _PYTORCH] + [
        {"name": name, **_state(package)} for name, package in _PACKAGES.items()
    ]


def names() -> list[str]:
    """All names that rows may have."""
    models = ("nanoGPT-shaped", "transformers")
    ways = [f"{model}, {way}" for model in models for way in _WAYS]
    return [*_PYTORCH, *_PACKAGES, *ways]


def installed(peers: Peers) -> Peers:
    """Those of the peers whose package is here, be it broken; PyTorch's own always are."""
    return {
        name: maker
        for name, maker in peers.items()
        if name not in _PACKAGES or _is_installed(_PACKAGES[name])
    }


def is_installed(name: str) -> bool:
    """Whether the package of a peer that is not PyTorch's is here, be it broken."""
    return _is_installed(_PACKAGES[name])


def load(name: str, module: str | None = None) -> Any:
    """The module of a peer's functions, or another module of its package. Raises ImportError, in
    one line, where it is installed but does not import."""
    package = _PACKAGES[name]
    loaded, reason = _attempt(module or package.module)
    if reason is not None:
        raise ImportError(f"{package.distribution} is installed but does not import: {reason}")
    return loaded


def need_gpu(device: torch.device, name: str) -> None:
    """Raises NotImplementedError on a CPU."""
    if device.type == "cpu":
        raise NotImplementedError(f"{name} runs on a GPU alone")


def need_half(dtype: torch.dtype, name: str) -> None:
    """Raises NotImplementedError unless the dtype has 16 bits."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError(f"{name} takes bfloat16 and float16 alone")


def _state(package: _Package) -> dict[str, Any]:
    name = package.distribution
    if not _is_installed(package):
        reason: str | None = f"{name} is not installed"
        return {"package": name, "version": None, "status": "absent", "reason": reason}
    _, reason = _attempt(package.module)
    status = "here" if reason is None else "broken"
    return {"package": name, "version": _version(package), "status": status, "reason": reason}


def _version(package: _Package) -> str | None:
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:  # a nightly build, or one from source
        return None


@functools.cache
def _attempt(module: str) -> tuple[Any, str | None]:
    """The module, or why it does not import; once, since a failure can take seconds."""
    try:
        return importlib.import_module(module), None
    except Exception as error:  # a package made for another PyTorch or CUDA raises all kinds
        return None, in_a_line(error)


def _is_installed(package: _Package) -> bool:
    return all(is_there(module) for module in package.signs)
