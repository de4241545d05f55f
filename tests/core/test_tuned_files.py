"""core.tuned_files: tables in files stay whole, whoever writes them and whatever happens."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import resource
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, command
from hypothesis import given, settings
from hypothesis import strategies as st

from gptkernels.core import cpu, tuned_files
from gptkernels.core.lock import alone_in
from gptkernels.core.tuned import EAGER, FORWARD, Entry, Key, Table

CPU, CUDA = "cpu", "cuda"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are on, the cache is a folder of the test, and nothing ships."""
    monkeypatch.setenv("GPTKERNELS_TUNE", "cached")
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPTKERNELS_TUNED_FILE", raising=False)
    monkeypatch.setattr(tuned_files, "_SHIPPED", tmp_path / "shipped")


def entry(number: int, way: str = "cpu", **more: Any) -> Entry:
    """Of a class of its own, whose line differs from the others' in several bytes."""
    name = f"{number:03d}" * 3
    return Entry(
        Key.of("attention", FORWARD, EAGER, {"device": CPU, "name": name}, {"Tq": 70, "Tk": 900}),
        ((0.5, way), (1.0, "torch")),
        **more,
    )


def ways(table: Table) -> dict[str, str]:
    """Name of the class -> the way at its lower end."""
    found = ((dict(key.facts), entry) for key, entry in table.entries.items())
    return {str(facts.get("name")): entry.way(0.0) for facts, entry in found}


def names(*numbers: int) -> set[str]:
    return {f"{number:03d}" * 3 for number in numbers}


def loaded() -> tuple[dict[str, str], list[str]]:
    """What is loaded, and the warnings: one at most, in one sentence."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ways(tuned_files.load(CPU))
    said = [str(warning.message) for warning in caught]
    assert len(said) <= 1
    for sentence in said:
        assert sentence.startswith(f"{tuned_files.path_of(CPU)}: ")
        assert sentence.endswith("; gptkernels tune measures again")
        assert "\n" not in sentence
    return found, said


def whole() -> dict[str, str]:
    """What is loaded, without a warning."""
    found, said = loaded()
    assert not said
    return found


def test_what_is_saved_is_loaded() -> None:
    full = entry(
        1, "pytorch",
        points=({"position": 1.0, "sizes": {"Tq": 128}, "seconds": {"cpu": 1e-5}},),
        refused={"cpu": "its error is too large"},
        errors={"cpu": (1.0, 0.5)},
    )  # fmt: skip
    assert not tuned_files.load(CPU).entries
    path = tuned_files.save(CPU, [full, entry(2)])
    assert path == tuned_files.path_of(CPU)
    found = tuned_files.load(CPU)
    assert found.get(full.key) == full
    assert found.get(entry(2).key) == entry(2)
    assert len(found.entries) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_later_save_adds_and_replaces() -> None:
    tuned_files.save(CPU, [entry(1), entry(2)])
    tuned_files.save(CPU, [entry(2, "pytorch", refused={"cpu": "no"}), entry(3)])
    assert whole() == dict(zip(sorted(names(1, 2, 3)), ["cpu", "pytorch", "cpu"], strict=True))
    assert tuned_files.load(CPU).entries[entry(2).key].refused == {"cpu": "no"}
    tuned_files.save(CPU, [])
    assert whole().keys() == names(1, 2, 3)


# What the scripts below share. The table is full enough that writing it takes its time.
SCRIPT = """
import os, pathlib, random, signal, sys, time, warnings
from gptkernels.core import tuned_files
from gptkernels.core.tuned import EAGER, FORWARD, Entry, Key

tuned_files._SHIPPED = pathlib.Path("nowhere")

def entry(who, number):
    facts = {"device": "cpu", "who": who, "number": number}
    return Entry(Key.of("attention", FORWARD, EAGER, facts, {"Tq": 8}), ((1.0, "cpu"),))

def numbers(who):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tuned_files.load("cpu")
    return sorted(f["number"] for f in (dict(k.facts) for k in found.entries) if f["who"] == who)
"""

AT_ONCE = """
go, tell = os.pipe()
children = []
for who in range(3):
    child = os.fork()
    if not child:
        os.close(tell)
        os.read(go, 1)  # all begin at once
        for number in range(30):
            tuned_files.save("cpu", [entry(who, number)])
        os._exit(0)
    children.append(child)
os.close(tell)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert all(numbers(who) == list(range(30)) for who in range(3))
"""

KILLED = """
path = tuned_files.path_of("cpu")
tuned_files.save("cpu", [entry(1, number) for number in range(200)])
random.seed()
left = 0
for _ in range(50):
    done = numbers(0)
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        for number in range(len(done), 10_000):
            os.write(tell, b".")
            tuned_files.save("cpu", [entry(0, number)])
    os.close(tell)
    os.read(told, 1)  # the first one begins
    time.sleep(random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    begun = len(done) + 1 + len(os.read(told, 1 << 16))
    os.close(told)
    found = numbers(0)
    assert found == list(range(len(found))), found
    assert begun - 1 <= len(found) <= begun, (begun, len(found))
    assert len(numbers(1)) == 200
    rest = {x.name for x in path.parent.iterdir()} - {path.name}
    assert rest <= {f".{path.name}.lock", f".{path.name}.tmp"}, rest
    left += bool(rest)
assert left >= 5, left  # else the moments were not in the middle of anything
begun = time.monotonic()
tuned_files.save("cpu", [entry(2, 0)])
assert time.monotonic() - begun < 10, "a dead process's lock was waited for"
assert [x.name for x in path.parent.iterdir()] == [path.name]
"""


@pytest.mark.parametrize("body", [AT_ONCE, KILLED], ids=["at once", "killed"])
def test_several_processes(body: str) -> None:
    """At once: what each saved is there. Killed at 50 random moments: the file is whole, and has
    all that was saved before; what stays behind blocks nobody, does not pile up, and goes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = command(sys.executable, "-c", SCRIPT + body, env=env, timeout=120)
    assert done.returncode == 0, done.stderr


def test_another_process_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned_files.save(CPU, [entry(1)])
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with alone_in("the table", path.parent, file=f".{path.name}.lock"):
            held.set()
            free.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(10)
        monkeypatch.setattr(tuned_files, "_PATIENCE_S", 0.05)
        with pytest.raises(ValueError, match=r"^the table: \S+ is in use by process"):
            tuned_files.save(CPU, [entry(2)])
        assert whole().keys() == names(1)
        monkeypatch.setattr(tuned_files, "_PATIENCE_S", 10.0)
        timer = threading.Timer(0.1, free.set)
        timer.start()
        tuned_files.save(CPU, [entry(2)])
        assert free.is_set()
    finally:
        free.set()
        holder.join()
    assert whole().keys() == names(1, 2)


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(
        NotADirectoryError, match=r"^the table must be a folder, but \S+ is a file$"
    ):
        tuned_files.save(CPU, [entry(1)])
    assert loaded() == ({}, [])  # nothing can be in it
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_cache(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned_files.save(CPU, [entry(1)])
    opened = Path.open

    def refuses_writers(file: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(code, os.strerror(code), str(file))
        return opened(file, mode, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuses_writers)
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            tuned_files.save(CPU, [entry(2)])
        assert caught.value.errno == code
        assert whole().keys() == names(1)
    assert list(path.parent.iterdir()) == [path]


def test_an_unreadable_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_files.save(CPU, [entry(1)])

    def refuses(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuses)
    found, said = loaded()
    assert not found
    assert "the table cannot be read (Permission denied)" in said[0]


@contextlib.contextmanager
def short_files() -> Iterator[None]:
    """No file of this process may grow beyond a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("how", ["a short file", "/dev/full", "write", "fsync", "replace"])
def test_a_full_disk(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is noticed, the old file stays whole, and nothing else stays."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tuned_files.save(CPU, [entry(number) for number in range(3)])
    old = path.read_bytes()
    with monkeypatch.context() as patched, contextlib.ExitStack() as stack:
        if how == "a short file":
            stack.enter_context(short_files())
        elif how == "/dev/full":
            path.with_name(f".{path.name}.tmp").symlink_to("/dev/full")
        else:
            patched.setattr(os, how, full)
            if how == "write":  # of the lock's holder too, which nobody needs
                patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError) as caught:
            tuned_files.save(CPU, [entry(9)])
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert path.read_bytes() == old
    assert whole().keys() == names(0, 1, 2)
    assert list(path.parent.iterdir()) == [path]
    tuned_files.save(CPU, [entry(9)])
    assert whole().keys() == names(0, 1, 2, 9)


def test_a_table_cut_anywhere() -> None:
    """The lines before the cut stay; of the cut one, one sentence tells."""
    path = tuned_files.save(CPU, [entry(number) for number in range(3)])
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    ends = [sum(map(len, lines[: n + 1])) - 1 for n in range(len(lines))]  # without the newline
    for size in range(len(text)):
        path.write_bytes(text[:size])
        found, said = loaded()
        intact = sum(size >= end for end in ends)
        assert found.keys() == names(*range(intact - 1)), size
        assert bool(said) == (size not in {n for end in ends for n in (end, end + 1)}), size
        if said and intact:
            assert "damaged lines of the table are left out (1)" in said[0]


@settings(max_examples=150)
@given(data=st.data())
def test_a_table_with_a_damaged_line(data: st.DataObject) -> None:
    """Bytes of one line are others: all other lines stay."""
    path = tuned_files.path_of(CPU)
    if not path.exists():
        tuned_files.save(CPU, [entry(number) for number in range(4)])
        path.with_suffix(".good").write_bytes(path.read_bytes())
    lines = path.with_suffix(".good").read_bytes().splitlines()
    number = data.draw(st.integers(1, 4))
    line = lines[number]
    start = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(start, min(len(line), start + 5)))
    lines[number] = line[:start] + data.draw(st.binary(max_size=5)) + line[end:]
    path.write_bytes(b"\n".join(lines))
    found, _ = loaded()
    assert names(*range(4)) - names(number - 1) <= found.keys()


@settings(max_examples=100)
@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_a_file_of_anything(content: bytes) -> None:
    path = tuned_files.path_of(CPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    found, said = loaded()
    assert not found
    assert "it is no table of gptkernels" in said[0]
    tuned_files.save(CPU, [entry(1)])  # of its own place: it is measured again
    assert whole().keys() == names(1)


LINES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
).map(json.dumps)
HARD = [
    "[" * 100_000,
    '{"a":' * 100_000,
    "1" * 5000,
    "1e999",
    json.dumps(entry(9).as_dict()).replace('"Tq": 7', '"Tq": Infinity'),
    json.dumps(entry(9).as_dict()).replace("1.0", "1e999"),
    json.dumps(entry(9).as_dict()).replace("1.0", "1" * 400),
    json.dumps({**entry(9).as_dict(), "errors": []}).replace("[]", "[1]"),
    "",
]


@settings(max_examples=150)
@given(line=LINES)
def test_lines_of_any_json(line: str) -> None:
    _among_good_lines(line)


@pytest.mark.parametrize("number", range(len(HARD)))
def test_lines_that_are_hard_to_read(number: int) -> None:
    _among_good_lines(HARD[number])


def _among_good_lines(line: str) -> None:
    path = tuned_files.path_of(CPU)
    good = path.with_suffix(".good")
    if not good.exists():
        tuned_files.save(CPU, [entry(1), entry(2)])
        good.write_text(path.read_text())
    head, first, second = good.read_text().splitlines()
    path.write_text("\n".join([head, first, line, second]))
    found, said = loaded()
    assert found.keys() == names(1, 2)
    assert "damaged lines of the table are left out (1)" in said[0]
    for other in (line, line + first[:5]):  # as the first line
        path.write_text("\n".join([other, first, second]))
        found, said = loaded()
        assert not found
        assert "it is no table" in said[0]


def rewritten(path: Path, **changes: Any) -> None:
    """The same table with another first line."""
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(head), **changes}), *lines]))


def test_a_newer_format_is_left_out_as_a_whole() -> None:
    path = tuned_files.save(CPU, [entry(1)])
    rewritten(path, format=tuned_files.FORMAT + 1)
    found, said = loaded()
    assert not found
    assert "the table has format 2, this version reads 1, it is left out" in said[0]
    for version in (float("inf"), "1", None, True, [1]):
        rewritten(path, format=version)
        assert "it is no table of gptkernels" in loaded()[1][0]
    rewritten(path, format=tuned_files.FORMAT)
    assert whole().keys() == names(1)
    rewritten(path, gptkernels="results")
    assert "it is no table of gptkernels" in loaded()[1][0]


@pytest.mark.parametrize("fact", [*tuned_files.fingerprint(CPU)])
def test_a_table_of_another_machine_is_left_out_as_a_whole(fact: str) -> None:
    path = tuned_files.save(CPU, [entry(1)])
    here = tuned_files.fingerprint(CPU)
    others = [{**here, fact: "another"}, {k: v for k, v in here.items() if k != fact}]
    for other in others:
        rewritten(path, fingerprint=other)
        found, said = loaded()
        assert not found
        assert "the table is of another machine or another software, and is left out" in said[0]


def test_each_machine_and_software_has_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {tuned_files.save(CPU, [entry(1)])}
    here = tuned_files.fingerprint(CPU)
    for fact in here:
        monkeypatch.setattr(tuned_files, "fingerprint", lambda _, f=fact: {**here, f: "another"})
        assert not whole()
        paths.add(tuned_files.save(CPU, [entry(2)]))
    assert len(paths) == 1 + len(here)


def ship(folder: Path, stem: str, entries: list[Entry], **changes: str) -> None:
    folder.mkdir(exist_ok=True)
    head = {
        "gptkernels": "tuned",
        "format": tuned_files.FORMAT,
        "fingerprint": {**tuned_files.fingerprint(CPU), **changes},
    }
    lines = [head, *(given.as_dict() for given in entries)]
    (folder / f"{stem}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_ships_is_of_this_machine_and_any_software(tmp_path: Path) -> None:
    """What the user measured goes over it."""
    folder = tmp_path / "shipped"
    ship(folder, "a", [entry(1), entry(2)], torch="2.0", kernels="older", blas="another")
    ship(folder, "b", [entry(2, "pytorch"), entry(3)])
    for fact in ("device", "name", "model", "isa"):
        ship(folder, f"c-{fact}", [entry(4), entry(1, "pytorch")], **{fact: "another"})
    (folder / "d.jsonl").write_text("no table")
    (folder / "README.md").write_text("no table either")
    assert whole() == dict(zip(sorted(names(1, 2, 3)), ["cpu", "pytorch", "cpu"], strict=True))
    path = tuned_files.save(CPU, [entry(3, "pytorch"), entry(5)])
    found = whole()
    assert found.keys() == names(1, 2, 3, 5)
    assert found["003" * 3] == "pytorch"
    assert len(path.read_text().splitlines()) == 3  # what ships is not copied


def test_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(tmp_path / "shipped", "a", [entry(1)])
    tuned_files.save(CPU, [entry(2)])
    for value in ("", "cached"):
        monkeypatch.setenv("GPTKERNELS_TUNE", value)
        assert whole().keys() == names(1, 2)
    monkeypatch.setenv("GPTKERNELS_TUNE", "off")
    assert not whole()
    monkeypatch.setenv("GPTKERNELS_TUNE", "on")
    with pytest.raises(ValueError, match=r"^GPTKERNELS_TUNE must be 'off' or 'cached', got 'on'$"):
        tuned_files.load(CPU)


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("GPTKERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(RuntimeError):
        tuned_files.path_of(CPU)
    assert not tuned_files.load(CPU).entries
    ship(tmp_path / "shipped", "a", [entry(1)])
    assert ways(tuned_files.load(CPU)).keys() == names(1)
    with pytest.raises(RuntimeError):
        tuned_files.save(CPU, [entry(2)])


def test_a_file_that_the_user_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that may be the current one, where nothing else stays behind, and where a run
    may have its own lock."""
    tuned_files.save(CPU, [entry(1)])
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GPTKERNELS_TUNED_FILE", "mine.jsonl")
    assert not whole()
    assert tuned_files.save(CPU, [entry(2)]) == Path("mine.jsonl")
    assert whole().keys() == names(2)
    assert [path.name for path in folder.iterdir()] == ["mine.jsonl"]
    with alone_in("out", folder):
        tuned_files.save(CPU, [entry(3)])
        assert {path.name for path in folder.iterdir()} == {"mine.jsonl", ".lock"}
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tuned_files.save(CPU, [entry(4)])
    assert [path.name for path in folder.iterdir()] == ["mine.jsonl"]
    monkeypatch.delenv("GPTKERNELS_TUNED_FILE")
    assert whole().keys() == names(1)


def test_a_folder_as_the_named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERNELS_TUNED_FILE", str(tmp_path))
    found, said = loaded()
    assert not found
    assert "the table cannot be read (Is a directory)" in said[0]
    with pytest.raises(IsADirectoryError, match="is a folder, a file is wanted"):
        tuned_files.save(CPU, [entry(1)])
    assert not list(tmp_path.iterdir())


def test_a_named_file_of_another_kind_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.py"
    monkeypatch.setenv("GPTKERNELS_TUNED_FILE", str(path))
    for content in ("import torch\n", '{"a": 1}', "{"):
        path.write_text(content)
        assert "it is no table of gptkernels" in loaded()[1][0]
        if content != "{":
            sentence = r"^GPTKERNELS_TUNED_FILE is \S+, which is no table of gptkernels: name anoth"
            with pytest.raises(ValueError, match=sentence):
                tuned_files.save(CPU, [entry(1)])
            assert path.read_text() == content
    tuned_files.save(CPU, [entry(1)])  # over a table that was cut to its first byte
    path.write_text(path.read_text()[:30])
    tuned_files.save(CPU, [entry(2)])
    assert whole().keys() == names(2)
    assert list(tmp_path.iterdir()) == [path]


def test_the_hash_is_of_all_that_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_files, "_PACKAGE", tmp_path)
    (tmp_path / "ops" / "gelu_mlp").mkdir(parents=True)
    (tmp_path / "core").mkdir()
    seen = set()
    for name in ("_cpu.so", "_cuda.so", "core/products.py", "ops/plan.py", "ops/gelu_mlp/cpu.py"):
        for content in ("a", "b"):
            (tmp_path / name).write_text(content)
            seen.add(tuned_files.kernels_hash.__wrapped__())
    assert len(seen) == 10
    for name in ("_cpu.so.tmp", "ops/notes.txt", "layers.py", "core/lock.py"):
        (tmp_path / name).write_text("a")
        assert tuned_files.kernels_hash.__wrapped__() in seen


def test_what_times_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    here = tuned_files.fingerprint(CPU)
    assert here["torch"] == torch.__version__
    assert here["kernels"] == tuned_files.kernels_hash()
    assert all(isinstance(value, str) for value in here.values())
    monkeypatch.setattr(cpu, "unavailable", lambda _: "there is none")
    without = tuned_files.fingerprint(CPU)
    assert without["isa"] == torch.backends.cpu.get_cpu_capability()


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    found = tuned_files.fingerprint(CUDA)
    assert (found["name"], found["isa"], found["triton"]) == ("H200", "sm90", "none")
    assert all(isinstance(value, str) for value in found.values())
