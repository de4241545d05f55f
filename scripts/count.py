"""Counts what makes the code easy or hard to work in, at any commit.

    python scripts/count.py                  counts in the working tree
    python scripts/count.py --at REVISION    counts in a commit

It prints the lines of code of each folder, without comments, docstrings and blank lines; the most
files in one folder of csrc; the lines of csrc/bindings.cpp; and the places that pass an option of
attention on, from the signature of the public function to the parameters of the CUDA kernels.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("softcap", "dropout_p")
# The files from the public function to the kernel's parameters: today's, and those of 0.1.0.
PATHS = (
    (
        "gptkernels/ops/attention/dense.py",
        "gptkernels/ops/attention/options.py",
        "gptkernels/ops/attention/cuda/dense.py",
        "csrc/bindings.cpp",
        "csrc/runtime/dropout.h",
        "csrc/attention/params.h",
    ),
    (
        "gptkernels/ops/attention.py",
        "gptkernels/ops/attention_options.py",
        "gptkernels/cuda/attention.py",
        "csrc/bindings.cpp",
        "csrc/dropout.h",
        "csrc/attention.h",
    ),
)
_CPP_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
# A line that only computes with an option, or checks it, does not count.
_USES = re.compile(r"\b(if|raise|return|check_\w+)\b|[<>]=?\s*0|\b\w*_scores_are_plain\b")


def main() -> int:
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--at", metavar="REVISION")
    revision = parser.parse_args().at
    files = _git(*(["ls-tree", "-r", "--name-only", revision] if revision else ["ls-files"]))
    names = [name for name in files.splitlines() if revision or (ROOT / name).exists()]
    read = _reader(revision)

    lines: Counter[str] = Counter()
    for name in names:
        if name.endswith((".py", ".h", ".cpp", ".cu")):
            lines[name.split("/")[0]] += len(code(name, read(name)))
    print("Lines of code")
    for folder, count in sorted(lines.items()):
        print(f"  {folder:12} {count:6}")
    tests = lines["tests"]
    print(f"  in all       {sum(lines.values()):6}, without tests {sum(lines.values()) - tests}")

    folders = Counter(name.rpartition("/")[0] for name in names if name.startswith("csrc/"))
    most, count = folders.most_common(1)[0]
    print(f"Files in a folder of csrc: at most {count}, in {most}")
    print(f"csrc/bindings.cpp: {len(read('csrc/bindings.cpp').splitlines())} lines")
    for option in OPTIONS:
        found = places(option, names, read)
        print(f"{option} is handed on in {len(found)} places:")
        print(*(f"  {place}" for place in found), sep="\n")
    return 0


def code(name: str, text: str) -> list[tuple[int, str]]:
    """Returns (number, text) of every line that has code, without its comments."""
    stripped = _python(text) if name.endswith(".py") else _cpp(text)
    return [(n, line) for n, line in enumerate(stripped.splitlines(), 1) if line.strip()]


def places(option: str, names: list[str], read: Callable[[str], str]) -> list[str]:
    """Returns file:line of every line that passes the option on."""
    path = max(PATHS, key=lambda files: sum(file in names for file in files))
    word = re.compile(rf"\b{option}\b")
    return [
        f"{file}:{number}: {line.strip()}"
        for file in path
        if file in names
        for number, line in code(file, read(file))
        if word.search(line) and not _USES.search(line)
    ]


def _python(text: str) -> str:
    """Returns the text without comments and docstrings."""
    lines = text.splitlines()
    statement = True  # whether the next token begins a statement
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = statement and token.type == tokenize.STRING
        if docstring or token.type == tokenize.COMMENT:
            (first, begin), (last, end) = token.start, token.end
            for row in range(first - 1, last):
                left = lines[row][:begin] if row == first - 1 else ""
                right = lines[row][end:] if row == last - 1 else ""
                lines[row] = left + right
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return "\n".join(lines)


def _cpp(text: str) -> str:
    """Returns the text without comments."""

    def kept(match: re.Match[str]) -> str:
        return match[0] if match[0].startswith('"') else "\n" * match[0].count("\n")

    return _CPP_COMMENT.sub(kept, text)


def _reader(revision: str | None) -> Callable[[str], str]:
    if revision is None:
        return lambda name: (ROOT / name).read_text()
    return lambda name: _git("show", f"{revision}:{name}")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
