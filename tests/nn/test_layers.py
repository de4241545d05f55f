from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, IMPLEMENTATIONS, of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from gptkernels import MLP, CausalSelfAttention, LayerNorm
from gptkernels.core import native, philox
from gptkernels.nn import layers
from gptkernels.nn.layers import KVCache, add_norm, set_impl
from gptkernels.truth import baseline, plain_gpt, reference
from gptkernels.truth.parity import assert_parity

SEEDS = st.integers(0, 2**32)


class PlainAttention(nn.Module):
    """Causal self-attention with PyTorch's SDPA, repeated key heads and a mask for the window."""

    def __init__(self, d_model: int, n_head: int, n_kv_head: int, window: int | None) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.window = n_head, n_kv_head, window
        width = d_model // n_head
        self.c_attn = nn.Linear(d_model, (n_head + 2 * n_kv_head) * width)
        self.c_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        (B, T, C), width = x.shape, x.shape[-1] // self.n_head
        q, k, v = self.c_attn(x).split([C, self.n_kv_head * width, self.n_kv_head * width], dim=-1)
        group = self.n_head // self.n_kv_head
        q = q.view(B, T, self.n_head, width).transpose(1, 2)
        k = k.view(B, T, self.n_kv_head, width).transpose(1, 2).repeat_interleave(group, dim=1)
        v = v.view(B, T, self.n_kv_head, width).transpose(1, 2).repeat_interleave(group, dim=1)
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if self.window is not None:
            seen &= ~torch.ones(T, T, dtype=torch.bool).tril(-self.window - 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.c_proj(out.transpose(1, 2).reshape(B, T, C))


def on_parameters(module: nn.Module) -> Callable[..., Tensor]:
    """Returns the module as a function of x and its parameters; the parameters' names have no
    dots."""

    def function(x: Tensor, **parameters: Tensor) -> Tensor:
        named = {name.replace("__", "."): tensor for name, tensor in parameters.items()}
        return functional_call(module, named, (x,))

    return function


def assert_same_function(module: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Asserts that the outputs and all gradients of `module` pass the parity rule, with its plain
    PyTorch twin as the yardstick, in x's dtype.

    It runs the twin's operators: beside them the error of a kernel on a few numbers is random.
    """
    set_impl(module, "torch")
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in plain.state_dict().items()}
    inputs = {"x": x}
    for name, tensor in module.state_dict().items():
        inputs[name.replace(".", "__")] = (tensor + 0.2 * torch.randn(tensor.shape)).to(x.dtype)
    twin = on_parameters(plain)
    assert_parity(on_parameters(module), twin, twin, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    C=st.integers(2, 70),
    rows=st.integers(1, 9),
    bias=st.booleans(),
    eps=st.sampled_from([1e-5, 0.1]),
    seed=SEEDS,
)
def test_layer_norm_replaces_pytorchs(
    dtype: torch.dtype, C: int, rows: int, bias: bool, eps: float, seed: int
) -> None:
    torch.manual_seed(seed)
    plain = nn.LayerNorm(C, eps=eps, bias=bias)
    assert_same_function(LayerNorm(C, eps, bias=bias), plain, torch.randn(rows, 2, C).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), [2, 5, 3], (3,), 3], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_over_the_dimensions_of_pytorchs(
    dtype: torch.dtype, shape: Any, affine: bool
) -> None:
    x = torch.randn(7, 2, 5, 3).to(dtype)
    plain = nn.LayerNorm(shape, elementwise_affine=affine)
    layer = LayerNorm(shape, elementwise_affine=affine)
    assert_same_function(layer, plain, x)
    y, s = layer(x, x, prenorm=True)
    assert y.shape == s.shape == x.shape
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., .*3\), got \(7, 5, 2\)"):
        layer(torch.zeros(7, 5, 2))
    with pytest.raises(ValueError, match=r"residual must have shape \(\.\.\., .*3\), got \(2,\)"):
        layer(x, torch.zeros(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    C=st.integers(1, 40),
    inner=st.integers(1, 70),
    rows=st.integers(1, 9),
    bias=st.booleans(),
    approximate=st.sampled_from(["tanh", "none"]),
    seed=SEEDS,
)
def test_mlp_replaces_its_plain_twin(
    dtype: torch.dtype, C: int, inner: int, rows: int, bias: bool, approximate: str, seed: int
) -> None:
    torch.manual_seed(seed)
    config = plain_gpt.PlainConfig(n_embd=C, n_inner=inner, approximate=approximate, bias=bias)
    x = torch.randn(2, rows, C).to(dtype)
    assert_same_function(MLP(C, inner, bias, approximate), plain_gpt.MLP(config), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.sampled_from([8, 20]),
    T=st.integers(1, 33),
    window=st.sampled_from([None, 2, 5]),
    seed=SEEDS,
)
def test_attention_replaces_its_plain_twin(
    dtype: torch.dtype, kv_heads: int, group: int, width: int, T: int, window: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    n_head = kv_heads * group
    pair = None if window is None else (window, 0)
    layer = CausalSelfAttention(n_head * width, n_head, kv_heads, window=pair)
    plain = PlainAttention(n_head * width, n_head, kv_heads, window)
    assert_same_function(layer, plain, torch.randn(2, T, n_head * width).to(dtype))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_has_the_state_dict_of_the_plain_one(bias: bool) -> None:
    plain = plain_gpt.Attention(plain_gpt.PlainConfig(n_embd=24, n_head=3, bias=bias))
    layer = CausalSelfAttention(24, 3, bias=bias)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert_same_function(layer, plain, torch.randn(2, 9, 24))


def test_layer_norm_loads_pytorchs_state() -> None:
    for bias in (True, False):
        plain, ours = nn.LayerNorm(8, bias=bias), LayerNorm(8, bias=bias)
        assert ours.state_dict().keys() == plain.state_dict().keys()
        nn.init.normal_(plain.weight)
        ours.load_state_dict(plain.state_dict())
        assert torch.equal(ours.weight, plain.weight)
        plain.load_state_dict(ours.state_dict())


def test_attention_after_a_layer_norm_without_weight() -> None:
    """Attention computes its input again only from a norm that has a weight."""
    x = torch.randn(2, 5, 24, requires_grad=True)
    norm, attention = LayerNorm(24, elementwise_affine=False), CausalSelfAttention(24, 3)
    normed = add_norm(norm, x, None, dropout_p=0.0)
    found, wanted = (
        torch.autograd.grad(attention(normed.y, normed=given).sum(), x, retain_graph=True)
        for given in (normed, None)
    )
    assert torch.equal(*found, *wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_adds_the_residual_and_returns_the_sum(dtype: torch.dtype) -> None:
    layer, plain = set_impl(LayerNorm(24), "torch"), nn.LayerNorm(24)

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return functional_call(
            layer, {"weight": weight, "bias": bias}, (x, residual), {"prenorm": True}
        )

    def twin(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        s = x + residual
        return functional_call(plain, {"weight": weight, "bias": bias}, (s,)), s

    inputs = {name: torch.randn(2, 5, 24).to(dtype) for name in ("x", "residual")}
    inputs |= {name: torch.randn(24).to(dtype) for name in ("weight", "bias")}
    assert_parity(ours, twin, twin, inputs, names=("y", "s"))
    _, s = layer(inputs["x"], inputs["residual"], prenorm=True, residual_in_fp32=True)
    assert s.dtype == torch.float32


@pytest.mark.parametrize("impl", [of(impl, device="cpu") for impl in IMPLEMENTATIONS])
def test_dropout_follows_the_contract_in_training_alone(impl: str) -> None:
    torch.manual_seed(3)
    norm, attention = LayerNorm(24), CausalSelfAttention(24, 3, dropout=0.3)
    set_impl(nn.ModuleList([norm, attention]), impl)
    x = torch.randn(2, 17, 24)

    def seeded(op: Callable[..., Any]) -> Callable[..., Any]:
        def function(**inputs: Tensor) -> Any:
            torch.manual_seed(7)
            return op(**inputs)

        return function

    def norm_twin(module: Any) -> Callable[..., Any]:
        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            torch.manual_seed(7)
            rng = philox.draw("cpu")
            return module.layer_norm(x, weight, bias, dropout_p=0.4, prenorm=True, rng=rng)

        return function

    def norm_ours(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        named = {"weight": weight, "bias": bias}
        return functional_call(norm, named, (x,), {"dropout_p": 0.4, "prenorm": True})

    inputs = {"x": x, "weight": torch.randn(24), "bias": torch.randn(24)}
    assert_parity(seeded(norm_ours), norm_twin(baseline), norm_twin(reference), inputs)

    def attention_twin(module: Any) -> Callable[..., Any]:
        def function(x: Tensor, **parameters: Tensor) -> Any:
            torch.manual_seed(7)
            heads = F.linear(x, parameters["c_attn__weight"], parameters["c_attn__bias"])
            q, k, v = heads.unflatten(-1, (3, 3, 8)).unbind(-3)
            out = module.attention(q, k, v, dropout_p=0.3, rng=philox.draw("cpu")).flatten(-2)
            return F.linear(out, parameters["c_proj__weight"], parameters["c_proj__bias"])

        return function

    state = attention.state_dict().items()
    inputs = {"x": x} | {name.replace(".", "__"): torch.randn(t.shape) for name, t in state}
    assert_parity(
        seeded(on_parameters(attention)),
        attention_twin(baseline),
        attention_twin(reference),
        inputs,
    )

    assert not torch.equal(norm(x, dropout_p=0.4), norm(x))
    assert not torch.equal(attention(x), attention(x))
    norm.eval(), attention.eval()
    assert torch.equal(norm(x, dropout_p=0.4), norm(x))
    assert torch.equal(attention(x), attention(x))


def test_attention_copies_nothing_on_the_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.extend((q, k, v))
        return torch.zeros(q.shape)

    monkeypatch.setattr(layers, "attention", spy)
    CausalSelfAttention(24, 6, 2)(torch.randn(2, 5, 24))
    assert [tuple(t.shape) for t in seen] == [(2, 5, 6, 4), (2, 5, 2, 4), (2, 5, 2, 4)]
    assert len({t.untyped_storage().data_ptr() for t in seen}) == 1
    assert [t.storage_offset() for t in seen] == [0, 24, 32]
    assert all(t.stride() == (200, 40, 4, 1) for t in seen)


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    window=st.sampled_from([None, (3, 0)]),
    seed=SEEDS,
)
def test_attention_in_parts_with_a_cache(
    lengths: list[int], window: tuple[int, int] | None, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = CausalSelfAttention(24, 6, 2, window=window).eval()
    plain = PlainAttention(24, 6, 2, window and window[0])
    plain.load_state_dict(layer.state_dict())
    ends = list(itertools.accumulate(lengths))

    @torch.no_grad()
    def in_parts(x: Tensor) -> Tensor:
        k, v = torch.full((2, 2, ends[-1] + 2, 2, 4), math.nan)
        parts = []
        rows = torch.arange(2)[:, None]
        for part, end in zip(x.split(lengths, dim=1), ends, strict=True):
            positions = torch.arange(end - part.shape[1], end).expand(2, -1)
            places = (rows, positions) if parts else None
            cache = KVCache(k, v, places, torch.full((2,), end, dtype=torch.int32))
            parts.append(layer(part, cache))
        return torch.cat(parts, dim=1)

    inputs = {"x": torch.randn(2, ends[-1], 24)}

    def truth(x: Tensor) -> Tensor:
        return copy.deepcopy(plain).to(x.dtype)(x)

    assert_parity(in_parts, plain, truth, inputs, gradients=False)


def test_a_cache_is_refused_where_gradients_are_tracked() -> None:
    layer, x = CausalSelfAttention(8, 2), torch.randn(1, 3, 8)
    k, v = torch.zeros(2, 1, 4, 2, 4)
    cache = KVCache(k, v, None, torch.tensor([3], dtype=torch.int32))
    message = r"a KVCache is for inference: call the model under torch\.no_grad\(\)"
    with pytest.raises(RuntimeError, match=message):
        layer(x, cache)
    layer.requires_grad_(False)
    with pytest.raises(RuntimeError, match=message):
        layer(x.clone().requires_grad_(), cache)
    assert not k.any()
    assert not v.any()
    layer(x, cache)  # nothing requires a gradient, so the call is allowed
    with torch.inference_mode():
        layer.requires_grad_(True)(x, cache)


def test_impl_is_checked_and_set_throughout() -> None:
    model = nn.Sequential(LayerNorm(8), nn.Linear(8, 8), MLP(8, 8), CausalSelfAttention(8, 2))
    assert [m.impl for m in model if hasattr(m, "impl")] == ["auto"] * 3
    assert set_impl(model, "triton") is model
    assert [m.impl for m in model if hasattr(m, "impl")] == ["triton"] * 3
    model[0].impl = "torch"
    assert [m.impl for m in model if hasattr(m, "impl")] == ["torch", "triton", "triton"]
    message = "impl must be one of auto, torch, triton, cuda, cpu, got 'fast'"
    with pytest.raises(ValueError, match=message):
        model[0].impl = "fast"
    with pytest.raises(ValueError, match=message):
        set_impl(model, "fast")
    assert model[0].impl == "torch"
    with pytest.raises(ValueError, match="must contain a layer of gptkernels, got a Linear"):
        set_impl(nn.Linear(2, 2), "torch")
    assert "impl='torch'" in repr(model[0])
    assert copy.deepcopy(model)[2].impl == "triton"


@pytest.mark.parametrize(
    "layer",
    [LayerNorm(8), MLP(8, 8), CausalSelfAttention(8, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_an_implementation_that_cannot_run_raises(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "EMULATED", False)
    layer.impl = "cuda"
    with pytest.raises(RuntimeError, match="impl='cuda': it runs on CUDA tensors"):
        layer(torch.randn(1, 3, 8))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LayerNorm(0), ValueError, "normalized_shape must be at least 1, got 0"),
        (lambda: LayerNorm(()), ValueError, r"^normalized_shape must have at least .*, got \(\)"),
        (lambda: LayerNorm((8, 0)), ValueError, "normalized_shape must be at least 1, got 0"),
        (lambda: LayerNorm(8.0), TypeError, r"normalized_shape must be an int, got 8\.0"),
        (lambda: LayerNorm(8, eps=0.0), ValueError, r"eps must be positive, got 0\.0"),
        (lambda: LayerNorm(8, eps=math.nan), ValueError, "eps must be positive, got nan"),
        (lambda: MLP(8, 0), ValueError, "d_inner must be at least 1, got 0"),
        (lambda: MLP(8, 8, approximate="relu"), ValueError, "approximate must be 'tanh' or 'none'"),
        (
            lambda: CausalSelfAttention(8, 3),
            ValueError,
            "n_head must divide d_model, got d_model=8",
        ),
        (lambda: CausalSelfAttention(8, 4, 3), ValueError, "n_kv_head must divide n_head"),
        (lambda: CausalSelfAttention(8, 0), ValueError, "n_head must be at least 1, got 0"),
        (lambda: CausalSelfAttention(1026, 2), ValueError, "at most 512, got 1026 / 2 = 513"),
        (
            lambda: CausalSelfAttention(8, 2, dropout=1.5),
            ValueError,
            r"dropout must be between 0 and 1, got 1\.5",
        ),
        (
            lambda: CausalSelfAttention(8, 2, window=3),
            ValueError,
            r"window must be a pair \(left, right\) of integers, got 3",
        ),
        (
            lambda: CausalSelfAttention(8, 2, window=(-2, 0)),
            ValueError,
            r"window must be at least 0 on either side, .* got \(-2, 0\)",
        ),
        (
            lambda: CausalSelfAttention(8, 2)(torch.zeros(3, 8)),
            ValueError,
            r"x must have shape \(B, T, 8\), got \(3, 8\)",
        ),
        (
            lambda: CausalSelfAttention(8, 2)(torch.zeros(1, 3, 6)),
            ValueError,
            r"x must have shape \(B, T, 8\), got \(1, 3, 6\)",
        ),
        (
            lambda: CausalSelfAttention(8, 2)(torch.zeros(1, 3, 8).double()),
            TypeError,
            "x must be float32, bfloat16 or float16, got float64",
        ),
    ],
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_autocast_gives_the_dtypes_of_the_plain_twins() -> None:
    x = torch.randn(2, 5, 24)
    config = plain_gpt.PlainConfig(n_embd=24, n_head=3)
    with torch.autocast("cpu", torch.bfloat16):
        for layer, plain in [
            (MLP(24, 96), plain_gpt.MLP(config)),
            (CausalSelfAttention(24, 3), plain_gpt.Attention(config)),
        ]:
            assert layer(x).dtype == plain(x).dtype == torch.bfloat16
        assert LayerNorm(24)(x).dtype == torch.float32
        # An fp32 residual stream stays fp32 although the branches are bf16.
        y, s = LayerNorm(24)(x.bfloat16(), x, prenorm=True)
        assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("make", "make_plain"),
    [
        (lambda: LayerNorm(24), lambda: nn.LayerNorm(24)),
        (
            lambda: nn.Sequential(
                nn.Unflatten(-1, (4, 6)), LayerNorm((4, 6), elementwise_affine=False)
            ),
            lambda: nn.Sequential(
                nn.Unflatten(-1, (4, 6)), nn.LayerNorm((4, 6), elementwise_affine=False)
            ),
        ),
        (
            lambda: MLP(24, 50),
            lambda: plain_gpt.MLP(plain_gpt.PlainConfig(n_embd=24, n_inner=50)),
        ),
        (
            lambda: CausalSelfAttention(24, 3),
            lambda: plain_gpt.Attention(plain_gpt.PlainConfig(n_embd=24, n_head=3)),
        ),
    ],
    ids=["LayerNorm", "LayerNorm of two dimensions", "MLP", "CausalSelfAttention"],
)
def test_layers_compile_whole(
    make: Callable[[], nn.Module], make_plain: Callable[[], nn.Module]
) -> None:
    layer, plain = make(), make_plain()
    plain.load_state_dict(layer.state_dict())
    truth = copy.deepcopy(plain).double()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 8):
        inputs = {"x": torch.randn(2, T, 24)}
        assert_parity(lambda x: compiled(x), lambda x: plain(x), lambda x: truth(x), inputs)
