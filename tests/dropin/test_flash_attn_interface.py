"""flash_attn_interface: flash-attn's signatures, and attention's results against the truth."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE, FP16, FP32
from op_inputs import attention_inputs, ends, in_pages, int32, varlen_inputs
from right import run, seeded
from torch import Tensor

from gptkernels import flash_attn_interface as interface
from gptkernels.core import philox
from gptkernels.flash_attn_interface import dense, varlen
from gptkernels.truth import baseline, parity, reference

_DROPPING = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
_ENDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
# Those of flash-attn 2.8.3.
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {_DROPPING}",
    "flash_attn_kvpacked_func": f"q, kv, {_DROPPING}",
    "flash_attn_qkvpacked_func": f"qkv, {_DROPPING}",
    "flash_attn_varlen_func": f"q, k, v, {_ENDS}, {_DROPPING}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {_ENDS}, {_DROPPING}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_DROPPING}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
    "index_first_axis": "input, indices",
    "index_put_first_axis": "values, indices, first_axis_dim",
    "pad_input": "hidden_states, indices, batch, seqlen",
    "unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    "layer_norm": "x, weight, bias, epsilon",
    "layer_norm_fn": "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, "
    "eps=1e-06, dropout_p=0.0, rowscale=None, prenorm=False, residual_in_fp32=False, "
    "zero_centered_weight=False, is_rms_norm=False, return_dropout_mask=False, out_dtype=None, "
    "out=None, residual_out=None",
    "layer_norm_linear_fn": "x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, "
    "eps=1e-06, prenorm=False, residual_in_fp32=False, is_rms_norm=False",
    "dropout_add_layer_norm": "x0, residual, weight, bias, dropout_p, epsilon, rowscale=None, "
    "layerscale=None, prenorm=False, residual_in_fp32=False, return_dropout_mask=False",
    "dropout_add_layer_norm_parallel_residual": "x0, x1, residual, weight0, bias0, weight1, "
    "bias1, dropout_p, epsilon, prenorm=False, residual_in_fp32=False, return_dropout_mask=False",
    "DropoutAddLayerNorm": "hidden_size, prenorm=False, p=0.0, eps=1e-05, "
    "residual_in_fp32=False, device=None, dtype=None",
}


def test_the_signatures_are_those_of_flash_attn() -> None:
    assert {*SIGNATURES} == {*interface.__all__}
    for name, wanted in SIGNATURES.items():
        parameters = inspect.signature(getattr(interface, name)).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert str(inspect.Signature(bare)) == f"({wanted})", name


def formula(of: Any, name: str, seed: int, named: dict[str, Any]) -> Callable[..., Any]:
    """The function `name` of the truth, or of the yardstick, with flash-attn's arguments."""
    options = {key: value for key, value in named.items() if key != "deterministic"}
    options["window"] = options.pop("window_size", None)
    options.setdefault("causal", False)
    options["return_lse"] = options.pop("return_attn_probs", False)
    if options.get("dropout_p"):
        torch.manual_seed(seed)
        options["rng"] = philox.draw(torch.device(DEVICE))

    def call(**tensors: Tensor) -> Any:
        found = getattr(of, name)(**tensors, **options)
        if not isinstance(found, tuple):
            return found
        return found[0], found[1].masked_fill(found[1] == -math.inf, math.inf)

    return call


def hold(function: Any, name: str, tensors: dict[str, Tensor], **named: Any) -> None:
    """Holds flash-attn's function, of unpacked tensors, to the truth; of its three results, the
    first two."""

    def call(**tensors: Tensor) -> Any:
        found = function(**tensors, **named)
        return found[:2] if isinstance(found, tuple) else found

    of = [formula(each, name, 3, named) for each in (baseline, reference)]
    parity.assert_parity(seeded(call, 3), *of, tensors, names=("out", "lse"))


def slopes(*shape: int) -> Tensor:
    return torch.linspace(0.1, 1.1, math.prod(shape), device=DEVICE).view(shape)


OPTIONS = [
    {},
    {"causal": True, "return_attn_probs": True},
    {"window_size": (5, 2), "softcap": 3.0, "return_attn_probs": True},
    {"causal": True, "softmax_scale": 0.3, "alibi_slopes": slopes(4)},
    {"alibi_slopes": slopes(2, 4), "window_size": (-1, 4), "return_attn_probs": True},
    {"causal": True, "dropout_p": 0.3, "deterministic": True, "return_attn_probs": True},
]
each_option = pytest.mark.parametrize("named", OPTIONS, ids=lambda named: "-".join(named))


@each_option
def test_flash_attn_func(named: dict[str, Any]) -> None:
    # More queries than keys: a causal query may see none.
    tensors = attention_inputs(2, 40, 33, 4, 2, 24, FP16, seed=None)
    hold(interface.flash_attn_func, "attention", tensors, **named)


def test_any_width_dtype_and_stride() -> None:
    """float32, which flash-attn does not take, and a last stride that is not 1."""
    tensors = attention_inputs(1, 30, H=3, D=11, dtype=FP32, seed=None)
    strided = {name: x.transpose(1, 3).contiguous().transpose(1, 3) for name, x in tensors.items()}
    assert strided["q"].stride(-1) != 1
    hold(interface.flash_attn_func, "attention", strided, causal=True)


def kv_packed(q: Tensor, k: Tensor, v: Tensor, *ends: Any, **named: Any) -> Any:
    kv = torch.stack((k, v), -3)
    if ends:
        return interface.flash_attn_varlen_kvpacked_func(q, kv, *ends, **named)
    return interface.flash_attn_kvpacked_func(q, kv, **named)


def qkv_packed(q: Tensor, k: Tensor, v: Tensor, *ends: Any, **named: Any) -> Any:
    qkv = torch.stack((q, k, v), -3)
    if ends:
        cu_seqlens, _, longest, _ = ends
        return interface.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, **named)
    return interface.flash_attn_qkvpacked_func(qkv, **named)


ALL = {
    "softmax_scale": 0.4, "causal": True, "window_size": (9, -1), "softcap": 4.0,
    "alibi_slopes": slopes(4), "deterministic": True, "return_attn_probs": True,
}  # fmt: skip


def test_the_packed_forms_hand_every_argument_on() -> None:
    tensors = attention_inputs(2, 30, H=4, D=16, seed=None)
    named = {**ALL, "dropout_p": 0.25}
    call = functools.partial(interface.flash_attn_func, **named)
    wanted = run(seeded(lambda **x: call(**x)[0]), tensors)
    for packed in (kv_packed, qkv_packed):
        found = run(seeded(lambda packed=packed, **x: packed(**x, **named)[0]), tensors)
        assert all(map(torch.equal, found, wanted))
    results = seeded(call)(**tensors)
    for packed in (kv_packed, qkv_packed):
        found = seeded(packed)(**tensors, **named)
        assert all(map(torch.equal, found, results))


LENGTHS = [7, 0, 40, 19]


@each_option
def test_flash_attn_varlen_func(named: dict[str, Any]) -> None:
    keys = [9, 3, 35, 19]
    tensors = varlen_inputs(LENGTHS, keys, 4, 2, 24, FP16)
    if named.get("alibi_slopes", torch.empty(0)).dim() == 2:
        named = {**named, "alibi_slopes": slopes(4, 4)}
    lengths = dict(
        cu_seqlens_q=ends(LENGTHS), cu_seqlens_k=ends(keys), max_seqlen_q=40, max_seqlen_k=35
    )
    hold(interface.flash_attn_varlen_func, "attention_varlen", tensors, **lengths, **named)


def test_the_packed_forms_of_sequences_hand_every_argument_on() -> None:
    tensors = varlen_inputs(LENGTHS, LENGTHS, 4, 4, 16)
    sequences = (ends(LENGTHS), ends(LENGTHS), 40, 40)
    named = {**ALL, "dropout_p": 0.25}
    call = seeded(interface.flash_attn_varlen_func)
    wanted = call(*tensors.values(), *sequences, **named)
    for packed in (kv_packed, qkv_packed):
        found = seeded(packed)(*tensors.values(), *sequences, **named)
        assert all(map(torch.equal, found, wanted))


def test_pages_are_gathered() -> None:
    """The same bits, and the same gradients, as of the keys that lie end to end."""
    tensors = varlen_inputs(LENGTHS, LENGTHS, 4, 2, 16)
    sequences = (ends(LENGTHS), ends(LENGTHS), torch.tensor(40), 40)
    page = 8
    caches = {name: torch.zeros(4, 40, 2, 16, device=DEVICE) for name in ("k_cache", "v_cache")}
    begin = 0
    for b, length in enumerate(LENGTHS):
        for name, x in caches.items():
            x[b, :length] = tensors[name[0]][begin : begin + length]
        begin += length
    paged, rest = in_pages({"q": tensors["q"], **caches}, {"cache_lengths": int32(*LENGTHS)}, page)
    call = interface.flash_attn_varlen_func
    wanted = call(*tensors.values(), *sequences, causal=True)
    keys = paged["k_cache"].requires_grad_()
    found = call(
        tensors["q"], keys, paged["v_cache"], *sequences, causal=True,
        block_table=rest["block_table"],
    )  # fmt: skip
    assert torch.equal(found, wanted)
    leaf = tensors["k"].requires_grad_()
    call(tensors["q"], leaf, tensors["v"], *sequences, causal=True).square().sum().backward()
    found.square().sum().backward()
    assert leaf.grad is not None
    assert keys.grad is not None
    assert torch.equal(keys.grad[rest["block_table"][2, 1]], leaf.grad[15:23])


def test_s_dmask_has_the_weights_and_what_was_dropped() -> None:
    """exp(score - largest score), with the sign of the dropout mask."""
    tensors = attention_inputs(2, 40, 33, 4, 2, 24, FP16, seed=None)
    named = {"dropout_p": 0.3, "causal": True, "softcap": 3.0, "alibi_slopes": slopes(4)}
    call = functools.partial(interface.flash_attn_func, **named, return_attn_probs=True)
    *_, found = seeded(call, 3)(**tensors)
    torch.manual_seed(3)
    keep = philox.attention_keep(philox.draw(torch.device(DEVICE)), 0.3, 2, 4, 40, 33)
    del named["dropout_p"]

    def weights(of: Any, tensors: dict[str, Tensor]) -> Tensor:
        """The softmax, which is attention to one value for each key, over its largest weight."""
        eye = torch.eye(33, dtype=tensors["q"].dtype, device=DEVICE)
        v = eye[None, :, None].expand(2, 33, 2, 33).contiguous()
        p = of.attention(tensors["q"], tensors["k"], v, **named).transpose(1, 2)
        return p / p.amax(-1, keepdim=True).masked_fill(p.amax(-1, keepdim=True) == 0, 1)

    truth = weights(reference, {name: parity.upcast(x) for name, x in tensors.items()})
    yardstick = weights(baseline, {name: x.float() for name, x in tensors.items()})
    sign = torch.where(keep, 1, -1)
    verdict = parity.compare(found, yardstick * sign, truth * sign, k=parity.K_FORWARD)
    assert verdict.passed, verdict


def test_s_dmask_of_sequences_is_that_of_each_alone() -> None:
    tensors = varlen_inputs(LENGTHS, LENGTHS, 4, 2, 16)
    named = {"dropout_p": 0.4, "alibi_slopes": slopes(4, 4), "return_attn_probs": True}
    sequences = (ends(LENGTHS), ends(LENGTHS), 41, 43)
    found = seeded(interface.flash_attn_varlen_func)(*tensors.values(), *sequences, **named)[2]
    assert found.shape == (4, 4, 41, 43)
    assert not found[:, :, 40:].any()
    assert not found[0, :, :7, 7:].any()
    # Sequence 2, as entry 2 of a batch whose other entries are made up.
    batch = [x[None, 7:47].expand(4, -1, -1, -1) for x in tensors.values()]
    alone = seeded(interface.flash_attn_func)(*batch, **named)[2]
    assert torch.equal(found[2, :, :40, :40], alone[2])


def test_s_dmask_is_empty_without_dropout() -> None:
    tensors = attention_inputs(dtype=FP16)
    _, lse, p = interface.flash_attn_func(**tensors, return_attn_probs=True)
    assert (lse.shape, lse.dtype) == ((1, 2, 20), FP32)
    assert (p.shape, p.dtype) == ((0,), FP16)


def test_flash_attn_s_own_ways_to_write_arguments() -> None:
    """A window in a tensor, any bound below 0, and a softcap below 0."""
    tensors = attention_inputs()
    call = functools.partial(interface.flash_attn_func, **tensors)
    assert torch.equal(call(window_size=torch.tensor([3, 2])), call(window_size=[3, 2]))
    assert torch.equal(call(window_size=(-7, 2)), call(window_size=(-1, 2)))
    assert torch.equal(call(softcap=-1.0), call())


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({"window_size": (3,)}, r"window_size must be a pair \(left, right\) of integers, got \(3"),
        ({"window_size": (1.5, 2)}, "window_size must be a pair"),
        ({"softcap": None}, "softcap must be a number, got None"),
        ({"dropout_p": 1.5, "return_attn_probs": True}, "dropout_p must be between 0 and 1"),
        ({"q": None, "return_attn_probs": True}, "q must be a torch.Tensor, got NoneType"),
        ({"causal": 1}, "causal must be a bool, got 1"),
        ({"alibi_slopes": torch.ones(3)}, "alibi_slopes must have shape"),
    ],
    ids=str,
)
def test_wrong_arguments(named: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        interface.flash_attn_func(**{**attention_inputs(), **named})


def test_wrong_packed_tensors() -> None:
    q = torch.zeros(2, 8, 2, 16)
    with pytest.raises(ValueError, match="qkv must have 5 dimensions with 3 in dimension 2"):
        interface.flash_attn_qkvpacked_func(torch.zeros(2, 8, 2, 2, 16))
    with pytest.raises(ValueError, match="qkv must have 5 dimensions"):
        interface.flash_attn_qkvpacked_func(torch.zeros(2, 8, 3, 16))
    with pytest.raises(ValueError, match="kv must have 4 dimensions with 2 in dimension 1"):
        interface.flash_attn_varlen_kvpacked_func(q[0], q, int32(0, 8), int32(0, 8), 8, 8)
    with pytest.raises(TypeError, match=r"qkv must be a torch.Tensor, got list"):
        interface.flash_attn_qkvpacked_func([])
    with pytest.raises(TypeError, match=r"max_seqlen_k must be an integer, got 8\.5"):
        interface.flash_attn_varlen_func(q[0], q[0], q[0], int32(0, 8), int32(0, 8), 8, 8.5)
    pages = torch.zeros(3, 4, 2, 16)
    call = functools.partial(interface.flash_attn_varlen_func, q[0], pages, pages)
    sequences = (int32(0, 8), int32(0, 8), 8, 8)
    with pytest.raises(ValueError, match="block_table must have pages for the 8 tokens"):
        call(*sequences, block_table=int32(0)[None])
    with pytest.raises(ValueError, match=r"block_table must have shape \(1, pages\)"):
        call(*sequences, block_table=int32(0, 1))
    with pytest.raises(ValueError, match=r"block_table must name pages 0 \.\.\. 2, got 3"):
        call(*sequences, block_table=int32(0, 3)[None])
    with pytest.raises(TypeError, match=r"cu_seqlens_k must be a torch.Tensor, got list"):
        call(int32(0, 8), [0, 8], 8, 8, block_table=int32(0, 1)[None])
    with pytest.raises(TypeError, match=r"block_table must be an int32 tensor .*, got int64"):
        call(*sequences, block_table=int32(0, 1)[None].long())


def test_names_that_are_missing_say_so() -> None:
    with pytest.raises(ImportError, match="has no rms_norm_fn, which flash-attn has: gptkernels"):
        from gptkernels.flash_attn_interface import rms_norm_fn  # noqa: F401
    with pytest.raises(NotImplementedError, match="has no apply_rotary_emb,"):
        _ = interface.apply_rotary_emb
    with pytest.raises(AttributeError, match="did you mean 'flash_attn_func'"):
        _ = interface.flash_attn_fun


@pytest.mark.parametrize(("given", "wanted"), [(True, True), (False, None)])
def test_deterministic_is_handed_on(
    given: bool, wanted: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients on a CPU repeat their bits anyway. False leaves it to PyTorch's own switch."""
    seen: list[Any] = []
    for module, name in ((dense, "attention"), (varlen, "attention_varlen")):
        monkeypatch.setattr(module, name, lambda *_, **named: seen.append(named["deterministic"]))
    q = torch.zeros(8, 2, 16)
    interface.flash_attn_func(q[None], q[None], q[None], deterministic=given)
    sequences = (int32(0, 8), int32(0, 8), 8, 8)
    interface.flash_attn_varlen_func(q, q, q, *sequences, deterministic=given)
    assert seen == [wanted, wanted]


def test_it_compiles() -> None:
    compiled = torch.compile(interface.flash_attn_func, backend="eager", fullgraph=True)
    tensors = attention_inputs(2, 40, H=4, D=24, dtype=FP16, seed=None)
    hold(compiled, "attention", tensors, causal=True, window_size=(5, 0))
