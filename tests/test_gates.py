from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the gates belong to the repository, not to the installed package

from gates.__main__ import ARCHITECTURES_ASIDE  # noqa: E402
from gates.table import (  # noqa: E402
    PATH,
    SHARED_LIMITS,
    Exemption,
    Key,
    Resources,
    Table,
    changes,
    load,
    save,
    violations,
)

CLEAN = Resources(registers=128, spills=0, stack=0, shared=65536)
FOUND: dict[Key, Resources] = {("a", 80): CLEAN, ("a", 86): CLEAN, ("b", 90): CLEAN}


def table() -> Table:
    return Table({"3.7.1": dict(FOUND)})


def with_row(key: Key, **numbers: int) -> dict[Key, Resources]:
    return FOUND | {key: dataclasses.replace(CLEAN, **numbers)}


class TestRules:
    def test_equal_numbers_hold(self) -> None:
        assert violations("3.7.1", FOUND, table()) == []

    @pytest.mark.parametrize("architecture", SHARED_LIMITS)
    def test_shared_memory_over_the_limit(self, architecture: int) -> None:
        """Even where the table has the same number."""
        limit = SHARED_LIMITS[architecture]
        for shared, broken in ((limit, 0), (limit + 1, 1)):
            found = with_row(("b", architecture), shared=shared)
            sentences = violations("3.7.1", found, Table({"3.7.1": found}))
            assert len(sentences) == broken
        assert sentences == [
            f"b sm_{architecture}: {limit + 1} B of shared memory, {limit} B is the limit"
        ]

    @pytest.mark.parametrize("numbers", [{"spills": 3}, {"stack": 8}])
    def test_spills_need_an_exemption(self, numbers: dict[str, int]) -> None:
        found = with_row(("a", 86), **numbers)
        spilled = Table({"3.7.1": found})
        (sentence,) = violations("3.7.1", found, spilled)
        assert sentence.startswith("a sm_86: spills registers without an exemption")
        spilled.exemptions = [Exemption("a", (80,), "another architecture")]
        assert len(violations("3.7.1", found, spilled)) == 2
        spilled.exemptions = [Exemption("a", (80, 86), "ptxas spills two, which costs nothing")]
        assert violations("3.7.1", found, spilled) == []
        spilled.exemptions = [Exemption("a", (86,), " ")]
        assert violations("3.7.1", found, spilled) == ["a: its exemption gives no reason"]

    @pytest.mark.parametrize("numbers", [{"registers": 127}, {"registers": 129}, {"shared": 0}])
    def test_any_change_is_named(self, numbers: dict[str, int]) -> None:
        (sentence,) = violations("3.7.1", with_row(("a", 80), **numbers), table())
        assert sentence.startswith("a sm_80: ")
        assert sentence.endswith("the table has 128 registers, 65536 B shared")

    def test_missing_and_stale_rows(self) -> None:
        new = with_row(("c", 80))
        assert violations("3.7.1", new, table()) == [
            "c sm_80: not in the table (128 registers, 65536 B shared)"
        ]
        part = {("a", 80): CLEAN}
        assert violations("3.7.1", part, table()) == [
            "a sm_86: in the table, but not shipped",
            "b sm_90: in the table, but not shipped",
        ]
        assert violations("3.7.1", part, table(), complete=False) == []

    def test_unknown_version(self) -> None:
        (sentence,) = violations("3.8.0", FOUND, table())
        assert sentence.startswith("the table has no Triton 3.8.0 (it has 3.7.1)")

    def test_changes(self) -> None:
        new = with_row(("a", 80), registers=100)
        del new["b", 90]
        new["c", 90] = CLEAN
        assert changes(FOUND, new) == [
            "- b sm_90: 128 registers, 65536 B shared",
            "+ c sm_90: 128 registers, 65536 B shared",
            "~ a sm_80: 128 registers, 65536 B shared -> 100 registers, 65536 B shared",
        ]


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "triton.json"
        versions = {"3.7.1": dict(FOUND), "3.6.0": with_row(("a", 80), stack=8)}
        written = Table(versions, [Exemption("a", (80,), "why")])
        save(written, path)
        assert load(path) == written
        save(Table(), path)
        assert load(path) == Table()

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"versions": {"3": {"a": 1}}}'])
    def test_foreign_file(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "triton.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a table of the gates"):
            load(path)

    def test_committed_table_keeps_its_own_rules(self) -> None:
        committed = load()
        assert {"3.6.0", "3.7.1", "3.9.0"} <= committed.versions.keys()
        shared = [
            {key for key in rows if key[1] in ARCHITECTURES_ASIDE}
            for rows in committed.versions.values()
        ]
        assert all(keys == shared[0] for keys in shared)
        for version, rows in committed.versions.items():
            assert violations(version, rows, committed) == []


class TestCommand:
    """In a copy with a cache and a table of its own, from a process that runs the interpreter."""

    ONLY = "gelu_mlp_fwd bf16 tanh 64x64x64"

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT))),
        }
        command = [sys.executable, "-m", "gates", "--jobs", "1", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    def test_compiles_and_compares(self, tmp_path: Path) -> None:
        version = pytest.importorskip("triton").__version__
        if version not in load().versions:
            pytest.skip(f"the table has no Triton {version}")
        shutil.copytree(PATH.parent, tmp_path / "gates", ignore=shutil.ignore_patterns("__py*"))
        path = tmp_path / "gates" / "triton.json"
        first = self.run(tmp_path, "--only", self.ONLY)
        assert first.returncode == 0, first.stdout + first.stderr
        assert "4 compiled kernels, all hold" in first.stdout
        assert len(list((tmp_path / "build" / "gates").glob("*.json"))) == 4

        text = json.loads(path.read_text())
        text["versions"][version][self.ONLY]["sm_90"][0] += 1
        path.write_text(json.dumps(text))
        changed = self.run(tmp_path, "--only", self.ONLY)
        assert changed.returncode == 1
        assert f"FAILED {self.ONLY} sm_90: " in changed.stdout
        assert "1 FAILED" in changed.stdout

    def test_nothing_to_compile(self) -> None:
        pytest.importorskip("triton")
        none = self.run(ROOT, "--only", "no such kernel")
        assert none.returncode == 2
        assert "no configuration's name contains 'no such kernel'" in none.stderr


def test_the_pinned_triton_is_in_the_table() -> None:
    """What the project pins must be what the gates check."""
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    (pin,) = (line for line in pinned if line.startswith("triton=="))
    version = pin.removeprefix("triton==").split(";")[0].strip()
    assert version in load().versions
