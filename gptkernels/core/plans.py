"""What runs a call of impl="auto": a plan, looked up once for all calls with the same shapes,
dtypes and options. A lookup never measures.

An op asks with a signature, all that its plan could depend on; most calls find their plan in
`known`. For a new signature the op says the call's class, its sizes and its static plan, which
holds where nothing was measured; the tables decide (core/tuned.py, core/tuned_files.py).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gptkernels.core import choice, cpu, externals, tuned_files
from gptkernels.core.checks import dtype_name
from gptkernels.core.errors import first_line
from gptkernels.core.torchscript import refuse_trace
from gptkernels.core.tuned import (
    COMPILED,
    EAGER,
    EXTERNAL,
    FORWARD,
    PYTORCH,
    TRAINING,
    Key,
    Table,
)
from gptkernels.core.tuned import position as position_of


class Plan(NamedTuple):
    """What runs a call: `whole`, a function that is no implementation of ours, or else an
    implementation for each direction. `measured`: it is of a table."""

    forward: str
    backward: str
    whole: str | None = None
    measured: bool = False


TORCH = Plan("torch", "torch")


class Way(str):
    """An implementation, or another package's function, that was chosen. Where its launch fails,
    PyTorch runs the call, and all later ones of its class (`core.registry`)."""

    key: Key


@dataclass(frozen=True)
class Call:
    """What an op says of a call with a new signature.

    sizes: axis -> its size, for the class and for the position in it.
    static: the plan where nothing was measured.
    whole: the functions that have all that it asks for.
    lacking: the implementations that have not.
    """

    op: str
    training: bool
    facts: Mapping[str, Any]
    sizes: Mapping[str, int]
    static: Plan
    whole: Sequence[str] = ()
    lacking: Collection[str] = ()

    @property
    def key(self) -> Key:
        """Its class, in eager mode."""
        direction = TRAINING if self.training else FORWARD
        return Key.of(self.op, direction, EAGER, self.facts, self.sizes)


class Choices(dict[str, Plan]):
    """Plans by op, whatever the sizes are."""

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        super().__init__(plans)
        self._known: dict[Hashable, Plan] = {}
        self._since = _forgotten

    @property
    def known(self) -> dict[Hashable, Plan]:
        """As the one of the module, for calls by these plans; emptied where that is, too."""
        if self._since != _forgotten:
            self._since = _forgotten
            self._known.clear()
        return self._known


_forgotten = 0  # how often `known` was emptied
# Signature -> plan. It is emptied where anything that plans depend on changes.
known: dict[Hashable, Plan] = {}
_MOST_KNOWN = 1 << 14
_LOCK = threading.Lock()
# The plans of an engine, by op: in its context the tables are not asked.
fixed: ContextVar[Choices | None] = ContextVar("fixed", default=None)

_tables: dict[str, Table] = {}
_demoted: set[Key] = set()
_recordings: dict[int, list[Call]] = {}  # by the list's id: two may hold the same calls


def seen(signature: Hashable) -> Plan | None:
    """The plan of an earlier call with the same signature; None where there was none."""
    choices = fixed.get()
    return (known if choices is None else choices.known).get(signature)


def new(signature: Hashable, call: Call) -> Plan:
    """The plan of a call whose signature was not seen; a signature of None is not kept. Raises
    NotImplementedError under torch.jit.trace, where none was ever seen: sizes are tensors."""
    refuse_trace()
    before = _forgotten
    for recording in tuple(_recordings.values()):
        if signature is not None or call not in recording:
            recording.append(call)
    choices = fixed.get()
    if choices is not None:
        plan = _fitting(choices.get(call.op, call.static), call)
        if signature is not None and len(choices.known) < _MOST_KNOWN:
            choices.known[signature] = plan
        return plan
    plan = of(call)
    if signature is not None:
        with _LOCK:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            if before == _forgotten:  # else it may be the plan of other tables
                known[signature] = plan
    return plan


def _fitting(plan: Plan, call: Call) -> Plan:
    """A plan for other calls too, or the static one where this call has what it lacks."""
    if plan.whole is not None:
        return plan if plan.whole in call.whole else call.static
    ours = implementation(plan.forward), implementation(plan.backward)
    return call.static if any(name in call.lacking for name in ours) else plan


def _forget() -> None:
    """Every signature is new from now on, also one whose plan another thread is just looking up."""
    global _forgotten
    with _LOCK:
        _forgotten += 1
        known.clear()


def compiled(
    op: str, training: bool, dtype: torch.dtype, device_type: str, *, opaque: bool = False
) -> str:
    """The implementation inside a graph of torch.compile: what wins in all classes that were
    measured of the op in this dtype, so that the graph asks nothing about sizes; else "torch",
    which Inductor fuses with what is around it. Of an `opaque` op no implementation is fused: then
    the static policy holds as in eager mode."""
    static = choice.automatic(device_type) if opaque else "torch"
    if choice.switched_off() or fixed.get() is not None:
        return static
    direction, name = TRAINING if training else FORWARD, dtype_name(dtype)
    way = table(device_type).unanimous(op, direction, COMPILED, {"dtype": name})
    if way is None or not _is_ours(way) or "+" in way:
        return static
    if unavailable(way, device_type) is not None:
        return static
    return way


# torch.compile takes the answer as a constant.
compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def asked(device_type: str) -> bool:
    """Whether a plan could be one that was measured, or is looked for by somebody who records."""
    return bool(_recordings or table(device_type).entries)


def table(device_type: str) -> Table:
    """The table of a device, read when it is first wanted."""
    found = _tables.get(device_type)
    if found is None:
        # Not over one that another thread has put there meanwhile.
        found = _tables.setdefault(device_type, tuned_files.load(device_type))
    return found


def use(device_type: str, found: Table | None) -> None:
    """From now on plans are of this table; None: read the files again."""
    if found is None:
        _tables.pop(device_type, None)
    else:
        _tables[device_type] = found
    _demoted.clear()
    _forget()


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """A list to which each call that is new in this context is added, of any thread. What they
    compute does not change."""
    calls: list[Call] = []
    _recordings[id(calls)] = calls
    _forget()
    try:
        yield calls
    finally:
        del _recordings[id(calls)]


@contextlib.contextmanager
def only(choices: Mapping[str, Plan]) -> Iterator[None]:
    """In this context, of this thread, an op has the plan that is named here, else its static one,
    whatever the sizes are."""
    token = fixed.set(choices if isinstance(choices, Choices) else Choices(choices))
    try:
        yield
    finally:
        fixed.reset(token)


def demote(way: Way, error: Exception) -> None:
    """From now on, calls of the way's class run by PyTorch."""
    if way.key in _demoted:
        return
    _demoted.add(way.key)
    _forget()
    said = first_line(error) or type(error).__name__
    warnings.warn(
        f"{way} was chosen for {way.key}, but cannot run now ({said}): PyTorch runs such calls "
        "in this process; gptkernels tune measures again",
        stacklevel=4,
    )


def instead(way: str, error: Exception) -> str:
    """What runs a call whose way raised `error`: impl="torch" where a table chose it. Raises the
    error for a way that was named, and where no memory is left."""
    if not isinstance(way, Way) or isinstance(error, torch.OutOfMemoryError):
        raise error
    demote(way, error)
    return "torch"


def implementation(way: str) -> str:
    """The implementation that a way is of, such as "cpu" of "cpu:v3"."""
    return way.partition(":")[0]


def variant(way: str) -> str:
    """What follows the colon in a way; "" where nothing does."""
    return way.partition(":")[2]


def keywords(text: str) -> dict[str, Any]:
    """The keywords that a variant stands for: "tile=128x64x8x3,build=2" is {"tile": (128, 64, 8,
    3), "build": 2}."""
    found: dict[str, Any] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        numbers = tuple(map(int, value.split("x")))
        found[name] = numbers if len(numbers) > 1 else numbers[0]
    return found


def unavailable(way: str, device_type: str) -> str | None:
    """Why a way that a table names cannot be taken here; None where it can."""
    if way == PYTORCH:
        return None
    if way.startswith(EXTERNAL):
        return externals.missing(way.removeprefix(EXTERNAL))
    parts = way.split("+")
    if len(parts) > 2:
        return f"a call has two directions, {way!r} names more"
    for part in parts:
        reason = _unavailable(part, device_type)
        if reason is not None:
            return reason
    return None


def _unavailable(way: str, device_type: str) -> str | None:
    name, which = implementation(way), variant(way)
    if name not in choice.IMPLEMENTATIONS:
        return f"there is no implementation {name!r}"
    reason = choice.unavailable(name, device_type, torch.float32)
    if reason is not None or name == way:
        return reason
    if name == "cpu":
        here = which in cpu.instruction_sets()
        return None if here else f"this CPU, or this build, has no {which!r}"
    try:
        keywords(which)
    except ValueError:
        return f"impl={name!r} has no variant {which!r}"
    return None


def of(call: Call) -> Plan:
    """The plan of a call by the tables, or its static one."""
    device_type = str(call.facts["device"])
    if choice.switched_off():
        return call.static
    key = call.key
    if key in _demoted:
        return TORCH
    entry = table(device_type).get(key)
    if entry is None:
        return call.static
    way = entry.way(position_of(call.sizes.values()))
    if unavailable(way, device_type) is not None:
        return call.static
    return _fitting(of_way(way, key), call)


def of_way(way: str, key: Key | None = None) -> Plan:
    """The plan that a way stands for; with a key, the implementations are of a table."""
    measured = key is not None
    if not _is_ours(way):
        # An error of PyTorch's own function is one of the call.
        return Plan("torch", "torch", way if way == PYTORCH else _chosen(way, key), measured)
    forward, _, backward = way.partition("+")
    return Plan(_chosen(forward, key), _chosen(backward or forward, key), measured=measured)


def _chosen(name: str, key: Key | None) -> str:
    if key is None or name == "torch":
        return name
    way = Way(name)
    way.key = key
    return way


def _is_ours(way: str) -> bool:
    return way != PYTORCH and not way.startswith(EXTERNAL)
