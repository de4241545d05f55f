"""Builds the CUDA C++ kernels with ninja: the extension for GPUs, or the emulator for a CPU.

    python scripts/extension.py emulator                 builds build/emulator/_cuda*.so with g++
    python scripts/extension.py native                   builds build/native/_cuda*.so with nvcc
    python scripts/extension.py emulator layer_norm/fwd.cu   compiles this file only
    python scripts/extension.py native layer_norm/fwd.cu     the same, and prints ptxas's report
    python scripts/extension.py native attention/fwd/kernel.cu.bf16   one row of csrc/instances.toml
    python scripts/extension.py native --check           says whether it can be built here

`setup.py` installs the native extension as gptkernels._cuda. The emulator is for the test suite and
is never installed. It runs the kernels as host code on the fibers of csrc/emulator, and checks
every memory access: with -fsanitize=thread g++ calls a function at each access, and csrc/emulator
defines these functions (the sanitizer's own library is not linked).

Environment variables: CUDA_HOME (default: the toolkit of the nvcc on PATH); CXX (default: g++);
NVCC_CCBIN; GPTKERNELS_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST (see scripts/gpus.py); MAX_JOBS;
NVCC_THREADS; GPTKERNELS_OBJECT_CACHE, a folder that keeps objects (see scripts/compile.py).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import gpus
from ninja_build import (
    ROOT,
    BuildError,
    Library,
    Object,
    bindings,
    build,
    check_pybind11,
    find_ninja,
    version_of,
)

# Commands name files relative to ROOT, so that several checkouts can share cached objects.
_SOURCES = Path("csrc")
_BINDINGS = _SOURCES / "bindings.cpp"
_EXPORTS = "--version-script=csrc/module.map"  # exports one symbol, which Python calls on import
_MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"

_OLDEST_NVCC = (12, 8)
# Sources in a folder of this name are compiled for 90a only.
_HOPPER_ONLY = "sm90"
# Host code in csrc that the emulator replaces with a version of its own.
_NATIVE_ONLY = tuple(f"csrc/runtime/{name}.cpp" for name in ("context", "driver", "launch"))

_HOST_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# The emulator's errors name the callers, which it finds by frame pointers.
_EMULATED_FLAGS = [*_HOST_FLAGS, "-DGK_EMULATE", "-g1", "-fno-omit-frame-pointer", "-Wno-psabi"]
if platform.machine() == "aarch64":
    _EMULATED_FLAGS.append("-mbranch-protection=none")  # a signed return address leads to no line
_EMULATOR_FLAGS = [*_EMULATED_FLAGS, "-O2", "-fno-optimize-sibling-calls"]
# Flags for kernels, whose memory accesses g++ must report.
# Function entries and exits are not reported.
# Device functions are always inlined (-Wno-attributes silences g++ about those that are not
# declared inline), since g++ does not report what calls take or return.
# -fno-tree-sra: loads and stores of structs stay whole, so that their alignment is checked.
# -fno-thread-jumps: no call is duplicated for the two outcomes of a condition. Lanes that meet in
# one call must have the same return address.
_REPORTED = [
    *("-O1", "-Wno-attributes", "-fno-tree-sra", "-fno-thread-jumps"),
    *("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
]
_NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    *("-Werror=all-warnings", "-Xptxas=--warning-as-error", "-Xptxas=-v"),
]


def emulator() -> Path:
    """Builds the emulator's module if it is out of date, and returns its path.

    Raises BuildError, or subprocess.CalledProcessError where a compiler fails.
    """
    return build(_emulator())


def _emulator() -> Library:
    compiler = _compiler()
    base = [*compiler, *_EMULATOR_FLAGS, "-Icsrc", f"-isystem{_cuda_headers()}"]
    bound = bindings(_BINDINGS, base, version_of(compiler), "the emulator")
    objects = [*_emulated(compiler, _kernels()), bound]
    link = [*compiler, "-shared", f"-Wl,{_EXPORTS}"]
    return Library(ROOT / "build" / "emulator" / _MODULE, objects, link, ["-pthread"])


def emulated(sources: Sequence[Path], folder: Path) -> Path:
    """Builds, if it is out of date, a library in `folder` of the emulator and these sources, and
    returns its path. Kernels are in .cu files, host code in others. Paths are relative to ROOT.
    Raises as `emulator` does.
    """
    compiler = _compiler()
    objects = _emulated(compiler, sources)
    return build(Library(folder / _MODULE, objects, [*compiler, "-shared"], ["-pthread"]))


def _emulated(compiler: Sequence[str], sources: Sequence[Path]) -> list[Object]:
    """Returns the objects, those of the emulator first. Where several objects have the same
    function of the standard library, the linker keeps the first one: the emulator's, whose accesses
    are not reported, since the emulator must not check itself.
    """
    include = ["-Icsrc", f"-isystem{_cuda_headers()}"]
    host = [*compiler, *_EMULATOR_FLAGS, *include]
    kernels = [*compiler, *_EMULATED_FLAGS, *_REPORTED, *include, "-xc++"]
    tools = version_of(compiler)
    shared = [file for file in _host_code(sources) if file.as_posix() not in _NATIVE_ONLY]
    return [
        o
        for source in (*_files("emulator/**/*.cpp"), *shared, *sources)
        for o in _objects(source, kernels if source.suffix == ".cu" else host, tools)
    ]


def _objects(source: Path, command: list[str], tools: str) -> Iterator[Object]:
    """Yields one object for each row that csrc/instances.toml has for the source, or one object if
    it does not name the source. The rows are all combinations of the macros' values.
    """
    table = tomllib.loads((ROOT / _SOURCES / "instances.toml").read_text())
    macros = table.get(source.as_posix().removeprefix(f"{_SOURCES}/"), {})
    for values in itertools.product(*macros.values()):
        row = tuple(map(str, values))
        defined = [f"-D{name}={value}" for name, value in zip(macros, row, strict=True)]
        yield Object(source, [*command, *defined], tools, row)


def native(folder: Path | None = None) -> Path:
    """Builds, if it is out of date, the extension for GPUs in `folder` (default: build/native), and
    returns its path. Says which of the architectures that were named it leaves out.

    Raises BuildError, or subprocess.CalledProcessError where a compiler fails.
    """
    older = gpus.left_out()
    if older is not None:
        print(older, flush=True)
    return build(_native(folder or ROOT / "build" / "native"))


def _native(folder: Path) -> Library:
    host, objects, link = _natively(_kernels())
    objects.append(bindings(_BINDINGS, host, objects[-1].tools, compiled_for()))
    link.append(f"-Xlinker={_EXPORTS},-s")
    return Library(folder / _MODULE, objects, link, [])


def native_library(sources: Sequence[Path], folder: Path) -> Path:
    """Builds, if it is out of date, a library in `folder` of these sources and the host code that
    launches kernels, and returns its path. Kernels are in .cu files, host code in others. Paths are
    relative to ROOT. Raises as `native` does.
    """
    _, objects, link = _natively(sources)
    return build(Library(folder / _MODULE, objects, link, []))


def _natively(sources: Sequence[Path]) -> tuple[list[str], list[Object], list[str]]:
    """Returns the command that compiles host code, the objects of the sources and of the launching
    code, and the command that links them.

    The CUDA runtime is linked statically, since the process may hold PyTorch's own copy; it loads
    the driver's library when needed. libstdc++ stays shared, since pybind11 passes C++ exceptions
    to other modules of the process.
    """
    compiler, nvcc = _compiler(), find_nvcc()
    if nvcc is None:
        raise BuildError("the CUDA kernels need nvcc, and neither PATH nor CUDA_HOME leads to one")
    # nvcc reads these variables itself. They may add -lineinfo for a profiler, or name another
    # compiler of host code.
    variables = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
    added = [os.environ.get(name, "") for name in variables]
    tools = " ".join((version_of([nvcc]), *added)).strip()
    host = [*compiler, *_HOST_FLAGS, "-O2", "-Icsrc", f"-isystem{_cuda_headers()}"]
    both = f"{tools}, {version_of(compiler)}"
    objects: list[Object] = []
    for source in (*sources, *_host_code(sources)):
        if source.suffix == ".cu":
            kernels = [nvcc, *_NVCC_FLAGS, *_targets(source), "-Icsrc"]
            objects += _objects(source, kernels, tools)
        else:
            objects.append(Object(source, host, both))
    return host, objects, [nvcc, "-shared", "--cudart=static"]


def kernels(folder: Path) -> dict[str, Path]:
    """Builds the native objects of all kernels that are out of date, in `folder`, and returns their
    paths by source and row.

    What the compiler printed is in a file beside each object, whose name ends in .log. Raises as
    `native` does.
    """
    library = _native(folder)
    made = {o.name: library.path(o) for o in library.objects if o.source.suffix == ".cu"}
    build(library, list(made.values()))
    return made


def compiled_for() -> str:
    """Returns the names of the architectures that the extension is compiled for, such as
    "80+PTX, 90a". Raises BuildError as `gpus.architectures` does."""
    return ", ".join(name + "+PTX" * ptx for name, ptx in gpus.architectures())


def lacks() -> str | None:
    """Returns why the extension for GPUs cannot be built here; None where it can. Raises BuildError
    for a malformed list of architectures."""
    if sys.platform != "linux":
        return "CUDA kernels are built on Linux only"
    nvcc = find_nvcc()
    if nvcc is None:
        return "neither PATH nor CUDA_HOME leads to nvcc"
    said = version_of([nvcc])
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or tuple(map(int, release.groups())) < _OLDEST_NVCC:
        oldest = ".".join(map(str, _OLDEST_NVCC))
        return f"the CUDA kernels need nvcc {oldest} or newer, {nvcc} is: {said or 'unknown'}"
    try:
        _compiler()
        _cuda_headers()
        check_pybind11()
        find_ninja()
    except BuildError as error:
        return str(error)
    return gpus.lacks()


def find_nvcc() -> str | None:
    """Returns the path of nvcc: that of CUDA_HOME, else the one on PATH; None without nvcc."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which(os.path.join(home, "bin", "nvcc"))) or shutil.which("nvcc")


def hopper_only(source: Path) -> bool:
    """Whether a source is in a folder for kernels of compute capability 9.0 only."""
    return _HOPPER_ONLY in source.parts


def _targets(source: Path) -> list[str]:
    """Returns nvcc's flags for the architectures that it compiles a source for.

    Sources for any GPU use no feature of the "a" variants, so they are compiled for 90, not 90a.
    """
    if hopper_only(source):
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    with_ptx: dict[str, bool] = {}
    for name, ptx in gpus.architectures():
        number = re.sub(r"\D", "", name)
        with_ptx[number] = ptx or with_ptx.get(number, False)
    return [
        f"-gencode=arch=compute_{number},code="
        + (f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}")
        for number, ptx in with_ptx.items()
    ]


def _compiler() -> list[str]:
    """Returns the C++ compiler: g++, or CXX with its arguments."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"the CUDA kernels need a C++ compiler, and {compiler[0]} is not on PATH")
    return compiler


def _cuda_headers() -> Path:
    """Returns the folder of cuda_runtime.h: the toolkit's, else that of the PyPI packages."""
    places = []
    nvcc = find_nvcc()
    if nvcc is not None:
        places.append(_toolkit(nvcc) / "include")
    packages = importlib.util.find_spec("nvidia")
    if packages is not None:
        places += [Path(p) / "cu13/include" for p in packages.submodule_search_locations or ()]
    for place in places:
        if (place / "cuda_runtime.h").exists() and (place / "crt" / "host_defines.h").exists():
            return place
    raise BuildError(
        "the CUDA kernels need CUDA's headers: a toolkit whose nvcc is on PATH, or "
        "pip install 'nvidia-cuda-runtime>=13,<14' 'nvidia-cuda-crt>=13,<14' "
        "'nvidia-cuda-cccl>=13,<14'"
    )


def _toolkit(nvcc: str) -> Path:
    """Returns the toolkit's folder of an nvcc. The nvcc on PATH may be a wrapper elsewhere: then it
    is asked for the folder."""
    beside = Path(nvcc).resolve().parent.parent
    if (beside / "include" / "cuda_runtime.h").exists():
        return beside
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.M)
    return Path(top[1]).resolve() if top else beside


def _files(pattern: str) -> list[Path]:
    """Returns the files of csrc that match the pattern, relative to ROOT."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / _SOURCES).glob(pattern))


def _kernels() -> list[Path]:
    sources = _files("**/*.cu")
    if not sources:
        raise BuildError(f"there are no kernels in {ROOT / _SOURCES}")
    return sources


def _host_code(kernels: Sequence[Path]) -> list[Path]:
    """Returns the host code that launchers call, without the bindings. Host code of an operator is
    left out unless its kernels are among `kernels`."""

    def operators(files: Sequence[Path]) -> set[str]:
        return {file.parts[1] for file in files}  # the name of the folder in csrc

    others = operators(_files("**/*.cu")) - operators(kernels)
    apart = ("cpu", "emulator")  # the CPU kernels are a module of their own (cpu_extension.py)
    files = [file for file in _files("*/**/*.cpp") if file.parts[1] not in apart]
    return [file for file in files if not operators([file]) & others]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a compiler failed, or 2 if nothing could be built."""
    parser = argparse.ArgumentParser(
        "python scripts/extension.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=("emulator", "native"))
    parser.add_argument("only", nargs="*", metavar="FILE", help="compile these files, link nothing")
    parser.add_argument("--check", action="store_true", help="build nothing (of native only)")
    options = parser.parse_args(arguments)
    if options.check:
        if options.kind != "native" or options.only:
            parser.error("--check is for native, without files")
        try:
            reason = lacks()
        except BuildError as error:
            reason = str(error)
        print(reason or "the CUDA kernels can be built here")
        return 2 if reason else 0
    here = f"{platform.machine()} {platform.system()}"
    if options.kind == "emulator" and here not in ("x86_64 Linux", "aarch64 Linux"):
        print(f"skipped: the emulator runs on x86-64 and aarch64 Linux, and this is {here}")
        return 0
    try:
        library = _emulator() if options.kind == "emulator" else _native(ROOT / "build" / "native")
        only = [path for name in options.only for path in library.named(_source(name))]
        build(library, only)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError:
        return 1
    if options.kind == "native":
        for path in only:
            print(_readable(Path(f"{path}.log").read_text()), end="")
    return 0


def _source(name: str) -> str:
    """Returns a source's path with csrc/ in front, which the command line may leave out."""
    return name if name.startswith(f"{_SOURCES}/") else f"{_SOURCES}/{name}"


def _readable(text: str) -> str:
    """Returns the text with demangled C++ names, if c++filt is installed."""
    program = shutil.which("c++filt")
    if program is None:
        return text
    return subprocess.run([program], input=text, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
