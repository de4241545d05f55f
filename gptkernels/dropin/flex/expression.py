"""What a mask_mod or a score_mod of FlexAttention computes, as an expression.

torch.fx runs the function once with symbols in place of its arguments. So what is read is the
function itself, whatever the lengths are, and not values of it. Numbers and tensors that it takes
from its closure are those of this call: nothing is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

BATCH, HEAD, QUERY, KEY, SCORE = "b", "h", "q_idx", "kv_idx", "score"
INDICES = (BATCH, HEAD, QUERY, KEY)

# PyTorch's and Python's names of an operation that is called otherwise here.
_ALIASES = {
    "bitwise_and": "and", "logical_and": "and", "bitwise_or": "or", "logical_or": "or",
    "subtract": "sub", "multiply": "mul", "truediv": "div", "divide": "div", "true_divide": "div",
    "absolute": "abs", "negative": "neg", "less": "lt", "less_equal": "le", "greater": "gt",
    "greater_equal": "ge", "iadd": "add", "isub": "sub", "imul": "mul", "iand": "and",
}  # fmt: skip
_INFIX = {
    "and": "&", "or": "|", "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//",
    "mod": "%", "pow": "**", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Captured:
    """A tensor of the function's closure."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Captured):
            return False
        a, b = self.tensor, other.tensor
        return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"tensor{list(self.tensor.shape)}"


@dataclass(frozen=True)
class Name:
    """One of the function's arguments."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Term:
    """An operation, with terms, names, captured tensors, numbers or tuples of them."""

    operation: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    call: Callable[..., Any] = field(compare=False, repr=False)

    def __str__(self) -> str:
        if self.operation in _INFIX and len(self.arguments) == 2 and not self.options:
            left, right = map(_shown, self.arguments)
            return f"({left} {_INFIX[self.operation]} {right})"
        if self.operation == "getitem":
            index = _shown(self.arguments[1])
            return f"{_shown(self.arguments[0])}[{index.removeprefix('(').removesuffix(')')}]"
        given = [_shown(argument) for argument in self.arguments]
        given += [f"{name}={_shown(value)}" for name, value in self.options]
        return f"{self.operation}({', '.join(given)})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return str(value)


class Unknown(NotImplementedError):
    """A form that this package's ops do not compute."""


def read(function: Callable[..., Any], kind: str, arguments: Sequence[str]) -> Any:
    """The expression that a function of these arguments returns. Raises Unknown where what it does
    depends on their values."""
    graph = fx.Graph()
    tracer = _Tracer(graph)
    symbols = {graph.placeholder(name): Name(name) for name in arguments}
    try:
        result = function(*(fx.Proxy(node, tracer) for node in symbols))
    except Exception as error:
        raise Unknown(f"{kind} cannot be read without its values: {error}") from error
    found: dict[fx.Node, Any] = dict(symbols)
    graph.output(tracer.create_arg(result))
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = _captured(tracer.tensors[node.target])
        elif node.op == "output":
            return fx.map_arg(node.args[0], found.__getitem__)
        elif node.op != "placeholder":
            found[node] = _term(node, found)
    raise AssertionError("a graph ends with its output")


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Takes a tensor of a closure as it is, a parameter too."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.tensors: dict[str, Tensor] = {}

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        name = f"captured_{id(a)}"
        self.tensors[name] = a
        return self.create_node("get_attr", name, (), {})


def _captured(tensor: Tensor) -> Any:
    if tensor.dim() == 0 and not tensor.requires_grad:
        return tensor.item()
    return Captured(tensor)


def _term(node: fx.Node, found: Mapping[fx.Node, Any]) -> Any:
    arguments = _tuples(fx.map_arg(node.args, found.__getitem__))
    named = fx.map_arg(dict(node.kwargs), found.__getitem__)
    options = tuple((key, _tuples(option)) for key, option in named.items())
    if callable(node.target):
        operation, call = node.target.__name__, node.target
    else:
        operation, call = node.target, _method(node.target)
    operation = operation.strip("_")
    operation = _ALIASES.get(operation, operation)
    if operation in ("new_ones", "new_zeros") and dict(options).get("dtype") == torch.bool:
        return operation == "new_ones"
    return Term(operation, arguments, options, call)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, tuple | list) else value


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *arguments, **options: getattr(tensor, name)(*arguments, **options)


def names(expression: Any) -> frozenset[str]:
    """The function's arguments in an expression."""
    if isinstance(expression, Name):
        return frozenset({expression.name})
    if isinstance(expression, Term):
        expression = (*expression.arguments, *(value for _, value in expression.options))
    if isinstance(expression, tuple):
        return frozenset().union(*map(names, expression))
    return frozenset()


def renamed(expression: Any, old: str, new: str) -> Any:
    """The expression with one argument in the place of another."""
    if isinstance(expression, tuple):
        return tuple(renamed(part, old, new) for part in expression)
    if isinstance(expression, Term):
        arguments = renamed(expression.arguments, old, new)
        options = tuple((key, renamed(value, old, new)) for key, value in expression.options)
        return Term(expression.operation, arguments, options, expression.call)
    return Name(new) if expression == Name(old) else expression


def value(expression: Any, given: Mapping[str, Tensor]) -> Any:
    """The expression's value, a tensor or a number, for values of its arguments that broadcast."""
    match expression:
        case Name(name):
            return given[name]
        case Captured(tensor):
            return tensor
        case tuple():
            return tuple(value(part, given) for part in expression)
        case Term():
            arguments = value(expression.arguments, given)
            options = {key: value(option, given) for key, option in expression.options}
            return expression.call(*arguments, **options)
    return expression


class Position(NamedTuple):
    """query q_idx + key kv_idx + more, of integers."""

    query: int
    key: int
    more: int


def exact(expression: Any) -> Any:
    """The expression without conversions to float32 or float64 around it, which keep positions and
    scores as they are."""
    while isinstance(expression, Term) and not expression.options:
        match expression.operation, expression.arguments:
            case (("float" | "double"), (inner,)):
                expression = inner
            case "to", (inner, (torch.float32 | torch.float64)):
                expression = inner
            case _:
                break
    return expression


def position(expression: Any) -> Position | None:
    """The expression as a sum of positions, where it is one."""
    expression = exact(expression)
    if type(expression) is int:
        return Position(0, 0, expression)
    if expression == Name(QUERY):
        return Position(1, 0, 0)
    if expression == Name(KEY):
        return Position(0, 1, 0)
    if not isinstance(expression, Term) or expression.options:
        return None
    found = (position(argument) for argument in expression.arguments)
    parts = [part for part in found if part is not None]
    if len(parts) < len(expression.arguments):
        return None
    match expression.operation, parts:
        case "neg", [x]:
            return Position(*(-n for n in x))
        case "add" | "sub", [x, y]:
            return Position(*map(getattr(operator, expression.operation), x, y))
        case "mul", [x, y] if x[:2] == (0, 0) or y[:2] == (0, 0):
            scale, other = (x.more, y) if x[:2] == (0, 0) else (y.more, x)
            return Position(*(scale * n for n in other))
    return None
