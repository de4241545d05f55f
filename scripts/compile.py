"""Runs a compiler on one source for scripts/extension.py. It adds `-o`, a depfile and a cache.

    python scripts/compile.py --tools TEXT --object FILE SOURCE -- COMPILER FLAGS...

What the compiler prints goes to FILE.log, with the time it took; if the compiler fails or warns,
also to the terminal. With GPTKERNELS_OBJECT_CACHE=DIR an object is compiled only once for the same
source, headers, flags and tools, even in several checkouts: DIR keeps the object with its depfile
and log, and they are copied from there.

nvcc 13.0 does not always compile one source to the same code: it orders some of its tables by
addresses, and a kernel may come out with eight registers fewer and some spills. So the compiler
runs with the addresses that Linux gives without randomisation, where the system allows it. The
machine code that was checked is then the machine code that every build ships.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from unreported import unreported

_KEPT = "3"  # to be changed whenever the files kept with an object change
_ADDR_NO_RANDOMIZE = 0x0040000  # of <sys/personality.h>


def main(arguments: list[str] | None = None) -> int:
    """Returns the compiler's exit code."""
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
    key = _key(options.tools, options.command, options.source)
    kept = Path(cache) / key
    kept.mkdir(parents=True, exist_ok=True)
    with open(kept / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits here, and then copies
        if not (kept / "object").exists():
            code = _compile(options.command, options.source, made)
            # If a file changed meanwhile, it is unknown which version was compiled: keep nothing.
            unchanged = key == _key(options.tools, options.command, options.source)
            if code == 0 and unchanged:
                _copy(made, kept / "object")
            return code
    _copy(kept / "object", made)
    depfile = Path(f"{made}.d")
    depfile.write_text(f"{made}:{depfile.read_text().partition(':')[2]}")
    return 0


def _compile(command: list[str], source: Path, made: Path) -> int:
    full = [*command, "-c", str(source), "-o", str(made), "-MMD", "-MF", f"{made}.d"]
    account = Path(f"{made}.gimple")
    reports = "-fsanitize=thread" in command
    if reports:
        full.append(f"-fdump-tree-optimized={account}")
    before = os.times()
    done = subprocess.run(
        full,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_same_addresses,
    )
    after = os.times()
    # CPU time depends less than wall-clock time on how busy the machine is.
    seconds = sum(after[i] - before[i] for i in (2, 3))  # user and system time of children
    Path(f"{made}.log").write_text(f"{done.stdout}compiled in {seconds:.1f} s of one core\n")
    if done.returncode or re.search(r"\bwarning\b", done.stdout):
        print(done.stdout, end="")
    if done.returncode == 0 and reports:
        unseen = list(unreported(account))
        account.unlink()
        if unseen:
            print(f"{source}: the emulator would not see what these touch", *unseen, sep="\n  ")
            made.unlink()
            return 1
    return done.returncode


def _same_addresses() -> None:
    """Gives the program that this process becomes the same addresses in every run. A container may
    refuse this; the program then runs with random ones, as it does on macOS."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.personality(libc.personality(0xFFFFFFFF) | _ADDR_NO_RANDOMIZE)  # 0xFFFFFFFF: the present


def _key(tools: str, command: list[str], source: Path) -> str:
    digest = hashlib.sha256("\0".join((_KEPT, tools, *command)).encode())
    for path in sorted(_read_by(source)):
        digest.update(f"\0{path}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _read_by(source: Path) -> set[Path]:
    """Returns the source and all headers of the project that it may include, whichever macros are
    defined."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            for name in re.findall(r'^\s*#\s*include\s+"(.+)"', path.read_text(), re.M):
                places = [Path(os.path.normpath(p / name)) for p in (path.parent, Path("csrc"))]
                waiting += [place for place in places if place.is_file()]
    return found


def _copy(source: Path, target: Path) -> None:
    """Copies an object with its depfile and log. The object comes last and by a rename, since its
    existence says that all files are complete."""
    for suffix in (".d", ".log"):
        shutil.copyfile(f"{source}{suffix}", f"{target}{suffix}")
    partial = Path(f"{target}.tmp")
    shutil.copyfile(source, partial)
    partial.replace(target)


if __name__ == "__main__":
    sys.exit(main())
