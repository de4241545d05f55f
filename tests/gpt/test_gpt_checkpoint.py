"""Checkpoints: a save that fails leaves the old one, and what is no checkpoint is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gptkernels.gpt.training import checkpoint
from gptkernels.gpt.training.train import TrainResult, resume


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_failure_in_the_middle_of_a_save_leaves_the_old_checkpoint(
    finished: tuple[Path, TrainResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    out, _ = finished
    path = tmp_path / "checkpoint.pt"
    content = checkpoint.load(out / "checkpoint.pt")
    checkpoint.save(path, content)
    before = path.read_bytes()

    def disk_full(*args: Any, **kwargs: Any) -> None:
        if failing == "write":
            args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    target = {"write": (torch, "save"), "fsync": (os, "fsync"), "rename": (os, "replace")}[failing]
    monkeypatch.setattr(*target, disk_full)
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint\.pt"):
        checkpoint.save(path, {**content, "step": 99})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_file_that_cannot_grow_is_told_as_the_system_tells_it(tmp_path: Path) -> None:
    """PyTorch itself raises a RuntimeError of its own then."""
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    path = tmp_path / "checkpoint.pt"
    content = {key: kind() for key, kind in checkpoint.KEYS.items()}
    checkpoint.save(path, content)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*checkpoint\.pt"):
            checkpoint.save(path, {**content, "model": {"weight": torch.zeros(1 << 18)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("obstacle", ["folder", "read-only"])
def test_a_folder_that_refuses_writes_keeps_the_checkpoint(
    finished: tuple[Path, TrainResult], tmp_path: Path, obstacle: str
) -> None:
    if obstacle == "read-only" and os.geteuid() == 0:
        pytest.skip("root may write into a read-only folder")
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = (run / "checkpoint.pt").read_bytes()
    if obstacle == "folder":  # where the temporary file should go
        (run / ".checkpoint.pt.tmp").mkdir()
    else:
        run.chmod(0o555)
    with pytest.raises(OSError, match=r"directory.*checkpoint\.pt|denied.*\.lock"):
        resume(run, steps=18)
    run.chmod(0o755)
    assert (run / "checkpoint.pt").read_bytes() == before


def test_truncated_and_foreign_checkpoints_are_refused_in_one_sentence(
    finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    out, _ = finished
    whole = (out / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.load(path)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
            resume(tmp_path)
    path.write_bytes(b"GIF89a" + bytes(500))
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        resume(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is a Git LFS pointer"):
        resume(tmp_path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="not a training checkpoint of this package"):
        resume(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "version": 1}, path)
    with pytest.raises(ValueError, match="has version 1, this package reads version 2"):
        resume(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "version": 2, "model": {}}, path)
    with pytest.raises(ValueError, match="lacks optimizer, step"):
        resume(tmp_path)


def test_a_damaged_or_contradictory_checkpoint_is_refused(
    finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    out, _ = finished
    path = tmp_path / "checkpoint.pt"
    damaged = bytearray((out / "checkpoint.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF  # in the middle of a tensor
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        resume(tmp_path)


@pytest.mark.parametrize("untied", [False, True])
def test_a_head_of_its_own_stays_one(
    finished: tuple[Path, TrainResult], tmp_path: Path, untied: bool
) -> None:
    content = checkpoint.load(finished[0] / "checkpoint.pt")
    if untied:
        content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    checkpoint.save(tmp_path / "a.pt", content)
    model = checkpoint.model("a.pt", checkpoint.load(tmp_path / "a.pt"))
    assert (model.lm_head.weight is not model.transformer.wte.weight) == untied
    assert torch.equal(model.lm_head.weight, content["model"]["lm_head.weight"])


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model_config", "n_embd"), 64),
        (("model_config", "n_layer"), 3),
        (("model_config", "n_head"), 5),
        (("model_config", "colour"), "red"),
        (("model_config",), {}),
        (("model_config",), None),
        (("train_config",), {}),
        (("train_config", "steps"), "many"),
        (("train_config", "colour"), "red"),
        (("model",), {}),
        (("model", "lm_head.weight"), 3),
        (("model", 3), torch.zeros(1)),
        (("optimizer",), {}),
        (("optimizer", "state"), {}),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
        (("optimizer", "state", 0, "step"), None),
        (("sampler",), {}),
        (("sampler", "generator"), torch.zeros(16, dtype=torch.uint8)),
        (("sampler", "generator"), torch.zeros(5056, dtype=torch.uint8)),
        (("random",), {}),
        (("random", "cpu"), torch.zeros(3)),
        (("step",), "x"),
        (("tokens",), None),
        (("files",), [3]),
        (("text",), 3),
    ],
)
def test_a_foreign_or_contradictory_checkpoint_is_refused_in_one_sentence(
    finished: tuple[Path, TrainResult], tmp_path: Path, keys: tuple[Any, ...], value: Any
) -> None:
    path = tmp_path / "checkpoint.pt"
    content = checkpoint.load(finished[0] / "checkpoint.pt")
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    checkpoint.save(path, content)
    with pytest.raises(
        ValueError, match=rf"^checkpoint: {path} .*{keys[0].split('_')[0]}"
    ) as refused:
        resume(tmp_path, steps=14)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        resume(tmp_path)
    assert not (tmp_path / "ran").exists()
