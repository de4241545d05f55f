"""`accelerate`: the ops of this package in a model of somebody else, in place; `restore` undoes it.

First everything is looked at and nothing changed: each module is asked what kind it is. Then the
classes are swapped (`gptkernels.dropin.swap`), which cannot fail half-way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gptkernels.core.checks import DTYPES, check_flag, dtype_name
from gptkernels.core.choice import check_impl, unavailable
from gptkernels.dropin import activation, linear, logits, mlp, norm, pytorch
from gptkernels.dropin import attention as written_out
from gptkernels.dropin.probe import Probe
from gptkernels.dropin.report import Report, Row
from gptkernels.dropin.swap import Match, is_swapped, is_wrapped, subclass
from gptkernels.nn.layers import FusedModule
from gptkernels.nn.plain import class_name, not_plain, original_class, remember

_LOOKED_FOR = (
    "attention of transformers' models, of nanoGPT's and minGPT's form, and nn.MultiheadAttention; "
    "nn.LayerNorm; modules of two linear layers with GELU between them; nn.Linear"
)


def accelerate(
    model: nn.Module,
    *,
    impl: str = "auto",
    attention: bool = True,
    norms: bool = True,
    mlps: bool = True,
    losses: bool = True,
) -> Report:
    """Let the modules of `model` run the ops of this package, in place, and say what was done.

        report = gptkernels.accelerate(model)
        print(report)

    Swapped are attention (of transformers' models, of nanoGPT's and minGPT's form, PyTorch's own),
    LayerNorm, MLPs of linear, GELU, linear, and a language model's head with its loss, by what they
    hold and not by their names; a module that this package does not know is first run beside the
    formula, on random numbers. Everything else stays as it is: parameters and their names, dtypes,
    devices, hooks, attributes, `isinstance`, pickling. Results agree up to rounding. Dropout keeps
    its distribution; inside attention its masks are those of `gptkernels.attention`.

    A module that is hooked, parametrised, quantised or wrapped inside runs its own forward; so does
    every module where impl="auto" finds nothing that was measured to be faster: on a GPU, and under
    torch.compile.

    Args:
        model: Any nn.Module, before or after `.to()`.
        impl: "auto", "torch", "triton", "cuda" or "cpu".
        attention: Whether to swap attention.
        norms: Whether to swap LayerNorms.
        mlps: Whether to swap MLPs, and to read the weights of other linear layers once where rows
            are few, as in generation.

        losses: Whether the logits of a language model's head wait, in training, for what is done
            with them: F.cross_entropy of them is `gptkernels.linear_cross_entropy`, and they are
            never in memory. For anything else they are computed when it is done; after an
            optimizer's step that is an error.

    A second call starts from the restored model. Raises TypeError where `model` is no nn.Module,
    RuntimeError for an `impl` that cannot run on this machine or in the model's dtype, and
    ValueError for an unknown one and for a model with nothing to swap. Then nothing has changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    flags = {"attention": attention, "norms": norms, "mlps": mlps, "losses": losses}
    for name, flag in flags.items():
        check_flag(name, flag)
    _check_runs(model, check_impl(impl))
    probe = Probe(model)
    matches: list[Callable[[nn.Module, Probe], Match]] = []
    if attention:
        theirs = _transformers()
        matches += [] if theirs is None else [theirs.match]
        matches += [pytorch.match_attention, written_out.match]
    matches.append(lambda module, _: pytorch.match_layer(module, norms, mlps))
    if norms:
        matches.append(norm.match)
    if losses:
        matches.append(logits.match)
    if mlps:
        matches += [mlp.match, activation.match, linear.match]
    before = _swapped_classes(model)
    restore(model)
    try:
        plan = list(_plan(model, matches, probe, impl))
        report = Report(impl, [row for row, *_ in plan])
        if not report.swapped:
            kinds = sorted({class_name(module) for module in model.modules()})
            shown = ", ".join(kinds[:12]) + (", ..." if len(kinds) > 12 else "")
            raise ValueError(
                f"model has nothing to swap: accelerate looks for {_LOOKED_FOR}; it saw {shown}"
            )
    except BaseException:
        _swap(before)
        raise
    _swap([(module, kind) for _, module, kind in plan if kind is not None])
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module gets its class back. A model that was not accelerated stays
    as it is. Raises TypeError where `model` is no nn.Module, and RuntimeError where a module was
    wrapped since in a way that changes its class."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if is_wrapped(module):
            raise RuntimeError(
                f"{name or 'the model'} was wrapped after accelerate, by FSDP or a "
                "parametrization: undo that first"
            )
    for module, _ in _swapped_classes(model):
        _announce(module, False)
        module.__class__ = original_class(module)


def _swapped_classes(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    return [(module, type(module)) for module in model.modules() if is_swapped(module)]


def _swap(classes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    for module, kind in classes:
        module.__class__ = kind
        _announce(module, True)


def _transformers() -> Any:
    """The file for transformers' attention. None where the program has not imported transformers,
    whose modules then are not there, or one without the registries."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    try:
        from gptkernels.dropin import transformers
    except ImportError:
        return None
    return transformers


def _announce(module: nn.Module, accelerated: bool) -> None:
    theirs = _transformers()
    if theirs is not None and isinstance(module, theirs.Registered):
        theirs.announce(module, accelerated)


def _plan(
    model: nn.Module, matches: list[Callable[[nn.Module, Probe], Match]], probe: Probe, impl: str
) -> Iterator[tuple[Row, nn.Module, type[nn.Module] | None]]:
    """Yields, for each module of a known kind, its row, itself, and its new class or None."""
    ours: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in ours:
            continue
        if isinstance(module, FusedModule):
            ours.update(module.modules())  # what it holds is its own business
            yield Row(name, type(module).__name__, False, "a layer of gptkernels"), module, None
            continue
        found: Match = next((said for match in matches if (said := match(module, probe))), None)
        if found is None:
            continue
        title = type(module).__name__
        reason = found if isinstance(found, str) else _unfit(module)
        if isinstance(found, str) or reason is not None:
            yield Row(name, title, False, str(reason)), module, None
            continue
        kind, facts = found
        given: Any = (kind, type(module), impl, tuple(sorted(facts.items())))
        made = subclass(*given)
        yield Row(name, title, True, kind.what), module, made


def _unfit(module: nn.Module) -> str | None:
    """Why the class of a module cannot be swapped. Hooks are called as before."""
    kind = type(module)
    if type(kind) is not type:
        return f"its class has the metaclass {class_name(kind)}"
    if "forward" in vars(module):
        return "has another forward"
    remember(kind)
    reason = not_plain(module, kind)
    return None if reason == "has hooks" else reason


def _check_runs(model: nn.Module, impl: str) -> None:
    """Raises RuntimeError where an implementation that was named cannot run. The model may still
    be moved to another device."""
    if impl == "auto":
        return
    dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point} or {torch.float32}
    for dtype in sorted(dtypes, key=str):
        if dtype not in DTYPES:
            raise RuntimeError(
                f"impl={impl!r} runs in float32, bfloat16 and float16, this model has "
                f"{dtype_name(dtype)}"
            )
        reasons = [unavailable(impl, device, dtype) for device in ("cpu", "cuda")]
        if all(reasons):
            here = 1 if impl in ("triton", "cuda") and torch.cuda.is_available() else 0
            raise RuntimeError(f"impl={impl!r}: {reasons[here]}")
