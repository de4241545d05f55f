"""impl="torch" under torch.compile: the graph that the compiler gets holds PyTorch's operators, and
its results pass the parity rule. The other implementations stay ops of their own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from harness import BF16, DEVICE, FP32, of
from op_inputs import (
    attention_inputs,
    cache,
    draw,
    gelu_mlp_inputs,
    int32,
    layer_norm_inputs,
    linear_cross_entropy_inputs,
    varlen_inputs,
    varlen_lengths,
)
from right import assert_right, run
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from gptkernels import (
    attention,
    attention_decode,
    attention_varlen,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
)
from gptkernels.core import philox
from gptkernels.ops.attention.torch import blocks
from gptkernels.truth import parity

MASKS = {"gptkernels.attention_keep.default", "gptkernels.elementwise_keep.default"}
BWD = "gptkernels.attention_bwd.default"


class Compiled:
    """`call` compiled as by Inductor, but for the code that Inductor would write: the graphs run
    operator by operator. `graphs` keeps them, forward before backward."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()
        backend = aot_autograd(
            fw_compiler=self._keep,
            decompositions=select_decomp_table,
            partition_fn=min_cut_rematerialization_partition,
        )
        self._call = torch.compile(call, fullgraph=True, backend=backend)

    def _keep(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(graph)
        return make_boxed_func(graph)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._call(*arguments, **named)

    @property
    def opaque(self) -> list[set[str]]:
        """The ops of gptkernels in each of the graphs."""
        names = ([str(node.target) for node in graph.graph.nodes] for graph in self.graphs)
        return [{name for name in graph if name.startswith("gptkernels")} for graph in names]


@pytest.fixture(autouse=True)
def not_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo would trace what fills the memory."""
    monkeypatch.setattr(parity, "poisoned_outputs", contextlib.nullcontext)


MANY_HEADS = functools.partial(attention_inputs, 2, 40, 44, H=4, Hk=2)
NORM = functools.partial(layer_norm_inputs, 2, 9, 48)
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "layer_norm": (layer_norm, NORM, {}),
    "layer_norm, residual": (
        layer_norm,
        functools.partial(NORM, weight=FP32, residual=FP32),
        {"prenorm": True},
    ),
    "layer_norm, dropout": (layer_norm, functools.partial(NORM, residual=FP32), {"dropout_p": 0.3}),
    "gelu_mlp": (gelu_mlp, lambda **how: gelu_mlp_inputs(2, 7, 24, 40, **how), {}),
    "gelu_mlp, erf": (
        gelu_mlp,
        lambda **how: gelu_mlp_inputs(7, 24, 40, **how),
        {"approximate": "none"},
    ),
    "attention": (attention, functools.partial(attention_inputs, 2, 40), {}),
    "attention, sinks": (
        attention,
        lambda **how: attention_inputs(2, 40, **how) | {"sinks": draw(2)},
        {},
    ),
    "attention, window": (attention, MANY_HEADS, {"window": (9, 3)}),
    "attention, lengths": (attention, MANY_HEADS, {"key_lengths": int32(0, 30)}),
    "attention, formula": (
        attention,
        MANY_HEADS,
        {"softcap": 3.0, "alibi_slopes": [0.5, 1.0, 0.2, 0.1], "return_lse": True},
    ),
    "attention, dropout": (attention, MANY_HEADS, {"dropout_p": 0.3}),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_the_graph_holds_pytorchs_operators(name: str, dtype: torch.dtype) -> None:
    if name in ("attention", "attention, sinks") and DEVICE == "cuda":
        pytest.skip("which of PyTorch's fused ops runs on a GPU cannot be traced")
    op, inputs, options = CALLS[name]
    compiled = Compiled(functools.partial(op, impl="torch"))
    assert_right(compiled, inputs(dtype=dtype), name=op.__name__, **options)
    assert len(compiled.graphs) == 2
    masks = MASKS if "dropout_p" in options else set()
    by_formula = op is attention and options.keys() & {"softcap", "dropout_p"}
    forward, backward = compiled.opaque
    assert forward <= masks
    # The formula's backward pass is for itself: it computes the scores again.
    assert backward == {BWD} if by_formula else backward <= masks


def test_narrow_rows_far_from_zero() -> None:
    """Inductor's formula for a CPU would round their statistics to 16 bits."""
    inputs = layer_norm_inputs(64, 48, dtype=BF16)
    inputs["x"] = inputs["x"] + 30
    assert_right(Compiled(functools.partial(layer_norm, impl="torch")), inputs, name="layer_norm")


def test_autocast_changes_nothing_inside() -> None:
    """It would narrow the formula's products, which are of fp32 tensors."""

    def call(q: Any, k: Any, v: Any) -> Any:
        with torch.autocast(DEVICE, dtype=BF16):
            return attention(q, k, v, softcap=3.0, impl="torch")

    compiled = Compiled(call)
    run(compiled, attention_inputs())
    forward, _ = compiled.graphs
    products = [n for n in forward.graph.nodes if n.target is torch.ops.aten.bmm.default]
    assert {product.meta["val"].dtype for product in products} == {FP32}


@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 4)])
def test_masks_are_ops_on_a_cpu(shape: tuple[int, ...]) -> None:
    rng, ops = philox.draw("cpu"), torch.ops.gptkernels
    torch.library.opcheck(ops.elementwise_keep.default, (rng, 0.3, shape))
    torch.library.opcheck(ops.attention_keep.default, (rng, 0.3, 2, *shape[:2], 4, 3, 1))


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation_keeps_no_pre_activation(recompute: bool) -> None:
    """In a graph of both passes a compiler finds what is computed twice, and would keep it."""
    compiled = Compiled(functools.partial(gelu_mlp, recompute=recompute, impl="torch"))
    run(compiled, gelu_mlp_inputs(7, 24, 40))
    (*_, output) = compiled.graphs[0].graph.nodes
    kept = {tuple(node.meta["val"].shape) for node in output.args[0]}
    assert ((7, 40) in kept) == (not recompute)
    assert compiled.opaque == [set(), {"gptkernels.gelu_mlp_bwd.default"} if recompute else set()]


@pytest.mark.parametrize("name", ["attention, formula", "attention, sinks"])
def test_many_blocks_of_rows_stay_an_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call is traced above, where it is one block."""
    monkeypatch.setattr(blocks, "_SCORES_HELD", 2**10)
    op, inputs, options = CALLS[name]
    compiled = Compiled(functools.partial(op, impl="torch"))
    assert_right(compiled, inputs(), name=op.__name__, **options)
    assert compiled.opaque == [
        {"gptkernels.attention_fwd.default"},
        {BWD},
    ]


def test_what_cannot_be_traced_stays_an_op() -> None:
    sizes = [5, 3], [4, 6]
    compiled = Compiled(functools.partial(attention_varlen, impl="torch"))
    run(functools.partial(compiled, **varlen_lengths(*sizes)), varlen_inputs(*sizes))
    assert compiled.opaque[0] == {"gptkernels.attention_fwd.default"}
    tensors, rest = cache([5, 3])
    compiled = Compiled(functools.partial(attention_decode, impl="torch"))
    compiled(**tensors, **rest)
    assert compiled.opaque == [{"gptkernels.attention_decode_fwd.default"}]


@pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
@pytest.mark.parametrize(
    ("reduction", "second"), [("none", {"gptkernels.linear_cross_entropy_bwd.default"}),
                              ("mean", set())]
)  # fmt: skip
def test_the_loop_over_chunks_stays_an_op(impl: str, reduction: str, second: set[str]) -> None:
    """A graph of it would be one of this number of rows. The gradients of a mean are there."""
    call = functools.partial(linear_cross_entropy, reduction=reduction, impl=impl)
    made = linear_cross_entropy_inputs(40, 10, 20)
    compiled = Compiled(functools.partial(call, targets=made.pop("targets"), bias=made.pop("bias")))
    run(compiled, made)
    assert compiled.opaque == [{"gptkernels.linear_cross_entropy_fwd.default"}, second]


@pytest.mark.parametrize("impl", [of("triton"), of("cuda"), of("cpu")])
def test_kernels_stay_ops(impl: str) -> None:
    compiled = Compiled(functools.partial(layer_norm, impl=impl))
    run(compiled, layer_norm_inputs(3, 32))
    assert compiled.opaque == [
        {"gptkernels.layer_norm_fwd.default"},
        {"gptkernels.layer_norm_bwd.default"},
    ]
