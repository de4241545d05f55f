"""Makes what was measured here a table that ships with the package.

    gptkernels tune --config gpt2 ...            as often as there are classes to measure
    python -m benchmarks.ship_table sapphire-rapids "Sapphire Rapids VM, 2 threads"

Each entry says where it comes from. A shipped table is used where device, name, model and
instruction set are the same, and the user has measured nothing; the software may be newer, so only
choices that stayed the same over several measurements should be in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from gptkernels.core import plans, tuned_files
from gptkernels.core.files import replacing


def main() -> None:
    """Writes core/tables/<name>.jsonl."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of the file")
    parser.add_argument("origin", help="the machine, in words")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    here = tuned_files.fingerprint(given.device)
    origin = f"{given.origin}, PyTorch {here['torch']}"
    entries = [
        dataclasses.replace(entry, origin=origin)
        for entry in plans.table(given.device).entries.values()
        if entry.origin == "here"
    ]
    if not entries:
        parser.error("nothing was measured here: run gptkernels tune first")
    head = {"gptkernels": "tuned", "format": tuned_files.FORMAT, "fingerprint": here}
    folder = Path(tuned_files.__file__).parent / "tables"
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{given.name}.jsonl") as file:
        lines = [head, *(entry.as_dict() for entry in entries)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(entries)} classes in {folder / given.name}.jsonl")


if __name__ == "__main__":
    main()
