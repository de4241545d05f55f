"""flash_attn_interface: LayerNorm of a residual sum, against the truth in fp64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, DEVICE, FP16, FP32, by_dtype
from op_inputs import draw
from right import run, seeded
from torch import Tensor

import gptkernels
from gptkernels import flash_attn_interface as interface
from gptkernels.core import philox
from gptkernels.flash_attn_interface import dropout_add_layer_norm, layer_norm_fn
from gptkernels.truth import parity

ROWS, C, P = 24, 96, 0.3
SHAPE = (2, ROWS // 2, C)


def masks(tensors: dict[str, Any]) -> tuple[Tensor, ...]:
    """What dropout keeps of x and of x1: it draws for x1 first."""
    torch.manual_seed(11)
    count = 2 if tensors.get("x1") is not None else 1
    drawn = [philox.elementwise_keep(philox.draw(DEVICE), P, SHAPE) for _ in range(count)]
    return tuple(reversed(drawn))


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    *,
    kept: tuple[Tensor, ...],
    plus: float,
    s_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """y, y1 and s, in fp64 if x is; else in fp32, with rounded results. The statistics are those of
    the rounded s, as gptkernels.layer_norm has them, unless it takes more than one call of it."""
    exact = x.dtype == torch.float64
    wide = torch.float64 if exact else torch.float32
    composed = any(each is not None for each in (x1, weight1, rowscale, layerscale))
    s = x.to(wide)
    for scale in (None if rowscale is None else rowscale[..., None], layerscale):
        s = s if scale is None else s * scale.to(wide)
    terms = [s] if x1 is None else [s, x1.to(wide)]
    if kept:
        terms = [
            term.masked_fill(~mask, 0) * philox.scale(P)
            for term, mask in zip(terms, kept, strict=True)
        ]
    s = sum(terms, 0 if residual is None else residual.to(wide))
    if not (exact or composed):
        s = s.to(s_dtype).to(wide)
    ys = [
        F.layer_norm(s, (C,), eps=1e-3) * (w.to(wide) + plus) + (0 if b is None else b.to(wide))
        for w, b in ((weight, bias), (weight1, bias1))
        if w is not None
    ]
    return (*ys, s) if exact else (*(y.to(y_dtype) for y in ys), s.to(s_dtype))


def tensors_of(dtype: torch.dtype, names: str, weight: torch.dtype) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "x": SHAPE, "residual": SHAPE, "x1": SHAPE, "rowscale": SHAPE[:-1],
    }  # fmt: skip
    return {
        name: draw(*shapes.get(name, (C,)), dtype=dtype if name in shapes else weight)
        for name in ("x", "weight", *names.split())
    }


def hold(
    call: Callable[..., Any],
    tensors: dict[str, Any],
    *,
    kept: bool = False,
    plus: float = 0.0,
    s_dtype: torch.dtype | None = None,
    y_dtype: torch.dtype | None = None,
) -> None:
    """Holds (y, y1, s) and all gradients to the formula in fp64; the yardstick is the formula in
    fp32."""
    x = tensors["x"]
    dtypes = {"s_dtype": s_dtype or x.dtype, "y_dtype": y_dtype or x.dtype}
    of = functools.partial(formula, kept=masks(tensors) if kept else (), plus=plus, **dtypes)

    def checked(**given: Any) -> Any:
        *ys, s = found = call(**given)
        assert {y.dtype for y in ys} == {dtypes["y_dtype"]}
        assert s.dtype == dtypes["s_dtype"]
        return found

    parity.assert_parity(seeded(checked), of, of, tensors, names=("y", "s"))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("bias", {}),
    ("", {"zero_centered_weight": True}),
    ("bias residual", {}),
    ("bias residual rowscale", {}),
    ("residual x1", {}),
    ("bias x1 weight1 bias1", {}),
    ("bias weight1 residual", {}),
]


@by_dtype
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(("names", "named"), CASES, ids=lambda case: str(case))
def test_layer_norm_fn(
    names: str, named: dict[str, Any], dropout_p: float, dtype: torch.dtype
) -> None:
    tensors = tensors_of(dtype, names, FP32)

    def call(weight: Tensor, **given: Tensor) -> Any:
        given.setdefault("bias", None)
        return layer_norm_fn(
            weight=weight, **given, **named, eps=1e-3, dropout_p=dropout_p, prenorm=True
        )

    plus = 1.0 if named else 0.0
    hold(call, tensors, kept=dropout_p > 0, plus=plus)


@pytest.mark.parametrize(
    ("residual", "in_fp32", "wanted"),
    [(None, False, FP16), (None, True, FP32), (FP32, False, FP32), (BF16, True, BF16)],
)
def test_s_has_the_dtype_of_the_residual(
    residual: torch.dtype | None, in_fp32: bool, wanted: torch.dtype
) -> None:
    tensors = tensors_of(FP16, "bias residual" if residual else "bias", FP16)
    if residual:
        tensors["residual"] = draw(*SHAPE, dtype=residual)
    call = functools.partial(
        layer_norm_fn, prenorm=True, residual_in_fp32=in_fp32, eps=1e-3, dropout_p=P
    )
    hold(call, tensors, kept=True, s_dtype=wanted)


def test_a_bias_and_an_output_of_another_dtype() -> None:
    tensors = tensors_of(BF16, "bias residual", FP32)
    tensors["weight"] = tensors["weight"].to(FP16)
    call = functools.partial(layer_norm_fn, prenorm=True, out_dtype=FP32, eps=1e-3)
    hold(call, tensors, y_dtype=FP32)


def test_one_is_added_to_a_weight_in_fp32() -> None:
    """In bfloat16 it would leave three digits of the weight."""
    tensors = tensors_of(FP32, "bias", BF16)
    named = {"prenorm": True, "eps": 1e-3, "zero_centered_weight": True}
    hold(functools.partial(layer_norm_fn, **named), tensors, plus=1.0)


def test_a_plain_call_is_one_fused_call() -> None:
    """The bits of gptkernels.layer_norm, with what that leaves out too."""
    tensors = tensors_of(FP16, "bias residual", FP16)
    wanted = gptkernels.layer_norm(**tensors, eps=1e-6)
    assert torch.equal(layer_norm_fn(**tensors), wanted)
    old = dropout_add_layer_norm(
        tensors["x"], tensors["residual"], tensors["weight"], tensors["bias"], 0.0, 1e-6
    )
    assert torch.equal(old, wanted)
    plain = {name: x for name, x in tensors.items() if name != "residual"}
    found = interface.layer_norm(**plain, epsilon=1e-6)
    assert torch.equal(found, gptkernels.layer_norm(**plain, eps=1e-6))


def test_the_masks_are_returned() -> None:
    tensors = tensors_of(FP16, "bias x1 weight1 bias1", FP16)
    call = functools.partial(layer_norm_fn, **tensors, return_dropout_mask=True, prenorm=True)
    y, y1, s, mask, mask1 = seeded(call)(dropout_p=P)
    kept, kept1 = masks(tensors)
    assert torch.equal(mask, kept)
    assert torch.equal(mask1, kept1)
    assert not torch.equal(kept, kept1)
    assert all(map(torch.equal, seeded(call)(dropout_p=P, prenorm=False)[:2], (y, y1)))
    assert not s[~kept & ~kept1].any()
    assert call()[3:] == (None, None)
    tensors = tensors_of(FP16, "bias", FP16)
    y, mask = layer_norm_fn(**tensors, return_dropout_mask=True)[:2]
    assert mask is None


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_dropout_add_layer_norm(dropout_p: float) -> None:
    tensors = tensors_of(FP16, "bias residual layerscale rowscale", FP32)
    tensors["residual"] = tensors["residual"].float()

    def call(x: Tensor, **given: Any) -> Any:
        found = dropout_add_layer_norm(
            x, **given, dropout_p=dropout_p, epsilon=1e-3, prenorm=True, return_dropout_mask=True
        )
        y, s, mask = found
        assert mask.dtype == torch.uint8
        assert torch.equal(mask.bool(), masks({})[0] if dropout_p else torch.ones_like(mask.bool()))
        return y, s

    hold(call, tensors, kept=dropout_p > 0, s_dtype=FP32)


def test_dropout_add_layer_norm_parallel_residual() -> None:
    tensors = tensors_of(FP16, "x1 residual bias weight1 bias1", FP16)

    def call(x: Tensor, weight: Tensor, bias: Tensor, **given: Any) -> Any:
        y0, y1, s, mask0, mask1 = interface.dropout_add_layer_norm_parallel_residual(
            x, weight0=weight, bias0=bias, **given, dropout_p=P, epsilon=1e-3, prenorm=True,
            return_dropout_mask=True,
        )  # fmt: skip
        assert not torch.equal(mask0, mask1)
        return y0, y1, s

    hold(call, tensors, kept=True)
    arguments = [tensors[name] for name in ("x", "x1", "residual", "weight", "bias")]
    y0, y1 = interface.dropout_add_layer_norm_parallel_residual(*arguments, None, None, 0.0, 1e-3)
    assert y0.shape == SHAPE
    assert y1 is None


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_linear_fn(autocast: bool) -> None:
    tensors = tensors_of(FP16, "bias residual", FP32)
    w, b = draw(40, C, dtype=FP32), draw(40, dtype=FP32)
    y, s = layer_norm_fn(**tensors, prenorm=True)
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        out, found = interface.layer_norm_linear_fn(
            tensors["x"], tensors["weight"], tensors["bias"], w, b, tensors["residual"],
            prenorm=True,
        )  # fmt: skip
    dtype = BF16 if autocast else FP16
    assert torch.equal(out, F.linear(y.to(dtype), w.to(dtype), b.to(dtype)))
    assert torch.equal(found, s)
    with pytest.raises(NotImplementedError, match="is_rms_norm is not supported"):
        interface.layer_norm_linear_fn(s, None, None, w, b, is_rms_norm=True)


def test_the_module_drops_in_training_alone() -> None:
    module = interface.DropoutAddLayerNorm(C, prenorm=True, p=P, device=DEVICE, dtype=FP16)
    assert [*module.state_dict()] == ["weight", "bias"]
    x = draw(*SHAPE, dtype=FP16)
    wanted = seeded(dropout_add_layer_norm)(x, x, module.weight, module.bias, P, 1e-5, prenorm=True)
    assert all(map(torch.equal, seeded(module)(x, x), wanted))
    plain = dropout_add_layer_norm(x, x, module.weight, module.bias, 0.0, 1e-5, prenorm=True)
    assert all(map(torch.equal, module.eval()(x, x), plain))


def test_a_call_leaves_the_generator_where_one_draw_does() -> None:
    """To ask for the mask changes no random number."""
    tensors = tensors_of(FP16, "bias", FP16)
    wanted = run(seeded(functools.partial(layer_norm_fn, dropout_p=P)), tensors)
    after = torch.rand(3)
    asked = functools.partial(layer_norm_fn, dropout_p=P, return_dropout_mask=True)
    found = run(seeded(lambda **given: asked(**given)[0]), tensors)
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"is_rms_norm": True}, "is_rms_norm is not supported"),
        ({"out": torch.empty(SHAPE)}, "out is not supported"),
        ({"residual_out": torch.empty(SHAPE)}, "residual_out is not supported"),
        ({"x1": torch.ones(SHAPE), "rowscale": torch.ones(SHAPE[:-1])}, "rowscale must be None"),
        ({"bias1": torch.ones(C)}, "bias1 must be None without weight1"),
        ({"weight": None}, "weight must be a torch.Tensor, got NoneType"),
        ({"weight": None, "zero_centered_weight": True}, "weight must be a torch.Tensor"),
        ({"weight1": torch.ones(5)}, r"weight1 must have shape \(96,\)"),
        ({"weight1": torch.ones(C), "bias1": torch.ones(5)}, r"bias1 must have shape \(96,\)"),
        ({"out_dtype": torch.int32}, "out_dtype must be float32, bfloat16 or float16, got torch.i"),
        ({"rowscale": 2.0}, "rowscale must be a torch.Tensor, got float"),
        ({"x1": 2.0}, "x1 must be a torch.Tensor, got float"),
        ({"eps": "a"}, "eps must be a number, got 'a'"),
        ({"x1": torch.ones(C)}, "x1 must have shape"),
        ({"rowscale": torch.ones(C)}, "rowscale must have shape"),
        ({"residual": torch.ones(C)}, "residual must have shape"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else None,
)
def test_wrong_arguments(wrong: dict[str, Any], sentence: str) -> None:
    tensors = tensors_of(FP32, "bias", FP32)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=sentence):
        layer_norm_fn(**{**tensors, **wrong})


def test_wrong_arguments_of_the_others() -> None:
    x, weight, bias = tensors_of(FP32, "bias", FP32).values()
    old = interface.dropout_add_layer_norm_parallel_residual
    with pytest.raises(ValueError, match="bias1 must be None without weight1"):
        old(x, None, None, weight, bias, None, bias, 0.0, 1e-5)
    linear = functools.partial(interface.layer_norm_linear_fn, x, weight, bias)
    with pytest.raises(ValueError, match=r"linear_weight must have shape \(40, 96\)"):
        linear(torch.ones(40, 5), None)
    with pytest.raises(ValueError, match=r"linear_bias must have shape \(40,\)"):
        linear(torch.ones(40, C), torch.ones(5))
    with pytest.raises(ValueError, match="p must be between 0 and 1, got 3"):
        interface.DropoutAddLayerNorm(C, p=3)
    with pytest.raises(TypeError, match="eps must be a number, got 'a'"):
        gptkernels.LayerNorm(C, eps="a")
