"""Runs one compiler for scripts/extension.py: `-o`, the depfile and, where asked for, a cache.

    python scripts/compile.py --tools TEXT --object FILE SOURCE -- COMPILER FLAGS...

What the compiler prints goes to FILE.log, and to the terminal where it fails or warns. With
GPTKERNELS_OBJECT_CACHE=DIR an object is compiled once for the same source, headers, flags and
tools, in whichever checkout: it is kept in DIR with its depfile and log, and copied from there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_HEADERS = (".h", ".cuh", ".hpp")


def main(arguments: list[str] | None = None) -> int:
    """The compiler's exit code."""
    parser = argparse.ArgumentParser("python scripts/compile.py", description=__doc__)
    parser.add_argument("--tools", required=True, help="the versions that the object depends on")
    parser.add_argument("--object", required=True, type=Path, metavar="FILE")
    parser.add_argument("source", type=Path)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    made: Path = options.object
    made.parent.mkdir(parents=True, exist_ok=True)
    cache = os.environ.get("GPTKERNELS_OBJECT_CACHE")
    if not cache:
        return _compile(options.command, options.source, made)
    kept = Path(cache) / _key(options.tools, options.command, options.source)
    if not kept.exists():
        code = _compile(options.command, options.source, made)
        if code == 0:
            _keep(made, kept)
        return code
    for suffix in (".d", ".log", ""):  # the object last: it says that the others are there
        shutil.copyfile(kept / f"object{suffix}", f"{made}{suffix}")
    depfile = Path(f"{made}.d")
    depfile.write_text(f"{made}:{depfile.read_text().partition(':')[2]}")
    return 0


def _compile(command: list[str], source: Path, made: Path) -> int:
    full = [*command, "-c", str(source), "-o", str(made), "-MMD", "-MF", f"{made}.d"]
    done = subprocess.run(full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    Path(f"{made}.log").write_text(done.stdout)
    if done.returncode or re.search(r"\bwarning\b", done.stdout):
        print(done.stdout, end="")
    return done.returncode


def _key(tools: str, command: list[str], source: Path) -> str:
    """Every header of the project counts, whether this source includes it or not."""
    digest = hashlib.sha256("\0".join((tools, *command, str(source))).encode())
    headers = [path for path in Path("csrc").rglob("*") if path.suffix in _HEADERS]
    for path in (source, *sorted(headers)):
        digest.update(f"\0{path}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _keep(made: Path, kept: Path) -> None:
    """Into the cache, whole: another process sees all three files or none."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=kept.parent))
    for suffix in ("", ".d", ".log"):
        shutil.copyfile(f"{made}{suffix}", partial / f"object{suffix}")
    try:
        partial.rename(kept)
    except OSError:  # another process was first with the same object
        shutil.rmtree(partial)


if __name__ == "__main__":
    sys.exit(main())
