"""The ops with DTensors: on four ranks, two for the batch and two for the heads or the tokens, the
results and gradients of the whole are right; what no rank can compute alone is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from op_inputs import attention_inputs, gelu_mlp_inputs, int32, layer_norm_inputs, varlen_inputs
from op_inputs import linear_cross_entropy_inputs as loss_inputs
from ranks import needs_gloo, on_ranks

import gptkernels
from gptkernels.flash_attn_interface import flash_attn_with_kvcache
from gptkernels.truth import baseline, parity, reference
from gptkernels.truth.yardstick import FullSums

pytestmark = needs_gloo

_MESH = (2, 2)


def _cases() -> dict[str, tuple[str, dict[str, Any], dict[str, str], dict[str, Any], str]]:
    """name -> op, tensors, where the mesh's two dimensions cut each ("r": Replicate), options, and
    where they cut the results ("p": Partial)."""
    heads = dict(q="02", k="02", v="02")
    lone = dict(q="r2", k="rr", v="rr")  # one key head, which both halves of the query heads read
    rows = dict(x="01", residual="01", weight="rr", bias="rr")
    weights = dict(w1="rr", b1="rr", w2="rr", b2="rr")
    head = dict(x="10", weight="rr", bias="rr", targets="10")
    lengths, ends = int32(17, 9, 30), int32(0, 20, 27)
    mask = torch.randn(4, 20, 24)
    caches = attention_inputs(4, 2, 40, 4, 2)
    caches = dict(q=caches["q"], k_cache=caches["k"], v_cache=caches["v"])
    caches["cache_lengths"] = int32(7, 40, 12, 25)
    pages = dict(zip(caches, attention_inputs(12, 2, 16, 4, 2).values(), strict=False))
    pages |= dict(q=caches["q"], cache_lengths=caches["cache_lengths"])
    pages["block_table"] = torch.randperm(12).view(4, 3).int()
    decoded = dict(q="02", k_cache="02", v_cache="02", cache_lengths="0r")
    paged = decoded | dict(k_cache="r2", v_cache="r2", block_table="0r")
    return {
        "batch and heads": (
            "attention",
            attention_inputs(3, 30, 30, 8, 4) | dict(key_lengths=lengths, sinks=torch.randn(8)),
            heads | dict(key_lengths="0r", sinks="r0"),
            dict(alibi_slopes=[0.1 * n for n in range(8)], window=(20, 0), return_lse=True),
            "02 01",
        ),
        "a mask of heads": (
            "attention",
            attention_inputs(2, 20, 24, 4) | dict(attn_mask=mask, alibi_slopes=torch.rand(2, 4)),
            heads | dict(attn_mask="r0", alibi_slopes="01"),
            dict(causal=False),
            "02",
        ),
        "one key head": ("attention", attention_inputs(1, 40, 40, 4, 1), lone, {}, "r2"),
        "packed": (
            "attention_varlen",
            varlen_inputs([20, 7], [20, 7], 4, 2) | dict(cu_seqlens_q=ends, cu_seqlens_k=ends),
            dict(q="r1", k="r1", v="r1", cu_seqlens_q="rr", cu_seqlens_k="rr"),
            dict(max_seqlen_q=20, max_seqlen_k=20, return_lse=True),
            "r1 r0",
        ),
        "a cache": ("attention_decode", caches, decoded, dict(return_lse=True), "02 01"),
        "pages": ("attention_decode", pages, paged, {}, "02"),
        "rows of layer_norm": (
            "layer_norm",
            layer_norm_inputs(1, 25, 32, residual=torch.float32),
            rows,
            dict(prenorm=True),
            "01 01",
        ),
        "rows of gelu_mlp": (
            "gelu_mlp",
            gelu_mlp_inputs(4, 1, 24, 48),
            weights | dict(x="10"),
            {},
            "10",
        ),
        "losses": (
            "linear_cross_entropy",
            loss_inputs(1, 35, 16, 40),
            head,
            dict(reduction="none"),
            "10",
        ),
        "a sum": (
            "linear_cross_entropy",
            loss_inputs(4, 9, 16, 40, bias=True),
            head,
            dict(reduction="sum", z_loss=0.1),
            "pp",
        ),
        "a mean": ("linear_cross_entropy", loss_inputs(1, 35, 16, 40), head, {}, "pp"),
    }


def _places(word: str) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    kinds = {"r": Replicate(), "p": Partial()}
    return [kinds[letter] if letter in kinds else Shard(int(letter)) for letter in word]


def _hold(
    mesh: Any, op: str, given: dict[str, Any], cuts: dict[str, str], options: Any, results: str
) -> list[str]:
    """What is wrong with a call."""
    from torch.distributed.tensor import distribute_tensor

    given = {key: value for key, value in given.items() if value is not None}
    differentiable = op != "attention_decode"
    generator = torch.Generator().manual_seed(5)

    def run(home: Any, inputs: Any, cotangents: Any = None) -> parity.Results:
        call = getattr(home, op)
        return parity.run(
            lambda **x: call(**x, **options), inputs, differentiable, generator, cotangents
        )

    truth = run(reference, {k: parity.upcast(v) for k, v in given.items()})
    with FullSums():
        yardstick = run(baseline, given, truth.cotangents)
    leaves = {
        key: distribute_tensor(value, mesh, _places(cuts[key])).requires_grad_(
            differentiable and value.is_floating_point()
        )
        for key, value in given.items()
    }
    found = getattr(gptkernels, op)(**leaves, **options)
    found = list(found) if isinstance(found, tuple) else [found]
    wrong = [
        f"result {number} is {result.placements}"
        for number, (result, word) in enumerate(zip(found, results.split(), strict=True))
        if list(result.placements) != _places(word)
    ]
    wholes = [result.full_tensor() for result in found]
    measured = [
        parity.compare(*triple, k=parity.K_FORWARD)
        for triple in zip(wholes, yardstick.outputs, truth.outputs, strict=True)
    ]
    if differentiable:
        wanted = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
        cotangents = [c.to(whole.dtype) for c, whole in zip(truth.cotangents, wholes, strict=True)]
        gradients = torch.autograd.grad(wholes, list(wanted.values()), cotangents)
        for key, gradient in zip(wanted, gradients, strict=True):
            # A part of the sum where the mesh cuts the results, but not this tensor.
            axes = zip(cuts[key], results.split()[0], strict=True)
            word = "".join("p" if own == "r" != cut else own for own, cut in axes)
            if list(gradient.placements) != _places(word):
                wrong.append(f"the gradient of {key} is {gradient.placements}")
            triple = gradient.full_tensor(), yardstick.gradients[key], truth.gradients[key]
            measured.append(parity.compare(*triple, k=parity.K_GRADIENT, name=f"d{key}"))
    return wrong + [str(m) for m in measured if not m.passed]


def _work(rank: int, world: int) -> dict[str, list[str]]:
    gptkernels.layer_norm(torch.ones(2, 8), torch.ones(8))
    early = [name for name in sys.modules if name.startswith("torch.distributed.tensor")]
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", _MESH)
    torch.manual_seed(0)
    return {"imports": early} | {name: _hold(mesh, *case) for name, case in _cases().items()}


def test_the_whole_is_right(tmp_path: Path) -> None:
    found, _ = on_ranks(4, tmp_path, _work)
    assert [{name: wrong for name, wrong in each.items() if wrong} for each in found] == [{}] * 4


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """Of two ranks, of which this process is the second; nobody else is there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def _cut(mesh: Any, tensors: dict[str, Any], cuts: str) -> dict[str, Any]:
    """DTensors of these shapes; what a rank holds of them is not looked at."""
    from torch.distributed.tensor import DTensor

    words = iter(cuts.split())
    return {
        key: value
        if value is None
        else DTensor.from_local(
            value, mesh, _places(next(words)), shape=value.shape, stride=value.stride()
        )
        for key, value in tensors.items()
    }


_LONGEST = dict(max_seqlen_q=8, max_seqlen_k=8)
_ENDS = dict(cu_seqlens_q=int32(0, 8), cu_seqlens_k=int32(0, 8))


@pytest.mark.parametrize(
    ("op", "tensors", "cuts", "options", "said"),
    [
        ("attention", attention_inputs(), "1 1 1", {}, "q Shard(0), k Shard(0), v Shard(0); or"),
        ("attention", attention_inputs(), "3 3 3", {}, "q Shard(2), k Shard(2), v Shard(2),"),
        ("attention", attention_inputs(), "2 r r", {}, "k Shard(2), v Shard(2)"),
        ("attention", attention_inputs(), "p r r", {}, "got q (1, 20, 2, 16) (Partial(sum),)"),
        ("attention", attention_inputs(H=3), "2 2 2", {}, "into parts of one size of H"),
        ("attention", attention_inputs(H=6, Hk=3), "2 2 2", {}, "into parts of one size of H"),
        ("attention", attention_inputs(H=6, Hk=1), "2 2 2", {}, "k Replicate, v Replicate"),
        ("attention_varlen", varlen_inputs([8], [8]) | _ENDS, "0 0 0 r r", _LONGEST, "q Shard(1)"),
        ("attention_varlen", varlen_inputs([8], [8]) | _ENDS, "0 r r r r", _LONGEST, "q Shard(1)"),
        ("layer_norm", layer_norm_inputs(2, 8, 4), "2 0 0", {}, "x Shard(1), weight Replicate"),
        ("gelu_mlp", gelu_mlp_inputs(8, 4, 6, biases=False), "r 0 1", {}, "w1 Replicate"),
        ("linear_cross_entropy", loss_inputs(8, 4, 9), "r 0 r", {}, "weight Replicate"),
        ("linear_cross_entropy", loss_inputs(8, 4, 9), "0 r r", {}, "targets Shard(0)"),
    ],
)
def test_other_placements_are_refused(
    mesh: Any, op: str, tensors: dict[str, Any], cuts: str, options: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{op} takes DTensors that are Replicate, or") as error:
        getattr(gptkernels, op)(**_cut(mesh, tensors, cuts), **options)
    assert said in str(error.value)


def test_dropout_is_refused(mesh: Any) -> None:
    given = _cut(mesh, attention_inputs(2), "0 0 0")
    with pytest.raises(NotImplementedError, match=r"^attention has no dropout on DTensors, since"):
        gptkernels.attention(**given, dropout_p=0.1)
    given = _cut(mesh, layer_norm_inputs(4, 8), "0 r r")
    with pytest.raises(NotImplementedError, match=r"^layer_norm has no dropout on DTensors, since"):
        gptkernels.layer_norm(**given, dropout_p=0.1)


def test_other_tensors_are_refused(mesh: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    tensors = layer_norm_inputs(4, 8, bias=False)
    given = _cut(mesh, tensors, "0 r")
    with pytest.raises(TypeError, match=r"^weight must be a DTensor, as x is, got Tensor: "):
        gptkernels.layer_norm(given["x"], tensors["weight"])
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        gptkernels.layer_norm(tensors["x"], given["weight"])
    other = _cut(init_device_mesh("cpu", (1, 2)), tensors, "rr rr")["weight"]
    with pytest.raises(ValueError, match=r"^weight must be on the device mesh of x, "):
        gptkernels.layer_norm(given["x"], other)
    given = _cut(mesh, attention_inputs() | dict(q=torch.ones(2, 20, 2, 16)), "0 r r")
    with pytest.raises(ValueError, match=r"^k must have the size 2 in dimension 0, as another"):
        gptkernels.attention(**given)
    given = _cut(mesh, attention_inputs(), "r r r") | dict(key_lengths=int32(3))
    with pytest.raises(TypeError, match=r"^key_lengths must be a DTensor, as q is, got Tensor: "):
        gptkernels.attention(**given)


def test_caches_that_are_written_are_refused(mesh: Any) -> None:
    """It was asked for a DTensor of lengths, an argument that this function does not have."""
    given = _cut(mesh, dict(q=torch.ones(4, 1, 4, 8), cache=torch.ones(4, 9, 4, 8)), "2 2")
    with pytest.raises(NotImplementedError, match=r"^flash_attn_with_kvcache takes no DTensors"):
        flash_attn_with_kvcache(given["q"], given["cache"], given["cache"], cache_seqlens=3)


def test_a_graph_has_one_piece(mesh: Any) -> None:
    given = _cut(mesh, layer_norm_inputs(4, 8, 64, bias=False), "1 r")
    call = functools.partial(gptkernels.layer_norm, **given, impl="torch")
    found, wanted = torch.compile(call, fullgraph=True, backend="aot_eager")(), call()
    assert found.placements == wanted.placements
    assert torch.equal(found.to_local(), wanted.to_local())
