"""Finds accesses to memory that g++ does not report with -fsanitize=thread, in its own account of a
compiled file (-fdump-tree-optimized): the emulator of the CUDA kernels would not check them.

g++ reports loads and stores. A call that returns a struct into memory, or takes one from it, is
neither, and memcpy, memset and memmove are calls too where they are not small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# What a statement names in memory, as `*p_2(D)`, `p_2(D)->x`, `MEM[...]`, `MEM <float> [...]`.
_MEMORY = re.compile(r"\*\w|MEM[ <\[]|[\w.]+(\(D\))?->")
_CALL = re.compile(r"(?:(?P<result>.+?) = )?(?P<called>[^( ]\S*(?: \S+)*?) \((?P<arguments>.*)\);")
_BYTES = re.compile(r"(__builtin_)?mem(cpy|set|move)")
_KERNEL = re.compile(r"\w_kernel\b")
# Launchers are host code, and `invoke` hands a kernel the parameters that they wrote.
_HOST = re.compile(r"launch|gk::detail::invoke<")


def unreported(dump: Path) -> Iterator[str]:
    """The statement, after the function that it is in."""
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
