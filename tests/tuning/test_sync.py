"""All ranks of a group use one table, or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import needs_gloo, on_ranks

from gptkernels.core import plans, tuned_files
from gptkernels.core.tuned import EAGER, FORWARD, Entry, Key, Table
from gptkernels.tuning.ranks import _device_type, _differing, sync

pytestmark = needs_gloo


def test_its_public_name() -> None:
    import gptkernels

    assert gptkernels.tuning.sync is sync


def table_of(rank: int, rows: int = 8) -> Table:
    """Another one for each rank; an end of 1 and no 1.0, as nobody forbids."""
    key = Key.of(
        "layer_norm", FORWARD, EAGER, {"device": "cpu", "C": 64, "bias": True}, {"M": rows}
    )
    return Table([Entry(key, ((0.5, f"cpu:v{rank}"), (1, "torch")), ({"sizes": {"M": 8}},))])


def digest_of(table: Table) -> str:
    """Of the table as a file would give it back."""
    return Table(Entry.from_dict(entry.as_dict()) for entry in table.entries.values()).digest()


def in_use() -> str:
    table = plans.table("cpu")
    return table.digest() if table.entries else ""


def _own_tables(rank: int, world: int) -> Any:
    plans.use("cpu", table_of(rank))
    before = in_use()
    returned = sync()
    ways = [entry.way(0.2) for entry in plans.table("cpu").entries.values()]
    return before, returned, in_use(), ways


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_get_the_first_ranks_table(world: int, tmp_path: Path) -> None:
    found, said = on_ranks(world, tmp_path, _own_tables)
    before, returned, after, ways = zip(*found, strict=True)
    assert len(set(before)) == world
    assert set(returned) == set(after) == {digest_of(table_of(0))}
    assert list(ways) == [["cpu:v0"]] * world
    assert said == [[]] * world


def _from_files(rank: int, world: int) -> Any:
    os.environ["GPTKERNELS_TUNE"] = "cached"
    os.environ["GPTKERNELS_TUNED_FILE"] += f".{rank}"
    plans.use("cpu", None)
    if rank != 1:  # the second has no file at all
        tuned_files.save("cpu", table_of(rank).entries.values())
    return sync(), in_use(), sync()


def test_the_table_may_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERNELS_TUNED_FILE", str(tmp_path / "table"))
    found, said = on_ranks(2, tmp_path, _from_files)
    assert found == [(digest_of(table_of(0)),) * 3] * 2
    assert said == [[], []]


def _without(rank: int, world: int) -> Any:
    plans.use("cpu", Table() if rank == 0 else table_of(rank))
    return sync(), in_use()


def test_no_table_on_the_first_rank_is_none_anywhere(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, _without) == ([("", "")] * 2, [[], []])


def _another_machine(rank: int, world: int) -> Any:
    plans.use("cpu", table_of(rank))
    if rank == 2:
        here = tuned_files.fingerprint("cpu")
        tuned_files.fingerprint = lambda *_: here | {"isa": "v9"}  # type: ignore[assignment]
    if rank == 3:
        torch.set_num_threads(2)
    return sync(), in_use()


def test_another_fingerprint_or_number_of_threads_is_no_table_and_said_once(
    tmp_path: Path,
) -> None:
    found, said = on_ranks(4, tmp_path, _another_machine)
    isa = tuned_files.fingerprint("cpu")["isa"]
    assert found == [("", "")] * 4
    assert said == [
        [
            "gptkernels uses no tuned table on any rank: rank 2 differs in isa ('v9', where rank 0 "
            f"has {isa!r}); rank 3 differs in threads ('2', where rank 0 has '1')"
        ],
        [],
        [],
        [],
    ]


def _switched_off_on_one(rank: int, world: int) -> Any:
    plans.use("cpu", table_of(rank))
    os.environ["GPTKERNELS_TUNE"] = "off" if rank else "cached"
    return sync(), in_use()


def test_a_rank_that_wants_no_table_gets_none(tmp_path: Path) -> None:
    found, said = on_ranks(2, tmp_path, _switched_off_on_one)
    assert found == [("", "")] * 2
    assert "rank 1 differs in GPTKERNELS_TUNE ('off', where rank 0 has 'cached')" in said[0][0]
    assert said[1] == []


def _broken(rank: int, world: int) -> Any:
    os.environ["GPTKERNELS_TUNED_FILE"] = "nowhere"
    failing, where = (plans, "table"), int(os.environ["TEST_FAILING"])
    if where == 1:
        failing = (tuned_files, "fingerprint")
    if where == 2:
        failing = (Entry, "from_dict")
    plans.use("cpu", table_of(rank))
    if rank == (0 if where == 0 else 1):
        kept = getattr(*failing)

        def fail(*_: Any) -> Any:
            raise OSError("the disk\nis gone")

        setattr(*failing, fail)
        returned = sync()
        setattr(*failing, kept)
        return returned, in_use()
    return sync(), in_use()


@pytest.mark.parametrize(
    ("where", "rank"), [(0, 0), (1, 1), (2, 1)], ids=["load", "fingerprint", "install"]
)
def test_a_rank_that_fails_leaves_no_rank_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: int, rank: int
) -> None:
    monkeypatch.setenv("TEST_FAILING", str(where))
    found, said = on_ranks(2, tmp_path, _broken)
    assert found == [("", "")] * 2
    text = f"gptkernels uses no tuned table on any rank: rank {rank} failed (OSError: the disk)"
    assert said == [[text], []]


def _in_halves(rank: int, world: int) -> Any:
    plans.use("cpu", table_of(rank))
    groups = [dist.new_group([0]), dist.new_group([1, 3])]
    if rank == 3:
        torch.set_num_threads(2)
    if rank not in (1, 3):
        with pytest.raises(RuntimeError, match=rf"^sync: rank {rank} is not in the group$"):
            sync(groups[1])
        return in_use()
    first = sync(groups[1])
    torch.set_num_threads(1)
    plans.use("cpu", table_of(rank))
    return first, sync(groups[1]), in_use()


def test_a_subgroup_changes_its_own_ranks_alone(tmp_path: Path) -> None:
    """It has the table of its first rank, which is not the first of all."""
    found, said = on_ranks(4, tmp_path, _in_halves)
    own = digest_of(table_of(1))
    assert found == [table_of(0).digest(), ("", own, own), table_of(2).digest(), ("", own, own)]
    assert [len(warned) for warned in said] == [0, 1, 0, 0]
    assert said[1][0].endswith(": rank 3 differs in threads ('2', where rank 1 has '1')")


@pytest.mark.parametrize(
    ("backend", "bound", "gpu", "wanted"),
    [
        ("nccl", None, True, "cuda"),
        ("cpu:gloo,cuda:nccl", None, True, "cuda"),
        ("cpu:gloo,cuda:nccl", None, False, "cpu"),
        ("cpu:gloo,cuda:gloo", None, True, "cpu"),
        ("cpu:gloo,cuda:gloo", torch.device("cuda", 1), True, "cuda"),
    ],
)
def test_where_the_ranks_train(
    monkeypatch: pytest.MonkeyPatch, backend: str, bound: Any, gpu: bool, wanted: str
) -> None:
    class Group:
        bound_device_id = bound

    monkeypatch.setattr(dist, "get_backend_config", lambda group: backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert _device_type(Group()) == wanted  # type: ignore[arg-type]


def test_many_ranks_are_counted() -> None:
    found = [{"threads": str(int(rank > 1))} for rank in range(40)]
    said = _differing(None, found)
    assert said == (
        "ranks 2, 3, 4, 5, 6, 7, 8, 9 and 30 more differ in threads ('1', where rank 0 has '0')"
    )
    assert _differing(None, found[:4]).startswith("ranks 2 and 3 differ in threads")


def test_without_torch_distributed_it_is_one_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"^sync needs torch\.distributed: call torch\.dist"):
        sync()
