"""Installs what gptkernels needs and the active environment lacks. It replaces no package.

    python scripts/install_missing.py

pip gets a constraint for every installed distribution, PyTorch above all, so it can add packages
but not replace them. Only setuptools may be replaced, if it is too old to build the package. A
missing package is installed in the tested version (constraints.txt) if that agrees with the
installed packages, else in any version that pyproject.toml allows. Triton is installed in the
version that belongs to the installed PyTorch, and CUDA's headers only where there is no toolkit.
The package itself is installed editable. If nothing is missing, no network is needed. What pip
prints is in build/install.log.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

import quietly

_ROOT = Path(__file__).resolve().parent.parent
_LOG = _ROOT / "build" / "install.log"
# PyTorch's version -> the version of Triton that its CUDA wheels require. CPU wheels require none.
_TRITON_OF = {
    "2.11": "==3.6.0",
    "2.12": "==3.7.1",
    "2.13": "==3.7.1",
    "2.14": "==3.8.*",
    "2.15": "==3.9.*",
}


def main() -> int:
    """Returns the exit code: 0, or 2 with a sentence on stderr after pip's own."""
    there = {_normal(d.metadata["Name"] or ""): d.version for d in metadata.distributions()}
    kept = {name: f"{name}=={there[name]}" for name in there if name not in ("", "setuptools")}
    if "torch" in there and "triton" not in there:
        minor = ".".join(there["torch"].split(".")[:2])
        kept["triton"] = "triton" + _TRITON_OF.get(minor, "")
    lines = (_ROOT / "constraints.txt").read_text().splitlines()
    tested = {_normal(line.split("==")[0]): line for line in lines if "==" in line}
    wanted = _requirements()
    # With --no-index pip succeeds only if nothing is missing.
    if not _pip("--no-index", "--quiet", *wanted, keep=kept, shown=False):
        print(f"Installing what is missing (pip's messages are in {_LOG})", flush=True)
        if not (_pip(*wanted, keep=tested | kept) or _pip(*wanted, keep=kept)):
            quietly.show_end(_LOG)
            reason = "pip could not add what is missing and keep what is there (see above)"
            print(f"{reason}; without PYTHON=... make uses a .venv of its own", file=sys.stderr)
            return 2
    if not _is_editable_here():
        print("Installing gptkernels itself, editable: about a minute on two cores", flush=True)
        # --no-build-isolation uses the installed setuptools, so no network is needed.
        if not _pip("--no-deps", "--no-build-isolation", "--editable", str(_ROOT), keep={}):
            quietly.show_end(_LOG)
            print("pip could not install gptkernels itself (see above)", file=sys.stderr)
            return 2
    return 0


def _requirements() -> list[str]:
    """Returns the requirements of the package and of all its extras."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    declared = [project["dependencies"], *project["optional-dependencies"].values()]
    left_out = ("gptkernels[", "nvidia-cuda-") if shutil.which("nvcc") else ("gptkernels[",)
    return [text for texts in declared for text in texts if not text.startswith(left_out)]


def _pip(*arguments: str, keep: dict[str, str], shown: bool = True) -> bool:
    """Whether `pip install` succeeds under the constraints `keep`. `shown`: with its progress."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(keep.values()))
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
        command += ["--constraint", str(file), *arguments]
        if shown:
            return quietly.run([*command, "--verbose", "--progress-bar=off"], _LOG) == 0
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _is_editable_here() -> bool:
    here = {"url": _ROOT.as_uri(), "dir_info": {"editable": True}}
    found = metadata.distributions(name="gptkernels")
    return any(json.loads(d.read_text("direct_url.json") or "{}") == here for d in found)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
