"""What others offer for the same ops: PyTorch's own held to the truth, packages played by fakes."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from gptkernels.bench.peers import (
    Function,
    Maker,
    Peers,
    attention,
    attention_decode,
    attention_varlen,
    compiled,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
    packages,
)
from gptkernels.truth import baseline, reference
from gptkernels.truth.parity import assert_parity

CPU = torch.device("cpu")
# The makers of packages for GPUs ask for the device alone, which their fakes never use.
GPU = torch.device("meta")
BF16, FP32 = torch.bfloat16, torch.float32
TOPS = ("flash_attn", "flash_attn_interface", "cutlass", "xformers", "transformer_engine",
        "liger_kernel", "quack")  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of small tensors wait for each other, which takes seconds on a busy machine."""
    with harness.threads(1):
        yield


def draw(*sizes: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(sizes).to(dtype)


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes seconds, and is not what most tests are about."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")


# ---- fakes of packages


class Fakes:
    """Packages on a path that stands first. What is called is recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, module: str, text: str = "") -> None:
        *parents, name = module.split(".")
        folder = self.folder
        for parent in parents:
            folder = folder / parent
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        if (folder / name).is_dir():
            (folder / name / "__init__.py").write_text(text)
        else:
            (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    def called(self, module: str, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return getattr(sys.modules[module], name).calls


# A function `name(signature)` that records its calls.
RECORDING = """
import functools, inspect
def recording(function):
    @functools.wraps(function)
    def recorded(*args, **kwargs):
        recorded.calls.append((args, kwargs))
        return function(*args, **kwargs)
    recorded.calls = []
    return recorded
"""


def recording(*functions: str) -> str:
    return RECORDING + "".join(f"@recording\n{function}\n" for function in functions)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    """No package that is installed is seen, unless it is added here."""
    forgotten = [name for name in sys.modules if name.partition(".")[0] in TOPS]
    for name in forgotten:
        monkeypatch.delitem(sys.modules, name)
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        spec = real(name, package)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        here = any(place and str(place).startswith(str(tmp_path)) for place in places)
        return spec if here or name not in TOPS else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.syspath_prepend(tmp_path)
    packages._attempt.cache_clear()
    yield Fakes(tmp_path)
    packages._attempt.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in TOPS]:
        del sys.modules[name]


FLASH = (
    "def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, {}): return q"
)
VARLEN = (
    "def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    "causal=False, window_size=(-1, -1)): return q, None"
)
CACHED = (
    "def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, causal, {}=None): return q"
)


@pytest.fixture
def flash_packages(fakes: Fakes) -> Fakes:
    options = "window_size=(-1, -1), softcap=0.0"
    fakes.add("flash_attn.flash_attn_interface")
    fakes.add("flash_attn.cute.interface")
    two = FLASH.format(options + ", alibi_slopes=None")
    fakes.add("flash_attn", recording(two, VARLEN, CACHED.format("block_table")))
    three = FLASH.format(options)
    fakes.add("flash_attn_interface", recording(three, VARLEN, CACHED.format("page_table")))
    fakes.add("flash_attn.cute", recording(three.replace("return q", "return q, None"), VARLEN))
    fakes.add("cutlass")
    return fakes


FLASHES = {
    "FlashAttention-2": "flash_attn",
    "FlashAttention-3": "flash_attn_interface",
    "FlashAttention-4": "flash_attn.cute",
}


# ---- which are here


def statuses() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in packages.found()}


def everything(device: torch.device) -> dict[str, Peers]:
    """The peers of all ops for a plain problem."""
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    q, k = (2, 8, 4, 16), (2, 8, 2, 16)
    lengths = torch.tensor([8, 5], dtype=torch.int32)
    return {
        "attention": attention.peers(device, BF16, q, k, backward=False),
        "attention_varlen": attention_varlen.peers(device, BF16, 4, 2, ends, 5, backward=False),
        "attention_decode": attention_decode.peers(device, BF16, (2, 1, 4, 16), k, lengths),
        "layer_norm": layer_norm.peers(device, BF16, 16, backward=False),
        "gelu_mlp": gelu_mlp.peers(device, BF16, backward=False),
        "linear_cross_entropy": linear_cross_entropy.peers(
            device, torch.tensor([0, 3]), reduction="mean", backward=False
        ),
    }


# Peers of whole models, and one that its case makes.
ELSEWHERE = {"transformers", "nanoGPT-shaped", "SDPA, padded"}


def test_an_absent_package_is_in_no_dict(fakes: Fakes) -> None:
    found = statuses()
    for name in ELSEWHERE:
        del found[name]
    names = {name for peers in everything(GPU).values() for name in peers}
    for row in found.values():
        assert row["status"] == ("here" if row["package"] == "torch" else "absent")
        assert row["reason"] == (
            None if row["package"] == "torch" else f"{row['package']} is not installed"
        )
        assert row["version"] == (torch.__version__ if row["package"] == "torch" else None)
    # All of PyTorch's own, and these alone.
    assert names == {name for name, row in found.items() if row["status"] == "here"}


def test_every_package_is_a_peer_of_some_op(flash_packages: Fakes) -> None:
    for module in ("liger_kernel", "quack", "xformers", "transformer_engine"):
        flash_packages.add(f"{module}.part")
    names = {name for peers in everything(GPU).values() for name in peers}
    assert names == statuses().keys() - ELSEWHERE


def test_a_package_that_raises_on_import_is_broken(fakes: Fakes) -> None:
    fakes.add("liger_kernel.ops.layer_norm", "raise OSError('libcudart.so.12 is missing\\nmore')")
    row = statuses()["Liger"]
    assert (row["status"], row["version"]) == ("broken", None)
    assert row["reason"] == "OSError: libcudart.so.12 is missing"
    for device in (CPU, GPU):
        make = layer_norm.peers(device, BF16, 16, backward=False)["Liger"]
        with pytest.raises(ImportError, match="liger-kernel is installed but does not import: OSE"):
            make()


def test_flash_attention_4_alone_is_no_flash_attention_2(fakes: Fakes) -> None:
    fakes.add("flash_attn.cute", recording(FLASH.format("window_size=(None, None)")))
    fakes.add("flash_attn.cute.interface")
    (fakes.folder / "flash_attn" / "__init__.py").unlink()  # the two share the folder
    found = statuses()
    assert found["FlashAttention-4"]["status"] == "absent"  # without the DSL it cannot run
    fakes.add("cutlass")
    found = statuses()
    assert found["FlashAttention-4"]["status"] == "here"
    assert found["FlashAttention-2"]["status"] == "absent"
    assert found["flash-attn Triton"]["status"] == "absent"


def test_packages_for_gpus_refuse_a_cpu(flash_packages: Fakes) -> None:
    for name in FLASHES:
        with pytest.raises(NotImplementedError, match=f"{name} runs on a GPU alone"):
            everything(CPU)["attention"][name]()


# ---- attention


def attention_peers(
    tensors: Mapping[str, Tensor], backward: bool, device: torch.device = CPU, **options: Any
) -> Peers:
    q, k = tensors["q"], tensors["k"]
    shapes = tuple(q.shape), tuple(k.shape)
    return attention.peers(device, q.dtype, *shapes, **options, backward=backward)


def outcome(make: Maker) -> Function | str:
    """What a maker makes, or why it does not."""
    try:
        return make()
    except NotImplementedError as error:
        return str(error)


def functions_of(peers: Peers) -> dict[str, Function]:
    """Of the peers that can."""
    found = {name: outcome(make) for name, make in peers.items()}
    return {name: function for name, function in found.items() if callable(function)}


def slopes(heads: int) -> Tensor:
    return torch.tensor([2 ** -(h + 1) for h in range(heads)])


def some(tokens: int) -> Tensor:
    return (torch.rand(tokens, tokens) < 0.7) | torch.eye(tokens, dtype=torch.bool)


T = 40
SDPA = {"SDPA flash", "SDPA math"}
BOTH_WAYS = SDPA | {"FlexAttention"}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("options", "keys", "able"),
    [
        ({}, T, BOTH_WAYS),
        ({"causal": False}, T, BOTH_WAYS),
        ({}, T + 9, BOTH_WAYS),  # the last query stands at the last key
        ({"window": (7, 0)}, T, BOTH_WAYS),
        ({"window": (7, 3), "causal": False}, T + 9, BOTH_WAYS),
        ({"window": (7, -1), "causal": False}, T, BOTH_WAYS),
        ({"window": (-1, 3), "causal": False}, T, BOTH_WAYS),
        ({"softcap": 2.0}, T, {"FlexAttention"}),
        ({"alibi_slopes": slopes(4)}, T, BOTH_WAYS),
        ({"alibi_slopes": slopes(4).tolist(), "softcap": 2.0}, T + 9, {"FlexAttention"}),
        ({"attn_mask": some(T)}, T, SDPA),
        ({"attn_mask": some(T).expand(2, 4, T, T), "window": (9, 0)}, T, SDPA),
        ({"attn_mask": draw(T, T), "causal": False}, T, SDPA),
        ({"attn_mask": draw(4, T, T), "alibi_slopes": slopes(4)}, T, SDPA),
    ],
)
def test_attention_of_pytorch_gives_the_truth(
    options: dict[str, Any],
    keys: int,
    able: set[str],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uncompiled(monkeypatch)
    for key_heads in (4, 2):
        tensors = {
            "q": draw(2, T, 4, 16, dtype=dtype),
            "k": draw(2, keys, key_heads, 16, dtype=dtype),
            "v": draw(2, keys, key_heads, 16, dtype=dtype),
        }
        for backward in (False, True):
            functions = functions_of(attention_peers(tensors, backward, **options))
            assert functions.keys() == able - ({"FlexAttention"} if backward else set())
            for function in functions.values():
                assert_parity(
                    lambda q, k, v, f=function: f(q, k, v),
                    functools.partial(baseline.attention, **options),
                    functools.partial(reference.attention, **options),
                    tensors,
                    gradients=backward,
                )


def test_attention_of_pytorch_refuses_in_a_sentence() -> None:
    tensors = {"q": draw(1, 8, 4, 16), "k": draw(1, 8, 4, 16)}
    found = attention_peers(tensors, True, softcap=2.0)
    assert outcome(found["SDPA flash"]) == "F.scaled_dot_product_attention has no softcap"
    assert (
        outcome(found["FlexAttention"]) == "PyTorch has no backward pass of FlexAttention on a CPU"
    )
    found = attention_peers(tensors, False, attn_mask=draw(8, 8))
    assert outcome(found["FlexAttention"]) == "FlexAttention takes no mask tensor"


def test_keys_are_repeated_where_no_kernel_takes_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def choice(q: Tensor, k: Tensor, *_: Any, enable_gqa: bool) -> int:
        asked.append((k.shape[1], enable_gqa))
        if enable_gqa:
            warnings.warn("Flash attention kernel not used because:", stacklevel=1)
            warnings.warn(
                "both want as many heads (Triggered internally at a.cpp:9.)", stacklevel=1
            )
            raise RuntimeError("No available kernel.  Aborting execution.")
        return 1

    tensors = {"q": draw(2, 8, 4, 16), "k": draw(2, 8, 2, 16), "v": draw(2, 8, 2, 16)}
    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    function = attention_peers(tensors, True)["SDPA flash"]()
    assert asked == [(2, True), (4, False)]
    assert_parity(function, baseline.attention, reference.attention, tensors)
    assert function(*tensors.values()).shape == tensors["q"].shape
    monkeypatch.setattr(torch, "_fused_sdp_choice", functools.partial(_refuse, choice))
    with pytest.raises(NotImplementedError, match="both want as many heads"):
        attention_peers(tensors, True)["SDPA flash"]()


def _refuse(choice: Callable[..., int], *tensors: Any, enable_gqa: bool) -> int:
    return choice(*tensors, enable_gqa=True)


@pytest.mark.parametrize("name", FLASHES)
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"causal": True}),
        ({"causal": False}, {"causal": False}),
        ({"window": (7, 0)}, {"causal": True, "window_size": (7, 0)}),
        ({"window": (7, 3)}, {"causal": True, "window_size": (7, 0)}),
        ({"window": (-1, 3), "causal": False}, {"causal": False, "window_size": (None, 3)}),
        ({"softcap": 2.0}, {"causal": True, "softcap": 2.0}),
    ],
)
def test_flash_attention_gets_the_options(
    name: str, options: dict[str, Any], wanted: dict[str, Any], flash_packages: Fakes
) -> None:
    tensors = {"q": draw(2, 8, 4, 16, dtype=BF16), "k": draw(2, 8, 2, 16, dtype=BF16)}
    function = attention_peers(tensors, True, GPU, **options)[name]()
    out = function(tensors["q"], tensors["k"], tensors["k"])
    assert out is tensors["q"]  # alone, be it with lse
    ((args, kwargs),) = flash_packages.called(FLASHES[name], "flash_attn_func")
    assert [x is y for x, y in zip(args, (tensors["q"], tensors["k"], tensors["k"]), strict=True)]
    if name != "FlashAttention-4" and "window_size" in wanted:
        wanted = wanted | {
            "window_size": tuple(-1 if n is None else n for n in wanted["window_size"])
        }
    assert kwargs == wanted


def test_flash_attention_refuses_what_it_does_not_take(flash_packages: Fakes) -> None:
    half = {"q": draw(2, 8, 4, 16, dtype=BF16), "k": draw(2, 8, 2, 16, dtype=BF16)}
    found = attention_peers(half, False, GPU, alibi_slopes=slopes(4).tolist())
    found["FlashAttention-2"]()(half["q"], half["k"], half["k"])
    ((_, kwargs),) = flash_packages.called("flash_attn", "flash_attn_func")
    assert kwargs["alibi_slopes"].dtype == FP32
    for name in ("FlashAttention-3", "FlashAttention-4"):
        assert outcome(found[name]) == f"flash_attn_func of {name} has no alibi_slopes"
    masked = attention_peers(half, False, GPU, attn_mask=torch.ones(8, 8, dtype=torch.bool))
    single = attention_peers({"q": draw(2, 8, 4, 16), "k": draw(2, 8, 4, 16)}, False, GPU)
    for name in FLASHES:
        assert outcome(masked[name]) == f"{name} takes no mask tensor"
        assert outcome(single[name]) == f"{name} takes bfloat16 and float16 alone"


XFORMERS_MASKS = (
    RECORDING
    + """
class Mask:
    def __init__(self, *args, **kwargs): self.made = args
    def make_local_attention(self, n): return type("Local", (Mask,), {})(n)
class LowerTriangularMask(Mask): pass
class LowerTriangularFromBottomRightMask(Mask): pass
class LocalAttentionFromBottomRightMask(Mask): pass
class BlockDiagonalMask(Mask):
    @classmethod
    def from_seqlens(cls, lengths): return cls(lengths)
class BlockDiagonalCausalMask(BlockDiagonalMask): pass
"""
)


@pytest.fixture
def xformers(fakes: Fakes) -> Fakes:
    fakes.add("xformers.ops.fmha.attn_bias", XFORMERS_MASKS)
    attend = "def memory_efficient_attention(query, key, value, attn_bias=None): return query"
    fakes.add("xformers.ops", recording(attend))
    return fakes


@pytest.mark.parametrize(
    ("options", "keys", "kind", "made_of"),
    [
        ({}, 8, "LowerTriangularMask", ()),
        ({}, 9, "LowerTriangularFromBottomRightMask", ()),
        ({"causal": False}, 8, "NoneType", None),
        ({"window": (3, 0)}, 8, "Local", (4,)),  # it counts the query's own key
        ({"window": (3, 2), "causal": False}, 8, "LocalAttentionFromBottomRightMask", (3, 2)),
    ],
)
def test_xformers_gets_the_mask(
    options: dict[str, Any], keys: int, kind: str, made_of: Any, xformers: Fakes
) -> None:
    q, k = draw(2, 8, 4, 16), draw(2, keys, 2, 16)
    function = attention_peers({"q": q, "k": k}, False, GPU, **options)["xformers"]()
    assert torch.equal(function(q, k, 2 * k), q)
    ((args, kwargs),) = xformers.called("xformers.ops", "memory_efficient_attention")
    grouped = [x.repeat_interleave(2, 2) for x in (k, 2 * k)]
    for got, wanted in zip(args, (q, *grouped), strict=True):
        assert got.shape[2:4] == (2, 2)  # groups, heads of one
        assert torch.equal(got.flatten(2, 3), wanted)
    assert type(kwargs["attn_bias"]).__name__ == kind
    assert getattr(kwargs["attn_bias"], "made", None) == made_of


def test_xformers_refuses_what_it_does_not_take(xformers: Fakes) -> None:
    tensors = {"q": draw(2, 8, 4, 16), "k": draw(2, 8, 2, 16)}
    for backward, options, reason in (
        (True, {}, "xformers has no backward pass of grouped heads"),
        (False, {"softcap": 1.0}, "xformers has no softcap"),
        (False, {"attn_mask": draw(8, 8)}, "xformers beside SDPA efficient takes no mask tensor"),
        (
            False,
            {"window": (3, -1), "causal": False},
            "xformers has no window without end to one side",
        ),
    ):
        peers = attention_peers(tensors, backward, GPU, **options)
        assert outcome(peers["xformers"]) == reason
    same = {"q": tensors["q"], "k": tensors["q"]}
    function = attention_peers(same, True, GPU)["xformers"]()
    assert function(same["q"], same["q"], same["q"]) is same["q"]


TRANSFORMER_ENGINE = (
    RECORDING
    + """
import torch
made = []
class DotProductAttention:
    def __init__(self, *args, **kwargs): made.append((args, kwargs))
    def __call__(self, q, k, v): return q.flatten(2)
class LayerNorm(torch.nn.Module):
    def __init__(self, *args, device, **kwargs):
        super().__init__()
        made.append((args, kwargs))
        self.weight, self.bias = (torch.nn.Parameter(torch.zeros(args[0])) for _ in range(2))
    def forward(self, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias)
"""
)


def test_transformer_engine_attends_heads_that_it_joins(fakes: Fakes) -> None:
    fakes.add("transformer_engine.pytorch", TRANSFORMER_ENGINE)
    q, k = draw(2, 8, 4, 16, dtype=BF16), draw(2, 8, 2, 16, dtype=BF16)
    longer = draw(2, 9, 2, 16, dtype=BF16)
    for keys, options, kind, window in (
        (k, {}, "causal", (-1, 0)),
        (longer, {}, "causal_bottom_right", (-1, 0)),
        (k, {"window": (3, 0)}, "causal", (3, 0)),
        (k, {"causal": False, "window": (3, 2)}, "no_mask", (3, 2)),
    ):
        function = attention_peers({"q": q, "k": keys}, False, GPU, **options)[
            "TransformerEngine"
        ]()
        assert torch.equal(function(q, keys, keys), q)
        args, kwargs = sys.modules["transformer_engine.pytorch"].made[-1]
        assert args == (4, 16)
        assert kwargs["num_gqa_groups"] == 2
        assert (kwargs["qkv_format"], kwargs["attn_mask_type"]) == ("bshd", kind)
        assert kwargs["window_size"] == window
    tensors = {"q": q, "k": k}
    refused = outcome(attention_peers(tensors, True, GPU)["TransformerEngine"])
    assert refused == "TransformerEngine's backward pass cannot be repeated, to be timed"
    assert callable(attention_peers(tensors, True, GPU, repeated=False)["TransformerEngine"]())
    for options in ({"softcap": 1.0}, {"alibi_slopes": slopes(4)}, {"attn_mask": draw(8, 8)}):
        peers = attention_peers(tensors, False, GPU, **options)
        assert isinstance(outcome(peers["TransformerEngine"]), str)


# ---- packed sequences


def test_packed_sequences(flash_packages: Fakes, xformers: Fakes) -> None:
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    q, k = draw(8, 4, 16, dtype=BF16), draw(8, 2, 16, dtype=BF16)
    for causal in (True, False):
        peers = attention_varlen.peers(GPU, BF16, 4, 2, ends, 5, causal=causal, backward=False)
        assert peers.keys() == {*FLASHES, "xformers", "SDPA nested"}
        for name, module in FLASHES.items():
            assert peers[name]()(q, k, k) is q
            args, kwargs = flash_packages.called(module, "flash_attn_varlen_func")[-1]
            assert [x is y for x, y in zip(args, (q, k, k), strict=True)] == [True] * 3
            assert kwargs == {
                "cu_seqlens_q": ends,
                "cu_seqlens_k": ends,
                "max_seqlen_q": 5,
                "max_seqlen_k": 5,
                "causal": causal,
            }
        assert torch.equal(peers["xformers"]()(q, k, k), q)
        args, kwargs = xformers.called("xformers.ops", "memory_efficient_attention")[-1]
        assert args[0].shape == (1, 8, 2, 2, 16)
        bias = kwargs["attn_bias"]
        assert type(bias).__name__ == ("BlockDiagonalCausalMask" if causal else "BlockDiagonalMask")
        assert bias.made == ([3, 5],)
    grouped = attention_varlen.peers(GPU, BF16, 4, 2, ends, 5, backward=True)
    assert outcome(grouped["xformers"]) == "xformers has no backward pass of grouped heads"
    assert "SDPA nested" not in attention_varlen.peers(CPU, BF16, 4, 2, ends, 5, backward=True)


def test_nested_tensors_give_the_truth() -> None:
    """Without a causal mask, for which PyTorch has no kernel on a CPU."""
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    peers = attention_varlen.peers(GPU, FP32, 4, 2, ends, 5, causal=False, backward=True)
    tensors = {"q": draw(8, 4, 16), "k": draw(8, 2, 16), "v": draw(8, 2, 16)}
    packed = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 5, "max_seqlen_k": 5}
    assert_parity(
        peers["SDPA nested"](),
        functools.partial(baseline.attention_varlen, **packed, causal=False),
        functools.partial(reference.attention_varlen, **packed, causal=False),
        tensors,
    )


# ---- decoding


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("lengths", [[20, 20], [20, 7], [12, 12]])
@pytest.mark.parametrize("paged", [False, True])
def test_decoding_of_pytorch_gives_the_truth(
    dtype: torch.dtype,
    queries: int,
    lengths: list[int],
    paged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uncompiled(monkeypatch)
    cache_lengths = torch.tensor(lengths, dtype=torch.int32)
    table = torch.tensor([[4, 0, 2, 5, 9], [1, 3, 8, 7, 6]], dtype=torch.int32) if paged else None
    shape = (10, 4, 2, 16) if paged else (2, 20, 2, 16)
    tensors = {
        "q": draw(2, queries, 4, 16, dtype=dtype),
        "k_cache": draw(*shape, dtype=dtype),
        "v_cache": draw(*shape, dtype=dtype),
    }
    peers = attention_decode.peers(
        CPU, dtype, (2, queries, 4, 16), shape, cache_lengths, block_table=table
    )
    functions = functions_of(peers)
    assert functions.keys() == (SDPA if paged else BOTH_WAYS)
    cached = {"cache_lengths": cache_lengths, "block_table": table}
    for function in functions.values():
        assert_parity(
            lambda q, k_cache, v_cache, f=function: f(q, k_cache, v_cache),
            functools.partial(baseline.attention_decode, **cached),
            functools.partial(reference.attention_decode, **cached),
            tensors,
            gradients=False,
        )


def test_flash_attention_gets_the_cache(flash_packages: Fakes) -> None:
    lengths = torch.tensor([300, 500], dtype=torch.int32)
    q, cache = draw(2, 1, 4, 16, dtype=BF16), draw(2, 512, 2, 16, dtype=BF16)
    like = (GPU, BF16, tuple(q.shape))
    peers = attention_decode.peers(*like, tuple(cache.shape), lengths)
    table = torch.zeros(2, 2, dtype=torch.int32)
    paged = attention_decode.peers(*like, (4, 256, 2, 16), lengths, block_table=table)
    for name, option in (("FlashAttention-2", "block_table"), ("FlashAttention-3", "page_table")):
        for found, more in ((peers, {}), (paged, {option: table})):
            assert found[name]()(q, cache, cache) is q
            args, kwargs = flash_packages.called(FLASHES[name], "flash_attn_with_kvcache")[-1]
            assert [x is y for x, y in zip(args, (q, cache, cache), strict=True)] == [True] * 3
            assert kwargs == {"cache_seqlens": lengths, "causal": True, **more}
    small = attention_decode.peers(*like, (8, 64, 2, 16), lengths, block_table=table)
    reason = "FlashAttention-2 takes pages of a multiple of 256 keys"
    assert outcome(small["FlashAttention-2"]) == reason
    assert callable(small["FlashAttention-3"]())


# ---- LayerNorm


def norm_inputs(residual: bool, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
    found = {"x": draw(2, 9, 24, dtype=dtype), "weight": draw(24, dtype=dtype)}
    found["bias"] = draw(24, dtype=dtype)
    return found | ({"residual": draw(2, 9, 24, dtype=dtype)} if residual else {})


def assert_norm(function: Function, inputs: Mapping[str, Tensor], gradients: bool) -> None:
    prenorm = "residual" in inputs
    assert_parity(
        lambda x, weight, bias, **rest: function(x, weight, bias, *rest.values()),
        functools.partial(baseline.layer_norm, prenorm=prenorm),
        functools.partial(reference.layer_norm, prenorm=prenorm),
        inputs,
        gradients=gradients,
    )


@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm_of_pytorch_gives_the_truth(
    residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncompiled(monkeypatch)
    peers = layer_norm.peers(CPU, BF16, 24, residual=residual, backward=True)
    assert {"torch.compile", "torch.compile max-autotune"} <= peers.keys()
    for name in ("torch.compile", "torch.compile max-autotune"):
        assert_norm(peers[name](), norm_inputs(residual, BF16), gradients=True)


def test_layer_norm_of_pytorch_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    peers = layer_norm.peers(CPU, FP32, 24, residual=True, dropout_p=0.5, backward=True)
    x, weight, bias, residual = norm_inputs(True).values()
    y, s = peers["torch.compile"]()(x, weight, bias, residual)
    dropped = s == residual
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(s[~dropped], (2 * x + residual)[~dropped])
    torch.testing.assert_close(y, F.layer_norm(s, (24,), weight, bias))


LIGER = (
    RECORDING
    + """
import torch
class LigerLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        assert eps == 1e-5
        ctx.save_for_backward(x, weight, bias)
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            y = torch.nn.functional.layer_norm(leaves[0], dy.shape[-1:], *leaves[1:], 1e-5)
        return *torch.autograd.grad(y, leaves, dy), None
"""
)

QUACK = """
import torch
def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert x.dim() == 2 and weight.dtype == bias.dtype == torch.float32
    y, mean, rstd = torch.ops.aten.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
    y = y.to(x.dtype)
    return (y, rstd[:, 0], mean[:, 0]) if return_rstd and return_mean else y
"""

QUACK_BACKWARD = """
def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
    assert rstd.shape == mean.shape == x.shape[:1]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dout.float(), x.float(), weight.shape, mean[:, None], rstd[:, None], weight,
        torch.zeros_like(weight), [True] * 3,
    )
    return dx.to(x.dtype), dw, db
"""

FLASH_NORM = """def layer_norm_fn(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None,
        eps=1e-6, dropout_p=0.0, rowscale=None, prenorm=False, residual_in_fp32=False):
    import torch
    s = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(s, x.shape[-1:], weight, bias, eps)
    return (y, s) if prenorm else y"""


@pytest.fixture
def norms(fakes: Fakes) -> Fakes:
    fakes.add("liger_kernel.ops.layer_norm", LIGER)
    fakes.add("quack.rmsnorm", QUACK + QUACK_BACKWARD)
    fakes.add("transformer_engine.pytorch", TRANSFORMER_ENGINE)
    fakes.add("flash_attn.flash_attn_interface")
    fakes.add("flash_attn.ops.triton.layer_norm", recording(FLASH_NORM))
    return fakes


NORMS = ("Liger", "quack", "TransformerEngine", "flash-attn Triton")


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_norms_of_packages_are_called_rightly(name: str, dtype: torch.dtype, norms: Fakes) -> None:
    """Their fakes give the truth where they get the right arguments."""
    for backward in (False, True):
        peers = layer_norm.peers(GPU, dtype, 24, backward=backward, repeated=False)
        function = peers[name]()
        assert_norm(function, norm_inputs(False, dtype), gradients=backward)


def test_transformer_engine_has_the_weights_of_the_call(norms: Fakes) -> None:
    make = layer_norm.peers(GPU, BF16, 24, backward=False)["TransformerEngine"]
    make()
    ((args, kwargs),) = sys.modules["transformer_engine.pytorch"].made
    assert args == (24,)
    assert kwargs == {"eps": 1e-5, "dtype": BF16}
    found = layer_norm.peers(GPU, BF16, 24, backward=True)
    assert outcome(found["TransformerEngine"]) == (
        "TransformerEngine's backward pass cannot be repeated, to be timed"
    )


def test_flash_attn_takes_residual_and_dropout(norms: Fakes) -> None:
    peers = layer_norm.peers(GPU, FP32, 24, residual=True, dropout_p=0.1, backward=True)
    inputs = norm_inputs(True)
    assert_norm(peers["flash-attn Triton"](), inputs, gradients=True)
    ((args, kwargs),) = norms.called("flash_attn.ops.triton.layer_norm", "layer_norm_fn")
    assert [x.shape for x in args] == [x.shape for x in inputs.values()]
    assert kwargs == {"eps": 1e-5, "dropout_p": 0.1, "prenorm": True}


@pytest.mark.parametrize("options", [{"residual": True}, {"dropout_p": 0.1}])
def test_norms_alone_refuse_more(options: dict[str, Any], norms: Fakes) -> None:
    found = layer_norm.peers(GPU, BF16, 24, **options, backward=False)
    for name in ("Liger", "quack", "TransformerEngine"):
        assert outcome(found[name]) == f"{name}'s LayerNorm has no residual and no dropout"
    assert callable(found["flash-attn Triton"]())


def test_older_releases_of_quack(norms: Fakes) -> None:
    norms.add("quack.rmsnorm", QUACK)
    found = layer_norm.peers(GPU, BF16, 24, backward=True)
    assert outcome(found["quack"]) == "this release of quack has no layernorm_bwd"
    assert callable(layer_norm.peers(GPU, BF16, 24, backward=False)["quack"]())


# ---- the MLP


def mlp_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {"x": (2, 9, 24), "w1": (40, 24), "b1": (40,), "w2": (24, 40), "b2": (24,)}
    return {name: draw(*size, dtype=dtype) for name, size in sizes.items()}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_mlps_of_pytorch_give_the_truth(
    dtype: torch.dtype, approximate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncompiled(monkeypatch)
    for backward in (False, True):
        functions = functions_of(
            gelu_mlp.peers(CPU, dtype, approximate=approximate, backward=backward)
        )
        # On a CPU its GELU is the one with erf.
        fused = {"addmm with GELU"} if approximate == "none" and not backward else set()
        assert functions.keys() == {"torch.compile", "torch.compile max-autotune"} | fused
        for function in functions.values():
            assert_parity(
                lambda x, w1, b1, w2, b2, f=function: f(x, w1, b1, w2, b2),
                functools.partial(baseline.gelu_mlp, approximate=approximate),
                functools.partial(reference.gelu_mlp, approximate=approximate),
                mlp_inputs(dtype),
                gradients=backward,
            )


def test_the_fused_product_has_one_gelu_a_device() -> None:
    make = gelu_mlp.peers(GPU, BF16, approximate="none", backward=False)["addmm with GELU"]
    with pytest.raises(NotImplementedError, match='approximate="tanh" alone on this device'):
        make()
    make = gelu_mlp.peers(GPU, BF16, backward=True)["addmm with GELU"]
    with pytest.raises(NotImplementedError, match="no derivative"):
        make()


# ---- the loss

FUSED_LOSS = (
    RECORDING
    + """
import torch
class LigerFusedLinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, bias, ce_weight, ignore_index, lse_square_scale,
                label_smoothing, reduction):
        assert bias is ce_weight is None and (ignore_index, lse_square_scale) == (-100, 0.0)
        assert label_smoothing == 0.0
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            logits = torch.nn.functional.linear(*leaves).float()
            loss = torch.nn.functional.cross_entropy(logits, target, reduction=reduction)
        ctx.leaves, ctx.loss = leaves, loss
        return loss.detach(), None
    @staticmethod
    def backward(ctx, dloss, _):
        return *torch.autograd.grad(ctx.loss, ctx.leaves, dloss), *[None] * 7
"""
)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_losses_of_others_are_called_rightly(
    dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch, fakes: Fakes
) -> None:
    """Those in x's dtype too: in fp32 they give the truth, in bf16 they are PyTorch's own two."""
    uncompiled(monkeypatch)
    fakes.add("liger_kernel.ops.fused_linear_cross_entropy", FUSED_LOSS)
    targets = torch.randint(37, (50,))
    targets[7] = -100
    given = {"targets": targets, "reduction": reduction}
    inputs = {"x": draw(50, 24, dtype=dtype), "weight": draw(37, 24, dtype=dtype)}
    plain = functools.partial(linear_cross_entropy.in_dtype, **given)
    narrow = {"torch.compile", "torch.compile max-autotune"}
    for backward in (False, True):
        peers = linear_cross_entropy.peers(GPU, **given, backward=backward)
        functions = functions_of(peers)
        liger = {"Liger"} if not backward or reduction == "mean" else set()
        assert functions.keys() == narrow | {"logits in fp32"} | liger
        for name, function in functions.items():
            if dtype == BF16 and name in narrow:
                assert torch.equal(function(**inputs), plain(**inputs))
                continue
            assert_parity(
                lambda x, weight, f=function: f(x, weight),
                functools.partial(baseline.linear_cross_entropy, **given),
                functools.partial(reference.linear_cross_entropy, **given),
                inputs,
                gradients=backward,
            )
    if reduction == "none":
        assert outcome(peers["Liger"]) == "Liger's gradients are those of a sum or a mean"


# ---- torch.compile


def test_each_maker_compiles_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shapes there were before: Dynamo compiles one function for a few only."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for width in (8, 16, 24):
            function = compiled.compiled(baseline.layer_norm)
            function(draw(3, width), draw(width), draw(width))


def test_compiled_for_real() -> None:
    """The backward pass alone can be called again and again."""
    inputs = norm_inputs(True)
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    function = layer_norm.peers(CPU, FP32, 24, residual=True, backward=True)["torch.compile"]()
    with compiled.repeatable():
        outputs = function(*leaves)
        cotangents = [torch.ones_like(x) for x in outputs]
        first, again = (
            torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True) for _ in range(2)
        )
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)
    assert_norm(function, inputs, gradients=True)


def test_flex_attention_compiled_for_real() -> None:
    options: dict[str, Any] = {"window": (7, 0), "softcap": 2.0, "alibi_slopes": slopes(4)}
    tensors = {
        "q": draw(2, T, 4, 16, dtype=BF16),
        "k": draw(2, T, 2, 16, dtype=BF16),
        "v": draw(2, T, 2, 16, dtype=BF16),
    }
    function = attention_peers(tensors, False, **options)["FlexAttention"]()
    function(*tensors.values())  # it does not compile while the check poisons memory
    assert_parity(
        lambda q, k, v: function(q, k, v),
        functools.partial(baseline.attention, **options),
        functools.partial(reference.attention, **options),
        tensors,
        gradients=False,
    )
