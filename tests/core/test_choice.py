"""Which implementation runs. An explicit one runs, or one sentence says why it cannot."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import command, emulated, needs_cuda

from gptkernels import layer_norm
from gptkernels.core import choice, cpu, native

CPU, GPU = "cpu", "cuda"


@pytest.fixture(autouse=True)
def _fresh_answers() -> Any:
    answers = (native._native_unavailable, native._emulator_unavailable, native._emulator)
    for answer in answers:
        answer.cache_clear()
    yield
    for answer in answers:
        answer.cache_clear()


def test_torch_runs_anywhere() -> None:
    assert choice.choose("torch", torch.zeros(1)) == "torch"


def test_auto_takes_the_cpu_kernels_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def picked(device: str = CPU) -> str:
        return choice.choose("auto", torch.zeros(1, device=device))

    monkeypatch.setattr(cpu, "_unavailable", lambda: None)
    monkeypatch.setattr(cpu, "instruction_set", lambda: "v3")
    assert picked() == "cpu"
    assert picked("meta") == "torch"
    monkeypatch.setattr(cpu, "instruction_set", lambda: "baseline")
    assert picked() == "torch"  # not measured to be faster
    monkeypatch.setattr(cpu, "_unavailable", lambda: "there is no compiler")
    monkeypatch.setattr(cpu, "instruction_set", lambda: int("none"))
    assert picked() == "torch"


def test_the_kill_switch_is_read_when_a_plan_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it may be set from Python, too."""
    assert not choice.switched_off()
    monkeypatch.setenv("GPTKERNELS_IMPL", "torch")
    assert choice.switched_off()


def test_the_kill_switch_makes_auto_take_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that is named runs all the same."""
    monkeypatch.setenv("GPTKERNELS_IMPL", "torch")
    monkeypatch.setattr(cpu, "_unavailable", lambda: None)
    monkeypatch.setattr(cpu, "instruction_set", lambda: "v3")
    assert choice.automatic(CPU) == choice.choose("auto", torch.zeros(1)) == "torch"
    assert choice.choose("cpu", torch.zeros(1)) == "cpu"
    monkeypatch.setenv("GPTKERNELS_IMPL", "cuda")
    with pytest.raises(ValueError, match="GPTKERNELS_IMPL is 'cuda', but it can only be 'torch'"):
        choice.automatic(CPU)


def test_the_kill_switch_is_read_from_the_environment() -> None:
    code = "import gptkernels.core.choice as c; print(c.automatic('cpu'))"
    done = command(sys.executable, "-c", code, env={**os.environ, "GPTKERNELS_IMPL": "torch"})
    assert (done.returncode, done.stdout) == (0, "torch\n"), done.stderr


def test_cpu_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"^impl='cpu': it runs on CPU tensors, this one is o"):
        choice.choose("cpu", torch.zeros(1, device="meta"))
    monkeypatch.setattr(cpu, "_unavailable", lambda: "there is none")
    with pytest.raises(RuntimeError, match=r"^impl='cpu': there is none$"):
        choice.choose("cpu", torch.zeros(1))


@pytest.mark.parametrize(
    ("emulated", "device", "sentence"),
    [
        (False, CPU, "runs on CUDA tensors .this one is on cpu., or on CPU tensors under GPTK"),
        (
            False,
            GPU,
            "built without CUDA kernels, .*; with nvcc 12.8 .*: GPTKERNELS_BUILD_CUDA=1 pip",
        ),
        (True, GPU, "GPTKERNELS_EMULATE=1 runs it on CPU tensors, this one is on cuda"),
        (True, CPU, "the emulator is not built here; `make emulator` builds it"),
    ],
)
def test_cuda_says_why_it_cannot_run(
    emulated: bool, device: str, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(native, "EMULATED", emulated)
    monkeypatch.setattr(native, "_EMULATOR", tmp_path / "absent.so")
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda _name: None)
    tensor: Any = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"^impl='cuda': .*{sentence}") as caught:
        choice.choose("cuda", tensor)
    assert "\n" not in str(caught.value)


def test_cuda_needs_compute_capability_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "EMULATED", False)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = {0: (7, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    reason = choice.unavailable("cuda", GPU, torch.float16)
    assert reason is not None
    assert reason.endswith("a GPU of compute capability 8.0 or later, and there is 7.5")
    capabilities[1] = (8, 0)
    module = SimpleNamespace(capability=lambda device: 80)
    monkeypatch.setattr(native, "_native", lambda: module)
    native._native_unavailable.cache_clear()
    assert choice.unavailable("cuda", GPU, torch.float16) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    native._native_unavailable.cache_clear()
    reason = choice.unavailable("cuda", GPU, torch.float16)
    assert reason is not None
    assert reason.endswith("and there is none")


def test_cuda_says_that_the_driver_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def capability(device: int) -> int:
        raise RuntimeError("the NVIDIA driver is made for CUDA 12.4")

    monkeypatch.setattr(native, "EMULATED", False)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(native, "_native", lambda: SimpleNamespace(capability=capability))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = choice.unavailable("cuda", GPU, torch.float16)
    assert reason == "the NVIDIA driver is made for CUDA 12.4"


def test_a_module_that_is_not_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(native, "EMULATED", True)
    monkeypatch.setattr(native, "_EMULATOR", tmp_path / "absent.so")
    with pytest.raises(ImportError, match="make emulator"):
        native.module()


@needs_cuda
@emulated
def test_threads_emulate_one_at_a_time() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads switch often, also between declaring and launching
    failures: list[Exception] = []

    def work(rows: int) -> None:
        try:
            for _ in range(100):
                layer_norm(torch.randn(rows, 8), torch.ones(8), impl="cuda")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 3, 4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
