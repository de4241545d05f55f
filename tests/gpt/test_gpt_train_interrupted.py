"""Training that is killed, interrupted, or loses its disk: what is lost is what came after the last
checkpoint, and the curve is the uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import command

KILLS = 20
CLOCKED = ("seconds", "tokens_per_s", "mfu")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and fork are POSIX's")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

# Imports once and forks for every life of the run, since importing takes longer than training. The
# parent never computes, so that no thread of PyTorch's has to survive the fork.
SERVER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from gptkernels import GPTConfig
from gptkernels.gpt.training.train import resume, train
from gptkernels.gpt.training.config import TrainConfig

text, out, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = GPTConfig(vocab_size=256, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.2)
config = TrainConfig(
    steps=600, batch_size=4, warmup_steps=3, validation_interval=200, validation_batches=1,
    checkpoint_interval=7, log_interval=5, device="cpu", impl="torch", ema=0.9,
)

def live():
    if os.path.exists(os.path.join(out, "checkpoint.pt")):
        resume(out)
    else:
        train([text], out, model=model, config=config)

random.seed(int(sys.argv[4]))
killed = 0
while True:
    child = os.fork()
    if child == 0:
        live()
        os._exit(0)
    if killed < kills:
        time.sleep(random.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed += 1
        continue
    print(json.dumps({"killed": killed, "code": os.WEXITSTATUS(status)}))
    break
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It is a truth universally acknowledged, that a man in want.\n" * 60)
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def run(text: Path, out: Path, kills: int, seed: int) -> dict[str, int]:
    arguments = [str(text), str(out), str(kills), str(seed)]
    done = command(sys.executable, "-c", SERVER, *arguments, env=environment())
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def curve(out: Path) -> list[dict[str, Any]]:
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKED} for line in lines]


def test_kills_at_any_moment_change_nothing(text: Path, tmp_path: Path, seed: int) -> None:
    assert run(text, tmp_path / "whole", 0, 0) == {"killed": 0, "code": 0}
    result = run(text, tmp_path / "killed", KILLS, seed)
    assert result["code"] == 0
    assert 0 < result["killed"] <= KILLS  # fewer where the run was done before
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    for name in ("model", "model-ema"):
        files = [tmp_path / run / name / "model.safetensors" for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()}


COMMAND = [sys.executable, "-m", "gptkernels", "train"]
SMALL = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--impl", "torch"),
    *("--batch-size", "4", "--device", "cpu", "--warmup-steps", "3", "--log-interval", "5"),
    *("--validation-batches", "1", "--dropout", "0.2"),
]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_from_there(
    text: Path, tmp_path: Path, number: signal.Signals
) -> None:
    long = [text, "--out", tmp_path / "long", *SMALL, "--steps", "1000000"]
    process = start(*long)
    log = tmp_path / "long" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert out.splitlines()[-1].startswith("stopped; go on with: gptkernels train --resume --out")
    assert (tmp_path / "long" / "checkpoint.pt").exists()
    stopped_at = curve(tmp_path / "long")[-1]["step"]

    resumed = start("--resume", "--out", tmp_path / "long", "--steps", (stopped_at // 5 + 4) * 5)
    assert resumed.wait(120) == 0, resumed.communicate()
    steps = [record["step"] for record in curve(tmp_path / "long")]
    assert steps == list(range(0, steps[-1] + 1, 5))


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint(text: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    out = tmp_path / "out"
    done = start(text, "--out", out, *SMALL, "--steps", "10")
    assert done.wait(120) == 0, done.communicate()
    before = (out / "checkpoint.pt").read_bytes()
    (out / "log.jsonl").unlink()
    (out / ".log.jsonl.tmp").unlink(missing_ok=True)
    (out / "log.jsonl").symlink_to("/dev/full")
    full = start("--resume", "--out", out, "--steps", "30")
    _, error = full.communicate(timeout=120)
    assert full.returncode not in (0, -signal.SIGKILL)
    assert error.count("\n") == 1, error
    assert f"{out / 'log.jsonl'}: No space left on device" in error
    assert (out / "checkpoint.pt").read_bytes() == before
