"""The compiled modules' part of the build; everything else is declared in pyproject.toml.

GPTKERNELS_BUILD_CPU and GPTKERNELS_BUILD_CUDA, auto|1|0, say whether gptkernels._cpu and
gptkernels._cuda are built. auto, the default: where there is a C++ compiler, or nvcc, and what else
it takes, and for CUDA also a GPU or a list of GPUs (scripts/gpus.py); elsewhere the package goes
without, and the build says so. 1: or the build fails. How they are built, and what else that obeys,
is in scripts/cpu_extension.py and scripts/extension.py.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

# Build front ends run this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))

import cpu_extension
import extension
import gpus
from ninja_build import BuildError, jobs, put


@dataclass(frozen=True)
class Module:
    """A compiled module: how it is built, and why it is left out."""

    name: str
    build: Callable[[], Path]
    lacks: Callable[[], str | None]  # why it cannot be built
    unwanted: Callable[[], str | None]  # why nobody would miss it
    compiled_for: Callable[[], str]
    minutes: int  # that it takes one core

    @property
    def kernels(self) -> str:
        """What is in it."""
        return f"{self.name.upper()} kernels"

    @property
    def variable(self) -> str:
        """The environment variable that has the user's choice."""
        return f"GPTKERNELS_BUILD_{self.name.upper()}"

    @functools.cached_property
    def missing(self) -> str | None:
        """Why the module is left out; None where it is built."""
        choice = os.environ.get(self.variable, "auto")
        if choice not in ("auto", "1", "0"):
            sys.exit(f"{self.variable} is auto, 1 or 0, not {choice!r}")
        if choice != "auto":
            return None if choice == "1" else f"{self.variable} is 0"
        try:
            return self.lacks() or self.unwanted()
        except BuildError as error:
            sys.exit(str(error))

    def made(self) -> Path:
        """Builds the module, and says beforehand what that takes. Raises as the scripts do."""
        reason = self.lacks()
        if reason is not None:
            raise BuildError(f"{self.variable} is 1, but {reason}")
        print(
            f"compiling the {self.kernels} for {self.compiled_for()}: about {self.minutes} minutes "
            f"of one core, {jobs()} compilers at a time",
            flush=True,
        )
        return self.build()


MODULES = [
    Module(
        "cpu",
        cpu_extension.cpu,
        cpu_extension.lacks,
        lambda: None,
        cpu_extension.compiled_for,
        minutes=2,
    ),
    Module(
        "cuda",
        extension.native,
        extension.lacks,
        gpus.unwanted,
        extension.compiled_for,
        minutes=12,
    ),
]


class BuildPython(build_py):
    """Says which kernels the package is built without."""

    def run(self) -> None:
        """Called by every kind of install."""
        super().run()
        for module in MODULES:
            if module.missing is not None:
                said = f"gptkernels is built without its {module.kernels}: {module.missing}"
                print(said, file=sys.stderr)


class BuildExtension(build_ext):
    """Runs ninja in build/, and copies the modules that it makes."""

    def build_extension(self, ext: Extension) -> None:
        """Called for each module that is not left out."""
        (module,) = (m for m in MODULES if ext.name == f"gptkernels._{m.name}")
        try:
            made = module.made()
        except BuildError as error:
            raise CompileError(str(error)) from error
        except subprocess.CalledProcessError as error:
            raise CompileError(f"the {module.kernels} do not compile (see above)") from error
        put(made, Path(self.get_ext_fullpath(ext.name)))


setup(
    ext_modules=[
        Extension(f"gptkernels._{module.name}", sources=[])
        for module in MODULES
        if module.missing is None
    ],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
)
