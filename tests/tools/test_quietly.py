"""What `make` prints while it installs: one line of progress, and the log where that fails."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from harness import ROOT, command

SCRIPT = ROOT / "scripts" / "quietly.py"
NOISY = "import sys\nfor i in range(40): print('step', i)\nprint('worse', file=sys.stderr)\n"


@pytest.fixture
def quietly(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import quietly as module

    monkeypatch.setattr(module, "_REPORT", 0.1)
    return module


def test_a_log_has_all_and_the_screen_the_last_line(
    quietly: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "new" / "install.log"
    slow = NOISY + "sys.stdout.flush(); import time; time.sleep(1)"
    assert quietly.run([sys.executable, "-c", slow], log) == 0
    assert quietly.run([sys.executable, "-c", "print('again')"], log) == 0
    told = capfd.readouterr()
    assert re.search(r"^  \d+ s: (worse|step 39)$", told.out, re.M)
    assert "step 3\n" not in told.out + told.err
    assert re.fullmatch(r"  done after \d+ s", told.out.splitlines()[-1])
    kept = log.read_text().splitlines()
    assert [f"step {i}" for i in range(40)] == [line for line in kept if line.startswith("step")]
    assert {"worse", "again"} <= set(kept)


def test_a_failure_shows_the_end_of_the_log_and_keeps_the_code(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    done = command(sys.executable, SCRIPT, log, sys.executable, "-c", f"{NOISY}sys.exit(7)")
    assert done.returncode == 7
    assert re.fullmatch(r"  failed after \d+ s\n", done.stdout)
    *shown, name = done.stderr.splitlines()
    assert len(shown) == 25
    assert "step 39" in shown
    assert name == f"All of it is in {log}"


def test_a_terminal_gets_one_line_that_fits_it(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    slow = "print('x' * 300, flush=True); import time; time.sleep(1)"
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60"}
    words = [sys.executable, str(SCRIPT), str(tmp_path / "log"), sys.executable, "-c", slow]
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, env=environment):
        pass
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert text.count("\n") == 1
    turns = text.rstrip("\r\n").split("\r")[1:]
    assert "xxx" in turns[-2]
    assert turns[-1].startswith("  done after ")
    assert all(len(turn.removesuffix("\033[K")) < 60 for turn in turns)


def test_ctrl_c_ends_both(tmp_path: Path) -> None:
    waiting = "print('ready', flush=True); import time; time.sleep(60)"
    log = tmp_path / "log"
    words = [sys.executable, str(SCRIPT), str(log), sys.executable, "-c", waiting]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        while not (log.exists() and "ready\n" in log.read_text()):
            assert child.poll() is None
        os.killpg(child.pid, signal.SIGINT)
        told = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Traceback" not in told[1]
