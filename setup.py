"""The CUDA kernels' part of the build; everything else is declared in pyproject.toml.

GPTKERNELS_BUILD_CUDA=auto|1|0 says whether gptkernels._cuda is built. auto, the default: where
there is nvcc and what else it takes; elsewhere the package is pure Python, and the build says so.
1: or the build fails. How it is built, and what else it obeys, is in scripts/extension.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

# Build front ends run this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))

import extension


def wanted() -> bool:
    """Whether to build gptkernels._cuda."""
    choice = os.environ.get("GPTKERNELS_BUILD_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        sys.exit(f"GPTKERNELS_BUILD_CUDA is auto, 1 or 0, not {choice!r}")
    return choice == "1" or (choice == "auto" and extension.lacks() is None)


class BuildPython(build_py):
    """Says when the package is built without its CUDA kernels."""

    def run(self) -> None:
        """Called by every kind of install."""
        super().run()
        if not self.distribution.has_ext_modules():
            reason = extension.lacks() or "GPTKERNELS_BUILD_CUDA is 0"
            print(f"gptkernels is built without its CUDA kernels: {reason}", file=sys.stderr)


class BuildExtension(build_ext):
    """Runs ninja in build/native, and copies the module that it makes."""

    def build_extension(self, ext: Extension) -> None:
        """Called for gptkernels._cuda, the only one."""
        reason = extension.lacks()
        if reason is not None:
            raise CompileError(f"GPTKERNELS_BUILD_CUDA is 1, but {reason}")
        try:
            module = extension.native()
        except extension.BuildError as error:
            raise CompileError(str(error)) from error
        except subprocess.CalledProcessError as error:
            raise CompileError("the CUDA kernels do not compile (see above)") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(module, target)


setup(
    ext_modules=[Extension("gptkernels._cuda", sources=[])] if wanted() else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
)
