"""`gptkernels prepare`: what it prints, what it refuses, and what a signal leaves behind."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("rensa")

from rich.console import Console

from gptkernels.gpt.corpus import progress as bars
from gptkernels.gpt.corpus.config import PrepareConfig
from gptkernels.gpt.corpus.prepare import prepare

SMALL = ["--block-size", "16", "--n-layer", "1", "--n-head", "2", "--n-embd", "16"]
SHORT = ["--batch-size", "2", "--validation-batches", "1", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    truth = "It is a truth universally acknowledged, that a single man in want of a wife {}. "
    lines = [json.dumps({"text": truth.format(i) * 3, "score": 1 + i % 4}) for i in range(12)]
    lines += ["{", '{"score": 3}', lines[-1], "[]", "3"]
    (folder / "pages.jsonl").write_text("\n".join(lines))
    (folder / "page.html").write_text("<html><body><p>" + "A page of words. " * 20 + "</p></html>")
    (folder / "empty.txt").touch()
    return folder


def refused(result: Any, *words: str) -> None:
    assert result.code == 2
    assert result.err.startswith("gptkernels: ")
    assert result.err.count("\n") == 1, result.err
    assert all(word in result.err for word in words), result.err


def test_a_folder_is_prepared_trained_on_and_left_alone(
    call: Any, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("resiliparse")
    out = tmp_path / "out"
    words = ("prepare", corpus, "--out", out, "--tokenizer", "bytes", "--processes", "2")
    result = call(*words, "--near-duplicates", "0", "--shard-tokens", "900")
    assert result.code == 0, result.err
    for line in (
        "19 records in 3 files, 13 with a score",
        "  1 left out: exact duplicate",
        "  6 left out: low score",
        f"  5 malformed, all named in {out / 'malformed.jsonl'}:",
        f"    {corpus / 'empty.txt'} holds no page",
        f"    {corpus / 'pages.jsonl'}:13 is not JSON",
        "  7 kept: 7 documents",
    ):
        assert f"{line}\n" in result.out
    assert result.out.count("pages.jsonl:") == 2  # of the malformed ones
    manifest = json.loads((out / "manifest.json").read_text())
    assert f"{manifest['counts']['tokens']:,} tokens of bytes in 2 shards\n" in result.out
    again = call(*words, "--near-duplicates", "0", "--shard-tokens", "900")
    assert again.code == 0
    assert "was finished before, and stays as it is" in again.out
    refused(call(*words), "was begun with near_duplicates 0.0, not 0.8 and shard_tokens 900, not")
    pytest.importorskip("matplotlib")
    run = call("train", out, "--out", tmp_path / "run", *SMALL, *SHORT)
    assert run.code == 0, run.err
    refused(call("train", out, "--out", tmp_path / "x", "--tokenizer", "gpt2"), "'gpt2', but")
    (out / "shard_00001.bin").unlink()
    refused(call("train", out, "--out", tmp_path / "x", *SMALL), "shard_00001.bin does not exist")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothere.txt"], "nothere.txt does not exist"),
        ([], "no file was given"),
        (["{in}", "--shard-tokens", "0"], "shard_tokens is 0"),
        (["{in}", "--near-duplicates", "3"], "near_duplicates is 3.0"),
        (["{in}", "--processes", "0"], "processes is 0"),
        (["{in}", "--tokenizer", "words"], "tokenizer name must be"),
        (
            ["{in}", "--text-key", "body", "--min-characters", "9999"],
            "nothing is left of what was read: 18 malformed, 1 too short; {in}/empty.txt holds no",
        ),
        (
            ["{in}/empty.txt"],
            "nothing is left of what was read: 1 malformed; {in}/empty.txt holds no page",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    call: Any, corpus: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    given = [word.replace("{in}", str(corpus)) for word in words]
    refused(
        call("prepare", *given, "--out", tmp_path / "out"), message.replace("{in}", str(corpus))
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the children")
def test_a_signal_ends_all_processes_and_the_same_command_goes_on(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [f"{i:x}" for i in range(3000)]
    with (tmp_path / "in.jsonl").open("w") as file:
        for _ in range(700):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=400))}) + "\n")
    out = tmp_path / "out"
    corpus = tmp_path / "in.jsonl"
    line = [sys.executable, "-m", "gptkernels", "prepare", str(corpus), "--out", str(out)]
    line += ["--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def started() -> tuple[subprocess.Popen[str], list[int]]:
        run = subprocess.Popen(
            line, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        while len(children.read_text().split()) < 3:  # one more counts shared resources
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        return run, [int(child) for child in children.read_text().split()]

    def gone(processes: list[int]) -> bool:
        ends = time.monotonic() + 60  # a busy machine takes its time over their imports
        while left := [i for i in processes if Path(f"/proc/{i}/status").exists()]:
            if time.monotonic() > ends:
                for process in left:
                    os.kill(process, signal.SIGKILL)
                return False
            time.sleep(0.02)
        return True

    run, children = started()
    time.sleep(0.5)  # in the middle of their imports, or at work
    os.killpg(run.pid, signal.SIGINT)  # as a terminal sends it, to all of them
    printed, said = run.communicate(timeout=60)
    assert (run.returncode, said) == (130, "stopped; go on with the same command\n"), printed
    assert gone(children)
    run, children = started()
    run.kill()
    run.wait()  # its pipes stay open as long as a child has them
    assert gone(children)
    assert not (out / "manifest.json").exists()
    assert (out / "state.sqlite").exists()
    whole = tmp_path / "whole"
    assert prepare([corpus], out, processes=2) == prepare([corpus], whole, processes=1)
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"documents": 1234, "tokens": 56789}
    for terminal in (True, False):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=terminal, width=120)
        with pytest.raises(ValueError, match="refused"), bars.ProgressBar(console):
            raise ValueError("refused")
        assert shown.getvalue() == ""
        with bars.ProgressBar(console) as bar:
            bar(counts, 1_000_000, 4_000_000)
            assert terminal or shown.getvalue() == ""  # not yet
            monkeypatch.setattr(bar, "_every_s", 0.0)
            bar(counts, 2_000_000, 4_000_000)
            monkeypatch.undo()
        assert "2 of 4 MB" in shown.getvalue()
        assert "1,234 documents  56,789 tokens" in shown.getvalue()


def test_every_option_of_the_config_is_offered(call: Any) -> None:
    shown = call("prepare", "--help").out
    for name in PrepareConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown
