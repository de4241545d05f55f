"""The Markdown pages: what they link to is there, and tables are those of the results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT

from benchmarks import readme, table

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(
    "names",
    [
        ("avx512_bf16", "avx2"),
        ("attention_avx512_bf16", "attention_avx2"),
    ],
    ids=" ".join,
)
def test_the_table_of_figures_is_that_of_the_results(names: tuple[str, ...]) -> None:
    results = [ROOT / "benchmarks" / "results" / f"cpu_{name}.json" for name in names]
    page = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8")
    assert "\n".join(table.instruction_sets_table(results)) in page


def test_the_first_table_is_that_of_the_results() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(readme.lines()) in page


def test_make_help_and_the_readme_say_the_same_times() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    helps = dict(re.findall(r"^([a-z-]+):.*## (\d+ min) +\|", makefile, re.M))
    assert helps
    assert helps == dict(re.findall(r"^make ([a-z-]+) +(\d+ min) ", page, re.M))


@pytest.mark.parametrize(
    ("made", "names", "page"),
    [
        (lambda files: table.bench_table(*files), ["bench_full"], "cpu"),
        (lambda files: table.models_table(*files), ["bench_full"], "cpu"),
        (table.dropin_table, ["dropin", "dropin_inference"], "dropin"),
        (lambda files: table.ceilings_table(*files), ["ceilings"], "benchmarking"),
    ],
)
def test_a_table_is_that_of_the_results(made: Any, names: list[str], page: str) -> None:
    results = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in names]
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert "\n".join(made(results)) in text
