"""The emulator's twins of mbarriers, clusters, registers that warpgroups pass on, and semaphores:
each right on every schedule. Mistakes with them: test_clusters_mistakes.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cluster_cases import ARRIVAL, RING, STORES, TILE
from emulated import Machine

pytest_plugins = ["machines"]
pytestmark = pytest.mark.usefixtures("hopper")

SCHEDULES = [
    pytest.param({"SCHEDULE": order, "COPIES": copies}, id=f"{order} {copies}")
    for order in ("forward", "reverse", "1", "2", "3")
    for copies in ("late", "early")
]


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in request.param.items():
        monkeypatch.setenv(f"GPTKERNELS_EMULATE_{name}", value)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("tiles", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["pipeline", "released_by_one"])
def test_rings_of_stages(machine: Machine, name: str, tiles: int) -> None:
    a, b = torch.randn(3, tiles, TILE), torch.empty(3, tiles, TILE)
    machine(name, a=a, b=b, n=tiles, threads=96, shared=RING["shared"], grid=(3, 1, 1))
    assert b.equal(a)


@pytest.mark.usefixtures("schedule")
def test_arrivals_pass_on_what_was_written(machine: Machine) -> None:
    a, b = torch.randn(128), torch.empty(128)
    machine("arrivals", a=a, b=b, threads=128, shared=STORES["shared"])
    assert b.equal(a + 1 + 1)
    machine("waited_by_one", a=a, b=b, threads=128, shared=STORES["shared"])
    assert b.equal(a)
    for of_cluster in (0, 1):
        b.fill_(float("nan"))
        machine("waited_by_first", a=a, b=b, n=of_cluster, threads=128, shared=STORES["shared"])
        assert b.equal(a)


@pytest.mark.usefixtures("schedule")
def test_registers_change_hands(machine: Machine) -> None:
    b = torch.empty(384)
    machine("registers", b=b, threads=384)
    assert b.equal(torch.arange(3.0).repeat_interleave(128))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_ctas_of_a_cluster_read_each_other(machine: Machine, cluster: int) -> None:
    threads, ctas = 96, 8
    arguments: dict[str, Any] = {"n": cluster, "grid": (ctas, 1, 1), "cluster": cluster}
    a, b = torch.randn(ctas, threads), torch.empty(ctas, threads)
    rolled = a.view(-1, cluster, threads).roll(-1, dims=1).reshape(a.shape)
    for name in ("exchange", "split"):
        machine(name, a=a, b=b, threads=threads, shared=8 * threads, **arguments)
        assert b.equal(rolled)
    found = torch.empty(ctas, 2)
    machine("ranks", b=found, **arguments)
    assert found.tolist() == [[cta % cluster, cta] for cta in range(ctas)]


@pytest.mark.usefixtures("schedule")
def test_arrivals_at_another_cta(machine: Machine) -> None:
    a, b = torch.randn(2, 64), torch.empty(2, 64)
    for name in ("remote_arrival", "remote_arrival_by_one"):
        b.fill_(float("nan"))
        machine(name, **{**ARRIVAL, "a": a, "b": b})
        assert b[0].equal(a[0])
        assert b[1].equal(torch.full((64,), -1.0))


@pytest.mark.usefixtures("schedule")
def test_semaphores_order_ctas(machine: Machine) -> None:
    c, b = torch.zeros(2), torch.empty(5)
    machine("turns_of_ctas", b=b, c=c, grid=(5, 1, 1))
    assert b.tolist() == [0, 1, 2, 3, 4]
    assert c.view(torch.int32)[0] == 5
