"""What `make gpu-tune` checks and times: for each problem of `predict.PROBLEMS` and each direction,
every way in which the CUDA C++ kernels are built, and what others offer for the same.

A case's result is checked on the inputs that are timed, against the truth in fp64: of attention the
heads of one key head, of the MLP's products the first and the last rows, of LayerNorm all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptkernels
from gptkernels.bench import dry_run, peers, predict
from gptkernels.bench.cases.workload import normal
from gptkernels.bench.dry_run import Problem
from gptkernels.bench.peers import Call, Peers
from gptkernels.ops.attention import cuda as attention_kernels
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.gelu_mlp import cuda as mlp_kernels
from gptkernels.ops.layer_norm import cuda as layer_norm_kernels
from gptkernels.truth import baseline, parity, reference

_K = {"forward": parity.K_FORWARD, "backward": parity.K_GRADIENT}
_EDGE_ROWS = 64  # of the MLP's products, at either end


@dataclass(frozen=True)
class Way:
    """One of our kernels for a case."""

    name: str
    build: int  # -1: the launcher's own choice
    chosen: bool  # by the launcher's own rule
    call: Call


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
    peers: Peers = field(default_factory=dict)


def cases(problem: Problem, device: torch.device, machine: dry_run.Machine) -> Iterator[Case]:
    """Inputs are made as a case comes, and let go with it."""
    of_op = {"attention": _attention, "gelu_mlp": _mlp, "layer_norm": _layer_norm}
    yield from of_op[problem.op](problem, device, machine)


def _case(
    part: predict.Part,
    machine: dry_run.Machine,
    call: Callable[[int], Any],
    check: Callable[[Any], parity.Measurement],
    peers: Peers,
) -> Case:
    """`call` takes the number of a build."""
    problem, ways = part.problem, []
    for index, made, chosen in part.direction.ways(machine, part.pick):
        built = part.pick(made.launches).built
        name = built["name"] if built else "any GPU"
        ways.append(Way(name, index, chosen, functools.partial(call, index)))
    return Case(
        problem.op,
        problem.text,
        part.name,
        problem.dtype,
        part.flops,
        part.bytes,
        ways,
        check,
        peers,
    )


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


def _attention(problem: Problem, device: torch.device, machine: dry_run.Machine) -> Iterator[Case]:
    sizes, dtype = problem.sizes, problem.dtype
    B, T, Tk, H, Hk, D = (sizes[name] for name in ("B", "T", "Tk", "H", "Hk", "D"))
    left, right = sizes["left"], sizes["right"]
    draw = normal(device, dtype)
    q, k, v = draw(B, T, H, D), draw(B, Tk, Hk, D), draw(B, Tk, Hk, D)
    dout = draw(B, T, H, D)
    sees: dict[str, Any] = dict(causal=right == 0, window=(left, right) if left >= 0 else None)
    options = AttentionOptions(softmax_scale=D**-0.5, left=left, right=right)
    forward, backward = predict.parts(problem)
    group = H // Hk
    mine = (q[:1, :, :group], k[:1, :, :1], v[:1, :, :1])

    def attend(build: int) -> Any:
        return attention_kernels.attention_fwd(q, k, v, options, build=build)

    def attended(module: Any, dtype: torch.dtype) -> list[Tensor]:
        return [module.attention(*(x.to(dtype) for x in mine), **sees)]

    check = _against(attended, dtype, parity.K_FORWARD, lambda found: [found[0][:1, :, :group]])
    yield _case(forward, machine, attend, check, peers.attention(q, k, v, None, sees))

    with torch.no_grad():
        # PyTorch computes these, so that a mistake of our forward kernel is not counted here too.
        out, lse = gptkernels.attention(q, k, v, **sees, return_lse=True, impl="torch")

    def differentiate(build: int) -> Any:
        return attention_kernels.attention_bwd(
            dout, None, q, k, v, out, lse, options, (True, True, True, False), False, build=build
        )

    def gradients(module: Any, dtype: torch.dtype) -> list[Tensor]:
        attention = functools.partial(module.attention, **sees)
        return _differentiated(attention, mine, [dout[:1, :, :group]], dtype)[1]

    def of_mine(found: Any) -> list[Tensor]:
        return [x[:1, :, :n] for x, n in zip(found[:3], (group, 1, 1), strict=True)]

    check = _against(gradients, dtype, parity.K_GRADIENT, of_mine)
    yield _case(backward, machine, differentiate, check, peers.attention(q, k, v, dout, sees))


# ---- the MLP


def _mlp(problem: Problem, device: torch.device, machine: dry_run.Machine) -> Iterator[Case]:
    M, C, inner = (problem.sizes[name] for name in ("M", "C", "F"))
    draw = normal(device, problem.dtype)
    x, dy = draw(M, C), draw(M, C)
    w1, w2 = draw(inner, C, scale=C**-0.5), draw(C, inner, scale=inner**-0.5)
    b1, b2 = draw(inner), draw(C)
    h = F.linear(x, w1, b1)
    a = F.gelu(h, approximate="tanh")
    dh = torch.ops.aten.gelu_backward(dy @ w2, h, approximate="tanh")

    def gelu(build: int) -> Any:
        outputs = torch.empty_like(h), torch.empty_like(h)
        mlp_kernels.linear_fwd(x, w1, b1, out=outputs[0], activation=outputs[1], build=build)
        return outputs

    def plain(build: int) -> Any:
        y = torch.empty_like(x)
        mlp_kernels.linear_fwd(a, w2, b2, out=y, build=build)
        return (y,)

    def slope(build: int) -> Any:
        return mlp_kernels.linear_gelu_bwd(dy, w2, h, "tanh", True, True, build=build)[:2]

    def to_input(build: int) -> Any:
        dx = torch.empty_like(x)
        mlp_kernels.linear_bwd(dh, w1, out=dx, build=build)
        return (dx,)

    # Of each product: its rows, our kernel, cuBLAS's, and the same written out.
    listed: list[tuple[int, Any, Call, Any]] = [
        (M, gelu, lambda: torch.mm(x, w1.T),
         lambda rows, wide: _activated(wide(x[rows]) @ wide(w1).T + wide(b1))),
        (M, plain, lambda: torch.mm(a, w2.T),
         lambda rows, wide: [wide(a[rows]) @ wide(w2).T + wide(b2)]),
        (M, slope, lambda: torch.mm(dy, w2),
         lambda rows, wide: _slopes(wide(dy[rows]) @ wide(w2), wide(h[rows]))),
        (C, lambda i: (mlp_kernels.weight_grad(dy, a, build=i),), lambda: torch.mm(dy.T, a),
         lambda rows, wide: [wide(dy[:, rows]).T @ wide(a)]),
        (inner, lambda i: (mlp_kernels.weight_grad(dh, x, build=i),), lambda: torch.mm(dh.T, x),
         lambda rows, wide: [wide(dh[:, rows]).T @ wide(x)]),
        (M, to_input, lambda: torch.mm(dh, w1), lambda rows, wide: [wide(dh[rows]) @ wide(w1)]),
    ]  # fmt: skip
    for part, (rows, ours, cublas, written_out) in zip(predict.parts(problem), listed, strict=True):
        check = _rows_check(written_out, rows, problem.dtype, _K[part.direction.name])
        yield _case(part, machine, ours, check, {"cuBLAS": functools.partial(_same, cublas)})
    yield _whole_mlp(problem, (x, w1, b1, w2, b2), dy, [cublas for _, _, cublas, _ in listed])


def _whole_mlp(
    problem: Problem, tensors: tuple[Tensor, ...], dy: Tensor, cublas: list[Call]
) -> Case:
    """Forward and backward in one, by the launchers' rule, beside the plain products alone."""
    M, C, inner = (problem.sizes[name] for name in ("M", "C", "F"))

    def through(mlp: Callable[..., Tensor], dtype: torch.dtype = problem.dtype) -> list[Tensor]:
        outputs, gradients = _differentiated(mlp, tensors, [dy], dtype)
        return outputs + gradients

    def products_alone() -> None:
        for call in cublas:
            call()

    ours = functools.partial(gptkernels.gelu_mlp, impl="cuda")
    ways = [Way("by the rule", -1, True, functools.partial(through, ours))]
    peers: Peers = {
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


def _layer_norm(problem: Problem, device: torch.device, machine: dry_run.Machine) -> Iterator[Case]:
    rows, cols, dtype = problem.sizes["rows"], problem.sizes["cols"], problem.dtype
    draw = normal(device, dtype)
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

    def normalise(build: int) -> Any:
        sum_dtype = None if residual is None else dtype
        return layer_norm_kernels.layer_norm_fwd(
            x, weight, bias, residual, None, 0.0, 1e-5, sum_dtype, build=build
        )

    def normalised(module: Any, dtype: torch.dtype) -> list[Tensor]:
        return through(module.layer_norm, *(t.to(dtype) for t in inputs))

    forward, backward = predict.parts(problem)
    of_outputs = slice(len(cotangents))
    check = _against(normalised, dtype, parity.K_FORWARD, lambda found: found[of_outputs])
    yield _case(forward, machine, normalise, check, peers.layer_norm(through, inputs, None))

    _, s, mean, rstd = normalise(-1)

    def differentiate(build: int) -> Any:
        return layer_norm_kernels.layer_norm_bwd(
            dy, cotangents[1] if residual is not None else None, x if residual is None else s,
            mean, rstd, weight, None, 0.0, dtype, None, True, True, build=build,
        )  # fmt: skip

    def gradients(module: Any, dtype: torch.dtype) -> list[Tensor]:
        normalising = functools.partial(through, module.layer_norm)
        return _differentiated(normalising, inputs, cotangents, dtype)[1][:3]

    def of_inputs(found: Any) -> list[Tensor]:
        dx, _, dweight, dbias = found
        return [dx, dweight, dbias]

    check = _against(gradients, dtype, parity.K_GRADIENT, of_inputs)
    yield _case(
        backward, machine, differentiate, check, peers.layer_norm(through, inputs, cotangents)
    )
