"""Builds the CUDA C++ kernels with ninja: the extension for GPUs, or the same kernels for a CPU.

    python scripts/extension.py emulator                 build/emulator/_cuda*.so, by g++
    python scripts/extension.py native                   build/native/_cuda*.so, by nvcc
    python scripts/extension.py emulator layer_norm/fwd.cu   that file's object alone
    python scripts/extension.py native layer_norm/fwd.cu     likewise, and what ptxas says about it
    python scripts/extension.py native --check           whether it can be built here; if not, why

`setup.py` installs the native extension as gptkernels._cuda. The emulator's is for the test suite
and never installed: kernels run as host code on the fibers of csrc/emulator, every memory access
reported to it (g++ calls a function at each access with -fsanitize=thread, and csrc/emulator has
those functions; the sanitizer's own library is not linked).

Environment: CUDA_HOME (else the toolkit of the nvcc on PATH); CXX (else g++), NVCC_CCBIN;
GPTKERNELS_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST, such as "80;90a" or "8.0 9.0a+PTX"; MAX_JOBS,
NVCC_THREADS; GPTKERNELS_OBJECT_CACHE, a folder that keeps objects (see scripts/compile.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
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
# Commands name files relative to ROOT, so that one checkout's objects serve another's cache.
_SOURCES = Path("csrc")
_BINDINGS = _SOURCES / "bindings.cpp"
_EXPORTS = "--version-script=csrc/module.map"  # one symbol: what Python calls on import
_MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"

# Machine code for A100, H100 and H200; the PTX of compute capability 8.0 serves all others.
DEFAULT_ARCHITECTURES = "80+PTX;90a"
_OLDEST_NVCC = (12, 8)
# A folder of this name holds sources that are compiled for 90a and for nothing else.
_HOPPER_ONLY = "sm90"
# Host code in csrc that the emulator has another version of.
_NATIVE_ONLY = ("csrc/runtime/launch.cpp",)

_HOST_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# Errors name the callers that frame pointers lead to.
_EMULATED_FLAGS = [*_HOST_FLAGS, "-DGK_EMULATE", "-g", "-fno-omit-frame-pointer", "-Wno-psabi"]
if platform.machine() == "aarch64":
    _EMULATED_FLAGS.append("-mbranch-protection=none")  # signed return addresses name no line
_EMULATOR_FLAGS = [*_EMULATED_FLAGS, "-O2", "-fno-optimize-sibling-calls"]
# Kernels: every access to memory is reported, function entries and exits are not. Device functions
# are inlined whether or not they are declared so: g++ does not report what calls take or return.
# Loads and stores of structs stay whole, so that their alignment is seen. No call is copied for
# the two outcomes of a condition: lanes that meet at one place have one return address.
_REPORTED = [
    *("-O1", "-Wno-attributes", "-fno-tree-sra", "-fno-thread-jumps"),
    *("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
]
_NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    *("-Werror=all-warnings", "-Xptxas=--warning-as-error", "-Xptxas=-v"),
]


class BuildError(Exception):
    """What keeps the extension from being built, in one sentence."""


@dataclass(frozen=True)
class _Object:
    source: Path
    command: list[str]
    tools: str  # the versions that its content depends on


def emulator(only: Sequence[str] = ()) -> Path:
    """The emulator's module, brought up to date; or the last of the objects of the sources `only`.

    Raises BuildError, or subprocess.CalledProcessError where a compiler fails.
    """
    compiler = _compiler()
    base = [*compiler, *_EMULATOR_FLAGS, "-Icsrc", f"-isystem{_cuda_headers()}"]
    objects = [*_emulated(compiler, _files("**/*.cu")), _bindings(base, _version(compiler))]
    link = [*compiler, "-shared", f"-Wl,{_EXPORTS}"]
    return _build(ROOT / "build" / "emulator", objects, link, ["-pthread"], only)


def emulated(sources: Sequence[Path], folder: Path) -> Path:
    """A library in `folder` that is the emulator with these sources, kernels in .cu files and host
    code in others, brought up to date. Paths are relative to ROOT. Raises as `emulator` does.
    """
    compiler = _compiler()
    return _build(folder, _emulated(compiler, sources), [*compiler, "-shared"], ["-pthread"], [])


def _emulated(compiler: Sequence[str], sources: Sequence[Path]) -> list[_Object]:
    """The emulator first: of the library functions that several files instantiate the linker keeps
    the first, and the emulator's own accesses are not for it to check.
    """
    include = ["-Icsrc", f"-isystem{_cuda_headers()}"]
    host = [*compiler, *_EMULATOR_FLAGS, *include]
    kernels = [*compiler, *_EMULATED_FLAGS, *_REPORTED, *include, "-xc++"]
    tools = _version(compiler)
    shared = [file for file in _host_code(sources) if file.as_posix() not in _NATIVE_ONLY]
    return [
        _Object(source, kernels if source.suffix == ".cu" else host, tools)
        for source in (*_files("emulator/**/*.cpp"), *shared, *sources)
    ]


def native(only: Sequence[str] = (), folder: Path | None = None) -> Path:
    """The extension for GPUs in `folder` (build/native), brought up to date; or the last of the
    objects of the sources `only`.

    Raises BuildError, or subprocess.CalledProcessError where a compiler fails.
    """
    host, objects, link = _natively(_files("**/*.cu"))
    objects.append(_bindings(host, objects[-1].tools))
    link.append(f"-Xlinker={_EXPORTS},-s")
    return _build(folder or ROOT / "build" / "native", objects, link, [], only)


def native_library(sources: Sequence[Path], folder: Path) -> Path:
    """A library in `folder` of these sources, kernels in .cu files and host code in others, and
    what launches them, brought up to date. Paths are relative to ROOT. Raises as `native` does.
    """
    _, objects, link = _natively(sources)
    return _build(folder, objects, link, [], [])


def _natively(sources: Sequence[Path]) -> tuple[list[str], list[_Object], list[str]]:
    """How host code is compiled, the objects of sources and of launches, and how they are linked.

    The CUDA runtime is linked in, since a process may hold PyTorch's own copy of it, and looks up
    the driver's library when needed. libstdc++ stays shared: pybind11 hands C++ exceptions to other
    modules of the process.
    """
    compiler, nvcc = _compiler(), find_nvcc()
    if nvcc is None:
        raise BuildError("the CUDA kernels need nvcc, and neither PATH nor CUDA_HOME leads to one")
    # nvcc takes these by itself: -lineinfo for a profiler, say, or another compiler of host code.
    variables = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
    added = [os.environ.get(name, "") for name in variables]
    tools = " ".join((_version([nvcc]), *added)).strip()
    host = [*compiler, *_HOST_FLAGS, "-O2", "-Icsrc", f"-isystem{_cuda_headers()}"]
    both = f"{tools}, {_version(compiler)}"
    objects = [
        _Object(source, [nvcc, *_NVCC_FLAGS, *_targets(source), "-Icsrc"], tools)
        if source.suffix == ".cu"
        else _Object(source, host, both)
        for source in (*sources, *_host_code(sources))
    ]
    return host, objects, [nvcc, "-shared", "--cudart=static"]


def kernels(folder: Path) -> dict[str, Path]:
    """The native objects in `folder` of all kernels' sources, by path, brought up to date.

    What the compiler said of each is beside it, with .log at the end of its name. Raises as
    native() does.
    """
    names = [source.as_posix() for source in _files("**/*.cu")]
    if not names:
        raise BuildError(f"there are no kernels in {ROOT / _SOURCES}")
    native(names, folder)
    return {name: _object(folder, name) for name in names}


def lacks() -> str | None:
    """What keeps the extension for GPUs from being built here; None where nothing does."""
    if sys.platform != "linux":
        return "CUDA kernels are built on Linux only"
    nvcc = find_nvcc()
    if nvcc is None:
        return "neither PATH nor CUDA_HOME leads to nvcc"
    said = _version([nvcc])
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or tuple(map(int, release.groups())) < _OLDEST_NVCC:
        oldest = ".".join(map(str, _OLDEST_NVCC))
        return f"the CUDA kernels need nvcc {oldest} or newer, {nvcc} is: {said or 'unknown'}"
    try:
        _compiler()
        _cuda_headers()
        _pybind11()
        _ninja()
    except BuildError as error:
        return str(error)
    return None


def find_nvcc() -> str | None:
    """The toolkit's compiler: of CUDA_HOME, else on PATH."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which(os.path.join(home, "bin", "nvcc"))) or shutil.which("nvcc")


def architectures() -> list[tuple[str, bool]]:
    """(such as "80" or "90a", whether its PTX is kept too) for each one asked for.

    Raises BuildError for a list that is none, or that names nothing the kernels run on.
    """
    for name in ("GPTKERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        text = os.environ.get(name, "").strip()
        if text:
            break
    else:
        name, text = "the default", DEFAULT_ARCHITECTURES
    found = []
    for entry in re.split(r"[;, ]+", text):
        match = re.fullmatch(r"(?:(\d+)\.(\d)|(\d{2,3}))([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f'{name} names {entry!r}; architectures are written as in "80;90a" or '
                '"8.0 9.0a+PTX"'
            )
        major, minor, both, variant, ptx = match.groups()
        number = both or major + minor
        if int(number) >= 80:
            found.append((number + variant, bool(ptx)))
    if not found:
        raise BuildError(f"{name} ({text}) has no compute capability from 8.0, which kernels need")
    return found


def hopper_only(source: Path) -> bool:
    """Whether a source's kernels are for compute capability 9.0 alone, as its folder says."""
    return _HOPPER_ONLY in source.parts


def _targets(source: Path) -> list[str]:
    """The architectures that nvcc compiles a source for.

    Files for any device use nothing of the "a" variants, and their code for 90 is the same.
    """
    if hopper_only(source):
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    with_ptx: dict[str, bool] = {}
    for name, ptx in architectures():
        number = re.sub(r"\D", "", name)
        with_ptx[number] = ptx or with_ptx.get(number, False)
    return [
        f"-gencode=arch=compute_{number},code="
        + (f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}")
        for number, ptx in with_ptx.items()
    ]


def _bindings(command: list[str], tools: str) -> _Object:
    """The one file that knows Python, compiled for the one that runs."""
    pybind11 = _pybind11()
    include = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    python = f"{sys.implementation.cache_tag} {platform.python_version()}"
    tools = f"{tools}, pybind11 {pybind11.__version__}, {python}"
    return _Object(_BINDINGS, [*command, *include], tools)


def _pybind11() -> ModuleType:
    try:
        return importlib.import_module("pybind11")
    except ImportError:
        raise BuildError("the CUDA kernels' bindings need pybind11: pip install pybind11") from None


def _compiler() -> list[str]:
    """g++, or CXX with its arguments."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"the CUDA kernels need a C++ compiler, and {compiler[0]} is not on PATH")
    return compiler


def _cuda_headers() -> Path:
    """The folder of cuda_runtime.h: the toolkit's, else that of the PyPI packages."""
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
    """The folder that nvcc belongs to, which nvcc on PATH may only lead to."""
    beside = Path(nvcc).resolve().parent.parent
    if (beside / "include" / "cuda_runtime.h").exists():
        return beside
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.M)
    return Path(top[1]).resolve() if top else beside


def _version(command: Sequence[str]) -> str:
    """What a compiler calls itself."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return " ".join(line for line in said.splitlines() if re.search(r"\d+\.\d+", line))


def _files(pattern: str) -> list[Path]:
    """Sources, relative to ROOT."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / _SOURCES).glob(pattern))


def _host_code(kernels: Sequence[Path]) -> list[Path]:
    """What launchers call, and nothing of Python; of an operator only beside its kernels."""

    def operators(files: Sequence[Path]) -> set[str]:
        return {file.parts[1] for file in files}  # the folder in csrc

    others = operators(_files("**/*.cu")) - operators(kernels)
    files = [file for file in _files("*/**/*.cpp") if file.parts[1] != "emulator"]
    return [file for file in files if not operators([file]) & others]


def _build(
    folder: Path,
    objects: list[_Object],
    link: list[str],
    libraries: list[str],
    only: Sequence[str],
) -> Path:
    """Writes folder/build.ninja and runs it. `only` are paths among the objects' sources."""
    if not objects:
        raise BuildError(f"there are no kernels in {ROOT / _SOURCES}")
    module = folder / _MODULE
    made = {o.source.as_posix(): _object(folder, o.source.as_posix()) for o in objects}
    unknown = [name for name in only if name not in made]
    if unknown:
        raise BuildError(f"there is no {unknown[0]} among {', '.join(made)}")
    wanted = [made[name] for name in only] or [module]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        file = folder / "build.ninja"
        text = "\n".join(_ninja_lines(folder, objects, made, [*link, "-o"], libraries, module))
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        command = [_ninja(), "-f", str(file), "-j", str(_jobs()), *map(_named, wanted)]
        subprocess.run(command, cwd=ROOT, env=_environment(), check=True)
    return wanted[-1]


def _object(folder: Path, source: str) -> Path:
    return folder / "objects" / f"{source}.o"


def _ninja_lines(
    folder: Path,
    objects: list[_Object],
    made: dict[str, Path],
    link: list[str],
    libraries: list[str],
    module: Path,
) -> Iterator[str]:
    compile_one = [sys.executable, "scripts/compile.py"]
    yield f"builddir = {_path(folder)}"
    yield "rule compile"
    yield f"  command = {_command(compile_one)} --tools $tools --object $out $in -- $compiler"
    yield "  description = $in"
    yield "  depfile = $out.d"
    yield "  deps = gcc"
    yield "rule link"
    yield f"  command = {_command(link)} $out $in {_command(libraries)}"
    yield "  description = $out"
    for o in objects:
        compiled = _path(made[o.source.as_posix()])
        yield f"build {compiled}: compile {_path(ROOT / o.source)} | scripts/compile.py"
        yield f"  tools = {_command([o.tools])}"
        yield f"  compiler = {_command(o.command)}"
    compiled = " ".join(map(_path, made.values()))
    yield f"build {_path(module)}: link {compiled} | csrc/module.map"
    yield ""


def _named(path: Path) -> str:
    """As commands name it: relative to ROOT where it is in it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _path(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", _named(path))


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def _ninja() -> str:
    """The PyPI package's program where it is installed, else the one on PATH."""
    with contextlib.suppress(ImportError):
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
        if program:
            return program
    program = shutil.which("ninja")
    if program is None:
        raise BuildError("the CUDA kernels are built with ninja: pip install ninja")
    return program


def _jobs() -> int:
    """How many compilers run at a time."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if not given:
        return len(os.sched_getaffinity(0))
    if re.fullmatch(r"0*[1-9]\d*", given, re.ASCII) is None:
        raise BuildError(f"MAX_JOBS is a number of compilers, 1 or more, not {given!r}")
    return int(given)


def _environment() -> dict[str, str]:
    """NVCC_THREADS as nvcc takes it: apart from the command, since objects do not depend on it."""
    environment = dict(os.environ)
    threads = environment.get("NVCC_THREADS")
    if threads:
        appended = environment.get("NVCC_APPEND_FLAGS", "")
        environment["NVCC_APPEND_FLAGS"] = f"{appended} --threads {threads}".strip()
    return environment


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time in a folder, whichever processes want one."""
    import fcntl  # not on Windows, where setup.py still reads this file

    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a compiler failed, 2 where nothing could be built."""
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
        reason = lacks()
        print(reason or "the CUDA kernels can be built here")
        return 2 if reason else 0
    here = f"{platform.machine()} {platform.system()}"
    if options.kind == "emulator" and here not in ("x86_64 Linux", "aarch64 Linux"):
        print(f"skipped: the emulator runs on x86-64 and aarch64 Linux, and this is {here}")
        return 0
    try:
        build = emulator if options.kind == "emulator" else native
        made = build([_source(name) for name in options.only])
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError:
        return 1
    if options.only and options.kind == "native":
        print(_readable(Path(f"{made}.log").read_text()), end="")
    return 0


def _source(name: str) -> str:
    """A path as objects have it, of one that may leave out csrc."""
    return name if name.startswith(f"{_SOURCES}/") else f"{_SOURCES}/{name}"


def _readable(text: str) -> str:
    """With C++ names, where the tool for that is installed."""
    program = shutil.which("c++filt")
    if program is None:
        return text
    return subprocess.run([program], input=text, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
