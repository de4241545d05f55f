"""Finds memory accesses that g++ does not report with -fsanitize=thread. The emulator of the CUDA
kernels could not check them.

It reads g++'s own dump of a compiled file (-fdump-tree-optimized). g++ reports loads and stores. It
does not report a call that takes a struct from memory or returns one to it, nor memcpy, memset and
memmove where they stay calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# A place in memory: `*p_2(D)`, `p_2(D)->x`, `MEM[...]`, `MEM <float> [...]`.
_MEMORY = re.compile(r"\*\w|MEM[ <\[]|[\w.]+(\(D\))?->")
_CALL = re.compile(r"(?:(?P<result>.+?) = )?(?P<called>[^( ]\S*(?: \S+)*?) \((?P<arguments>.*)\);")
_BYTES = re.compile(r"(__builtin_)?mem(cpy|set|move)")
_KERNEL = re.compile(r"\w_kernel\b")
# Host code needs no check: launchers, and `invoke`, which passes their parameters to a kernel.
_HOST = re.compile(r"launch|gk::detail::invoke<")


def unreported(dump: Path) -> Iterator[str]:
    """Yields "function: statement" for each such access in a dump."""
    function = ""
    for line in dump.read_text(errors="replace").splitlines():
        if line.startswith(";; Function "):
            function = line.removeprefix(";; Function ").split(" (_Z")[0]
            continue
        call = _CALL.match(line.strip())
        if call is None or _HOST.search(function):
            continue
        places = [call["result"] or "", *call["arguments"].split(", ")]
        of_bytes = _BYTES.fullmatch(call["called"]) and _KERNEL.search(function)
        if of_bytes or any(_MEMORY.match(place) for place in places):
            yield f"{function}: {line.strip()}"
