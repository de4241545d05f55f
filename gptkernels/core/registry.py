"""One definition for each registered op: its signature, its fake and its implementations.

    @register("gptkernels.ops.layer_norm")
    def layer_norm_fwd(x: Tensor, weight: Tensor, ..., impl: str) -> tuple[Tensor, ...]:
        return x.new_empty(x.shape), ...

defines `torch.ops.gptkernels.layer_norm_fwd`. The annotations give the schema. The body is the
fake, which tells torch.compile the shapes and dtypes of the results. A call runs the function of
the same name in the module `gptkernels.ops.layer_norm.<impl>`, with all arguments but `impl`; of
the others only `torch`, which torch.compile traces, is imported.

`impl` may name a variant of an implementation behind a colon (`core.plans`): its keywords go to
that function, "cpu:v3" runs on that instruction set. Where it is a choice of a table (`plans.Way`)
and its launch fails, impl="torch" runs the call.

The decorated name is a function that calls that function directly where nothing could tell the
difference (core/direct.py), and else the registered op, whose dispatch takes longer than a small
kernel. Under torch.compile it also calls the function itself for impl="torch": the graph then holds
PyTorch's operators, which Inductor fuses, and not an op that it cannot look into.

A parameter annotated with a NamedTuple stands for all fields of that record. The schema and the
calls have one argument for each field; the fake and the implementations get the record.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from gptkernels.core import cpu, plans, vmap
from gptkernels.core import flops as core_flops
from gptkernels.core.autocast import autocast_enabled, without_autocast
from gptkernels.core.autograd import requires_grad
from gptkernels.core.choice import check_impl
from gptkernels.core.direct import direct
from gptkernels.core.refusal import ONCE, once

# An op is registered for as long as its library lives.
_LIBRARIES: dict[str, torch.library.Library] = {}


_NO_DERIVATIVE = (
    "torch.ops.gptkernels.{} has no derivative in an exported graph: there only PyTorch's own "
    "operators have one, which most calls become if they are exported with impl='torch'"
)


def _always(*_: Any) -> bool:
    return True


def _none(_: Any) -> tuple[str, ...]:
    return ()


def register(
    home: str,
    traceable: Callable[..., bool] = _always,
    entries: vmap.Entries = _none,
    flops: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Decorates the fake of an op: defines the op, and returns what calls it in place of the fake;
    its attribute `op` is the registered op itself.

    Args:
        home: The package whose modules `torch`, `triton`, `cuda` and `cpu` implement the op.
        traceable: Says whether torch.compile can trace a call of impl="torch". It gets the
            arguments of the call without `impl`.
        entries: Says how a call runs inside vmap (`core.vmap`).
        flops: What a call's products take (`core.flops`); None where it has no product. It gets the
            call's arguments.
    """

    def define(fake: Callable[..., Any]) -> Any:
        name = fake.__name__
        signature = inspect.signature(fake, eval_str=True)
        parameters = tuple(signature.parameters.values())
        pack = _packer(parameters)
        why = ONCE if name.endswith("_bwd") else _NO_DERIVATIVE.format(name)
        # Found now: Dynamo cannot trace an import.
        traced = getattr(importlib.import_module(f"{home}.torch"), name)

        def implementation(impl: str) -> Callable[..., Any]:
            if ":" in impl:
                return _variant(implementation(plans.implementation(impl)), impl)
            return getattr(_module(home, impl), name)

        def run(*arguments: Any) -> Any:
            found = _undisturbed(implementation(arguments[-1]), pack(arguments[:-1]))
            if requires_grad(arguments):  # a graph calls it, and no autograd.Function
                return once(found, arguments, why)
            return found

        def call(*arguments: Any) -> Any:
            # On "meta" the op answers with its fake: an implementation might loop over a problem
            # that no machine can hold.
            if not direct(arguments) or arguments[0].is_meta:
                # No plain string, and so not direct.
                if not torch.compiler.is_compiling() and type(arguments[-1]) is plans.Way:
                    return _or_torch(call, arguments)
                # Dynamo's graph is the key to PyTorch's caches of compiled graphs. With these
                # functions in it, and not an op's name, the caches notice that one was changed.
                if torch.compiler.is_compiling() and arguments[-1] == "torch":
                    given = pack(arguments[:-1])
                    if traceable(*given):
                        return _traced(traced, given)
                return op(*arguments)
            if autocast_enabled(arguments[0]):
                return run(*arguments)
            # The callers are forward and backward passes: nothing requires a gradient.
            return implementation(arguments[-1])(*pack(arguments[:-1]))

        def describe(*arguments: Any) -> Any:
            return fake(*pack(arguments))

        flat = signature.replace(parameters=tuple(_flat(parameters)))
        describe.__signature__ = flat  # type: ignore[attr-defined]
        _LIBRARIES.pop(name, None)  # a module that is loaded again defines its op again
        library = _LIBRARIES[name] = torch.library.Library("gptkernels", "FRAGMENT")
        library.define(torch.library.infer_schema(describe, op_name=name, mutates_args=()))
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gptkernels::{name}", describe, lib=library)
        op = getattr(torch.ops.gptkernels, name).default
        inside = vmap.rule(op, tuple(flat.parameters), entries)
        torch.library.register_vmap(f"gptkernels::{name}", inside, lib=library)
        if flops is not None:
            core_flops.register(op, lambda *arguments: flops(*pack(arguments)))
        call.op = op  # type: ignore[attr-defined]
        return functools.update_wrapper(call, fake)

    return define


def _or_torch(call: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """The call by the way that a table chose; by impl="torch" where that raises and "torch" does
    not: a launch that fails has written nothing that anybody sees, as all results are fresh."""
    *given, way = arguments
    try:
        return call(*given, str(way))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        try:
            found = call(*given, "torch")
        except Exception:
            raise error from None
        plans.demote(way, error)
        return found


def _variant(function: Callable[..., Any], impl: str) -> Callable[..., Any]:
    """The function of the implementation's variant that `impl` names."""
    variant = plans.variant(impl)
    if plans.implementation(impl) == "cpu":
        return functools.partial(cpu.run_on, variant, function)
    return functools.partial(function, **plans.keywords(variant))


def _undisturbed(function: Callable[..., Any], given: Sequence[Any]) -> Any:
    """Returns function(*given), computed without autograd and without autocast."""
    with torch.no_grad(), without_autocast(given[0]):
        return function(*given)


def _traced(function: Callable[..., Any], given: Sequence[Any]) -> Any:
    """As `_undisturbed`; what is exported can be differentiated."""
    if torch.compiler.is_exporting():
        with without_autocast(given[0]):
            return function(*given)
    return _undisturbed(function, given)


@functools.cache
def _module(home: str, impl: str) -> ModuleType:
    return importlib.import_module(f"{home}.{check_impl(impl, auto=False)}")


def _record(parameter: inspect.Parameter) -> Any:
    """Returns the NamedTuple that a parameter is annotated with; None for other annotations."""
    annotation = parameter.annotation
    return annotation if hasattr(annotation, "_fields") else None


def _flat(parameters: Sequence[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    """Yields the parameters, with the fields of a record in place of the record."""
    for parameter in parameters:
        record = _record(parameter)
        if record is None:
            yield parameter
            continue
        for name, annotation in typing.get_type_hints(record).items():
            yield parameter.replace(name=name, annotation=annotation)


def _packer(
    parameters: Sequence[inspect.Parameter],
) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Returns a function that puts a record in the place of its fields in an op's arguments."""
    for place, parameter in enumerate(parameters):
        record = _record(parameter)
        if record is not None:
            end = place + len(record._fields)
            return lambda given: (*given[:place], record(*given[place:end]), *given[end:])
    return lambda given: given
