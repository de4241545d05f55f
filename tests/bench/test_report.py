"""The report of a benchmark: its page, its figures and what it says in few words."""

from __future__ import annotations

import io
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptkernels.bench import report
from gptkernels.bench.report import summary, words

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image, ImageChops

from gptkernels.bench.report.looks import LIGHT, LOOKS, Look, candidates
from gptkernels.bench.report.picture import Picture
from gptkernels.bench.report.pictures import pictures

Row = dict[str, Any]
SPREAD = 0.02
OURS = ("cuda", "cpu", "triton", "torch", "auto", "torch.compile of ours")
PRODUCTS, MEMORY = 700e12, 4e12


def case(
    op: str = "attention",
    shape: str = "B1 T1024 H12 D64 causal",
    sizes: dict[str, int] | None = None,
    times: dict[str, float] | None = None,
    skipped: dict[str, str] | None = None,
    **more: Any,
) -> list[Row]:
    """The rows of one case: name -> seconds."""
    if times is None:
        times = {"pytorch": 4e-3, "cuda": 1e-3, "triton": 2e-3, "Rival": 1.5e-3}
    flops, moved = 5e11, 2e9
    head = {
        "op": op,
        "shape": shape,
        "sizes": {"B": 1, "T": 1024, "H": 12, "Hk": 12, "D": 64} if sizes is None else sizes,
        "series": "causal",
        "dtype": "bfloat16",
        "direction": "forward",
    }
    others = {name: time for name, time in times.items() if kind(name) != "ours"}
    best = min(others, key=others.__getitem__, default=None)
    rows = []
    for name, time in times.items():
        beside_plain = times["pytorch"] / time if "pytorch" in times else None
        beside_best = others[best] / time if best and kind(name) == "ours" else None
        rows.append(
            {
                **head,
                **dict(impl=name, kind=kind(name), time_s=time, low_s=0.99 * time),
                **dict(high_s=1.01 * time, min_s=0.98 * time, rounds=9, host_s=None),
                **dict(baseline_s=times.get("pytorch"), ratio=beside_plain, ratio_spread=SPREAD),
                "verdict": verdict(beside_plain),
                "best_peer": best if beside_best else None,
                **dict(peer_ratio=beside_best, peer_spread=SPREAD if beside_best else None),
                "peer_verdict": verdict(beside_best),
                **dict(bytes=moved, flops=flops, tokens_per_s=None),
                **dict(bytes_per_s=moved / time, flops_per_s=flops / time, bound="arithmetic"),
                **dict(ceiling=PRODUCTS, memory_ceiling=MEMORY, product_ceiling=PRODUCTS),
                **dict(efficiency=flops / time / PRODUCTS, error=1e-3, limit=4e-3),
                "peak_bytes": 2**20,
                **more,
            }
        )
    for name, reason in (skipped or {}).items():
        lost = {"time_s": None, "skipped": reason, "failed": "Error" in reason}
        rows.append({**head, "impl": name, "kind": kind(name), **more, **lost})
    return rows


def kind(name: str) -> str:
    return "baseline" if name == "pytorch" else "ours" if name in OURS else "peer"


def verdict(ratio: float | None) -> str | None:
    if ratio is None:
        return None
    return "same" if abs(ratio - 1) <= SPREAD else "faster" if ratio > 1 else "slower"


def content(rows: list[Row], finished: bool = True) -> dict[str, Any]:
    return {
        "environment": {
            "time": "2026-01-02T03:04:05+00:00",
            "command": "gptkernels bench --report here",
            "commit": "0123456789ab",
            "gptkernels": "1.0",
            "python": "3.11.0",
            "platform": "Linux",
            "cpu": {"name": "A CPU", "cores": 2, "load": 0.1, "instruction_set": None},
            "cpu_threads": 2,
            "versions": {"torch": "2.11", "triton": None},
            "gpu": None,
        },
        "ceilings": {
            "products": {"bfloat16": PRODUCTS},
            "memory": [[2**24, 2 * MEMORY], [2**32, MEMORY]],
        },
        "peers": [
            dict(name="Rival", package="rival", version="1.2", status="here", reason=None),
            dict(name="Other", package="other", version=None, status="broken", reason="no <lib>"),
        ],
        "finished": finished,
        "rows": rows,
    }


def everything() -> list[Row]:
    """Rows that every figure has something of, some of them losing."""
    rows = []
    for T in (1024, 4096):
        sizes = {"B": 1, "T": T, "H": 12, "Hk": 12, "D": 64}
        rows += case(shape=f"B1 T{T} H12 D64 causal", sizes=sizes)
        slow = {"pytorch": 4e-3, "cuda": 2e-3, "Rival": 1.5e-3}
        rows += case(shape=f"B1 T{T} H12 D64 causal", sizes=sizes, times=slow, direction="backward")
        rows += case("attention_decode", f"B1 T{T}", sizes | {"Tq": 1})
    for C in (768, 1024):
        rows += case("layer_norm", f"8192 x C{C}", {"rows": 8192, "C": C})
        for n in (64, 8192):
            rows += case("gelu_mlp", f"rows {n} C{C}", {"rows": n, "C": C, "F": 4 * C})
    rows += case("gpt_training", "12 layers", {"layers": 12}, tokens_per_s=5e4)
    return rows


def drawn(rows: list[Row]) -> dict[str, Picture]:
    return {picture.name: picture for picture in pictures(content(rows))}


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """What the texts of a figure say, and their boxes."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    shown = {
        label: axis.get_tightbbox(renderer)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels(which="both")
    }
    boxes = {
        text: text.get_window_extent(renderer)
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text()
    }
    return [
        (text.get_text(), box)
        for text, box in boxes.items()
        # Ticks out of view are not drawn.
        if text not in shown or box.count_overlaps([shown[text]])
    ]


def assert_texts_are_whole_and_apart(figure: Figure) -> None:
    boxes = texts(figure)
    width, height = figure.canvas.get_width_height()
    assert boxes
    for said, box in boxes:
        assert "…" not in said
        assert box.x0 >= 0, said
        assert box.y0 >= 0, said
        assert box.x1 <= width, said
        assert box.y1 <= height, said
    for (one, box), (other, beside) in itertools.combinations(boxes, 2):
        assert not box.overlaps(beside), f"{one!r} lies on {other!r}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(content(everything()), tmp_path_factory.mktemp("report") / "new" / "folder")


def test_the_page_holds_everything_it_shows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert (page.name, page.parent.name) == ("index.html", "folder")
    links = re.findall(r'(?:src|srcset|href|url)\s*[=(]\s*["\']?([^"\')]{0,40})', text)
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert text.count("<picture>") == text.count('alt="') == len(drawn(everything()))
    pngs = {file.name: file.read_bytes() for file in page.parent.glob("*.png")}
    assert len(pngs) == 2 * text.count("<picture>")
    assert {file.suffix for file in page.parent.iterdir()} == {".html", ".png"}
    for png in pngs.values():
        image = Image.open(io.BytesIO(png))
        assert image.mode == "P"
        assert image.width == 1440
        assert 150 <= image.height <= 3000


def test_a_palette_shows_the_same(page: Path) -> None:
    full, small = io.BytesIO(), page.with_name("attention_T_bfloat16_light.png")
    drawn(everything())["attention_T_bfloat16"].draw(LIGHT).savefig(full, format="png")
    one, other = (Image.open(file).convert("RGB") for file in (full, small))
    # Of 255, at the blurred edges of lines.
    assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 32
    assert small.stat().st_size < 0.4 * len(full.getvalue())


def test_what_scrolls_can_be_reached_and_columns_have_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    boxes = re.findall(r'<div class="wide"([^>]*)>', text)
    assert len(boxes) > text.count("<picture>")
    for box in boxes:
        assert re.fullmatch(r' tabindex="0" role="region" aria-label="[^"]+"', box)
    headers = re.findall(r"<th\b([^>]*)>([^<]*)", text)
    assert headers
    assert all("scope=" in attributes for attributes, _ in headers)
    assert all(name for attributes, name in headers if 'scope="col"' in attributes)
    assert ">status</th>" in text


def test_the_page_says_what_the_run_was_and_what_lost(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for said in ("A CPU", "gptkernels bench --report here", "0123456789ab", "torch 2.11"):
        assert said in text
    slower = text[text.index('id="slower"') : text.index('id="peers"')]
    assert "In 2 of 13 cases" in slower
    assert "attention B1 T4096 H12 D64 causal" in slower
    assert "0.75×" in slower
    assert "Rival" in slower
    assert "no &lt;lib&gt;" in text
    assert "did not finish" not in text


def test_an_unfinished_run_is_said(tmp_path: Path) -> None:
    page = report.write(content(case(times={"pytorch": 1.0}), finished=False), tmp_path)
    assert "This run did not finish: the page holds the 1 row that it had" in page.read_text(
        encoding="utf-8"
    )


def test_rows_without_times_or_checks(tmp_path: Path) -> None:
    rows = case(times={}, skipped={"cuda": "RuntimeError: it broke", "Rival": "not installed"})
    rows += case("layer_norm", "odd", {}, {"Rival": 1e-3}, error=None, limit=None, peak_bytes=None)
    rows += case("gelu_mlp", "odd", {}, {"cuda": 1e-3}, efficiency=None, no_efficiency="too small")
    text = report.write(content(rows), tmp_path).read_text(encoding="utf-8")
    assert "RuntimeError: it broke" in text[text.index('id="failed"') : text.index('id="peers"')]
    assert "Rival, attention: 1" in text[text.index('id="skipped"') :]
    for said in ("unchecked", "too small", "Cases that none of ours ran", "Unknown: no case"):
        assert said in text
    assert [picture.name for picture in pictures(content(rows))] == ["roofline"]


def test_no_rows(tmp_path: Path) -> None:
    page = report.write({**content([]), "ceilings": None, "peers": []}, tmp_path)
    assert "<picture>" not in page.read_text(encoding="utf-8")


def test_html_in_names_is_escaped(tmp_path: Path) -> None:
    name = "<script>alert(1)</script> & $x$"
    rows = case(
        shape=name, times={"pytorch": 2e-3, "cuda": 1e-3, name: 5e-4}, skipped={"Rival": name}
    )
    text = report.write(content(rows), tmp_path).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x$" in text


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.name)
def test_texts_are_whole_and_apart(look: Look) -> None:
    long = "a peer with a name of many words"
    times = {"pytorch": 4e-3, "cuda": 1e-3, "triton": 2e-3} | {
        f"{long} {i}": 3e-3 for i in range(7)
    }
    rows = everything()
    rows += case(shape="a shape of many words " * 8, times=times)
    for direction in ("forward", "backward", "forward+backward"):
        for T in (1024, 2048):
            sizes = {"T": T, "B": 1, "H": 16, "Hk": 16, "D": 128}
            more = {"series": "window 1024, softcap, sinks, dropout", "direction": direction}
            rows += case(shape=f"T{T} D128", sizes=sizes, times=times, **more)
    rows += case("gpt_generate", "a model of many words, 12 layers", {}, times, tokens_per_s=1e7)
    for name in ("one", "another"):
        alone = {"cuda": 1e-3}
        rows += case("gpt_generate", f"{name} of many words " * 12, {}, alone, tokens_per_s=1e7)
    shown = drawn(rows)
    names = {"memory", "models", "roofline", "peers_gelu_mlp", "peers_ops_of_few_shapes"}
    assert names <= set(shown)
    for picture in shown.values():
        assert_texts_are_whole_and_apart(picture.draw(look))


def test_many_cases_are_parted() -> None:
    rows = [row for i in range(100) for row in case(shape=f"shape {i}")]
    maps = [picture for name, picture in drawn(rows).items() if name.startswith("peers_")]
    assert [picture.name for picture in maps] == [f"peers_attention_{i}" for i in (1, 2, 3)]
    heights = [picture.draw(LIGHT).get_size_inches()[1] for picture in maps]
    assert min(heights) / 20 >= 0.25  # inches for a row, of which the last part has 20


def test_a_figure_needs_rows() -> None:
    one = drawn(case(peak_bytes=None))
    assert set(one) == {"peers_ops_of_few_shapes", "roofline"}
    assert {name for name in drawn(everything()) if "_bfloat16" in name} == {
        "attention_T_bfloat16",
        "attention_decode_T_bfloat16",
        "layer_norm_C_bfloat16",
        "gelu_mlp_rows_bfloat16",
        "gelu_mlp_C_bfloat16",
    }


def test_shapes_of_one_length_are_parted_by_what_else_they_differ_in() -> None:
    rows = []
    for heads in (2, 12):
        for T in (512, 1024):
            sizes = {"B": 1, "T": T, "H": 12, "Hk": heads, "D": 64}
            rows += case(shape=f"T{T} Hk{heads}", sizes=sizes)
    figure = drawn(rows)["attention_T_bfloat16"].draw(LIGHT)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["D64 causal Hk2 · forward", "D64 causal Hk12 · forward"]
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == (
        [[512, 1024]] * 5  # the candidates and the ceiling
    )


def test_a_line_breaks_where_its_candidate_was_not_timed() -> None:
    rows = []
    for T in (512, 1024, 2048):
        sizes = {"B": 1, "T": T, "H": 12, "Hk": 12, "D": 64}
        times = {"pytorch": 4e-3, "cuda": 1e-3} | ({} if T == 1024 else {"Rival": 2e-3})
        rows += case(shape=f"T{T}", sizes=sizes, times=times)
    (axes,) = drawn(rows)["attention_T_bfloat16"].draw(LIGHT).axes
    broken = [[math.isnan(y) for y in line.get_ydata()] for line in axes.lines]
    assert broken == [[False] * 3, [False] * 3, [False, True, False], [False] * 3]


def test_a_candidate_has_a_look_of_its_own() -> None:
    peers = [f"peer {i}" for i in range(7)]
    known = candidates(case(times=dict.fromkeys(["pytorch", *OURS, *peers], 1.0)))
    for look in LOOKS:
        lines = [candidate.line(look) for candidate in known.values()]
        assert len({(line["color"], line["marker"]) for line in lines}) == len(known)
        ours = [known[name].line(look) for name in OURS]
        for what in ("color", "marker", "linestyle"):
            assert len({line[what] for line in ours}) == len(OURS)
    assert [c.label for c in known.values()][:2] == ["plain PyTorch", "gptkernels cuda"]
    alone = candidates(case(times={"auto": 1.0}))
    assert alone["auto"] == known["auto"]


def test_bars_have_their_candidates_names_and_each_group_its_own_scale() -> None:
    rows = case("gpt_training", "small", {}, tokens_per_s=10.0, peak_bytes=None)
    rows += case("gpt_training", "large", {}, tokens_per_s=5.0, peak_bytes=None)
    figure = drawn(rows)["models"].draw(LIGHT)
    names = ("plain PyTorch", "gptkernels cuda", "gptkernels triton", "Rival")
    said = [text for text, _ in texts(figure)]
    for value in (10, 5):
        assert {f"{value}  {name}" for name in names} <= set(said)
    assert {bar.get_width() for bar in figure.axes[0].patches} == {1.0}


def test_memory_shows_where_ours_stands_worst() -> None:
    times = {"pytorch": 4.0, "cuda": 1.0, "torch": 0.5, "Fast": 1.5, "Middling": 1.7, "Small": 2.0}

    def one(shape: str, **peaks: int) -> list[Row]:
        return [row | {"peak_bytes": peaks[row["impl"]]} for row in case(shape=shape, times=times)]

    large = dict.fromkeys(times, 2**30)
    rows = [row for i in range(12) for row in one(f"large {i}", **large)]
    small = {**dict.fromkeys(times, 2**20), "cuda": 2**12, "Small": 2**11}
    rows += one("small, but twice the least", **small)
    picture = drawn(rows)["memory"]
    assert "Of 13 cases these are the 12" in picture.how
    said = [text for text, _ in texts(picture.draw(LIGHT))]
    labels = [text for text in said if text.startswith("attention")]
    assert labels[0] == "attention forward\nsmall, but twice the least bfloat16"
    assert len(labels) == 12
    assert "4 KiB  gptkernels cuda" in said
    assert "2 KiB  Small" in said
    assert not any("Middling" in text or "torch" in text.split() for text in said)


def test_the_roofline_has_the_ceiling_of_its_rows_and_names_what_it_lacks() -> None:
    rows = case(product_ceiling=2 * PRODUCTS) + case(shape="other")
    rows += case("layer_norm", flops=None) + case("gpt_training", bytes=None)
    picture = drawn(rows)["roofline"]
    assert picture.how.endswith(
        " Not in it: layer_norm: no FLOPs are counted; gpt_training: no bytes are counted."
    )
    figure = picture.draw(LIGHT)
    assert "products 1,400 TFLOP/s" in [text for text, _ in texts(figure)]
    (axes,) = figure.axes
    top = axes.get_window_extent().y1
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_window_extent().y0 >= top
    assert "Not in it" not in drawn(case())["roofline"].how


def test_the_numbers_of_a_heat_map_can_be_read() -> None:
    def luminance(colour: Any) -> float:
        parts = [
            x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)
        ]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    rows = []
    for i in range(31):
        times = {"cuda": 1.0, "Rival": 2 ** ((i - 15) / 12)}
        rows += case(shape=f"shape {i}", times=times)
    for look in LOOKS:
        (axes,) = drawn(rows)["peers_attention"].draw(look).axes
        (image,) = axes.images
        for text in axes.texts:
            x, y = text.get_position()
            cell, ink = luminance(image.get_array()[int(y)][int(x)]), luminance(text.get_color())
            assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) >= 4.5


def test_a_kernel_that_loses_is_not_hidden_behind_torch() -> None:
    times = {"triton": 2.0, "cuda": 3.0, "torch": 0.5, "torch.compile of ours": 0.4, "Rival": 1.0}
    (lost,) = summary.losing(case(times=times))
    assert (lost["impl"], lost["peer_ratio"]) == ("triton", 0.5)
    for kernel in ("cpu", "auto"):
        rows = case(times={kernel: 2.0, "torch": 1.0})
        assert [row["impl"] for row in summary.best_of_ours(rows)] == [kernel]
    alone = case(times={"torch": 2.0, "torch.compile of ours": 1.0}, skipped={"cuda": "too large"})
    assert [row["impl"] for row in summary.best_of_ours(alone)] == ["torch.compile of ours"]


def test_means_are_geometric_and_of_the_best_of_ours() -> None:
    rows = case(times={"pytorch": 4.0, "cuda": 1.0, "triton": 8.0, "Rival": 2.0})
    rows += case(shape="other", times={"pytorch": 1.0, "cuda": 2.0, "triton": 1.0, "Rival": 0.5})
    rows += case(shape="alone", times={"triton": 1.0})
    rows += case("layer_norm", times={"pytorch": 1.0})
    (mean,) = summary.geometric_means(rows)
    assert (mean.op, mean.dtype, mean.direction, mean.cases) == (
        "attention",
        "bfloat16",
        "forward",
        3,
    )
    assert mean.pytorch is not None
    assert mean.peer is not None
    assert math.isclose(mean.pytorch.mean, 2.0)
    assert (mean.pytorch.faster, mean.pytorch.same, mean.pytorch.slower) == (1, 1, 0)
    assert math.isclose(mean.peer.mean, 1.0)
    assert (mean.peer.faster, mean.peer.slower, mean.peer.cases) == (1, 1, 2)
    assert [row["impl"] for row in summary.best_of_ours(rows)] == ["cuda", "triton", "triton"]
    assert [row["shape"] for row in summary.losing(rows)] == ["other"]
    assert [len(case) for case in summary.without_ours(rows)] == [1]


def test_the_worst_loss_comes_first() -> None:
    rows = [
        row
        for shape, rival in (("a", 0.9), ("b", 0.5), ("c", 0.99), ("d", 0.7))
        for row in case(shape=shape, times={"cuda": 1.0, "Rival": rival})
    ]
    assert [row["shape"] for row in summary.losing(rows)] == ["b", "d", "a"]


def test_no_efficiency_above_one_is_printed() -> None:
    assert words.efficiency({"efficiency": 0.876}) == "88%"
    assert words.efficiency({"efficiency": 1.2}) == "above the measured ceiling"
    assert words.efficiency({"efficiency": None, "no_efficiency": "why"}) == "why"


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_what_is_missing_is_said_in_one_sentence(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for act in (report.check, lambda folder: report.write(content([]), folder)):
        with pytest.raises(
            ImportError, match=rf"^a report needs {package}: pip install 'gptkernels\[bench\]'$"
        ):
            act(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_the_summary_needs_neither_package() -> None:
    program = (
        "import sys; sys.modules |= {'matplotlib': None, 'jinja2': None}; "
        "import gptkernels.bench.report.summary"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match="must be a folder"):
            report.check(folder)
    report.check(tmp_path / "not there yet")
    assert not (tmp_path / "not there yet").exists()
