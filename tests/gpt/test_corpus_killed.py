"""`prepare`, killed at any moment and begun again, ends with the bytes of a run that was not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from corpus_cases import contents, corpus
from harness import ROOT, command

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and fork are POSIX's")
pytest.importorskip("rensa")

# Imports once and forks for every life of a run. A life kills itself before or after one of the
# calls that change what is on the disk, counted from its beginning.
SERVER = """
import dataclasses, json, os, random, signal, sqlite3, sys
from pathlib import Path
from corpus_cases import BYTES, Inline
from gptkernels.gpt.corpus import growing, manifest, prepare as module, sources, state

folder, out, mode, chunk, seed = sys.argv[1:]
module.Pool, module._CHUNK_RECORDS, module._COMMIT_CHUNKS = Inline, int(chunk), 1
read, pieces = sources.read, sources.Reading(piece=80)  # of long texts, which go on
sources.read = lambda path, _: read(path, pieces)
CONFIG = dataclasses.replace(BYTES, shard_tokens=3000)
# A kill loses nothing that was written, synced or not; syncing takes longer than all the rest.
os.fsync, connect = lambda descriptor: None, sqlite3.connect
def unsynced(path):
    database = connect(path)
    database.execute("PRAGMA synchronous = OFF")
    return database
sqlite3.connect = unsynced
CALLS = [(growing.Growing, "append"), (growing.Growing, "sync"), (state.State, "commit"),
         (manifest, "write"), (state, "remove")]
if mode == "nothing":
    CALLS.append((Path, "unlink"))

def prepare(out):
    if mode == "nothing":  # is left
        try:
            module.prepare([folder], out, config=dataclasses.replace(CONFIG, min_score=9))
        except ValueError as error:
            assert "nothing is left of what was read: 2 malformed, 2 low score; " in str(error)
        else:
            raise AssertionError
    else:
        module.prepare([folder], out, config=CONFIG)

def live(out, fatal, calls):
    count = 0
    def event():
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    def deadly(call):
        def around(*arguments, **options):
            event()
            result = call(*arguments, **options)
            event()
            return result
        return around
    child = os.fork()
    if child == 0:
        for owner, name in calls:
            setattr(owner, name, deadly(getattr(owner, name)))
        prepare(out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)

prepare(out + "/whole")
kills = 0
if mode != "often":
    while live(f"{out}/{kills}", kills + 1, CALLS[1:]):
        live(f"{out}/{kills}", 0, CALLS)
        kills += 1
else:
    draw = random.Random(int(seed))
    while live(out + "/0", draw.randint(1, 120), CALLS):
        kills += 1
        assert kills < 500
print(json.dumps(kills))
"""


def run(tmp_path: Path, mode: str, chunk: int, seed: int = 0) -> tuple[int, list[dict[str, Any]]]:
    """The number of kills, and what each folder holds, that of the run that was not killed
    first."""
    folder, out = tmp_path / "in", tmp_path / "out"
    if mode == "nothing":
        folder.mkdir()
        line = '{"text": "a", "score": 1}\n'
        (folder / "a.jsonl").write_text(f"{{\n{line}{{\n{line}")
    else:
        corpus(folder)
    paths = [*sys.path, str(ROOT / "tests" / "gpt")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    words = (sys.executable, "-c", SERVER, folder, out, mode, str(chunk), str(seed))
    done = command(*words, env=environment)
    assert done.returncode == 0, done.stderr
    there = sorted(os.listdir(out)) if out.exists() else []
    names = ["whole", *there] if mode != "nothing" else there
    return json.loads(done.stdout), [contents(out / name) for name in names]


def test_killed_once_at_each_step_to_the_disk(tmp_path: Path) -> None:
    kills, (whole, *others) = run(tmp_path, "once", 40)
    assert kills > 30
    assert {"manifest.json", "shard_00001.idx", "malformed.jsonl"} <= whole.keys()
    assert all(other == whole for other in others)


def test_killed_while_it_takes_back_what_it_wrote(tmp_path: Path) -> None:
    kills, others = run(tmp_path, "nothing", 2)
    assert kills > 10
    # A life that is killed keeps the folder, so that the next one leaves it, but for the lock.
    assert all(other.keys() <= {".lock"} for other in others)


def test_killed_again_and_again(tmp_path: Path) -> None:
    kills, (whole, *others) = run(tmp_path, "often", 10, seed=4)
    assert kills >= 5
    assert all(other == whole for other in others)
