"""Compile the CUDA C++ kernels as they are shipped, and read what each uses from its machine code.

Objects are compiled as setup.py compiles them, for the architectures of a wheel, and kept with
theirs (GPTKERNELS_OBJECT_CACHE, else build/objects); what is read from one is kept under
build/gates. Shared memory is what a kernel declares, which is none: launchers choose its size, and
the emulator refuses a launch with more than 99 KiB, which every supported device has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from gates import sass
from gates.table import Key, Requirement, Resources

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))  # which are no package

import extension  # noqa: E402

CACHE = ROOT / "build" / "gates"

# Tensor cores where operands have 16 bits; accesses of 16 bytes a thread where data is moved.
_PRODUCTS = r"(attention_(fwd|bwd_keys|bwd_queries)|product)_kernel<"
REQUIREMENTS = (
    Requirement(rf"{_PRODUCTS}(bf16|fp16)\b", "HMMA"),
    Requirement(_PRODUCTS, "LDGSTS.128"),
    Requirement(r"column_sums_kernel<", "LDG.128"),
    # Where rows are aligned.
    Requirement(r"layer_norm_(fwd|bwd)_kernel<\w+, \w+, \d+, true\b", "LDG.128"),
    Requirement(r"layer_norm_bwd_(weights|wide)_kernel<\w+, \w+, true>", "LDG.128"),
)
_SHORT = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}
_CHOICES = (
    *("GPTKERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"),
    *("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"),
)


def version() -> str | None:
    """The release of the nvcc that would compile, such as "13.0"; None where there is none."""
    nvcc = extension.find_nvcc()
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    if release is None:
        raise RuntimeError(f"{nvcc} --version names no release")
    return release[1]


def measure_all() -> tuple[dict[Key, Resources], list[str]]:
    """What each kernel uses on each architecture, and a sentence for each warning that nvcc does
    not take for one.

    Raises subprocess.CalledProcessError where a source does not compile.
    """
    for name in _CHOICES:
        os.environ.pop(name, None)
    os.environ.setdefault("GPTKERNELS_OBJECT_CACHE", str(ROOT / "build" / "objects"))
    objects = extension.kernels(ROOT / "build" / "gates-native")
    found: dict[Key, Resources] = {}
    for source, path in objects.items():
        for key, resources in _measure(path).items():
            if key in found:
                raise ValueError(f"{source}: there is another kernel named {key[0]!r}")
            found[key] = resources
    logs = {source: Path(f"{path}.log").read_text() for source, path in objects.items()}
    return found, [note for source, text in logs.items() for note in notes(source, text)]


def notes(source: str, text: str) -> Iterator[str]:
    """ptxas mentions what it had to undo, setmaxnreg or the overlap of wgmma, as information."""
    for line in dict.fromkeys(text.splitlines()):
        if re.search(r"\bC75\d\d\b", line):
            yield f"{source}: {line.strip()}"


def readable(mangled: list[str]) -> list[str]:
    """Kernels' names as in their sources: "layer_norm_fwd_kernel<bf16, 4>"."""
    program = shutil.which("c++filt")
    if program is None:
        raise RuntimeError("the gates need c++filt, which comes with g++'s binutils")
    done = subprocess.run(
        [program], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return [_short(name) for name in done.stdout.splitlines()]


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\bgk::", "", name)
    name = re.sub(r"\([\w:]+\)(?=-?\d)", "", name)  # the type of an enumerator
    name = name.removeprefix("void ").partition("(")[0]  # without arguments
    return re.sub("|".join(_SHORT), lambda match: _SHORT[match[0]], name)


def _measure(path: Path) -> dict[Key, Resources]:
    how = b"".join(Path(file).read_bytes() for file in (__file__, sass.__file__))
    kept = CACHE / f"{hashlib.sha256(how + path.read_bytes()).hexdigest()}.json"
    if not kept.exists():
        rows = [[name, capability, asdict(r)] for (name, capability), r in _read(path).items()]
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(rows))
        partial.replace(kept)
    return {(n, c): Resources(**numbers) for n, c, numbers in json.loads(kept.read_text())}


def _read(path: Path) -> dict[Key, Resources]:
    used = sass.usage(path)
    spills = dict.fromkeys(used, 0)
    seen: dict[tuple[str, str], set[str]] = {kernel: set() for kernel in used}
    for kernel, instruction in sass.instructions(path):
        spills[kernel] += sass.is_spill(instruction)
        seen[kernel].add(instruction)
    found: dict[Key, Resources] = {}
    for kernel, name in zip(used, readable([name for name, _ in used]), strict=True):
        of_note = " ".join(
            name
            for name, pattern in sass.OF_NOTE.items()
            if any(re.match(pattern, instruction) for instruction in seen[kernel])
        )
        key = (name, int(re.sub(r"\D", "", kernel[1])))
        if key in found:
            raise ValueError(f"two kernels are named {name!r}")
        found[key] = replace(used[kernel], spills=spills[kernel], instructions=of_note)
    return found
