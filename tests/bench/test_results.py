"""Files of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptkernels.bench import results
from gptkernels.bench.results import Results, Row


def test_a_run_cut_short_leaves_its_rows(tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        yield {"n": 1}
        yield {"n": 2}
        raise KeyboardInterrupt

    path = tmp_path / "folder" / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        list(results.recorded(rows(), path))
    content = json.loads(path.read_text())
    assert (content["finished"], content["rows"]) == (False, [{"n": 1}, {"n": 2}])
    for key in ("time", "command", "commit", "versions", "gpu", "python", "gptkernels"):
        assert key in content["environment"]


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    rows = results.recorded(iter([{"n": 1}]), tmp_path / "rows.json")
    assert list(rows) == [{"n": 1}]
    assert results.read(tmp_path / "rows.json")["finished"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    results.write_json(path, {"old": True})
    with pytest.raises(TypeError):
        results.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = Results()
    found.add({"n": 1}, {"n": 2})
    found.finish()
    assert (found.rows, found.content["finished"]) == ([{"n": 1}, {"n": 2}], True)
    assert list(tmp_path.iterdir()) == []


class TestResume:
    def test_goes_on_with_the_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        Results(path, peers=[]).add({"n": 1})
        again = Results(path, resume=True, peers=[])
        assert again.rows == [{"n": 1}]
        again.add({"n": 2})
        assert results.read(path)["rows"] == [{"n": 1}, {"n": 2}]

    def test_starts_where_nothing_is(self, tmp_path: Path) -> None:
        assert Results(tmp_path / "rows.json", resume=True).rows == []

    def test_without_it_a_file_is_begun_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        Results(path).add({"n": 1})
        assert Results(path).rows == []
        assert results.read(path)["rows"] == []

    @pytest.mark.parametrize(
        ("name", "change", "said"),
        [
            ("versions", {"torch": "1.0"}, "another versions"),
            ("cpu_threads", 77, r"another cpu threads \(77, here"),
            ("commit", "0123456789ab", "another commit"),
            ("cpu", {"name": "Z80"}, "another processor"),
        ],
    )
    def test_refuses_rows_of_another_machine(
        self, name: str, change: Any, said: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "rows.json"
        Results(path).add({"n": 1})
        content = json.loads(path.read_text())
        content["environment"][name] = change
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=said):
            Results(path, resume=True)
        assert json.loads(path.read_text()) == content

    def test_another_load_is_the_same_machine(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        Results(path).add({"n": 1})
        content = json.loads(path.read_text())
        content["environment"]["cpu"]["load"] = 99.0
        path.write_text(json.dumps(content))
        assert Results(path, resume=True).rows == [{"n": 1}]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"rows": 1, "environment": {}}', "\x00"])
def test_what_is_no_results_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is no results file of gptkernels"):
        results.read(path)
