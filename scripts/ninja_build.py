"""Compiles sources and links them with ninja. The scripts that build a module, extension.py (CUDA
kernels) and cpu_extension.py, say which, and with what flags;
scripts/compile.py runs each compiler.

Paths in the working tree are written relative to it. The environment variables MAX_JOBS and
NVCC_THREADS are explained in scripts/extension.py.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


class BuildError(Exception):
    """The reason why the extension cannot be built, in one sentence."""


@dataclass(frozen=True)
class Object:
    """What one compiler makes of one source."""

    source: Path
    command: list[str]
    tools: str  # the versions of the tools, on which the object depends
    row: tuple[str, ...] = ()  # the values of its macros, from csrc/instances.toml

    @property
    def name(self) -> str:
        """The source's path and the row, such as csrc/attention/fwd/kernel.cu.bf16."""
        return ".".join((self.source.as_posix(), *self.row))


@dataclass(frozen=True)
class Library:
    """A shared library, with its objects, which are kept in its folder, and how they are linked."""

    module: Path  # the library's own path
    objects: list[Object]
    link: list[str]  # the command that links, without the files
    libraries: list[str]
    exports: str = "csrc/module.map"  # what the link depends on besides the objects

    @property
    def folder(self) -> Path:
        """The folder that ninja works in."""
        return self.module.parent

    def path(self, o: Object) -> Path:
        """The path of one of the objects."""
        return self.folder / "objects" / f"{o.name}.o"

    def named(self, name: str) -> list[Path]:
        """Returns the paths of a source's objects, or of the object of one of its rows. Raises
        BuildError for other names."""
        found = [self.path(o) for o in self.objects if name in (o.source.as_posix(), o.name)]
        if not found:
            raise BuildError(f"there is no {name} among {', '.join(o.name for o in self.objects)}")
        return found


def build(library: Library, only: Sequence[Path] = ()) -> Path:
    """Writes build.ninja in the library's folder, and runs it for the library or for the objects in
    `only`. Returns the library's path."""
    library.folder.mkdir(parents=True, exist_ok=True)
    with _alone(library.folder):
        file = library.folder / "build.ninja"
        text = "\n".join(_ninja_lines(library))
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        wanted = map(_named, only or [library.module])
        command = [find_ninja(), "-f", str(file), "-j", str(jobs()), *wanted]
        subprocess.run(command, cwd=ROOT, env=_environment(), check=True)
    return library.module


def put(made: Path, to: Path) -> None:
    """Copies a module to its place, at once: a process that has loaded the old one keeps it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f"{to.name}.{os.getpid()}.tmp")
    shutil.copy(made, partial)
    partial.replace(to)


def _ninja_lines(library: Library) -> Iterator[str]:
    compile_one = [sys.executable, "scripts/compile.py"]
    link, libraries = _command([*library.link, "-o"]), _command(library.libraries)
    yield f"builddir = {_path(library.folder)}"
    yield "rule compile"
    yield f"  command = {_command(compile_one)} --tools $tools --object $out $in -- $compiler"
    yield "  description = $name"
    yield "  depfile = $out.d"
    yield "  deps = gcc"
    yield "rule link"
    yield f"  command = {link} $out $in {libraries}"
    yield "  description = $out"
    for o in library.objects:
        source = _path(ROOT / o.source)
        yield f"build {_path(library.path(o))}: compile {source} | scripts/compile.py"
        yield f"  name = {o.name}"
        yield f"  tools = {_command([o.tools])}"
        yield f"  compiler = {_command(o.command)}"
    compiled = " ".join(_path(library.path(o)) for o in library.objects)
    yield f"build {_path(library.module)}: link {compiled} | {library.exports}"
    yield ""


def _named(path: Path) -> str:
    """Returns a path as commands name it: relative to ROOT if it lies in ROOT."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _path(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", _named(path))


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def bindings(source: Path, command: list[str], tools: str, compiled_for: str) -> Object:
    """Returns the object of a source that uses pybind11 and Python's headers, those of the running
    Python; its module tells Python what it was compiled for. Raises BuildError without pybind11."""
    pybind11 = check_pybind11()
    include = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    python = f"{sys.implementation.cache_tag} {platform.python_version()}"
    tools = f"{tools}, pybind11 {pybind11.__version__}, {python}"
    told = f'-DGK_COMPILED_FOR="{compiled_for}"'
    return Object(source, [*command, *include, told], tools)


def check_pybind11() -> ModuleType:
    """Returns pybind11. Raises BuildError without it."""
    try:
        return importlib.import_module("pybind11")
    except ImportError:
        raise BuildError("the kernels' bindings need pybind11: pip install pybind11") from None


def version_of(command: Sequence[str]) -> str:
    """Returns the lines of `--version` that have a version number."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return " ".join(line for line in said.splitlines() if re.search(r"\d+\.\d+", line))


def find_ninja() -> str:
    """Returns ninja's program: the PyPI package's where it is installed, else the one on PATH."""
    with contextlib.suppress(ImportError):
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
        if program:
            return program
    program = shutil.which("ninja")
    if program is None:
        raise BuildError("the kernels are built with ninja: pip install ninja")
    return program


def jobs() -> int:
    """Returns how many compilers run at a time: MAX_JOBS, else the number of cores."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if not given:
        # macOS does not say which cores a process may use.
        mine = getattr(os, "sched_getaffinity", None)
        return len(mine(0)) if mine else os.cpu_count() or 1
    if re.fullmatch(r"0*[1-9]\d*", given, re.ASCII) is None:
        raise BuildError(f"MAX_JOBS is a number of compilers, 1 or more, not {given!r}")
    return int(given)


def _environment() -> dict[str, str]:
    """Returns the environment for ninja and the compilers. It passes NVCC_THREADS on to nvcc in a
    variable, not in the command, since objects do not depend on it."""
    # A line for each file that is done; ninja prints all of them where no terminal is.
    environment = {"NINJA_STATUS": "compiled %f of %t: ", **os.environ}
    threads = environment.get("NVCC_THREADS")
    if threads:
        appended = environment.get("NVCC_APPEND_FLAGS", "")
        environment["NVCC_APPEND_FLAGS"] = f"{appended} --threads {threads}".strip()
    return environment


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock, so that only one process builds in a folder at a time."""
    import fcntl  # not on Windows, where setup.py still reads this file

    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
