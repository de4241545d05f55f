"""What is said to a keyword that a function does not have.

Other packages have other names for the same arguments. Who writes one of them is told ours; who
mistypes one of ours is told the nearest. A function of an op takes what it does not know as
`**unknown`, which costs a call some 20 ns; a wrapper would cost 600, and torch.compile would have
to look through it. A layer checks before it is made (`gptkernels.nn.layers.FusedModule`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from gptkernels.core.names import hint
from gptkernels.core.torchscript import refuse_script

_Function = TypeVar("_Function", bound=Callable[..., Any])


def renamed(ours: str, *theirs: str, note: str = "") -> dict[str, str]:
    """What is said of each of their names for an argument that is called `ours` here."""
    return dict.fromkeys(theirs, f"it is called {ours} here{note}")


def without_unknown(function: _Function) -> _Function:
    """Decorates a function whose last parameter is `**unknown`: inspect and help do not show it,
    and torch.jit.script, which has no such parameters, is refused."""
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    function.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]
    return function


def check_keywords(
    function: Callable[..., Any], named: Iterable[str], elsewhere: Mapping[str, str]
) -> None:
    """Raises TypeError where `function`, which may be a class, has no parameter of such a name;
    elsewhere as for `refuse`."""
    own = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        return
    unknown = [name for name in named if name not in own]
    if unknown:
        refuse(function, unknown, elsewhere)


def refuse(
    function: Callable[..., Any], unknown: Iterable[str], elsewhere: Mapping[str, str]
) -> NoReturn:
    """Raises TypeError for the first of the keywords that `function` does not have. elsewhere: what
    is said of those that other packages have."""
    keyword, name = next(iter(unknown)), function.__name__
    if keyword in elsewhere:
        raise TypeError(f"{name}() has no argument {keyword}: {elsewhere[keyword]}")
    nearest = hint(keyword, inspect.signature(function).parameters)
    raise TypeError(f"{name}() got an unexpected keyword argument {keyword!r}{nearest}")
