"""What is said to a name that is none of those that are known: all of them, and the nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable


def check_name(what: str, name: str, known: Collection[str], otherwise: str = "") -> str:
    """Returns `name` if it is one of those `known`. Raises ValueError for any other; `what` it is
    the name of, and what else it may be, `otherwise`, are said in the error."""
    if name in known:
        return name
    raise ValueError(
        f"{what} must be one of {', '.join(known)}{otherwise}, got {name!r}{hint(name, known)}"
    )


def hint(name: str, known: Iterable[str]) -> str:
    """A question that ends an error about `name`: whether the nearest of those `known` was meant;
    "" where none is near."""
    found = nearest(name, known)
    return "" if found is None else f"; did you mean {found!r}?"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of those `known` that `name` is but for a slip; else one that it goes on from, as
    "gpt2-small" does from "gpt2"; else one that it is a part of, as "mlp" is of "gelu_mlp"; else
    the one that it looks most like. Capitals make no difference. None where there is none."""
    plain = {each.casefold(): each for each in known}
    wanted = str(name).casefold()
    slip = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.8)
    begun = [each for each in plain if re.match(rf"{re.escape(each)}[-_]", wanted)]
    holding = [each for each in plain if len(wanted) > 2 and wanted in each]
    close = difflib.get_close_matches(wanted, plain, n=1)
    return next((plain[each] for each in (*slip, *begun, *holding, *close)), None)
