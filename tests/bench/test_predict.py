"""The arithmetic of predictions, and the table that docs/tuning.md has of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, needs_dry_run

from gptkernels.bench import dry_run, predict

SQUARE = dict(B=4, T=16384, Tk=16384, H=16, Hk=16, D=128, left=-1, right=-1)


def way(**members: Any) -> dict[str, Any]:
    return dict(head_width=128, tile_m=128, tile_n=176, pingpong=True) | members


@pytest.mark.parametrize(("pingpong", "published"), [(True, 661e12), (False, 570e12)])
def test_forward_comes_near_the_published_ablation(pingpong: bool, published: float) -> None:
    units, step = predict._forward_units(SQUARE, way(pingpong=pingpong))
    seconds = predict.makespan(units, 132)
    assert predict.attention_flops(SQUARE, 2) / seconds == pytest.approx(published, rel=0.03)
    assert step.bound() == "products"


def test_flops_leave_masked_pairs_out() -> None:
    full = predict.attention_flops(SQUARE, 2)
    assert full == 4 * 4 * 16 * 16384 * 16384 * 128
    causal = predict.attention_flops(SQUARE | dict(right=0), 2)
    assert causal / full == pytest.approx(0.5, rel=1e-4)
    window = predict.attention_flops(SQUARE | dict(right=0, left=1023), 2)
    assert window == 4 * 4 * 16 * 128 * (1024 * 16384 - 1023 * 1024 // 2)
    # Queries at the end of the keys: no causal mask cuts the ones before.
    late = predict.attention_flops(SQUARE | dict(T=1, right=0), 2)
    assert late == 4 * 4 * 16 * 16384 * 128


def test_visible_keys() -> None:
    sizes = SQUARE | dict(T=100, Tk=150, left=20, right=0)
    assert predict.visible(sizes, 0, 1) == (30, 51)
    assert predict.visible(sizes, 99, 100) == (129, 150)
    assert predict.visible(sizes | dict(left=-1, right=-1), 5, 6) == (0, 150)
    assert predict._steps(30, 51, 16) == 3  # 16-31, 32-47, 48-63
    assert predict._steps(5, 5, 16) == 0


def test_steps_of_backward_cover_the_same_pairs_as_forward() -> None:
    """In blocks of 1 the steps of both directions are the visible pairs."""
    sizes = dict(B=1, T=30, Tk=50, H=4, Hk=2, D=64, left=7, right=2)
    pairs = predict.attention_flops(sizes, 1) / (2 * 4 * 64)
    one = way(tile_m=1, tile_n=1, head_width=64)
    for units_of, finish in ((predict._forward_units, 1), (predict._backward_units, 2)):
        units, step = units_of(sizes, one)
        finished = len(units) * finish * predict._FINISH_S
        steps = (sum(units) - finished) / step.seconds(predict._EXPOSED[True])
        assert steps == pytest.approx(pairs * 4)


def test_makespan() -> None:
    assert predict.makespan([1.0] * 132, 132) == 1.0
    assert predict.makespan([1.0] * 133, 132) == 2.0
    assert predict.makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0  # longest first
    assert predict.makespan([1.0], 132) == 1.0


def test_what_bounds_a_step() -> None:
    step = predict._Step(products=4.0, shared=1.0, l2=2.0, other=1.0)
    assert step.seconds(0.5) == 4.5
    assert (step.seconds(0.0), step.bound()) == (4.0, "products")
    assert predict._Step(products=1.0, shared=1.0, l2=9.0, other=1.0).seconds(0.5) == 9.0
    assert predict._Step(products=1.0, shared=1.0, l2=2.0, other=4.0).seconds(0.5) == 4.5


def launched(tiles: int, cluster: int, **members: Any) -> dry_run.Launched:
    built = dict(
        name="x", head_width=0, tile_m=128, tile_n=256, tile_k=64, stages=4, consumers=2,
        cluster=cluster, pingpong=False, threads=384, shared_bytes=220_000,
    )  # fmt: skip
    return dry_run.Launched(
        "gelu_mlp product, forward", "(8192, 4096) times (4096, 16384) bf16", (132, 1, 1), 384,
        cluster, 220_000, tiles, built | members,
    )  # fmt: skip


def product_clocks(problem: dry_run.Problem, direction: int, number: int, build: int) -> float:
    """That a launcher predicts for one of a problem's products."""
    made = problem.directions[direction].dry_run(predict.MACHINE, build)
    launched = predict.product(number, made.launches)
    assert launched.clocks > 0
    return launched.clocks


def test_sizes_of_a_product() -> None:
    assert predict._product_sizes(launched(64 * 64, 2)) == (8192, 4096, 16384)


@needs_dry_run
def test_products() -> None:
    large = dry_run.gelu_mlp(8192, 4096, 16384, torch.bfloat16)
    cooperative, pingpong = 0, 1
    gelu = product_clocks(large, 0, 0, cooperative)
    seconds = gelu / predict._CLOCKS_OF_PRODUCTS
    # 31.03 waves take the time of 32, and the epilogue is not hidden.
    flops = 2.0 * 8192 * 4096 * 16384
    assert seconds > flops / predict.PRODUCT_RATE * 32 / (64 * 64 / 132)
    # Backward the same product has the slope of GELU too; in ping-pong it is hidden.
    assert gelu < product_clocks(large, 1, 0, cooperative)
    assert product_clocks(large, 0, 0, pingpong) < gelu
    assert product_clocks(large, 1, 0, pingpong) < 1.01 * product_clocks(large, 0, 0, pingpong)
    # One more tile is one more wave.
    one_wave, more = (dry_run.gelu_mlp(rows, 4096, 256, torch.bfloat16) for rows in (1024, 33_792))
    waves = product_clocks(more, 0, 0, cooperative) / product_clocks(one_wave, 0, 0, cooperative)
    assert waves > 1.5


@needs_dry_run
def test_the_rule_takes_the_product_with_the_fewest_clocks() -> None:
    large = dry_run.gelu_mlp(8192, 4096, 16384, torch.bfloat16)
    for direction in range(2):
        rule = large.directions[direction].dry_run(predict.MACHINE)
        for number, chosen in enumerate(predict.products(rule.launches)):
            clocks = [product_clocks(large, direction, number, build) for build in range(3)]
            assert chosen.clocks == min(clocks)


@needs_dry_run
def test_every_problem_is_predicted() -> None:
    rows = list(predict.predictions())
    for problem in predict.PROBLEMS:
        for direction in ("forward", "backward"):
            mine = [
                row
                for row in rows
                if row.problem == problem.text and row.direction.startswith(direction)
            ]
            assert mine
            # One way of each product is the launcher's own.
            products = {row.direction for row in mine}
            for product in products:
                assert sum(row.chosen for row in mine if row.direction == product) == 1
    for row in rows:
        assert 0 < row.seconds < 1
        assert 0 < row.share < 1, row
    lines = list(predict.table(rows))
    assert len(lines) == len(rows) + 2
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


@needs_dry_run
def test_the_documents_have_this_table() -> None:
    """Else: python -m gptkernels.bench.predict --write docs/tuning.md."""
    text = (ROOT / "docs" / "tuning.md").read_text()
    assert predict.written(text, predict.summary(predict.predictions())) == text


def test_builds_that_cannot_or_are_for_wider_heads_are_left_out() -> None:
    def run(machine: dry_run.Machine, build: int = -1) -> dry_run.DryRun:
        if build == 1:
            raise ValueError("not this one")
        return dry_run.DryRun([launched(100, {-1: 1, 0: 2, 2: 1, 3: 4}[build])], [])

    class Direction(dry_run.Direction):
        def builds(self) -> list[dict[str, Any]]:
            return [{"head_width": width} for width in (64, 64, 64, 128)]

    direction = Direction("forward", lambda: None, None)
    object.__setattr__(direction, "dry_run", run)

    def found(arch: str) -> list[tuple[int, bool]]:
        ways = direction.ways(dry_run.MACHINES[arch], predict.main_launch)
        return [(index, chosen) for index, _, chosen in ways]

    assert found("sm90") == [(0, False), (2, True)]
    assert found("sm80") == []


def test_tables_are_written_between_marks(tmp_path: Path) -> None:
    text = f"before\n{predict.BEGIN}\nold\n{predict.END}\nafter\n"
    assert predict.written(text, ["| a |", "| b |"]) == (
        f"before\n{predict.BEGIN}\n| a |\n| b |\n{predict.END}\nafter\n"
    )
    with pytest.raises(ValueError, match="no place for the table"):
        predict.written("nothing", [])


@needs_dry_run
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    few = (dry_run.layer_norm(64, 512, torch.bfloat16),)
    monkeypatch.setattr(predict, "predictions", lambda: _real(few))
    assert predict.main([]) == 0
    assert "| layer_norm 64 rows of 512 | forward | any GPU * |" in capsys.readouterr().out
    path = tmp_path / "tuning.md"
    path.write_text(f"{predict.BEGIN}\n{predict.END}\n")
    assert predict.main(["--write", str(path)]) == 0
    written = path.read_text()
    assert written.count("| layer_norm 64 rows of 512: ") == 2
    assert written.count("| any GPU |") == 2
    path.write_text("")
    assert predict.main(["--write", str(path)]) == 2
    assert "no place for the table" in capsys.readouterr().err


_real = predict.predictions
