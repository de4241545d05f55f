"""Compiles the CUDA C++ kernels as they are shipped, and reads from machine code what each uses.

Objects are compiled as setup.py compiles them, for the architectures of a wheel, and cached with
setup.py's (in GPTKERNELS_OBJECT_CACHE, else build/objects). What is read from an object is cached
under build/gates. Kernels in sm90/ folders are compiled for sm_90a only; the table lists them under
sm_90.

The column of shared memory has what a kernel declares statically, which is 0: launchers choose the
dynamic size. The emulator refuses a launch with more than the device has, and the gate of builds
reads the size of each build of Hopper's kernels from the launchers.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

from gates import sass
from gates.table import Key, Launch, Requirement, Resources

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))  # the scripts are not a package

import extension  # noqa: E402
import gpus  # noqa: E402

CACHE = ROOT / "build" / "gates"
MOST_SECONDS = 180  # of one core, to compile one source

# Kernels for any GPU: tensor cores for 16-bit operands, 16-byte accesses where data is moved.
_PRODUCTS = (
    r"(attention_(fwd|decode|bwd_keys|bwd_queries)|product|linear_cross_entropy_(fwd|bwd))_kernel<"
)
_HOPPERS = r"(attention_fwd|attention_bwd|product|linear_cross_entropy_bwd)_sm90_kernel<"
REQUIREMENTS = (
    Requirement(rf"{_PRODUCTS}(bf16|fp16)\b", "HMMA"),
    Requirement(_PRODUCTS, "LDGSTS.128"),
    # Hopper's own kernels: tensor cores of four warps, and tiles loaded and stored by the tensor
    # memory accelerator.
    *(Requirement(_HOPPERS, name) for name in ("HGMMA", "UTMALDG", "UTMASTG")),
    *(Requirement(r"linear_cross_entropy_fwd_sm90_kernel<", n) for n in ("HGMMA", "UTMALDG")),
    Requirement(r"(column_sums|attention_decode_combine)_kernel<", "LDG.128"),
    Requirement(r"attention_bwd_sm90_kernel<", "UBLKCP"),
    Requirement(r"attention_bwd_sm90_kernel<", "UBLKRED"),  # dq
    Requirement(r"attention_bwd_sm90_(prepare|finish)_kernel<", "LDG.128"),
    Requirement(r"attention_bwd_sm90_(prepare|finish)_kernel<", "STG.128"),
    # LayerNorm's kernels for aligned rows.
    Requirement(r"layer_norm_(fwd|bwd|bwd_wide)(_sm90)?_kernel<\w+, \w+, \d+, true\b", "LDG.128"),
    Requirement(r"layer_norm_bwd_weights_kernel<\w+, \w+, true>", "LDG.128"),
    Requirement(r"layer_norm_bwd(_sm90)?_kernel<\w+, \w+, \d, true>", "LDGSTS.128"),
)
_SHORT = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}
_CHOICES = (
    *("GPTKERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"),
    *("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"),
)


def version() -> str | None:
    """Returns the release of the nvcc that would compile, such as "13.0"; None without nvcc."""
    nvcc = extension.find_nvcc()
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    if release is None:
        raise RuntimeError(f"{nvcc} --version names no release")
    return release[1]


def names(capabilities: Sequence[int] | None) -> list[str]:
    """Returns the architectures of a wheel, such as "90a", that have one of these compute
    capabilities; all of them by default."""
    shipped = gpus.DEFAULT_ARCHITECTURES.split(";")
    return [name for name in shipped if capabilities is None or capability(name) in capabilities]


def measure_all(
    jobs: int, capabilities: Sequence[int] | None = None
) -> tuple[dict[Key, Resources], list[str]]:
    """Returns what each kernel uses on each architecture, by default on all of a wheel, and one
    sentence for each of these: a note of ptxas that nvcc does not treat as a warning, code for an
    architecture that the source is not meant for, and a source that takes too long to compile.
    `jobs` processes read the objects.

    Raises subprocess.CalledProcessError where a source does not compile.
    """
    for name in _CHOICES:
        os.environ.pop(name, None)
    os.environ["GPTKERNELS_CUDA_ARCHS"] = ";".join(names(capabilities))
    os.environ.setdefault("GPTKERNELS_OBJECT_CACHE", str(ROOT / "build" / "objects"))
    objects = extension.kernels(ROOT / "build" / "gates-native")
    found: dict[Key, Resources] = {}
    said: list[str] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        all_measured = list(pool.map(_measure, objects.values()))
    for (source, path), measured in zip(objects.items(), all_measured, strict=True):
        said += misplaced(source, {architecture for _, architecture in measured})
        for (name, architecture), resources in measured.items():
            key = (name, capability(architecture))
            if capabilities is not None and key[1] not in capabilities:
                continue  # Hopper's sources are compiled whatever is asked for
            if key in found:
                raise ValueError(f"{source}: there is another kernel named {name!r}")
            found[key] = resources
        log = Path(f"{path}.log").read_text()
        said += [*notes(source, log), *slow(source, log)]
    return found, said


def capability(architecture: str) -> int:
    """Returns the number that the table has for an architecture: 90 for "90a"."""
    return int(re.sub(r"\D", "", architecture))


def misplaced(source: str, architectures: set[str]) -> Iterator[str]:
    """Yields a sentence for each architecture that the source must not have code for. Sources for
    Hopper are compiled for sm_90a only, and all others never are."""
    wrong = {a for a in architectures if (a == "90a") != extension.hopper_only(Path(source))}
    for architecture in sorted(wrong):
        for_it = "sm_90a alone" if architecture != "90a" else "every GPU"
        yield f"{source}: has code for sm_{architecture}, its folder says {for_it}"


def slow(source: str, log: str) -> Iterator[str]:
    """Yields a sentence if the source took too long to compile: at the end of a build the other
    cores would wait for it."""
    match = re.search(r"^compiled in ([\d.]+) s of one core$", log, re.MULTILINE)
    if match is None:
        yield f"{source}: nothing says how long it took to compile"
    elif float(match[1]) > MOST_SECONDS:
        yield f"{source}: took {match[1]} s of one core to compile, {MOST_SECONDS} s is the limit"


def builds() -> dict[str, Launch]:
    """Returns the builds that the launchers of Hopper's kernels choose among. They come from the
    emulator's module.

    Raises extension.BuildError or subprocess.CalledProcessError where it cannot be built.
    """
    file = extension.emulator()
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(file))
    spec = importlib.util.spec_from_file_location("_cuda", file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    found: dict[str, Launch] = {}
    for function in sorted(vars(module)):
        op = function.removesuffix("_builds")
        if op == function:
            continue
        for index, one in enumerate(getattr(module, function)()):
            found[f"{op} {index}: {one['name']}"] = Launch(
                one["threads"], one["shared_bytes"], one["stages"], one["consumers"], one["cluster"]
            )
    return found


def notes(source: str, text: str) -> Iterator[str]:
    """Yields the notes of ptxas that it had to undo setmaxnreg or the overlap of wgmma. nvcc does
    not treat these notes as warnings."""
    for line in dict.fromkeys(text.splitlines()):
        if re.search(r"\bC75\d\d\b", line):
            yield f"{source}: {line.strip()}"


def readable(mangled: list[str]) -> list[str]:
    """Returns the kernels' names as in their sources, such as "layer_norm_fwd_kernel<bf16, 4>"."""
    program = shutil.which("c++filt")
    if program is None:
        raise RuntimeError("the gates need c++filt, which comes with g++'s binutils")
    done = subprocess.run(
        [program], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return [_short(name) for name in done.stdout.splitlines()]


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\bgk::", "", name)
    name = re.sub(r"\([\w:]+\)(?=-?\d)", "", name)  # remove the type of an enumerator
    name = name.removeprefix("void ").partition("(")[0]  # remove the arguments
    return re.sub("|".join(_SHORT), lambda match: _SHORT[match[0]], name)


Compiled = dict[tuple[str, str], Resources]  # (kernel, architecture such as "90a")


def _measure(path: Path) -> Compiled:
    how = b"".join(Path(file).read_bytes() for file in (__file__, sass.__file__))
    kept = CACHE / f"{hashlib.sha256(how + path.read_bytes()).hexdigest()}.json"
    if not kept.exists():
        rows = [[name, architecture, asdict(r)] for (name, architecture), r in _read(path).items()]
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(rows))
        partial.replace(kept)
    return {(n, a): Resources(**numbers) for n, a, numbers in json.loads(kept.read_text())}


def _read(path: Path) -> Compiled:
    used = sass.usage(path)
    spills = dict.fromkeys(used, 0)
    seen: dict[tuple[str, str], set[str]] = {kernel: set() for kernel in used}
    roles: dict[tuple[str, str], set[int]] = {kernel: set() for kernel in used}
    for kernel, instruction in sass.instructions(path):
        spills[kernel] += sass.is_spill(instruction)
        seen[kernel].add(instruction.partition(" ")[0])
        registers = sass.registers_of_a_role(instruction)
        if registers is not None:
            roles[kernel].add(registers)
    found: Compiled = {}
    for kernel, name in zip(used, readable([name for name, _ in used]), strict=True):
        of_note = " ".join(
            name
            for name, pattern in sass.OF_NOTE.items()
            if any(re.match(pattern, instruction) for instruction in seen[kernel])
        )
        key = (name, kernel[1])
        if key in found:
            raise ValueError(f"two kernels are named {name!r}")
        found[key] = replace(
            used[kernel],
            spills=spills[kernel],
            instructions=of_note,
            roles=" ".join(map(str, sorted(roles[kernel]))),
        )
    return found
