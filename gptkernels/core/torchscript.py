"""TorchScript, which PyTorch has deprecated, is refused: a trace would hold the sizes and the
choices of one call, and a script has no keyword-only arguments."""

from __future__ import annotations

from typing import NoReturn

import torch

_REFUSAL = (
    "gptkernels takes no part in TorchScript, neither torch.jit.script nor torch.jit.trace, nor in "
    "the ONNX export that traces: torch.export.export takes its functions and layers"
)


def refuse_script() -> NoReturn:
    """Raises NotImplementedError. As the attribute `__prepare_scriptable__` of a function, or a
    method of that name, torch.jit.script calls it."""
    raise NotImplementedError(_REFUSAL)


def refuse_trace() -> None:
    """Raises NotImplementedError under torch.jit.trace."""
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(_REFUSAL)
