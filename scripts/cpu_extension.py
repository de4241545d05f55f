"""Builds the CPU kernels, gptkernels._cpu, with ninja and any C++ compiler.

    python scripts/cpu_extension.py              builds build/cpu/_cpu*.so
    python scripts/cpu_extension.py --inplace    builds it, and copies it into gptkernels/
    python scripts/cpu_extension.py --check      says whether it can be built here
    python scripts/cpu_extension.py --sanitize   runs tests/cpu/driver.cpp, every kernel on several
                                                 threads, under the sanitizers
    python scripts/cpu_extension.py --cross      compiles every file with clang for other machines
                                                 too, from the PyPI package ziglang; links nothing

Each kernel file is compiled once for each instruction set; csrc/cpu/dispatch.cpp chooses among them
when the module is loaded, by what the CPU and the system have.

Environment variables: CXX (default: g++, else clang++); MAX_JOBS; GPTKERNELS_OBJECT_CACHE (see
scripts/compile.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from ninja_build import (
    ROOT,
    BuildError,
    Library,
    Object,
    bindings,
    build,
    check_pybind11,
    find_ninja,
    put,
    version_of,
)

_SOURCES = Path("csrc/cpu")
MODULE = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"

# What all instruction sets share is compiled for the lowest of them.
_ONCE = ("bindings.cpp", "dispatch.cpp", "launch.cpp", "parallel.cpp")
_V4 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
# csrc/cpu/dispatch.cpp tests for exactly these features.
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "v3": ["-march=x86-64-v3"],
        "v4": _V4,
        "v4_bf16": [*_V4, "-mavx512bf16"],
    },
    "aarch64": {"baseline": []},
    "arm64": {"baseline": []},
}
# What csrc/cpu/amx is compiled for, and nothing else.
_TILES = {"x86_64": {"v4_amx": [*_V4, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]}}
# What --cross compiles for, as ziglang spells them: Python's name of the machine comes first.
TARGETS = ("x86_64-linux-gnu", "aarch64-linux-gnu", "x86_64-macos", "aarch64-macos")
# No contraction: a compiler would fuse a product and a sum in one copy of a loop and not in the
# next, and a row's bits would depend on the rows beside it. vec.h has multiply_add.
_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Icsrc"),
    "-ffp-contract=off",
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
# GCC's own header of AVX-512 intrinsics reads a variable before it is set, on purpose.
_QUIET = {"GNU": ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]}


def cpu(folder: Path | None = None) -> Path:
    """Builds the module if it is out of date, in `folder` (default: build/cpu), and returns its
    path. Raises BuildError, or subprocess.CalledProcessError where the compiler fails."""
    return build(library(folder or ROOT / "build" / "cpu"))


def library(folder: Path, added: Sequence[str] = ()) -> Library:
    """The module, compiled with `added` flags too."""
    compiler = _compiler()
    objects = _objects(compiler, platform.machine(), added)
    link = [*compiler, "-shared", *added, *_linked()]
    return Library(folder / MODULE, objects, link, ["-ldl"], f"{_SOURCES}/module.map")


def _objects(
    compiler: Sequence[str],
    machine: str,
    added: Sequence[str],
    spelled: Callable[[str], str] = str,
) -> list[Object]:
    """What `compiler` makes of every source for a machine, as platform.machine() names it.
    `spelled` turns GCC's flags into the compiler's."""
    tools = version_of(compiler)
    kind = "LLVM" if "clang" in tools else "GNU"
    command = [*compiler, *_FLAGS, *_QUIET.get(kind, []), *added]
    objects = []
    for path in sorted((ROOT / _SOURCES).glob("**/*.cpp")):
        source = path.relative_to(ROOT)
        if source.name == "bindings.cpp":
            objects.append(bindings(source, command, tools, compiled_for(machine)))
        elif source.name in _ONCE:
            objects.append(Object(source, command, tools))
        else:
            sets = (_TILES if source.parent.name == "amx" else INSTRUCTION_SETS).get(machine, {})
            objects += [
                Object(source, [*command, *map(spelled, flags), f"-DGK_ISA={name}"], tools, (name,))
                for name, flags in sets.items()
            ]
    return objects


def compiled_for(machine: str | None = None) -> str:
    """Returns the names of the instruction sets that the kernels of a machine (default: this one)
    are compiled for, such as "baseline, v3, v4"."""
    machine = machine or platform.machine()
    return ", ".join([*INSTRUCTION_SETS.get(machine, {}), *_TILES.get(machine, {})])


def cross() -> None:
    """Compiles every source for each of TARGETS; a warning is an error. Python's headers are those
    of the running Python. Raises as `cpu` does."""
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError("--cross needs a compiler for other machines: pip install ziglang")
    zig = [sys.executable, "-m", "ziglang", "c++"]
    for target in TARGETS:
        module = ROOT / "build" / "cross" / target / MODULE
        # zig does not repeat a warning about a source that it has compiled before. Asked for its
        # version with a target of macOS, it leaves a file behind.
        added = ["-target", target, "-Werror"]
        machine = target.partition("-")[0]
        objects = _objects(zig, machine, added, lambda flag: flag.replace("x86-64-", "x86_64_"))
        compiled = Library(module, objects, [], [])
        print(f"{target}:", flush=True)
        build(compiled, [compiled.path(o) for o in compiled.objects])


def sanitize(sanitizers: str) -> int:
    """Builds tests/cpu/driver.cpp with the kernels and these sanitizers, runs it, and returns its
    exit code. Raises as `cpu` does."""
    folder = ROOT / "build" / "sanitize" / sanitizers.replace(",", "-")
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g1", "-O1"]
    kernels = library(folder, flags)
    command = [*_compiler(), *_FLAGS, *flags]
    mine = {"bindings.cpp", "parallel.cpp"}  # what the driver has its own of
    objects = [o for o in kernels.objects if o.source.name not in mine]
    tools = objects[0].tools
    objects += [
        Object(Path("tests/cpu") / name, command, tools) for name in ("driver.cpp", "threads.cpp")
    ]
    driver = build(Library(folder / "driver", objects, [*_compiler(), *flags], ["-pthread"]))
    print(f"{sanitizers}:", flush=True)
    return subprocess.run([driver]).returncode


def _linked() -> list[str]:
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    return ["-Wl,--version-script=csrc/cpu/module.map,--gc-sections,-s"]


def lacks() -> str | None:
    """Returns why the module cannot be built here; None where it can."""
    if sys.platform not in ("linux", "darwin"):
        return "the CPU kernels are built on Linux and macOS only"
    if platform.machine() not in INSTRUCTION_SETS:
        known = ", ".join(INSTRUCTION_SETS)
        return f"the CPU kernels are for {known}, and this is {platform.machine()}"
    try:
        _compiler()
        check_pybind11()
        find_ninja()
    except BuildError as error:
        return str(error)
    return None


def _compiler() -> list[str]:
    given = shlex.split(os.environ.get("CXX", ""))
    for compiler in [given] if given else [["g++"], ["clang++"]]:
        if shutil.which(compiler[0]) is not None:
            return compiler
    wanted = given[0] if given else "g++ or clang++"
    raise BuildError(f"the CPU kernels need a C++ compiler, and {wanted} is not on PATH")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if the compiler failed, or 2 if nothing could be built."""
    parser = argparse.ArgumentParser(
        "python scripts/cpu_extension.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inplace", action="store_true", help="copy it into gptkernels/")
    parser.add_argument("--check", action="store_true", help="build nothing")
    parser.add_argument("--sanitize", action="store_true", help="run the driver instead")
    parser.add_argument("--cross", action="store_true", help="compile for other machines instead")
    options = parser.parse_args(arguments)
    reason = None if options.cross else lacks()
    if options.check:
        print(reason or "the CPU kernels can be built here")
        return 2 if reason else 0
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    try:
        if options.cross:
            cross()
            return 0
        if options.sanitize:
            return max(map(sanitize, ("address,undefined", "thread")))
        made = cpu()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError:
        return 1
    if options.inplace:
        put(made, ROOT / "gptkernels" / MODULE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
