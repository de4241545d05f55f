"""The GPUs of a build of the CUDA kernels: whether one is here, and for which ones it compiles.

    python scripts/gpus.py      exit code 0 where an NVIDIA GPU is visible, 1 elsewhere

GPTKERNELS_CUDA_ARCHS, or else TORCH_CUDA_ARCH_LIST, names what is compiled for: such as "80;90a" or
"8.0 9.0a+PTX", and in PyTorch's variable also the names that PyTorch knows, such as "Ampere".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ninja_build import BuildError

# Machine code for A100, H100 and H200; the PTX of compute capability 8.0 serves all others.
DEFAULT_ARCHITECTURES = "80+PTX;90a"
_OLDEST = 80
_DEVICES = Path("/dev")
_VARIABLES = ("GPTKERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
# torch/utils/cpp_extension.py, named_arches
_PYTORCHS = {
    "Kepler": "3.5+PTX",
    "Kepler+Tesla": "3.7",
    "Maxwell": "5.0;5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}


def visible() -> bool:
    """Whether an NVIDIA GPU is here, by the driver's files or its program. Needs no PyTorch."""
    if any(_DEVICES.glob("nvidia[0-9]*")):
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    said = subprocess.run([program, "-L"], capture_output=True, text=True).stdout
    return said.startswith("GPU ")


def architectures() -> list[tuple[str, bool]]:
    """Returns (name such as "80" or "90a", whether its PTX is kept too) for each architecture to
    compile for; what is older than the kernels need is left out.

    Raises BuildError for a malformed list, or one without any architecture that the kernels run on.
    """
    reason = lacks()
    if reason is not None:
        raise BuildError(reason)
    return [entry for entry in _asked() if not _too_old(entry)]


def lacks() -> str | None:
    """Returns why there is nothing to compile for; None where there is. Raises BuildError for a
    malformed list."""
    if all(map(_too_old, _asked())):
        name, text = _list()
        return f"{name} ({text}) has no compute capability from 8.0, which the CUDA kernels need"
    return None


def left_out() -> str | None:
    """Returns the sentence on architectures that were named and are older than the kernels need;
    None where there is none. Raises BuildError for a malformed list."""
    older = ["{}.{}".format(*divmod(_number(e), 10)) for e in _asked() if _too_old(e)]
    if not older:
        return None
    name = _list()[0]
    return f"{', '.join(older)} of {name} left out: the CUDA kernels need compute capability 8.0"


def unwanted() -> str | None:
    """Returns why a build that nobody asked for leaves the CUDA kernels out though they could be
    compiled: that takes minutes, and nothing here could run them. None where a GPU is visible, or
    where GPUs are named, as for an image that is built on a machine without one."""
    if _list()[1] is None and not visible():
        return (
            "no NVIDIA GPU is visible here and GPTKERNELS_CUDA_ARCHS names none; "
            "GPTKERNELS_BUILD_CUDA=1 compiles them all the same, for minutes"
        )
    return None


def _list() -> tuple[str, str | None]:
    """Returns the name of the variable that names architectures, and its value; ("the default",
    None) where none does."""
    for name in _VARIABLES:
        text = os.environ.get(name, "").strip()
        if text:
            return name, text
    return "the default", None


def _asked() -> list[tuple[str, bool]]:
    name, text = _list()
    entries = re.split(r"[;, ]+", text or DEFAULT_ARCHITECTURES)
    if name == "TORCH_CUDA_ARCH_LIST":
        entries = [e for entry in entries for e in _PYTORCHS.get(entry, entry).split(";")]
    found = []
    for entry in entries:
        match = re.fullmatch(r"(?:(\d+)\.(\d)|(\d{2,3}))([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f'{name} names {entry!r}; architectures are written as in "80;90a" or '
                '"8.0 9.0a+PTX"'
            )
        major, minor, both, variant, ptx = match.groups()
        found.append(((both or major + minor) + variant, bool(ptx)))
    return found


def _too_old(entry: tuple[str, bool]) -> bool:
    return _number(entry) < _OLDEST


def _number(entry: tuple[str, bool]) -> int:
    return int(re.sub(r"\D", "", entry[0]))


if __name__ == "__main__":
    sys.exit(not visible())
