"""Tables in files: the user's, one for each machine and version of what runs on it, and those that
ship with the package.

A file has JSON lines: the first says what machine and software it is of (`fingerprint`), each
further one is an entry. A line that is cut or of another form is left out, and a file of a newer
form or of another machine as a whole, each with one warning: all can be measured again. A file is
written whole, beside the old one and then in its place, by one process at a time; so readers need
no lock, and a process that is killed loses its own new entries at most. What such a process leaves
behind, a lock's file and a half-written one, the next one takes away.

    GPTKERNELS_TUNE=off        no table at all; "cached", the default, takes what is there
    GPTKERNELS_TUNED_FILE=F    the user's table is in F
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from gptkernels.core import cpu
from gptkernels.core.files import replacing
from gptkernels.core.lock import alone_in
from gptkernels.core.machine import cache_folder, cpu_model, cpu_name
from gptkernels.core.tuned import Entry, Table

FORMAT = 1
# How long another process may write the same file: that takes milliseconds.
_PATIENCE_S = 30.0
_EXTERNAL_PACKAGES = ("flash-attn", "liger-kernel")
# What implementations share, outside of their own folders.
_COMPUTING = ("few_rows", "masks", "philox", "products")
_PACKAGE = Path(__file__).resolve().parent.parent
_SHIPPED = _PACKAGE / "core" / "tables"
_START = b'{"gptkernels"'
# What a line raises that is no entry; RecursionError: brackets in thousands of brackets.
_DAMAGE = (ValueError, KeyError, TypeError, RecursionError)
# Of a machine, what a shipped table must share with it: the software may be newer.
_SHARED = ("device", "name", "model", "isa")


def switched_on() -> bool:
    """Whether tables are used. Raises ValueError for a GPTKERNELS_TUNE that it cannot be."""
    mode = os.environ.get("GPTKERNELS_TUNE", "") or "cached"
    if mode not in ("off", "cached"):
        raise ValueError(f"GPTKERNELS_TUNE must be 'off' or 'cached', got {mode!r}")
    return mode == "cached"


def fingerprint(device_type: str) -> dict[str, str]:
    """What times on a device, the current one of its type, depend on, besides the load."""
    software = {"torch": torch.__version__, "kernels": kernels_hash()}
    if device_type != "cuda":
        return machine(device_type) | software | {"blas": _blas()}
    return (
        machine(device_type)
        | software
        | {
            "driver": str(torch._C._cuda_getDriverVersion()),  # type: ignore[attr-defined]
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "triton": _version_of("triton"),
            **{package: _version_of(package) for package in _EXTERNAL_PACKAGES},
        }
    )


def machine(device_type: str) -> dict[str, str]:
    """Which device it is, without its software."""
    if device_type == "cuda":
        index = torch.cuda.current_device()
        major, minor = torch.cuda.get_device_capability(index)
        name, model = torch.cuda.get_device_name(index), f"{major}.{minor}"
        return {"device": device_type, "name": name, "model": model, "isa": f"sm{major}{minor}"}
    missing = cpu.unavailable("cpu")
    isa = torch.backends.cpu.get_cpu_capability() if missing else cpu.instruction_set()
    return {"device": device_type, "name": cpu_name(), "model": cpu_model(), "isa": isa}


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _blas() -> str:
    """The libraries of products that PyTorch was built with."""
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    return ", ".join(line for line in lines if "Math Kernel Library" in line or "MKL-DNN" in line)


@functools.cache
def kernels_hash() -> str:
    """Of everything that computes: the compiled modules, and the sources in Python."""
    digest = hashlib.sha256()
    found = (*_PACKAGE.glob("_cpu.*"), *_PACKAGE.glob("_cuda.*"))
    modules = [path for path in found if path.suffix != ".tmp"]  # which a build has not finished
    shared = [path for path in (_PACKAGE / "core").glob("*.py") if path.stem in _COMPUTING]
    for path in sorted([*modules, *shared, *(_PACKAGE / "ops").rglob("*.py")]):
        digest.update(f"{path.relative_to(_PACKAGE)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _has_any(device_type: str) -> bool:
    """Whether the user has a table of any software. Raises RuntimeError where there is no home."""
    if os.environ.get("GPTKERNELS_TUNED_FILE"):
        return True
    return any((cache_folder() / "tuned").glob(f"{device_type}-*.jsonl"))


def path_of(device_type: str) -> Path:
    """The user's file for this machine. Raises RuntimeError where there is no home."""
    named = os.environ.get("GPTKERNELS_TUNED_FILE")
    if named:
        return Path(named)
    text = json.dumps(fingerprint(device_type), sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cache_folder() / "tuned" / f"{device_type}-{name}.jsonl"


def load(device_type: str) -> Table:
    """All that is known here of a device: what ships, and over it what the user's file has."""
    if not switched_on():
        return Table()
    entries: list[Entry] = []
    for path in sorted(_SHIPPED.glob("*.jsonl")):
        here = machine(device_type)
        found, _ = _read(path, {name: here[name] for name in _SHARED})
        entries += found
    try:
        if not _has_any(device_type):  # then nobody needs the kernels' hash, which takes a while
            return Table(entries)
        path = path_of(device_type)
    except RuntimeError:  # no home
        return Table(entries)
    found, trouble = _read(path, fingerprint(device_type))
    if trouble:
        warnings.warn(f"{path}: {trouble}; gptkernels tune measures again", stacklevel=2)
    return Table([*entries, *found])


def save(device_type: str, entries: Iterable[Entry]) -> Path:
    """Adds entries to the user's file, in the place of those of the same classes, and returns its
    path.

    Raises OSError, or ValueError where another process has the file for long, or the user named a
    file that is no table, or RuntimeError where there is no home; the file then stays as it was.
    """
    path = path_of(device_type)
    here = fingerprint(device_type)
    lock = f".{path.name}.lock"  # a file that the user names may lie where a run has the folder
    with alone_in("the table", path.parent, patience_s=_PATIENCE_S, file=lock):
        if os.environ.get("GPTKERNELS_TUNED_FILE"):
            _check_ours(path)
        there, _ = _read(path, here)
        table = Table([*there, *entries])
        lines = [{"gptkernels": "tuned", "format": FORMAT, "fingerprint": here}]
        lines += [entry.as_dict() for entry in table.entries.values()]
        with replacing(path, durable=True, alone=True) as temporary:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            temporary.write_text(text, encoding="utf-8")
    return path


def _check_ours(path: Path) -> None:
    """Raises ValueError for a file that no table ever was."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(len(_START))
    if start != _START[: len(start)]:
        raise ValueError(
            f"GPTKERNELS_TUNED_FILE is {path}, which is no table of gptkernels: name another file, "
            "or remove this one"
        )


def _read(path: Path, wanted: Mapping[str, str]) -> tuple[list[Entry], str]:
    """The entries of a file for a machine with these facts, and what is wrong with it, if
    anything."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"the table cannot be read ({error.strerror})"
    try:
        head = json.loads(lines[0])
        kind, version, machine = head["gptkernels"], head["format"], dict(head["fingerprint"])
        if kind != "tuned" or type(version) is not int:
            raise ValueError(f"a table has no {kind} of format {version}")
    except (IndexError, *_DAMAGE):
        return [], "it is no table of gptkernels, and is left out"
    if version != FORMAT:
        return [], f"the table has format {version}, this version reads {FORMAT}, it is left out"
    if any(machine.get(name) != value for name, value in wanted.items()):
        return [], "the table is of another machine or another software, and is left out"
    entries, foreign = [], 0
    for line in lines[1:]:
        try:
            entries.append(Entry.from_dict(json.loads(line)))
        except _DAMAGE:
            foreign += 1
    return entries, f"damaged lines of the table are left out ({foreign})" if foreign else ""
