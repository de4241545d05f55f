"""torch.export and AOTInductor: exported graphs take other sizes, are saved and loaded, and have
derivatives where they hold PyTorch's operators. Elsewhere a derivative is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DEVICE, FP32, command, of
from op_inputs import (
    attention_inputs,
    gelu_mlp_inputs,
    layer_norm_inputs,
    linear_cross_entropy_inputs,
)
from right import assert_right, assert_same
from torch import Tensor, nn
from torch.export import Dim, export, load, save

import gptkernels
from gptkernels import attention, gelu_mlp, layer_norm, linear_cross_entropy

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="a graph does not ask which of PyTorch's fused ops runs on a GPU"
)
ROWS = Dim("rows", max=4096)


class Call(nn.Module):
    """A call with keywords as a module that can be exported."""

    def __init__(self, call: Callable[..., Any], names: list[str]) -> None:
        super().__init__()
        self.call, self.names = call, names

    def forward(self, *tensors: Tensor) -> Any:
        return self.call(**dict(zip(self.names, tensors, strict=True)))


def exported(call: Callable[..., Any], tensors: dict[str, Any], strict: bool = False) -> Any:
    """A function like `call`, by a graph that was exported with these tensors. The first dimension
    but one of those with two or more rows may then have any size."""
    sizes = tuple({1: ROWS} if name in _WITH_ROWS else None for name in tensors)
    model = Call(call, list(tensors))
    graph = export(model, tuple(tensors.values()), dynamic_shapes=(sizes,), strict=strict).module()
    return lambda **named: graph(*named.values())


_WITH_ROWS = {"q", "k", "v", "x", "residual", "targets"}
CALLS: dict[str, tuple[Callable[..., Any], Callable[[int], dict[str, Any]], dict[str, Any]]] = {
    "attention": (attention, lambda rows: attention_inputs(2, rows, H=4, Hk=2), {}),
    "every key": (attention, lambda rows: attention_inputs(2, rows), {"causal": False}),
    "layer_norm": (
        layer_norm,
        lambda rows: layer_norm_inputs(2, rows, 300, residual=FP32),
        {"prenorm": True, "dropout_p": 0.3},
    ),
    "gelu_mlp": (gelu_mlp, lambda rows: gelu_mlp_inputs(2, rows, 256, 300), {}),
    "losses": (
        linear_cross_entropy,
        lambda rows: linear_cross_entropy_inputs(2, rows, 40, 300, bias=True),
        {"reduction": "none", "z_loss": 1e-2, "softcap": 5.0},
    ),
}


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in CALLS), ("attention", True), ("losses", True)]
)
def test_derivatives(name: str, strict: bool) -> None:
    op, inputs, options = CALLS[name]
    call = exported(functools.partial(op, **options, impl="torch"), inputs(7), strict)
    given = inputs(150)
    named = functools.partial(_of, call, list(given))
    assert_right(named, given, name=op.__name__, **options)


def _of(call: Callable[..., Any], names: list[str], **named: Any) -> Any:
    return call(**{name: named[name] for name in names})  # the options are in the graph


@pytest.mark.parametrize(
    ("impl", "options"),
    [
        of("cpu", {}),
        of("torch", {"window": (3, 0)}),
        of("torch", {"return_lse": True}),
        of("torch", {"sinks": torch.ones(2)}),
    ],
)
@pytest.mark.filterwarnings("ignore:gptkernels..attention_fwd")  # PyTorch warns of the same
def test_a_derivative_that_no_graph_has_is_refused(impl: str, options: dict[str, Any]) -> None:
    call = functools.partial(attention, **options, impl=impl)
    graph = exported(call, attention_inputs(1, 5))
    leaves = {k: v.requires_grad_() for k, v in attention_inputs(1, 9).items()}
    found, wanted = graph(**leaves), call(**leaves)
    found, wanted = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
    assert_same(found, wanted)
    with pytest.raises(NotImplementedError, match="has no derivative in an exported graph"):
        found[-1].sum().backward()


@pytest.mark.parametrize(("impl", "strict"), [of("torch", False), of("cpu", True)])
def test_a_gpt_is_saved_and_loaded(impl: str, strict: bool, tmp_path: Path) -> None:
    """Its head is the embedding, and it returns its loss."""
    config = gptkernels.GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=40, block_size=64)
    model = gptkernels.GPT(config).set_impl(impl).eval()
    sizes = {0: Dim("texts"), 1: Dim("tokens", max=64)}
    few, many = torch.randint(40, (2, 6)), torch.randint(40, (3, 17))
    graph = export(model, (few, few), dynamic_shapes=(sizes, sizes), strict=strict)
    ops = {str(node.target) for node in graph.graph.nodes if "gptkernels" in str(node.target)}
    assert bool(ops) == (impl == "cpu")
    save(graph, tmp_path / "gpt.pt2")
    found = load(tmp_path / "gpt.pt2").module()(many, many)
    torch.testing.assert_close(found, model(many, many))


def test_a_process_that_loads_a_graph_registers_every_op() -> None:
    names = "{n for n in torch._C._dispatch_get_all_op_names() if n.startswith('gptkernels::')}"
    code = f"import gptkernels.registered, torch; print(len({names}))"
    found = command(sys.executable, "-c", code, check=True).stdout
    assert int(found) == len(eval(names)) >= 11


def test_a_package_of_aot_inductor(tmp_path: Path) -> None:
    layer = gptkernels.CausalSelfAttention(16, 2)
    layer.impl = "torch"
    with torch.no_grad():
        graph = export(layer, (torch.randn(2, 9, 16),), dynamic_shapes=({1: ROWS},))
        package = torch._inductor.aoti_compile_and_package(
            graph,
            package_path=str(tmp_path / "layer.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
        x = torch.randn(2, 14, 16)
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), layer(x))
