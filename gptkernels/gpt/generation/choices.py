"""By what an engine runs its model, chosen once, before its first request.

With impl="auto" the plan of a call goes by its sizes and by the table that is in use. One slot,
eight slots, and a token with guesses behind it would then run by different ways, whose results
differ in their last bits; and a table that another one replaces would change texts in their middle.
So an engine has one plan for each op: the way that won in all that was measured of the op for
layers like its model's. Where winners differ, or nothing was measured, it is the static plan.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from gptkernels.core import plans
from gptkernels.core.choice import switched_off
from gptkernels.core.plans import Call
from gptkernels.core.tuned import EAGER, EXTERNAL, FORWARD, PYTORCH
from gptkernels.gpt.generation.cache import CachingModel
from gptkernels.nn.layers import MLP, CausalSelfAttention, LayerNorm
from gptkernels.ops.attention import plan as attention_plan
from gptkernels.ops.attention import whole as attention_whole
from gptkernels.ops.attention.options import AttentionOptions, complete, scale
from gptkernels.ops.gelu_mlp import plan as gelu_mlp_plan
from gptkernels.ops.gelu_mlp import whole as gelu_mlp_whole
from gptkernels.ops.layer_norm import plan as layer_norm_plan
from gptkernels.ops.layer_norm import whole as layer_norm_whole

# What differs from one call of a layer to the next.
_VARYING = ("layout", "residual", "prenorm")
_TAKES = {
    "layer_norm": layer_norm_whole.takes,
    "gelu_mlp": gelu_mlp_whole.takes,
    "attention": attention_whole.takes,
}


def choices_of(model: CachingModel) -> plans.Choices:
    """The plan of each op of which one way was measured to be the best for the model's layers,
    whatever the sizes, that can run here, and by which no row depends on the rows beside it.

    Args:
        model: What will be run; its layers with impl="auto" are looked at.

    Returns:
        op -> its plan. An op that is left out has its static plan.

    Raises:
        ValueError: GPTKERNELS_TUNE has a value that it cannot have.
    """
    first = next(model.parameters())
    # The kill switch stands above all tables, of which one without entries has no say.
    if switched_off() or not plans.table(first.device.type).entries:
        return plans.Choices({})
    ways: dict[str, set[str | None]] = {}
    for call in _calls(model.modules(), first):
        ways.setdefault(call.op, set()).add(_way(call))
    return plans.Choices(
        {
            op: plans.of_way(way)
            for op, found in ways.items()
            for way in found
            if way and len(found) == 1
        }
    )


@contextlib.contextmanager
def running(choices: plans.Choices, device_type: str) -> Iterator[None]:
    """In this context the ops run by `choices`, and never by a table."""
    # They are of layers without autocast. A function of PyTorch's would follow it in its own way.
    with plans.only({} if torch.is_autocast_enabled(device_type) else choices):
        yield


def _way(call: Call) -> str | None:
    """The way that won in all classes of such calls; None where there is none, or it may not be
    taken."""
    device_type = str(call.facts["device"])
    facts = {name: value for name, value in call.facts.items() if name not in _VARYING}
    way = plans.table(device_type).unanimous(call.op, FORWARD, EAGER, facts)
    if way is None or plans.unavailable(way, device_type) is not None:
        return None
    external = way.startswith(EXTERNAL)
    if way != PYTORCH and not external:
        return way
    # Each call asks for nothing that such a function lacks, whatever else was measured.
    takes = _TAKES.get(call.op)
    if takes is None or way not in takes(call.facts):
        return None
    # Nobody vouches for what another package does with rows; attention gets those of one text.
    if external:
        return way if call.op == "attention" else None
    # On a CPU, F.gelu rounds the last elements of a thread's share differently.
    return None if call.op == "gelu_mlp" and device_type == "cpu" else way


def _calls(layers: Iterable[nn.Module], first: Tensor) -> Iterator[Call]:
    """A call of each kind that the layers make of tensors like `first`."""
    seen = set()
    for layer in layers:
        for call in _calls_of(layer, first):
            kind = (call.op, tuple(call.facts.items()))
            if kind not in seen:
                seen.add(kind)
                yield call


def _calls_of(layer: nn.Module, first: Tensor) -> Iterator[Call]:
    if getattr(layer, "impl", "") != "auto":  # one with another impl asks for no plan
        return
    if isinstance(layer, LayerNorm):
        x = first.new_empty(1, math.prod(layer.normalized_shape))
        yield layer_norm_plan.described(x, layer.weight, layer.bias, x, 0.0, True, False)
    elif isinstance(layer, MLP) and not layer.not_fused():
        up, down = layer.c_fc, layer.c_proj
        x = first.new_empty(1, up.weight.shape[1])
        options = (layer.approximate, layer.recompute)
        yield gelu_mlp_plan.described(x, up.weight, up.bias, down.weight, down.bias, *options)
    elif isinstance(layer, CausalSelfAttention):
        q = first.new_empty(1, 1, layer.n_head, layer.head_dim)
        k = first.new_empty(1, 1, layer.n_kv_head, layer.head_dim)
        seen = AttentionOptions(softmax_scale=scale(None, q))
        seen = complete(seen, q, causal=True, window=layer.window, alibi_slopes=None)
        given, exactly = ((q, k, k), (1, 1, 1)), torch.are_deterministic_algorithms_enabled()
        yield attention_plan.described("attention", *given, seen, exactly, False)
        lengths = torch.ones(1, dtype=torch.int32, device=q.device)
        seen = seen._replace(key_lengths=lengths)
        yield attention_plan.described("attention_decode", *given, seen, False, False)
