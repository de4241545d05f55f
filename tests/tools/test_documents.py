"""The Markdown pages: what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import ROOT

from benchmarks import readme
from benchmarks.table import dropin_table, options_table, table

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
        ("attention_amx", "attention_avx512_bf16", "attention_avx2"),
    ],
    ids=" ".join,
)
def test_the_table_of_figures_is_that_of_the_results(names: tuple[str, ...]) -> None:
    results = [ROOT / "benchmarks" / "results" / f"cpu_{name}.json" for name in names]
    page = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8")
    assert "\n".join(table(results)) in page


def test_the_first_table_is_that_of_the_results() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(readme.lines()) in page


def test_the_table_of_accelerated_models_is_that_of_the_results() -> None:
    folder = ROOT / "benchmarks" / "results"
    results = [folder / f"{name}.json" for name in ("dropin", "dropin_inference")]
    page = (ROOT / "docs" / "dropin.md").read_text(encoding="utf-8")
    assert "\n".join(dropin_table(results)) in page


def test_the_table_of_options_is_that_of_the_results() -> None:
    folder = ROOT / "benchmarks" / "results"
    results = [folder / f"attention_options_{dtype}.json" for dtype in ("bfloat16", "float32")]
    page = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8")
    assert "\n".join(options_table(results)) in page
