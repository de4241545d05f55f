"""Imports point down: cli -> tuning -> bench -> (gpt, truth, dropin) -> nn -> ops -> core.

A layer may import only itself and the layers that `_BELOW` lists. That holds for imports at the top
of a module, inside a function and for type checking. Only layers that use the public functions, as
a user does, may import `gptkernels` itself.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import gptkernels

_ROOT = Path(gptkernels.__file__).parent
_PUBLIC = "gptkernels"
_BELOW = {
    "core": set(),
    "ops": {"core"},
    "nn": {"core", "ops"},
    "dropin": {"core", "ops", "nn"},
    "flash_attn_interface": {"core", "ops"},
    "gpt": {"core", "ops", "nn"},
    # The truth must not depend on the implementations that are compared with it.
    "truth": {"core", _PUBLIC},
    # Whole models are timed, too.
    "bench": {"core", "ops", "nn", "gpt", "truth", _PUBLIC},
    # It times what it has to choose from, as bench does, on the shapes of a GPT.
    "tuning": {"core", "ops", "nn", "gpt", "truth", "bench", _PUBLIC},
    "cli": {"core", "ops", "nn", "dropin", "gpt", "truth", "bench", "tuning", _PUBLIC},
}


def _name(path: Path) -> str:
    parts = path.relative_to(_ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


_FILES = {_name(path): path for path in sorted(_ROOT.rglob("*.py"))}


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the line and the module of each import of this package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "gptkernels":
                yield node.lineno, name if name in _FILES else name.rpartition(".")[0]


_IMPORTS = {module: list(_imported(path)) for module, path in _FILES.items()}


def _layer(module: str) -> str:
    """Returns the name of a module's folder in gptkernels, or of a module directly in
    gptkernels."""
    return module.split(".")[1] if "." in module else _PUBLIC


def _op(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if _layer(module) == "ops" and len(parts) > 2 else None


def _check(allowed: Callable[[str, str], bool]) -> None:
    wrong = [
        f"{_FILES[module].relative_to(_ROOT.parent)}:{line} imports {imported}"
        for module, imports in _IMPORTS.items()
        for line, imported in imports
        if not allowed(module, imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_a_layer() -> None:
    folders = {path.name for path in _ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(_BELOW)


def test_imports_point_down() -> None:
    def allowed(module: str, imported: str) -> bool:
        layer, other = _layer(module), _layer(imported)
        beside = layer not in _BELOW  # modules directly in gptkernels, which no layer imports
        return beside or other == layer or other in _BELOW[layer]

    _check(allowed)


def test_an_op_imports_no_other_op() -> None:
    def allowed(module: str, imported: str) -> bool:
        op, other = _op(module), _op(imported)
        return None in (op, other) or op == other

    _check(allowed)


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: {imported for _, imported in imports} for module, imports in _IMPORTS.items()}
    # It imports nothing when it is imported: `tune` uses the public functions and is one.
    graph[_PUBLIC] = set()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None
