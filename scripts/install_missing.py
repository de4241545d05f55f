"""Installs into the active environment what gptkernels needs and it lacks, and replaces nothing.

    python scripts/install_missing.py

Every distribution that is already there is pinned as it is, so pip can add but not change: least of
all PyTorch. What is missing comes in the tested versions (constraints.txt) where they agree with
what is there, else in any version that pyproject.toml admits (Triton still in the tested one). The
package itself is installed editable. With nothing missing, pip is not started and no network is
needed.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_EXTRAS = ("cli", "gpt", "bench", "test")


def main() -> int:
    """Returns the exit code: 0, or 2 with one sentence on stderr when pip cannot add what lacks."""
    installed = {
        _normal(d.metadata["Name"]): d.version
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }
    missing = [r for r in _requirements() if _name(r) not in installed]
    if missing:
        print(f"Installing what is missing: {', '.join(missing)}", flush=True)
        tested = [
            line
            for line in (_ROOT / "constraints.txt").read_text().splitlines()
            if line and not line.startswith("#") and _name(line) not in installed
        ]
        kept = [f"{name}=={version}" for name, version in sorted(installed.items())]
        triton = [line for line in tested if _name(line) == "triton"]
        done = _install(missing, kept + tested)
        if not done:
            print("The tested versions do not fit what is installed; trying others", flush=True)
            done = _install(missing, kept + triton)
        if not done:
            print(
                "pip could not add what is missing beside what this environment has (see above); "
                "without PYTHON=... make uses a .venv of its own",
                file=sys.stderr,
            )
            return 2
    if not _is_editable_here():
        print("Installing gptkernels itself (editable)", flush=True)
        arguments = ["--no-deps", "--editable", str(_ROOT)]
        setuptools = installed.get("setuptools", "0")
        if int(setuptools.split(".")[0]) >= 77:
            arguments.append("--no-build-isolation")
        if _pip(arguments) != 0:
            print("pip could not install gptkernels itself (see above)", file=sys.stderr)
            return 2
    return 0


def _requirements() -> list[str]:
    """The core's and the extras' requirements that apply to this platform, without markers."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in _EXTRAS:
        wanted += project["optional-dependencies"][extra]
    applying = []
    for requirement in wanted:
        bare, _, marker = (part.strip() for part in requirement.partition(";"))
        if marker and marker != "sys_platform == 'linux'":
            raise ValueError(
                f"pyproject.toml has the marker {marker!r}, which this script cannot read"
            )
        if (not marker or sys.platform == "linux") and bare not in applying:
            applying.append(bare)
    return applying


def _install(missing: list[str], constraints: list[str]) -> bool:
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


def _name(requirement: str) -> str:
    return _normal(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
