"""Installs into the active environment what gptkernels needs and it lacks, and replaces nothing.

    python scripts/install_missing.py

Every distribution that is already there is pinned as it is, so pip can add but not change: least of
all PyTorch. One that is there in a version that pyproject.toml does not admit is named, and nothing
is done. What is missing comes in the tested versions (constraints.txt) where they agree with what
is there, else in any version that pyproject.toml admits; Triton always in the version that belongs
to the PyTorch that is there. Only a setuptools too old to build the package is replaced. The
package itself is installed editable. With nothing missing, pip is not started and no network is
needed.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.version import Version
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.version import Version

_ROOT = Path(__file__).resolve().parent.parent
_EXTRAS = ("cli", "gpt", "bench", "test")
# CUDA's headers, which a toolkit has.
_HEADERS = ("nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-runtime")
# PyTorch -> the Triton that its CUDA builds are made with. CPU builds bring none.
_TRITON_OF = {
    "2.11": "3.6.0",
    "2.12": "3.7.1",
    "2.13": "3.7.1",
    "2.14": "3.8.*",
    "2.15": "3.9.*",
}


def main() -> int:
    """Returns the exit code: 0, or 2 with one sentence on stderr where what is installed does not
    fit or pip cannot add what lacks.
    """
    installed = {
        _normal(d.metadata["Name"]): d.version
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }
    requirements = _requirements()
    for tool in requirements:
        # A setuptools that cannot build the package counts as missing: nothing that runs is
        # replaced.
        if tool.name == "setuptools" and not _admits(tool, installed.get("setuptools", "0")):
            installed.pop("setuptools", None)
    unfit = [
        f"{r.name} {installed[_normal(r.name)]} is installed, {r.specifier} is wanted"
        for r in requirements
        if _normal(r.name) in installed and not _admits(r, installed[_normal(r.name)])
    ]
    if unfit:
        print(f"{'; '.join(unfit)}; nothing is replaced", file=sys.stderr)
        return 2
    missing = [f"{r.name}{r.specifier}" for r in requirements if _normal(r.name) not in installed]
    if missing:
        print(f"Installing what is missing: {', '.join(missing)}", flush=True)
        tested = {
            _normal(Requirement(line).name): line
            for line in (_ROOT / "constraints.txt").read_text().splitlines()
            if line and not line.startswith("#")
        }
        kept = {name: f"{name}=={version}" for name, version in sorted(installed.items())}
        if "torch" in installed and "triton" not in installed:
            del tested["triton"]
            minor = ".".join(map(str, Version(installed["torch"]).release[:2]))
            if minor in _TRITON_OF:
                kept["triton"] = f"triton=={_TRITON_OF[minor]}"
        done = _install(missing, (tested | kept).values())
        if not done:
            print("The tested versions do not fit what is installed; trying others", flush=True)
            done = _install(missing, kept.values())
        if not done:
            print(
                "pip could not add what is missing beside what this environment has (see above); "
                "without PYTHON=... make uses a .venv of its own",
                file=sys.stderr,
            )
            return 2
    if not _is_editable_here():
        print("Installing gptkernels itself (editable)", flush=True)
        # With the setuptools that is there by now, so that no network is needed.
        arguments = ["--no-deps", "--no-build-isolation", "--editable", str(_ROOT)]
        if _pip(arguments) != 0:
            print("pip could not install gptkernels itself (see above)", file=sys.stderr)
            return 2
    return 0


def _requirements() -> list[Requirement]:
    """The core's and the extras' requirements that apply here, each once."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in _EXTRAS:
        wanted += project["optional-dependencies"][extra]
    requirements = [Requirement(text) for text in dict.fromkeys(wanted)]
    if shutil.which("nvcc"):
        requirements = [r for r in requirements if r.name not in _HEADERS]
    return [r for r in requirements if r.marker is None or r.marker.evaluate()]


def _admits(requirement: Requirement, version: str) -> bool:
    """Whether a version fits. Of 2.13.0a0+git or 2.13.0+cpu it is 2.13.0 that counts, since such
    builds are made and used as that release.
    """
    return requirement.specifier.contains(Version(version).base_version)


def _install(missing: list[str], constraints: Iterable[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(constraints) + "\n")
        return _pip(["--constraint", str(file), *missing]) == 0


def _pip(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode


def _is_editable_here() -> bool:
    try:
        text = importlib.metadata.distribution("gptkernels").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    origin = json.loads(text) if text else {}
    return origin.get("url") == _ROOT.as_uri() and origin.get("dir_info", {}).get("editable", False)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
