"""The report of a benchmark: one self-contained page and its figures as PNGs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptkernels.core.files import check_folder, make_folder, replacing
from gptkernels.core.optional import optional


def check(folder: Path | str) -> None:
    """Finds before a measurement what would keep `write` from working after it.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        NotADirectoryError: `folder`, or one above it, is a file.
    """
    for module in ("matplotlib", "jinja2"):
        optional(module, f"a report needs {module}: pip install 'gptkernels[bench]'")
    check_folder("the folder of a report", Path(folder))


def write(content: dict[str, Any], folder: Path | str) -> Path:
    """Writes index.html and its figures, each in light and dark, to `folder`. Returns the page.

    The page holds its figures, so it can be sent alone; it comes last, when everything else is
    there. Files of the same names are replaced, others in the folder stay.

    Args:
        content: a results file: environment, ceilings, peers, finished, rows.
        folder: where to write; it is made where it is not there.

    Raises:
        ImportError, NotADirectoryError: as `check` does.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    check(folder)
    # These need what `check` has just found.
    from gptkernels.bench.report.page import html
    from gptkernels.bench.report.pictures import files, pictures

    make_folder("the folder of a report", folder)
    drawn = [(picture, files(picture)) for picture in pictures(content)]
    for _, pngs in drawn:
        for name, png in pngs.items():
            with replacing(folder / name) as file:
                file.write_bytes(png)
    page = folder / "index.html"
    with replacing(page) as file:
        file.write_text(html(content, drawn), encoding="utf-8")
    return page
