"""The compiled modules' part of the build; everything else is declared in pyproject.toml.

GPTKERNELS_BUILD_CPU and GPTKERNELS_BUILD_CUDA, auto|1|0, say whether gptkernels._cpu and
gptkernels._cuda are built. auto, the default: where there is a C++ compiler, or nvcc, and what else
it takes; elsewhere the package goes without, and the build says so. 1: or the build fails. How they
are built, and what else that obeys, is in scripts/cpu_extension.py and scripts/extension.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

# Build front ends run this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))

import cpu_extension
import extension
from ninja_build import BuildError, put


class Module:
    """A compiled module: its name, how it is built, and why it cannot be."""

    def __init__(
        self, name: str, kernels: str, build: Callable[[], Path], lacks: Callable[[], str | None]
    ) -> None:
        self.name, self.kernels, self.build, self.lacks = name, kernels, build, lacks
        self.variable = f"GPTKERNELS_BUILD_{name.upper()}"
        self.choice = os.environ.get(self.variable, "auto")
        if self.choice not in ("auto", "1", "0"):
            sys.exit(f"{self.variable} is auto, 1 or 0, not {self.choice!r}")

    def missing(self) -> str | None:
        """Returns why the module is left out; None where it is built."""
        if self.choice == "0":
            return f"{self.variable} is 0"
        return self.lacks() if self.choice == "auto" else None


MODULES = [
    Module("cpu", "CPU kernels", cpu_extension.cpu, cpu_extension.lacks),
    Module("cuda", "CUDA kernels", extension.native, extension.lacks),
]


class BuildPython(build_py):
    """Says which kernels the package is built without."""

    def run(self) -> None:
        """Called by every kind of install."""
        super().run()
        for module in MODULES:
            reason = module.missing()
            if reason is not None:
                print(
                    f"gptkernels is built without its {module.kernels}: {reason}", file=sys.stderr
                )


class BuildExtension(build_ext):
    """Runs ninja in build/, and copies the modules that it makes."""

    def build_extension(self, ext: Extension) -> None:
        """Called for each module that is not left out."""
        (module,) = (m for m in MODULES if ext.name == f"gptkernels._{m.name}")
        reason = module.lacks()
        if reason is not None:
            raise CompileError(f"{module.variable} is 1, but {reason}")
        try:
            made = module.build()
        except BuildError as error:
            raise CompileError(str(error)) from error
        except subprocess.CalledProcessError as error:
            raise CompileError(f"the {module.kernels} do not compile (see above)") from error
        put(made, Path(self.get_ext_fullpath(ext.name)))


setup(
    ext_modules=[
        Extension(f"gptkernels._{module.name}", sources=[])
        for module in MODULES
        if module.missing() is None
    ],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
)
