"""Other packages' functions in impl="auto", played by fakes."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import BF16, FP16, FP32
from torch import Tensor

import gptkernels
from gptkernels.core import externals, plans
from gptkernels.core.tuned import PYTORCH, Entry, Table
from gptkernels.ops.attention import external as attention_external
from gptkernels.ops.attention import whole as attention_whole
from gptkernels.ops.layer_norm import external as layer_norm_external
from gptkernels.ops.layer_norm import whole as layer_norm_whole
from gptkernels.truth import baseline, reference
from gptkernels.truth.parity import assert_parity

TOPS = ("flash_attn", "flash_attn_interface", "cutlass", "liger_kernel")
FLASHES = {
    "flash_attn2": "flash_attn.flash_attn_interface",
    "flash_attn3": "flash_attn_interface",
    "flash_attn4": "flash_attn.cute",
}
# As the packages have it, on a CPU: the parameters of a release, and what it returns.
FLASH = """
from gptkernels.truth import baseline
calls = []
def flash_attn_func(q, k, v, {parameters}):
    given = dict(window_size=window_size, softcap=softcap, alibi_slopes={slopes})
    calls.append(given)
    left, right = (-1 if n is None else n for n in window_size)
    out = baseline.attention(
        q, k, v, causal=causal, softmax_scale=softmax_scale, softcap=softcap,
        window=None if left == right == -1 else (left, right), alibi_slopes={slopes},
    )
    return {returned}
"""
SCALE = "softmax_scale=None, causal=False"
LIGER = """
import torch
class LigerLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            y = torch.nn.functional.layer_norm(leaves[0], dy.shape[-1:], *leaves[1:], ctx.eps)
        return *torch.autograd.grad(y, leaves, dy), None
"""


class Packages:
    """A folder of packages that stands first on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, module: str, text: str = "") -> None:
        *parents, name = module.split(".")
        folder = self.folder
        for parent in parents:
            folder = folder / parent
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        file = folder / name / "__init__.py" if (folder / name).is_dir() else folder / f"{name}.py"
        file.write_text(text)
        importlib.invalidate_caches()
        forget()

    def flashes(self) -> None:
        """All three."""
        old = f"dropout_p=0.0, {SCALE}, window_size=(-1, -1), softcap=0.0"
        two = FLASH.format(
            parameters=f"{old}, alibi_slopes=None", slopes="alibi_slopes", returned="out"
        )
        three = FLASH.format(
            parameters=f"{SCALE}, window_size=(-1, -1), softcap=0.0", slopes=None, returned="out"
        )
        four = FLASH.format(
            parameters=f"{SCALE}, window_size=(None, None), softcap=0.0",
            slopes=None,
            returned="(out, None)",
        )
        self.add("flash_attn.cute.interface")
        for name, text in zip(FLASHES, (two, three, four), strict=True):
            self.add(FLASHES[name], text)
        self.add("cutlass")


def forget() -> None:
    externals.missing.cache_clear()
    externals.load.cache_clear()


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    """No package that is installed is seen, unless it is added here."""
    for name in [name for name in sys.modules if name.partition(".")[0] in TOPS]:
        monkeypatch.delitem(sys.modules, name)
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        spec = real(name, package)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        here = any(place and str(place).startswith(str(tmp_path)) for place in places)
        return spec if here or name not in TOPS else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield Packages(tmp_path)
    forget()
    for name in [name for name in sys.modules if name.partition(".")[0] in TOPS]:
        del sys.modules[name]


def draw(*sizes: int, dtype: torch.dtype = FP16) -> Tensor:
    return torch.randn(sizes).to(dtype)


def heads(Tq: int = 24, Tk: int = 24, D: int = 16) -> dict[str, Any]:
    return {"q": draw(2, Tq, 4, D), "k": draw(2, Tk, 2, D), "v": draw(2, Tk, 2, D)}


def facts_of(op: str, *arguments: Any, **options: Any) -> dict[str, Any]:
    """The facts of a call's class, of a GPU."""
    with plans.recording() as calls:
        getattr(gptkernels, op)(*arguments, **options)
    return dict(calls[-1].facts) | {"device": "cuda"}


def names_of(ways: list[str]) -> set[str]:
    return {way.removeprefix("external:") for way in ways if way != PYTORCH}


# ---- which are offered


PLAIN: dict[str, Any] = {}
ALL = {"flash_attn2", "flash_attn3", "flash_attn4"}


@pytest.mark.parametrize(
    ("options", "offered"),
    [
        (PLAIN, ALL),
        ({"causal": False}, ALL),
        ({"window": (7, 0)}, ALL),
        ({"softcap": 2.0}, ALL),
        ({"alibi_slopes": (0.5, 0.25, 0.1, 0.05)}, {"flash_attn2"}),
        ({"dropout_p": 0.1}, set()),
        ({"deterministic": True}, set()),
        ({"return_lse": True}, set()),
        ({"key_lengths": torch.tensor([24, 9], dtype=torch.int32)}, set()),
        ({"attn_mask": torch.ones(24, 24, dtype=torch.bool)}, set()),
    ],
)
def test_flash_attention_is_offered_for_what_it_has(
    options: dict[str, Any], offered: set[str], fakes: Packages
) -> None:
    fakes.flashes()
    facts = facts_of("attention", *heads().values(), **options)
    assert names_of(attention_whole.takes(facts)) == offered
    assert names_of(attention_whole.takes(facts | {"device": "cpu"})) == set()
    assert names_of(attention_whole.takes(facts | {"dtype": "float32"})) == set()
    assert names_of(attention_whole.takes(facts | {"converted": True})) == set()
    assert names_of(attention_whole.takes(facts | {"D": 20})) == set()
    assert names_of(attention_whole.takes(facts | {"D": 192})) == offered - {"flash_attn4"}


def test_pytorch_is_offered_as_before(fakes: Packages) -> None:
    fakes.flashes()
    for options, own in ((PLAIN, True), ({"window": (7, 0)}, False), ({"softcap": 2.0}, False)):
        ways = attention_whole.takes(facts_of("attention", *heads().values(), **options))
        assert (PYTORCH in ways) == own
    # SDPA aligns the causal mask at the first key; FlashAttention as ours does.
    ways = attention_whole.takes(facts_of("attention", *heads(Tq=9).values()))
    assert (PYTORCH in ways, names_of(ways)) == (False, ALL)


def test_what_is_not_installed_is_not_offered(fakes: Packages) -> None:
    facts = facts_of("attention", *heads().values())
    assert attention_whole.takes(facts) == [PYTORCH]
    assert externals.missing("flash_attn3") == "flash_attn_interface is not installed"
    assert externals.missing("other") == "there is no external 'other'"
    fakes.add("flash_attn_interface", "raise OSError('libcudart.so.12 is missing\\nmore')")
    # It is not imported for that; where it is tried, it is refused.
    assert attention_whole.takes(facts) == [PYTORCH, "external:flash_attn3"]
    assert externals.missing("flash_attn3") == (
        "flash_attn_interface is installed but does not import: OSError: libcudart.so.12 is missing"
    )


def test_flash_attention_4_alone_is_no_flash_attention_2(fakes: Packages) -> None:
    fakes.add("flash_attn.cute.interface")
    fakes.add("flash_attn.cute", "def flash_attn_func(): pass")
    assert externals.missing("flash_attn2") == "flash_attn.flash_attn_interface is not installed"
    assert externals.missing("flash_attn4") == "flash_attn.cute is not installed"  # without the DSL
    fakes.add("cutlass")
    assert externals.missing("flash_attn4") is None
    facts = facts_of("attention", *heads().values())
    assert names_of(attention_whole.takes(facts)) == {"flash_attn4"}


@pytest.mark.parametrize(
    ("given", "options", "offered"),
    [
        ({}, {}, True),
        ({"residual": draw(6, 24, dtype=BF16)}, {"prenorm": True}, True),
        ({}, {"residual_in_fp32": True}, False),
        ({"residual": draw(6, 24, dtype=FP32)}, {}, False),
        ({"weight": draw(24, dtype=FP32), "bias": draw(24, dtype=FP32)}, {}, False),
        ({"bias": None}, {}, False),
        ({"weight": None}, {}, False),
        ({}, {"dropout_p": 0.1}, False),
    ],
)
def test_liger_is_offered_for_what_it_has(
    given: dict[str, Any], options: dict[str, Any], offered: bool, fakes: Packages
) -> None:
    tensors: dict[str, Any] = {"x": draw(6, 24, dtype=BF16), "weight": draw(24, dtype=BF16)}
    tensors |= {"bias": draw(24, dtype=BF16)}
    facts = facts_of("layer_norm", **tensors | given, **options)
    assert names_of(layer_norm_whole.takes(facts)) == set()
    fakes.add("liger_kernel.ops.layer_norm", LIGER)
    assert names_of(layer_norm_whole.takes(facts)) == ({"liger"} if offered else set())
    assert names_of(layer_norm_whole.takes(facts | {"device": "cpu"})) == set()


# ---- what they compute


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that makes a way the winner of a call's class. Tensors on the CPU count as those
    of a GPU."""
    for module in (attention_external, layer_norm_external):
        takes = module.takes

        def on_gpu(facts: Any, takes: Any = takes) -> list[str]:
            return takes({**facts, "device": "cuda"})

        monkeypatch.setattr(module, "takes", on_gpu)

    def win(way: str, op: str, *arguments: Any, **options: Any) -> None:
        with plans.recording() as calls:
            getattr(gptkernels, op)(*arguments, **options)
        plans.use("cpu", Table([Entry(call.key, ((1.0, way),)) for call in calls]))

    yield win
    plans.use("cpu", None)


@pytest.mark.parametrize("name", FLASHES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "softmax_scale": 0.3},
        {"window": (7, 0)},
        {"window": (7, 3)},
        {"window": [7, -1], "causal": False},
        {"window": (-1, 5), "causal": False, "softcap": 2.0},
        {"alibi_slopes": [0.5, 0.25, 0.1, 0.05]},
        {"alibi_slopes": (0.5, 0.25, 0.1, 0.05)},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05], dtype=FP16)},
    ],
    ids=str,
)
def test_a_call_of_auto_runs_by_flash_attention(
    name: str, options: dict[str, Any], fakes: Packages, table: Any
) -> None:
    fakes.flashes()
    if "alibi_slopes" in options and name != "flash_attn2":
        pytest.skip("it takes no ALiBi slopes")
    tensors = heads(Tq=17)
    leaves = {key: x.clone().requires_grad_() for key, x in tensors.items()}
    table(f"external:{name}", "attention", **leaves, **options)
    calls = sys.modules[FLASHES[name]].calls if FLASHES[name] in sys.modules else []
    calls.clear()
    for _ in range(2):  # a new call, and one whose plan is known
        assert_parity(
            functools.partial(gptkernels.attention, **options),
            functools.partial(baseline.attention, **options),
            functools.partial(reference.attention, **options),
            tensors,
        )
    calls = sys.modules[FLASHES[name]].calls
    assert len(calls) == 2
    endless = None if name == "flash_attn4" else -1
    window = options.get("window")
    if window is None:
        assert calls[0]["window_size"] == (endless, endless)
    else:
        right = 0 if options.get("causal", True) else window[1]
        assert calls[0]["window_size"] == tuple(endless if n < 0 else n for n in (window[0], right))
    assert calls[0]["softcap"] == options.get("softcap", 0.0)


@pytest.mark.parametrize("residual", [False, True])
def test_a_call_of_auto_runs_by_liger(residual: bool, fakes: Packages, table: Any) -> None:
    fakes.add("liger_kernel.ops.layer_norm", LIGER)
    tensors: dict[str, Any] = {"x": draw(6, 24, dtype=BF16), "weight": draw(24, dtype=BF16)}
    tensors |= {"bias": draw(24, dtype=BF16)}
    if residual:
        tensors["residual"] = draw(6, 24, dtype=BF16)
    leaves = {key: x.clone().requires_grad_() for key, x in tensors.items()}
    options: dict[str, Any] = {"eps": 0.5, "prenorm": residual}
    table("external:liger", "layer_norm", **leaves, **options)
    applied = []
    function = externals.load("liger").LigerLayerNormFunction
    real = function.forward
    function.forward = staticmethod(lambda *given: applied.append(1) or real(*given))
    assert_parity(
        functools.partial(gptkernels.layer_norm, **options),
        functools.partial(baseline.layer_norm, **options),
        functools.partial(reference.layer_norm, **options),
        tensors,
    )
    assert applied == [1]


def test_an_older_release_without_the_option(fakes: Packages, table: Any) -> None:
    """The contest refuses it. Where a table names it all the same, PyTorch runs the call."""
    fakes.add("flash_attn_interface", "def flash_attn_func(q, k, v, softmax_scale, causal): pass")
    tensors = heads()
    table("external:flash_attn3", "attention", **tensors, softcap=2.0)
    wanted = gptkernels.attention(**tensors, softcap=2.0, impl="torch")
    with pytest.warns(UserWarning, match=r"^external:flash_attn3 was chosen for .*softcap"):
        found = gptkernels.attention(**tensors, softcap=2.0)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))


def test_a_package_that_is_gone_is_not_taken(fakes: Packages, table: Any) -> None:
    fakes.flashes()
    tensors = heads()
    table("external:flash_attn3", "attention", **tensors)
    (fakes.folder / "flash_attn_interface.py").unlink()
    sys.modules.pop("flash_attn_interface", None)
    importlib.invalidate_caches()
    forget()
    plans.known.clear()
    out: Any = gptkernels.attention(**tensors)
    assert "flash_attn_interface" not in sys.modules
    assert torch.isfinite(out).all()
