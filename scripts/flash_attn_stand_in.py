"""What flash-attn's own tests see in place of flash-attn and of a GPU.

`modules` are modules under flash-attn's names whose functions are those of
`gptkernels.flash_attn_interface`. `on_a_cpu` sends what is made for "cuda" to the CPU.

PyTorch's own LayerNorm in float32 is taken for the truth by the tests, which allow 3e-5 beside it.
On a CPU its gradient of a weight, 4,096 rows added one after another, errs by 6e-5 (and
`gptkernels.layer_norm` by 9e-6). So it adds up in float64 here.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels import flash_attn_interface

# An A100: the tests then take every dtype and every head width.
CAPABILITY = (8, 0)
# What makes a tensor, or moves one, by a device that is named.
_MAKERS = (
    "arange", "empty", "full", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros",
)  # fmt: skip


@contextlib.contextmanager
def modules(source: Path) -> Iterator[None]:
    """Puts the modules that the tests of the checkout `source` import into sys.modules."""
    # One block holds all keys of S_dmask, which the tests scale block by block.
    block = {"_get_block_size_n": lambda *_: sys.maxsize}
    # The tests rotate before they call flash_attn_with_kvcache, which refuses rotary_cos.
    rotary = {"apply_rotary_emb": lambda x, *_, **__: x}
    references = _functions(
        source / "flash_attn/ops/triton/layer_norm.py", "layer_norm_ref", "rms_norm_ref"
    )
    made = {
        "flash_attn": {},
        "flash_attn.flash_attn_interface": block,
        "flash_attn.bert_padding": {},
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": rotary,
        "flash_attn.ops": {},
        "flash_attn.ops.layer_norm": {},
        "flash_attn.ops.rms_norm": {},
        "flash_attn.ops.triton": {},
        "flash_attn.ops.triton.layer_norm": references,
    }
    with mock.patch.dict(sys.modules, {name: _module(name, own) for name, own in made.items()}):
        yield


@contextlib.contextmanager
def on_a_cpu() -> Iterator[None]:
    """Sends tensors and modules that are made for "cuda" to the CPU, and answers what the tests ask
    of the GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.ExitStack() as stack:
        replace = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
        for name in (*_MAKERS, "empty_like", "randn_like"):
            replace(torch, name, _redirected(getattr(torch, name)))
        replace(F, "layer_norm", _exact(F.layer_norm))
        replace(torch, "autocast", _redirected(torch.autocast))
        for kind in (Tensor, torch.nn.Module):
            replace(kind, "to", _redirected(kind.to))
        replace(torch.cuda, "get_device_capability", lambda *_: CAPABILITY)
        replace(
            torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=memory)
        )
        yield


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        named = {key: _device(value) for key, value in named.items()}
        return function(*map(_device, arguments), **named)

    return call


def _device(value: Any) -> Any:
    return "cpu" if isinstance(value, str) and value == "cuda" else value


def _exact(layer_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        if x.dtype != torch.float32:
            return layer_norm(x, shape, weight, bias, eps)
        wide = (None if each is None else each.double() for each in (weight, bias))
        return layer_norm(x.double(), shape, *wide, eps).float()

    return call


def _module(name: str, own: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(own, __path__=[], __getattr__=_ours)
    return module


def _ours(name: str) -> Any:
    """A function of the interface; one that is missing there is refused when it is called, so that
    the tests which do not call it run."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name in flash_attn_interface.__all__:
        return getattr(flash_attn_interface, name)
    return lambda *_, **__: getattr(flash_attn_interface, name)


def _functions(file: Path, *names: str) -> dict[str, Any]:
    """Functions of a file, without the rest of it, which needs a GPU."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    space: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(tree, str(file), "exec"), space)
    return {name: space[name] for name in names}
