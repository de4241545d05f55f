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
    found.add(row(1), row(2))
    found.finish()
    assert (found.rows, found.content["finished"]) == ([row(1), row(2)], True)
    assert list(tmp_path.iterdir()) == []


def row(n: int, **more: Any) -> Row:
    return {"op": "o", "shape": str(n), "dtype": "d", "direction": "f", **more}


def test_rows_take_the_place_of_those_of_their_case(tmp_path: Path) -> None:
    found = Results(tmp_path / "rows.json")
    found.add(row(1, impl="a"), row(1, impl="b"))
    found.add(row(2))
    found.add(row(1, impl="c"))
    assert results.read(tmp_path / "rows.json")["rows"] == [row(2), row(1, impl="c")]


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    results.refuse_unfinished(path)  # there is none
    found = Results(path)
    found.begin()
    results.refuse_unfinished(path)  # it has no rows
    found.add(row(1))
    with pytest.raises(ValueError, match="an unfinished run of 1 rows: --resume goes on with it"):
        results.refuse_unfinished(path)
    found.finish()
    results.refuse_unfinished(path)
    path.write_text("something else")
    results.refuse_unfinished(path)


def test_json_has_no_infinity(tmp_path: Path) -> None:
    """A failed check may have an infinite error, and must be written all the same."""
    path = tmp_path / "rows.json"
    inf, nan = float("inf"), float("nan")
    results.write_json(path, {"rows": [{"error": inf, "limit": 1.0}, (nan, -inf)], "n": 1})
    assert "Infinity" not in path.read_text()
    found = json.loads(path.read_text())
    assert found == {"rows": [{"error": None, "limit": 1.0}, [None, None]], "n": 1}


class TestResume:
    @pytest.mark.parametrize(
        ("name", "was", "now"),
        [("level", "quick", "full"), ("peers", [], [1]), ("device", "cpu", "cuda")],
    )
    def test_refuses_another_head(self, name: str, was: Any, now: Any, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        first = Results(path)
        first.begin(**{name: was})
        first.add(row(1))
        again = Results(path, resume=True)
        again.begin(**{name: was})
        with pytest.raises(ValueError, match=f"rows of another {name}"):
            again.begin(**{name: now})
        assert results.read(path)[name] == was

    def test_goes_on_with_the_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        Results(path).add(row(1))
        again = Results(path, resume=True)
        assert again.rows == [row(1)]
        again.add(row(2))
        assert results.read(path)["rows"] == [row(1), row(2)]

    def test_starts_where_nothing_is(self, tmp_path: Path) -> None:
        assert Results(tmp_path / "rows.json", resume=True).rows == []

    def test_without_it_a_file_is_begun_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        Results(path).add(row(1))
        Results(path).begin()
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
        Results(path).add(row(1))
        content = json.loads(path.read_text())
        content["environment"][name] = change
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=said):
            Results(path, resume=True)
        assert json.loads(path.read_text()) == content

    def test_another_load_is_the_same_machine(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        Results(path).add(row(1))
        content = json.loads(path.read_text())
        content["environment"]["cpu"]["load"] = 99.0
        path.write_text(json.dumps(content))
        assert Results(path, resume=True).rows == [row(1)]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"rows": 1, "environment": {}}', "\x00"])
def test_what_is_no_results_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is no results file of gptkernels"):
        results.read(path)
