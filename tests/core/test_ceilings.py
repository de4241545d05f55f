"""Rates that are measured once and kept. No test here depends on how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptkernels.core import ceilings, machine

CPU = torch.device("cpu")
# A cache whose copies are fast, a slow memory; a sum is faster than a copy in one set.
MEMORY = [
    ("memory 1000 copy", 100.0),
    ("memory 1000 read", 90.0),
    ("memory 4000 copy", 300.0),
    ("memory 16000 copy", 50.0),
    ("memory 16000 read", 60.0),
]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a process that knows nothing; passes are made up."""
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ceilings, "_KEPT", {})
    monkeypatch.setattr(ceilings, "_memory_pass", lambda device: iter(MEMORY))
    monkeypatch.setattr(ceilings, "_product_pass", lambda device, dtype: products(dtype, 1.0))
    return tmp_path / "cache" / "ceilings.json"


def products(dtype: torch.dtype, factor: float) -> Iterator[tuple[str, float]]:
    rate = {torch.float32: 10.0, torch.bfloat16: 40.0, torch.float16: 5.0}[dtype] * factor
    name = str(dtype).removeprefix("torch.")
    yield from ((f"products {name} 512", rate), (f"products {name} 1024", 2 * rate))


@pytest.mark.parametrize(
    ("working_set", "rate"),
    # The best set which is not smaller, or the next smaller one.
    [(0, 300.0), (1000, 300.0), (3999, 300.0), (4000, 300.0), (15999, 300.0), (16000, 60.0),
     (10**9, 60.0)],
)  # fmt: skip
def test_memory_by_working_set(working_set: int, rate: float) -> None:
    assert ceilings.memory_rate(CPU, working_set) == rate


def test_products_in_the_dtype_or_in_fp32() -> None:
    assert ceilings.product_rate(CPU, torch.bfloat16) == 80.0
    assert ceilings.product_rate(CPU, torch.float16) == 20.0  # fp32's: a kernel may compute in it
    assert ceilings.known(CPU)["products"] == {"bfloat16": 80.0, "float32": 20.0, "float16": 10.0}


def test_the_best_counts_and_is_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = iter([1.0, 3.0, 2.0] * 2)
    monkeypatch.setattr(
        ceilings, "_product_pass", lambda device, dtype: products(dtype, next(factors))
    )
    ceilings.measure(CPU, [torch.float32])
    assert ceilings.product_rate(CPU, torch.float32) == 60.0
    # Another process finds it, and measures only when it is told to.
    monkeypatch.setattr(ceilings, "_KEPT", {})
    monkeypatch.setattr(ceilings, "_product_pass", lambda device, dtype: products(dtype, 0.1))
    assert ceilings.product_rate(CPU, torch.float32) == 60.0
    ceilings.measure(CPU, [])
    assert ceilings.product_rate(CPU, torch.float32) == 60.0
    (rates,) = json.loads(fresh.read_text()).values()
    assert rates["products float32 1024"] == 60.0


def test_machines_do_not_share_rates(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings.measure(CPU, [])
    monkeypatch.setattr(ceilings, "fingerprint", lambda device: "another")
    monkeypatch.setattr(ceilings, "_product_pass", lambda device, dtype: products(dtype, 0.5))
    assert ceilings.product_rate(CPU, torch.float32) == 10.0
    assert len(json.loads(fresh.read_text())) == 2


def test_what_another_process_measured_meanwhile_stays(fresh: Path) -> None:
    ceilings.measure(CPU, [])
    content = json.loads(fresh.read_text())
    (rates,) = content.values()
    rates["products float32 1024"] = 1000.0
    fresh.write_text(json.dumps({**content, "elsewhere": {"memory 1 copy": 1.0}}))
    ceilings.measure(CPU, [])
    assert ceilings.product_rate(CPU, torch.float32) == 1000.0
    assert "elsewhere" in json.loads(fresh.read_text())


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", '{"a": 3}', '{"a": {"b": 1}}', '{"a": {"b c d": "x"}}']
)
def test_a_damaged_file_is_measured_again(fresh: Path, damaged: str) -> None:
    fresh.parent.mkdir()
    fresh.write_text(damaged)
    assert ceilings.product_rate(CPU, torch.float32) == 20.0
    assert machine.fingerprint(CPU) in json.loads(fresh.read_text())


def test_without_a_file_a_process_has_its_own_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "file" / "cache"))
    assert ceilings.product_rate(CPU, torch.float32) == 20.0
    assert ceilings.memory_rate(CPU, 16000) == 60.0


def test_without_a_home_a_process_has_its_own_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has none."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(ceilings, "cache_folder", no_home)
    assert ceilings.product_rate(CPU, torch.float32) == 20.0


def test_slow_products_end_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(ceilings, "_fastest", lambda call, device: 1.0)
    assert len(dict(ceilings._product_pass(CPU, torch.float32))) == 1


def test_no_rates_on_other_devices() -> None:
    assert ceilings.product_rate(torch.device("meta"), torch.float32) is None
    assert ceilings.memory_rate(torch.device("meta"), 1) is None


def test_no_memory_is_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(device: torch.device) -> Iterator[tuple[str, float]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ceilings, "_memory_pass", none_left)
    assert ceilings.memory_rate(CPU, 1) is None


def test_a_real_pass_draws_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(ceilings, "_PASS_S", 0.0)
    monkeypatch.setattr(ceilings, "_CPU_SETS", (1 << 12, 1 << 16))
    monkeypatch.setattr(ceilings, "_CPU_SIZES", (8,))
    before = torch.get_rng_state()
    rates = dict(ceilings.one_pass(CPU, [torch.float32, torch.bfloat16]))
    assert torch.equal(before, torch.get_rng_state())
    assert set(rates) == {
        *(f"memory {size} {how}" for size in (4096, 65536) for how in ("copy", "read")),
        "products float32 8",
        "products bfloat16 8",
    }
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"GPTKERNELS_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"GPTKERNELS_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/gptkernels"),
        ({"GPTKERNELS_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/gptkernels"),
    ],
)
def test_the_cache_folder(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine.cache_folder() == Path(folder)
