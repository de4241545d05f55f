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


def _ways(
    direction: dry_run.Direction,
    machine: dry_run.Machine,
    pick: Callable[[list[dry_run.Launched]], dry_run.Launched],
    call: Callable[[int], Any],
) -> list[Way]:
    found = []
    for index, made, chosen in direction.ways(machine, pick):
        built = pick(made.launches).built
        name = built["name"] if built else "any GPU"
        found.append(Way(name, index, chosen, functools.partial(call, index)))
    return found


def _measured(
    results: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], k: float
) -> parity.Measurement:
    """Of the tensor that is nearest to its limit, or beyond it."""
    found = [
        parity.compare(result, other, exact, k=k)
        for result, other, exact in zip(results, plain, truth, strict=True)
    ]
    return max(found, key=lambda m: m.error / m.limit if m.limit else float(m.error > 0))


# ---- attention


def _attention(problem: Problem, device: torch.device, machine: dry_run.Machine) -> Iterator[Case]:
    sizes = problem.sizes
    B, T, Tk, H, Hk, D = (sizes[name] for name in ("B", "T", "Tk", "H", "Hk", "D"))
    left, right = sizes["left"], sizes["right"]
    draw = normal(device, problem.dtype)
    q, k, v = draw(B, T, H, D), draw(B, Tk, Hk, D), draw(B, Tk, Hk, D)
    dout = draw(B, T, H, D)
    sees: dict[str, Any] = dict(causal=right == 0, window=(left, right) if left >= 0 else None)
    options = AttentionOptions(softmax_scale=D**-0.5, left=left, right=right)
    forward, backward = problem.directions
    group = H // Hk
    mine = (q[:1, :, :group], k[:1, :, :1], v[:1, :, :1])

    def attend(build: int) -> Any:
        return attention_kernels.attention_fwd(q, k, v, options, build=build)

    @functools.cache
    def expected() -> tuple[Any, Any]:
        exact = [x.double() for x in mine]
        return baseline.attention(*mine, **sees), reference.attention(*exact, **sees)

    def check(outputs: Any) -> parity.Measurement:
        plain, truth = expected()
        return _measured([outputs[0][:1, :, :group]], [plain], [truth], parity.K_FORWARD)

    itemsize = problem.dtype.itemsize
    of_q, of_k = itemsize * q.numel(), itemsize * k.numel()
    yield Case(
        "attention", problem.text, "forward", problem.dtype,
        predict.attention_flops(sizes, 2), 2 * of_q + 2 * of_k,
        _ways(forward, machine, predict.main_launch, attend), check,
        peers.attention(q, k, v, None, sees),
    )  # fmt: skip

    with torch.no_grad():
        # PyTorch computes these, so that a mistake of our forward kernel is not counted here too.
        out, lse = gptkernels.attention(q, k, v, **sees, return_lse=True, impl="torch")

    def differentiate(build: int) -> Any:
        return attention_kernels.attention_bwd(
            dout, None, q, k, v, out, lse, options, (True, True, True, False), False, build=build
        )

    @functools.cache
    def expected_gradients() -> tuple[list[Tensor], list[Tensor]]:
        found = []
        cotangent = dout[:1, :, :group]
        for attention, dtype in (
            (baseline.attention, problem.dtype),
            (reference.attention, torch.float64),
        ):
            leaves = [x.to(dtype).detach().requires_grad_() for x in mine]
            result: Any = attention(*leaves, **sees)
            found.append(list(torch.autograd.grad(result, leaves, cotangent.to(dtype))))
        return found[0], found[1]

    def check_gradients(gradients: Any) -> parity.Measurement:
        heads = (group, 1, 1)
        results = [x[:1, :, :n] for x, n in zip(gradients[:3], heads, strict=True)]
        return _measured(results, *expected_gradients(), parity.K_GRADIENT)

    yield Case(
        "attention", problem.text, "backward", problem.dtype,
        predict.attention_flops(sizes, 5), 4 * of_q + 4 * of_k,
        _ways(backward, machine, predict.main_launch, differentiate), check_gradients,
        peers.attention(q, k, v, dout, sees),
    )  # fmt: skip


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

    # Of each product: direction, number, (m, n, k), our kernel, cuBLAS's, and the same written out.
    forward, backward = problem.directions
    listed: list[tuple[Any, int, tuple[int, int, int], Any, Call, Any]] = [
        (forward, 0, (M, inner, C), gelu, lambda: torch.mm(x, w1.T),
         lambda rows, wide: _activated(wide(x[rows]) @ wide(w1).T + wide(b1))),
        (forward, 1, (M, C, inner), plain, lambda: torch.mm(a, w2.T),
         lambda rows, wide: [wide(a[rows]) @ wide(w2).T + wide(b2)]),
        (backward, 0, (M, inner, C), slope, lambda: torch.mm(dy, w2),
         lambda rows, wide: _slopes(wide(dy[rows]) @ wide(w2), wide(h[rows]))),
        (backward, 1, (C, inner, M), lambda i: (mlp_kernels.weight_grad(dy, a, build=i),),
         lambda: torch.mm(dy.T, a), lambda rows, wide: [wide(dy[:, rows]).T @ wide(a)]),
        (backward, 2, (inner, C, M), lambda i: (mlp_kernels.weight_grad(dh, x, build=i),),
         lambda: torch.mm(dh.T, x), lambda rows, wide: [wide(dh[:, rows]).T @ wide(x)]),
        (backward, 3, (M, C, inner), to_input, lambda: torch.mm(dh, w1),
         lambda rows, wide: [wide(dh[rows]) @ wide(w1)]),
    ]  # fmt: skip
    for direction, number, sizes, ours, cublas, written_out in listed:
        pick = functools.partial(predict.product, number)
        m, n, k = sizes
        yield Case(
            "gelu_mlp", problem.text, predict.product_name(direction.name, number, sizes),
            problem.dtype, 2.0 * m * n * k, problem.dtype.itemsize * (m * k + k * n + m * n),
            _ways(direction, machine, pick, ours),
            _rows_check(written_out, m, _K[direction.name]),
            {"cuBLAS": functools.partial(_same, cublas)},
        )  # fmt: skip
    yield from _whole_mlp(problem, (x, w1, b1, w2, b2), dy, [entry[4] for entry in listed])


def _whole_mlp(
    problem: Problem, tensors: tuple[Tensor, ...], dy: Tensor, cublas: list[Call]
) -> Iterator[Case]:
    """Forward and backward in one, by the launchers' rule, beside the plain products alone."""
    M, C, inner = (problem.sizes[name] for name in ("M", "C", "F"))
    leaves = [x.detach().requires_grad_() for x in tensors]

    def through(mlp: Callable[..., Tensor]) -> Any:
        y = mlp(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    def ours() -> Any:
        return through(functools.partial(gptkernels.gelu_mlp, impl="cuda"))

    def products_alone() -> None:
        for call in cublas:
            call()

    def compiled() -> Call:
        mlp = torch.compile(baseline.gelu_mlp, dynamic=False)
        return lambda: through(mlp)

    def check(results: Any) -> parity.Measurement:
        wide = [x.detach().double().requires_grad_() for x in tensors]
        y: Any = reference.gelu_mlp(*wide)
        truth = [y.detach(), *torch.autograd.grad(y, wide, dy.double())]
        return _measured(results, through(baseline.gelu_mlp), truth, parity.K_GRADIENT)

    yield Case(
        "gelu_mlp", problem.text, "forward + backward", problem.dtype,
        6 * 2.0 * M * C * inner, 0.0, [Way("by the rule", -1, True, ours)], check,
        {
            "six cuBLAS products": functools.partial(_same, products_alone),
            "torch.compile": compiled,
        },
    )  # fmt: skip


def _rows_check(
    written_out: Callable[..., list[Tensor]], rows: int, k: float
) -> Callable[[Any], parity.Measurement]:
    """A product on its first and last rows: `written_out` takes their numbers and a conversion."""
    edges = [*range(min(rows, _EDGE_ROWS)), *range(max(_EDGE_ROWS, rows - _EDGE_ROWS), rows)]

    @functools.cache
    def expected() -> tuple[list[Tensor], list[Tensor]]:
        return written_out(edges, _same), written_out(edges, Tensor.double)

    def check(outputs: Any) -> parity.Measurement:
        return _measured([x[edges] for x in outputs], *expected(), k)

    return check


def _activated(h: Tensor) -> list[Tensor]:
    return [h, F.gelu(h, approximate="tanh")]


def _slopes(da: Tensor, h: Tensor) -> list[Tensor]:
    slope = torch.ops.aten.gelu_backward(da, h, approximate="tanh")
    return [slope, F.gelu(h, approximate="tanh")]


def _same(x: Any) -> Any:
    return x


# ---- LayerNorm


def _layer_norm(problem: Problem, device: torch.device, machine: dry_run.Machine) -> Iterator[Case]:
    rows, cols = problem.sizes["rows"], problem.sizes["cols"]
    draw = normal(device, problem.dtype)
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
        return list(y) if isinstance(y, tuple) else [y]

    def normalise(build: int) -> Any:
        dtype = None if residual is None else x.dtype
        return layer_norm_kernels.layer_norm_fwd(
            x, weight, bias, residual, None, 0.0, 1e-5, dtype, build=build
        )

    def check(outputs: Any) -> parity.Measurement:
        results = outputs[: 1 if residual is None else 2]
        truth = through(reference.layer_norm, *(t.double() for t in inputs))
        return _measured(results, through(baseline.layer_norm, *inputs), truth, parity.K_FORWARD)

    def first(launches: list[dry_run.Launched]) -> dry_run.Launched:
        return launches[0]

    forward, backward = problem.directions
    size = problem.dtype.itemsize * rows * cols
    yield Case(
        "layer_norm", problem.text, "forward", problem.dtype, 0.0,
        (2 if residual is None else 4) * size, _ways(forward, machine, first, normalise), check,
        peers.layer_norm(through, inputs, None),
    )  # fmt: skip

    _, s, mean, rstd = normalise(-1)

    def differentiate(build: int) -> Any:
        return layer_norm_kernels.layer_norm_bwd(
            dy, cotangents[1] if residual is not None else None, x if residual is None else s,
            mean, rstd, weight, None, 0.0, x.dtype, None, True, True, build=build,
        )  # fmt: skip

    def gradients(layer_norm: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        outputs = through(layer_norm, *leaves)
        return list(torch.autograd.grad(outputs, leaves, [c.to(dtype) for c in cotangents]))[:3]

    def check_gradients(results: Any) -> parity.Measurement:
        dx, _, dweight, dbias = results
        plain = gradients(baseline.layer_norm, problem.dtype)
        truth = gradients(reference.layer_norm, torch.float64)
        return _measured([dx, dweight, dbias], plain, truth, parity.K_GRADIENT)

    yield Case(
        "layer_norm", problem.text, "backward", problem.dtype, 0.0,
        (3 if residual is None else 4) * size, _ways(backward, machine, first, differentiate),
        check_gradients, peers.layer_norm(through, inputs, cotangents),
    )  # fmt: skip
