"""Reads compiled kernels with cuobjdump: the resources and the instructions of each."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gates.table import Resources

# Name of an instruction -> pattern of how the disassembly begins its line.
# HMMA, HGMMA: tensor cores of one warp, of four warps.
# LDG.128, LDGSTS.128, STG.128: accesses of 16 bytes a thread.
# UBLKCP, UBLKRED: copies and sums of contiguous bytes by the tensor memory accelerator.
# UCGABAR: barriers of a cluster.
# UTMALDG, UTMASTG, UTMAREDG: loads, stores and sums of a tensor's boxes by that accelerator.
OF_NOTE = {
    "HMMA": r"HMMA\.",
    "HGMMA": r"HGMMA\.",
    "LDG.128": r"LDG\.\S*\b128",
    "LDGSTS.128": r"LDGSTS\.\S*\b128",
    "STG.128": r"STG\.\S*\b128",
    "UBLKCP": r"UBLKCP\.",
    "UBLKRED": r"UBLKRED\.",
    "UCGABAR": r"UCGABAR_",
    "UTMALDG": r"UTMALDG\.",
    "UTMASTG": r"UTMASTG\.",
    "UTMAREDG": r"UTMAREDG\.",
}
_SPILL = re.compile(r"(?:STL|LDL)\b")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*(\S[^;]*?)\s*;")


def usage(file: Path) -> dict[tuple[str, str], Resources]:
    """Returns (kernel's mangled name, architecture such as "90a") -> registers, stack and static
    shared memory. It does not look at instructions.
    """
    found = {}
    architecture = name = ""
    for line in _cuobjdump("-res-usage", file).splitlines():
        if line.startswith("arch = sm_"):
            architecture = line.removeprefix("arch = sm_").strip()
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[name, architecture] = Resources(registers, 0, stack + local, shared)
    return found


def instructions(file: Path) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields each kernel, named as in `usage`, with each of its instructions, such as
    "LDG.E.128 R4, [R2.64]"."""
    architecture = name = ""
    for line in _cuobjdump("-sass", file).splitlines():
        if match := _INSTRUCTION.match(line):
            yield (name, architecture), match[1]
        elif line.startswith("arch = sm_"):
            architecture = line.removeprefix("arch = sm_").strip()
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]


def is_spill(instruction: str) -> bool:
    """Whether the instruction moves a register to local memory or back."""
    return _SPILL.match(instruction) is not None


def registers_of_a_role(instruction: str) -> int | None:
    """Returns how many registers a thread has after the instruction, if it is setmaxnreg; else
    None."""
    match = re.match(r"USETMAXREG\.\S+ (?:UP\w+, )?(0x[0-9a-f]+)$", instruction)
    return int(match[1], 16) if match else None


def _cuobjdump(option: str, file: Path) -> str:
    done = subprocess.run([_program(), option, str(file)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} cannot read {file}: {done.stderr.strip()}")
    return done.stdout


def _program() -> str:
    """Returns the path of Triton's copy of cuobjdump, else the toolkit's."""
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        program = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if program.exists():
            return str(program)
    program = shutil.which("cuobjdump")
    if program is None:
        raise RuntimeError("the gates need cuobjdump: of CUDA's toolkit, or pip install triton")
    return program
