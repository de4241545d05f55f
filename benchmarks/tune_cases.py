"""What `make gpu-tune` checks and times: for each problem of `predict.PROBLEMS` and each direction,
every way in which the CUDA C++ kernels are built, the tiles of Triton's (`tuning.tiles`), and what
others offer for the same.

A case's result is checked on the inputs that are timed, against the truth in fp64: of attention the
heads of one key head, of the MLP's products the first and the last rows, of LayerNorm all.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptkernels
from gptkernels.bench import dry_run, predict
from gptkernels.bench.case import Call, Makers
from gptkernels.bench.cases.workload import normal
from gptkernels.bench.dry_run import Problem
from gptkernels.bench.peers import Peers
from gptkernels.bench.peers import attention as attention_peers
from gptkernels.bench.peers import layer_norm as layer_norm_peers
from gptkernels.bench.peers.compiled import repeatable
from gptkernels.core import cuda_products as products
from gptkernels.core.choice import unavailable
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.layer_norm.op import layer_norm_fwd
from gptkernels.truth import baseline, parity, reference
from gptkernels.tuning import tiles as triton_tiles

_K = {"forward": parity.K_FORWARD, "backward": parity.K_GRADIENT}
_EDGE_ROWS = 64  # of the MLP's products, at either end
# The others are slower, or compile for longer than the run has.
_ATTENTION_PEERS = ("SDPA cuDNN", "SDPA flash", "FlashAttention-4", "FlashAttention-3")
_LAYER_NORM_PEERS = ("torch.compile", "eager PyTorch", "Liger", "quack")


@dataclass(frozen=True)
class Way:
    """One of our kernels for a case."""

    name: str
    impl: str  # "cuda" or "triton"
    chosen: bool  # by the launcher's own rule
    call: Call
    # For the row: the build's number, -1 for the launcher's own choice; or the tiles.
    made: dict[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    """One direction of a problem, or one product of it. `check` compares what a way's call returned
    with the truth; a peer is made when it is wanted, and may raise."""

    op: str
    problem: str
    direction: str
    dtype: torch.dtype
    flops: float
    bytes: float
    ways: list[Way]
    check: Callable[[Any], parity.Measurement]
    peers: Makers = field(default_factory=dict)


# Forward and backward.
_Tiles = tuple[triton_tiles.Choices | None, triton_tiles.Choices | None]


@dataclass(frozen=True)
class Place:
    """Where cases run. A machine of None has no CUDA C++ kernels. Tiles are those for `gpu`, also
    where the tensors are on another device, such as meta."""

    device: torch.device
    machine: dry_run.Machine | None
    gpu: torch.device

    @classmethod
    def here(cls, device: torch.device) -> Place:
        """For tensors and kernels on this device."""
        missing = unavailable("cuda", device.type, torch.bfloat16)
        return cls(device, None if missing else dry_run.machine_here(), device)

    def tiles(self, dtype: torch.dtype, found: Callable[[], _Tiles]) -> _Tiles:
        """Those of `found`; none where Triton's kernels do not run in this dtype."""
        return found() if unavailable("triton", self.gpu.type, dtype) is None else (None, None)

    def drawing(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        """A function of sizes that makes a tensor here."""
        if self.device.type == "meta":
            return lambda *sizes, scale=1.0: torch.empty(sizes, dtype=dtype, device=self.device)
        return normal(self.device, dtype)

    def shown(self, x: Tensor) -> Tensor:
        """A tensor with the shape and dtype of x on the GPU, where x may be without content."""
        return x if x.device == self.gpu else x.new_empty(1, device=self.gpu).expand(x.shape)


def cases(problem: Problem, place: Place) -> Iterator[Case]:
    """Inputs are made as a case comes, and let go with it."""
    of_op = {"attention": _attention, "gelu_mlp": _mlp, "layer_norm": _layer_norm}
    yield from of_op[problem.op](problem, place)


def _case(
    part: predict.Part,
    ways: Iterable[Way],
    check: Callable[[Any], parity.Measurement],
    peers: Makers,
) -> Case:
    problem = part.problem
    return Case(
        problem.op,
        problem.text,
        part.name,
        problem.dtype,
        part.flops,
        part.bytes,
        # The most valuable first.
        sorted(ways, key=lambda way: not way.chosen),
        check,
        peers,
    )


def _ways(
    part: predict.Part,
    place: Place,
    call: Callable[..., Any],
    choices: triton_tiles.Choices | None,
    tiled: Callable[..., Any] | None = None,
) -> Iterator[Way]:
    """`call` takes the module of the launchers, and by keyword a build or tiles; `tiled`, if given,
    takes the latter in its place."""
    op = part.problem.op
    builds = part.direction.ways(place.machine, part.pick) if place.machine else []
    for index, made, chosen in builds:
        built = part.pick(made.launches).built
        name, build = built["name"] if built else "any GPU", {"build": index}
        called = functools.partial(call, _launchers(op, "cuda"), **build)
        yield Way(name, "cuda", chosen, called, build)
    if choices is None:
        return
    for i, (name, tiles) in enumerate(triton_tiles.ways(choices)):
        called = functools.partial(tiled or call, _launchers(op, "triton"), **tiles)
        yield Way(name, "triton", i == 0, called, {"tiles": tiles})


def _launchers(op: str, impl: str) -> Any:
    return importlib.import_module(f"gptkernels.ops.{op}.{impl}")


def _calls(
    names: Sequence[str],
    found: Peers,
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
) -> Makers:
    """Of the peers of these names, calls on the tensors; with cotangents, the backward pass alone,
    behind one forward pass. A call is made once, since torch.compile compiles for each anew."""

    @functools.cache
    def call(name: str) -> Call:
        if name not in found:
            raise NotImplementedError(f"there is no {name} here")
        function = found[name]()
        if cotangents is None:
            return lambda: function(*tensors)
        leaves = [x.detach().requires_grad_() for x in tensors]
        with repeatable():
            outputs = _listed(function(*leaves))

        def backward() -> Any:
            with repeatable():
                return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)

        return backward

    return {name: functools.partial(call, name) for name in names}


def _against(
    computed: Callable[[Any, torch.dtype], Sequence[Tensor]],
    dtype: torch.dtype,
    k: float,
    taken: Callable[[Any], Sequence[Tensor]],
) -> Callable[[Any], parity.Measurement]:
    """A check of what is `taken` from a call's result: `computed` has the same from the module with
    the ops in plain PyTorch, in `dtype`, or from the reference, in fp64."""

    @functools.cache
    def expected() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return computed(baseline, dtype), computed(reference, torch.float64)

    def check(outputs: Any) -> parity.Measurement:
        """Of the tensor that is nearest to its limit, or beyond it."""
        found = [
            parity.compare(result, plain, truth, k=k)
            for result, plain, truth in zip(taken(outputs), *expected(), strict=True)
        ]
        return max(found, key=lambda m: m.error / m.limit if m.limit else float(m.error > 0))

    return check


def _differentiated(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, computed in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    outputs = _listed(function(*leaves))
    gradients = torch.autograd.grad(outputs, leaves, [c.to(dtype) for c in cotangents])
    return [x.detach() for x in outputs], list(gradients)


def _listed(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


# ---- attention


def _attention(problem: Problem, place: Place) -> Iterator[Case]:
    sizes, dtype = problem.sizes, problem.dtype
    B, T, Tk, H, Hk, D = (sizes[name] for name in ("B", "T", "Tk", "H", "Hk", "D"))
    left, right = sizes["left"], sizes["right"]
    draw = place.drawing(dtype)
    q, k, v = draw(B, T, H, D), draw(B, Tk, Hk, D), draw(B, Tk, Hk, D)
    dout = draw(B, T, H, D)
    sees: dict[str, Any] = dict(causal=right == 0, window=(left, right) if left >= 0 else None)
    options = AttentionOptions(softmax_scale=D**-0.5, left=left, right=right)
    forward, backward = predict.parts(problem)
    group = H // Hk
    mine = (q[:1, :, :group], k[:1, :, :1], v[:1, :, :1])
    tiles = place.tiles(dtype, lambda: triton_tiles.attention(place.shown(q), options))

    def others(cotangents: list[Tensor] | None) -> Makers:
        shapes, backward = (tuple(q.shape), tuple(k.shape)), cotangents is not None
        found = attention_peers.peers(q.device, dtype, *shapes, **sees, backward=backward)
        return _calls(_ATTENTION_PEERS, found, (q, k, v), cotangents)

    def attend(kernels: Any, **made: Any) -> Any:
        return kernels.attention_fwd(q, k, v, options, **made)

    def attended(module: Any, dtype: torch.dtype) -> list[Tensor]:
        return [module.attention(*(x.to(dtype) for x in mine), **sees)]

    check = _against(attended, dtype, parity.K_FORWARD, lambda found: [found[0][:1, :, :group]])
    yield _case(
        forward,
        _ways(forward, place, attend, tiles[0]),
        check,
        others(None),
    )

    with torch.no_grad():
        # PyTorch computes these, so that a mistake of our forward kernel is not counted here too.
        out, lse = gptkernels.attention(q, k, v, **sees, return_lse=True, impl="torch")

    def differentiate(kernels: Any, **made: Any) -> Any:
        return kernels.attention_bwd(
            dout, None, q, k, v, out, lse, options, (True, True, True, False, False), False, **made
        )

    def gradients(module: Any, dtype: torch.dtype) -> list[Tensor]:
        attention = functools.partial(module.attention, **sees)
        return _differentiated(attention, mine, [dout[:1, :, :group]], dtype)[1]

    def of_mine(found: Any) -> list[Tensor]:
        return [x[:1, :, :n] for x, n in zip(found[:3], (group, 1, 1), strict=True)]

    check = _against(gradients, dtype, parity.K_GRADIENT, of_mine)
    yield _case(
        backward,
        _ways(backward, place, differentiate, tiles[1]),
        check,
        others([dout]),
    )


# ---- the MLP


def _mlp(problem: Problem, place: Place) -> Iterator[Case]:
    M, C, inner = (problem.sizes[name] for name in ("M", "C", "F"))
    draw = place.drawing(problem.dtype)
    x, dy = draw(M, C), draw(M, C)
    w1, w2 = draw(inner, C, scale=C**-0.5), draw(C, inner, scale=inner**-0.5)
    b1, b2 = draw(inner), draw(C)
    h = F.linear(x, w1, b1)
    a = F.gelu(h, approximate="tanh")
    dh = torch.ops.aten.gelu_backward(dy @ w2, h, approximate="tanh")

    shown = functools.partial(map, place.shown, (x, w1, dy, w2))
    tiles = place.tiles(problem.dtype, lambda: triton_tiles.gelu_mlp(*shown()))

    def gelu(kernels: Any, **build: Any) -> Any:
        outputs = torch.empty_like(h), torch.empty_like(h)
        products.linear_fwd(x, w1, b1, out=outputs[0], activation=outputs[1], **build)
        return outputs

    def gelu_tiled(kernels: Any, **tile: Any) -> Any:
        outputs = torch.empty_like(h), torch.empty_like(h)
        kernels.linear_gelu_fwd(x, w1, b1, *outputs, "tanh", **tile)
        return outputs

    def plain(kernels: Any, **build: Any) -> Any:
        y = torch.empty_like(x)
        products.linear_fwd(a, w2, b2, out=y, **build)
        return (y,)

    def slope(kernels: Any, **made: Any) -> Any:
        return kernels.linear_gelu_bwd(dy, w2, h, "tanh", True, True, **made)[:2]

    def to_weight(left: Tensor, right: Tensor) -> Any:
        return lambda kernels, **build: (products.weight_grad(left, right, **build),)

    def to_input(kernels: Any, **build: Any) -> Any:
        dx = torch.empty_like(x)
        products.linear_bwd(dh, w1, out=dx, **build)
        return (dx,)

    forward, backward = problem.directions
    # Of each product: direction, number and sizes; our kernel, cuBLAS's, and the same written out.
    listed: list[tuple[Any, int, tuple[int, int, int], Any, Call, Any]] = [
        (forward, 0, (M, inner, C), gelu, lambda: torch.mm(x, w1.T),
         lambda rows, wide: _activated(wide(x[rows]) @ wide(w1).T + wide(b1))),
        (forward, 1, (M, C, inner), plain, lambda: torch.mm(a, w2.T),
         lambda rows, wide: [wide(a[rows]) @ wide(w2).T + wide(b2)]),
        (backward, 0, (M, inner, C), slope, lambda: torch.mm(dy, w2),
         lambda rows, wide: _slopes(wide(dy[rows]) @ wide(w2), wide(h[rows]))),
        (backward, 1, (C, inner, M), to_weight(dy, a), lambda: torch.mm(dy.T, a),
         lambda rows, wide: [wide(dy[:, rows]).T @ wide(a)]),
        (backward, 2, (inner, C, M), to_weight(dh, x), lambda: torch.mm(dh.T, x),
         lambda rows, wide: [wide(dh[:, rows]).T @ wide(x)]),
        (backward, 3, (M, C, inner), to_input, lambda: torch.mm(dh, w1),
         lambda rows, wide: [wide(dh[rows]) @ wide(w1)]),
    ]  # fmt: skip
    fused = {gelu: (tiles[0], gelu_tiled), slope: (tiles[1], slope)}
    for direction, number, sizes, ours, cublas, written_out in listed:
        part = predict.product_part(problem, direction, number, sizes)
        check = _rows_check(written_out, sizes[0], problem.dtype, _K[direction.name])
        ways = _ways(part, place, ours, *fused.get(ours, (None,)))
        yield _case(part, ways, check, {"cuBLAS": functools.partial(_same, cublas)})
    yield _whole_mlp(problem, place, (x, w1, b1, w2, b2), dy, [call for *_, call, _ in listed])


def _whole_mlp(
    problem: Problem, place: Place, tensors: tuple[Tensor, ...], dy: Tensor, cublas: list[Call]
) -> Case:
    """Forward and backward in one, by the launchers' rule, beside the plain products alone."""
    M, C, inner = (problem.sizes[name] for name in ("M", "C", "F"))

    def through(mlp: Callable[..., Tensor], dtype: torch.dtype = problem.dtype) -> list[Tensor]:
        outputs, gradients = _differentiated(mlp, tensors, [dy], dtype)
        return outputs + gradients

    def products_alone() -> None:
        for call in cublas:
            call()

    names = {"cuda": "by the rule", "triton": "triton by the rule"}
    ways = [
        Way(name, impl, True, functools.partial(
            through, functools.partial(gptkernels.gelu_mlp, impl=impl)
        ))
        for impl, name in names.items()
        if unavailable(impl, place.device.type, problem.dtype) is None
    ]  # fmt: skip
    peers: Makers = {
        "six cuBLAS products": lambda: products_alone,
        "torch.compile": lambda: functools.partial(
            through, torch.compile(baseline.gelu_mlp, dynamic=False)
        ),
    }
    check = _against(
        lambda module, dtype: through(module.gelu_mlp, dtype),
        problem.dtype, parity.K_GRADIENT, _same,
    )  # fmt: skip
    return Case(
        "gelu_mlp", problem.text, "forward + backward", problem.dtype, 6 * 2.0 * M * C * inner, 0.0,
        ways, check, peers,
    )  # fmt: skip


def _rows_check(
    written_out: Callable[..., list[Tensor]], rows: int, dtype: torch.dtype, k: float
) -> Callable[[Any], parity.Measurement]:
    """A product on its first and last rows: `written_out` takes their numbers and a conversion."""
    edges = [*range(min(rows, _EDGE_ROWS)), *range(max(_EDGE_ROWS, rows - _EDGE_ROWS), rows)]
    return _against(
        lambda _, dtype: written_out(edges, lambda x: x.to(dtype)),
        dtype,
        k,
        lambda outputs: [x[edges] for x in outputs],
    )


def _activated(h: Tensor) -> list[Tensor]:
    return [h, F.gelu(h, approximate="tanh")]


def _slopes(da: Tensor, h: Tensor) -> list[Tensor]:
    slope = torch.ops.aten.gelu_backward(da, h, approximate="tanh")
    return [slope, F.gelu(h, approximate="tanh")]


def _same(x: Any) -> Any:
    return x


# ---- LayerNorm


def _layer_norm(problem: Problem, place: Place) -> Iterator[Case]:
    rows, cols, dtype = problem.sizes["rows"], problem.sizes["cols"], problem.dtype
    draw = place.drawing(dtype)
    x, dy, weight, bias = draw(rows, cols), draw(rows, cols), draw(cols), draw(cols)
    residual = draw(rows, cols) if problem.sizes["residual"] else None
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    cotangents = [dy] if residual is None else [dy, draw(rows, cols)]

    def through(layer_norm: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
        y = layer_norm(
            *tensors[:3],
            residual=tensors[3] if len(tensors) > 3 else None,
            prenorm=residual is not None,
        )
        return _listed(y)

    given = (x, weight, bias, residual, None, 0.0, 1e-5, None if residual is None else dtype)
    tiles = place.tiles(dtype, lambda: triton_tiles.layer_norm(x))

    def others(cotangents: list[Tensor] | None) -> Makers:
        added, backward = residual is not None, cotangents is not None
        found = layer_norm_peers.peers(x.device, dtype, cols, residual=added, backward=backward)
        eager: Peers = {"eager PyTorch": lambda: functools.partial(through, baseline.layer_norm)}
        return _calls(_LAYER_NORM_PEERS, found | eager, inputs, cotangents)

    def normalise(kernels: Any, **made: Any) -> Any:
        return kernels.layer_norm_fwd(*given, **made)

    def normalised(module: Any, dtype: torch.dtype) -> list[Tensor]:
        return through(module.layer_norm, *(t.to(dtype) for t in inputs))

    forward, backward = predict.parts(problem)
    of_outputs = slice(len(cotangents))
    check = _against(normalised, dtype, parity.K_FORWARD, lambda found: found[of_outputs])
    yield _case(
        forward,
        _ways(forward, place, normalise, tiles[0]),
        check,
        others(None),
    )

    _, s, mean, rstd = layer_norm_fwd(*given, "torch")  # as in attention

    def differentiate(kernels: Any, **made: Any) -> Any:
        return kernels.layer_norm_bwd(
            dy, cotangents[1] if residual is not None else None, x if residual is None else s,
            mean, rstd, weight, None, 0.0, dtype, None, True, True, **made,
        )  # fmt: skip

    def gradients(module: Any, dtype: torch.dtype) -> list[Tensor]:
        normalising = functools.partial(through, module.layer_norm)
        return _differentiated(normalising, inputs, cotangents, dtype)[1][:3]

    def of_inputs(found: Any) -> list[Tensor]:
        dx, _, dweight, dbias = found
        return [dx, dweight, dbias]

    check = _against(gradients, dtype, parity.K_GRADIENT, of_inputs)
    yield _case(
        backward,
        _ways(backward, place, differentiate, tiles[1]),
        check,
        others(cotangents),
    )
