"""What `impl="cuda"` would launch for a problem: `gptkernels info --explain` tells it, benchmarks
predict from it. No GPU is needed and nothing is launched: the launchers themselves are asked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.core import native
from gptkernels.nn.transformer_layer import TransformerLayer
from gptkernels.ops.attention import cuda as attention_kernels
from gptkernels.ops.attention.options import AttentionOptions, bounds
from gptkernels.ops.gelu_mlp import cuda as mlp_kernels
from gptkernels.ops.layer_norm import cuda as layer_norm_kernels

# Of both chips: bytes of shared memory of an SM, of which each CTA costs 1 KiB more than it asks
# for, and the most threads and CTAs that an SM holds.
_RESERVED, _MOST_THREADS, _MOST_CTAS = 1024, 2048, 32


@dataclass(frozen=True)
class Machine:
    """What a dry run has to know of a GPU."""

    name: str
    arch: str
    capability: int
    multiprocessors: int
    shared_bytes: int  # of an SM


MACHINES = {
    machine.arch: machine
    for machine in (
        Machine("A100", "sm80", 80, 108, 164 * 1024),
        Machine("H200", "sm90", 90, 132, 228 * 1024),
    )
}


def machine_here(arch: str | None = None) -> Machine:
    """That of `arch`: this machine's GPU where it is one, else A100 or H200; H200 without either.

    Raises ValueError for another architecture.
    """
    if arch is not None and arch not in MACHINES:
        raise ValueError(f"arch must be {' or '.join(MACHINES)}, got {arch!r}")
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        # What is newer than Hopper or in between runs as sm_80 does.
        here = "sm90" if (found.major, found.minor) == (9, 0) else "sm80"
        if arch in (None, here):
            known = MACHINES[here]
            return Machine(
                found.name,
                here,
                10 * found.major + found.minor,
                found.multi_processor_count,
                getattr(found, "shared_memory_per_multiprocessor", known.shared_bytes),
            )
    return MACHINES[arch or "sm90"]


@dataclass(frozen=True)
class Launched:
    """One launch of a dry run."""

    kernel: str
    shape: str
    grid: tuple[int, int, int]
    threads: int
    cluster: int
    shared_bytes: int
    tiles: int  # of work that a persistent grid shares; 0: one a CTA
    built: dict[str, Any] | None  # the build's members, as csrc/runtime/build.h names them
    clocks: float = 0.0  # that the launcher predicts, of a multiprocessor; 0: it predicts nothing

    @property
    def ctas(self) -> int:
        """All of the grid."""
        return math.prod(self.grid)

    def resident(self, machine: Machine) -> int:
        """CTAs that an SM holds at most, by threads and shared memory; registers may allow less."""
        by_memory = machine.shared_bytes // (self.shared_bytes + _RESERVED)
        return max(1, min(by_memory, _MOST_THREADS // self.threads, _MOST_CTAS))

    def waves(self, machine: Machine, resident: int | None = None) -> float:
        """Units of work, over those that the GPU takes up at a time."""
        at_a_time = (resident or self.resident(machine)) * machine.multiprocessors
        return (self.tiles or self.ctas) / min(at_a_time, self.ctas if self.tiles else at_a_time)


@dataclass(frozen=True)
class DryRun:
    """What one direction of a problem would launch, and what was made for the GPU but cannot."""

    launches: list[Launched]
    refusals: list[tuple[str, str]]  # kernel, reason


@dataclass(frozen=True)
class Direction:
    """The forward or the backward pass of a problem."""

    name: str
    run: Callable[..., Any]  # the launcher; takes build=N where the kernels have builds
    list_name: str | None  # of the builds, in the module

    def dry_run(self, machine: Machine, build: int = -1) -> DryRun:
        """Raises ImportError where no module is built, ValueError where a launcher, or the
        build, cannot take the problem."""
        chosen = {"build": build} if build >= 0 else {}
        try:
            made = native.dry_run(
                lambda: self.run(**chosen),
                capability=machine.capability,
                multiprocessors=machine.multiprocessors,
            )
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(str(error)) from error
        launches = [Launched(**launch) for launch in made["launches"]]
        return DryRun(launches, list(dict.fromkeys(made["refusals"])))

    def ways(
        self, machine: Machine, pick: Callable[[list[Launched]], Launched]
    ) -> list[tuple[int, DryRun, bool]]:
        """Each build for the problem: its number, its dry run, and whether the launcher's rule
        makes the same launch of that which `pick` picks. Before them, as -1, the kernel for any GPU
        where the rule takes that."""
        rule = self.dry_run(machine)
        own = pick(rule.launches)
        found = [] if own.built else [(-1, rule, True)]
        widths = {}
        # Elsewhere no build can run.
        builds = self.builds() if machine.arch == "sm90" else []
        for index, build in enumerate(builds):
            try:
                made = self.dry_run(machine, index)
            except ValueError:  # of another head width, say
                continue
            found.append((index, made, pick(made.launches) == own))
            widths[index] = build["head_width"]
        # One for wider heads than need be can take them, and only loses.
        least = min(widths.values(), default=0)
        return [way for way in found if widths.get(way[0], least) == least]

    def builds(self) -> list[dict[str, Any]]:
        """Every way in which the kernel for Hopper is built; index is the build's number."""
        return getattr(native.dry_run_module(), self.list_name)() if self.list_name else []


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one op, or of a layer of several."""

    op: str
    text: str
    dtype: torch.dtype
    sizes: dict[str, int]
    directions: tuple[Direction, ...]
    # What of a layer runs as PyTorch's own operators, and why; None: an op, which is one kernel's.
    not_fused: dict[str, str] | None = None


def attention(
    B: int,
    T: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    *,
    kv_heads: int | None = None,
    keys: int | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi: bool = False,
    key_lengths: bool = False,
    varlen: bool = False,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> Problem:
    """With `varlen` of B sequences of T tokens laid end to end. Raises TypeError, ValueError as
    `gptkernels.attention` does, or if such sequences are to have key lengths too."""
    if varlen and key_lengths:
        raise ValueError("sequences laid end to end have no key lengths")
    Hk, Tk = H if kv_heads is None else kv_heads, T if keys is None else keys
    _check_sizes(B=B, T=T, H=H, D=D, kv_heads=Hk, keys=Tk)
    q = _empty(B, T, H, D, dtype=dtype)
    k, v = (_empty(B, Tk, Hk, D, dtype=dtype) for _ in range(2))
    slopes = _empty(H, dtype=torch.float32) if alibi else None
    lengths = _empty(B, dtype=torch.int32) if key_lengths else None
    options: dict[str, Any] = dict(causal=causal, window=window, softcap=softcap)
    # For its checks: meta tensors hold nothing that it could compute with.
    gptkernels.attention(
        q, k, v, **options, alibi_slopes=slopes, key_lengths=lengths, dropout_p=dropout_p,
        impl="torch",
    )  # fmt: skip
    left, right = bounds(causal, window)
    record = AttentionOptions(
        softmax_scale=D**-0.5,
        left=left,
        right=right,
        softcap=softcap,
        dropout_p=dropout_p,
        alibi_slopes=slopes,
        key_lengths=lengths,
        rng=_empty(2, dtype=torch.int64) if dropout_p > 0 else None,
    )
    if varlen:
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        ends = _empty(B + 1, dtype=torch.int32)
        record = record._replace(
            max_seqlen_q=T, max_seqlen_k=Tk, cu_seqlens_q=ends, cu_seqlens_k=ends
        )
    out, lse = torch.empty_like(q), _empty(q.shape[0], H, q.shape[1], dtype=torch.float32)

    def forward(**chosen: Any) -> Any:
        return attention_kernels.attention_fwd(q, k, v, record, **chosen)

    def backward(**chosen: Any) -> Any:
        return attention_kernels.attention_bwd(
            torch.empty_like(q), None, q, k, v, out, lse, record, (True, True, True, False),
            deterministic, **chosen,
        )  # fmt: skip

    heads = f"H{H}" + (f"/{Hk}" if Hk != H else "")
    tokens = f"T{T}" + (f"/{Tk}" if Tk != T else "")
    parts = [
        "causal" if causal else "not causal",
        *([f"window {window[0]}, {window[1]}"] if window else []),
        *([f"softcap {softcap:g}"] if softcap else []),
        *(["ALiBi"] if alibi else []),
        *(["key lengths"] if key_lengths else []),
        *([f"dropout {dropout_p:g}"] if dropout_p else []),
        *(["deterministic"] if deterministic else []),
    ]
    return Problem(
        "attention_varlen" if varlen else "attention",
        f"B{B} {tokens} {heads} D{D} {', '.join(parts)}",
        dtype,
        dict(B=B, T=T, H=H, D=D, Hk=Hk, Tk=Tk, left=left, right=right),
        (
            Direction("forward", forward, "attention_fwd_builds"),
            Direction("backward", backward, "attention_bwd_builds"),
        ),
    )


def attention_decode(
    B: int,
    T: int,
    KEYS: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    *,
    kv_heads: int | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi: bool = False,
) -> Problem:
    """T new tokens to caches with room for KEYS. Raises TypeError, ValueError as
    `gptkernels.attention_decode` does."""
    Hk = H if kv_heads is None else kv_heads
    _check_sizes(B=B, T=T, KEYS=KEYS, H=H, D=D, kv_heads=Hk)
    q = _empty(B, T, H, D, dtype=dtype)
    k, v = (_empty(B, KEYS, Hk, D, dtype=dtype) for _ in range(2))
    lengths = _empty(B, dtype=torch.int32)
    slopes = _empty(H, dtype=torch.float32) if alibi else None
    gptkernels.attention_decode(  # for its checks, as above
        q, k, v, lengths, window=window, softcap=softcap, alibi_slopes=slopes, impl="torch"
    )
    left, _ = bounds(True, window)

    def forward() -> Any:
        options = AttentionOptions(
            softmax_scale=D**-0.5,
            left=left,
            right=0,
            softcap=softcap,
            alibi_slopes=slopes,
            key_lengths=lengths,
        )
        return attention_kernels.attention_decode_fwd(q, k, v, None, 0, options)

    heads = f"H{H}" + (f"/{Hk}" if Hk != H else "")
    parts = [
        f"B{B} T{T}/{KEYS} {heads} D{D}",
        *([f"window {window[0]}, {window[1]}"] if window else []),
        *([f"softcap {softcap:g}"] if softcap else []),
        *(["ALiBi"] if alibi else []),
    ]
    return Problem(
        "attention_decode",
        ", ".join(parts),
        dtype,
        dict(B=B, T=T, H=H, D=D, Hk=Hk, Tk=KEYS, left=left),
        (Direction("forward", forward, None),),
    )


def gelu_mlp(
    M: int,
    C: int,
    F: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    recompute: bool = False,
    approximate: str = "tanh",
) -> Problem:
    """M rows, width C, inner width F. Raises TypeError, ValueError as `gptkernels.gelu_mlp`."""
    _check_sizes(M=M, C=C, F=F)
    x, dy = (_empty(M, C, dtype=dtype) for _ in range(2))
    w1, w2 = _empty(F, C, dtype=dtype), _empty(C, F, dtype=dtype)
    b1, b2 = (_empty(n, dtype=dtype) if bias else None for n in (F, C))
    gptkernels.gelu_mlp(x, w1, b1, w2, b2, approximate=approximate, impl="torch")
    h = None if recompute else _empty(M, F, dtype=dtype)

    def forward(**chosen: Any) -> Any:
        return mlp_kernels.gelu_mlp_fwd(x, w1, b1, w2, b2, approximate, not recompute, **chosen)

    def backward(**chosen: Any) -> Any:
        wanted = (True, True, bias, True, bias)
        return mlp_kernels.gelu_mlp_bwd(dy, x, w1, b1, w2, h, approximate, wanted, **chosen)

    parts = [*([] if bias else [" no biases"]), *([" recompute"] if recompute else [])]
    return Problem(
        "gelu_mlp",
        f"M{M} C{C} F{F}{','.join(parts)}",
        dtype,
        dict(M=M, C=C, F=F),
        (
            Direction("forward", forward, "gelu_mlp_builds"),
            Direction("backward", backward, "gelu_mlp_builds"),
        ),
    )


def layer_norm(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    prenorm: bool = True,
    bias: bool = True,
    dropout_p: float = 0.0,
) -> Problem:
    """With prenorm the sum with a residual is an output too, and has a gradient. Raises TypeError,
    ValueError as `gptkernels.layer_norm` does."""
    _check_sizes(rows=rows, cols=cols)
    x = _empty(rows, cols, dtype=dtype)
    weight = _empty(cols, dtype=dtype)
    shift = torch.empty_like(weight) if bias else None
    added = torch.empty_like(x) if residual else None
    gptkernels.layer_norm(x, weight, shift, residual=added, dropout_p=dropout_p, impl="torch")
    rng = _empty(2, dtype=torch.int64) if dropout_p > 0 else None
    mean, rstd = (_empty(rows, dtype=torch.float32) for _ in range(2))
    has_sum = residual or dropout_p > 0
    of_sum = torch.empty_like(x) if residual and prenorm else None

    def forward(**chosen: Any) -> Any:
        return layer_norm_kernels.layer_norm_fwd(
            x, weight, shift, added, rng, dropout_p, 1e-5, dtype if has_sum else None, **chosen
        )

    def backward(**chosen: Any) -> Any:
        return layer_norm_kernels.layer_norm_bwd(
            torch.empty_like(x), of_sum, x, mean, rstd, weight, rng, dropout_p, dtype,
            dtype if residual and dropout_p > 0 else None, True, bias, **chosen,
        )  # fmt: skip

    parts = [
        *([" + residual"] if residual else []),
        *([" no prenorm"] if residual and not prenorm else []),
        *([] if bias else [" no bias"]),
        *([f" dropout {dropout_p:g}"] if dropout_p else []),
    ]
    return Problem(
        "layer_norm",
        f"{rows} rows of {cols}{','.join(parts)}",
        dtype,
        dict(rows=rows, cols=cols, residual=int(residual), prenorm=int(residual and prenorm)),
        (
            Direction("forward", forward, "layer_norm_fwd_builds"),
            Direction("backward", backward, "layer_norm_bwd_builds"),
        ),
    )


def transformer_layer(
    B: int,
    T: int,
    C: int,
    H: int,
    F: int,
    dtype: torch.dtype,
    *,
    activation: str = "relu",
    norm_first: bool = False,
    causal: bool = False,
    mask: bool = False,
    bias: bool = True,
    dropout_p: float = 0.0,
) -> Problem:
    """A `gptkernels.TransformerLayer` of width C, H heads and inner width F: its fused parts in the
    order in which they run, forward, then backward. `mask`: it is given a mask tensor to read.
    Dropout is that of training. Raises TypeError, ValueError as the layer does.
    """
    _check_sizes(B=B, T=T, C=C, H=H, F=F)
    for sizes in ((B * T, C), (3 * C, C), (F, C)):
        _empty(*sizes, dtype=torch.float64)  # which the layer's own tensors stay below
    with torch.device("meta"):
        layer = TransformerLayer(C, H, F, dropout_p, activation, norm_first=norm_first, bias=bias)
    not_fused = layer.not_fused(masked=mask, training=True)
    rows, normed = B * T, functools.partial(layer_norm, B * T, C, dtype, bias=bias)
    parts = {
        "attention": lambda: attention(B, T, H, C // H, dtype, causal=causal, dropout_p=dropout_p),
        "norm1": lambda: normed(residual=True, prenorm=False, dropout_p=dropout_p),
        "mlp": lambda: gelu_mlp(rows, C, F, dtype, bias=bias, approximate="none"),
        "norm2": lambda: normed(residual=True, prenorm=norm_first, dropout_p=dropout_p),
    }
    if norm_first:
        parts = {"norm1": normed, **{name: parts[name] for name in ("attention", "norm2", "mlp")}}
    made = {name: part() for name, part in parts.items() if name not in not_fused}
    forward, backward = (
        [replace(part.directions[i], name=f"{name}, {('forward', 'backward')[i]}: {part.text}")
         for name, part in made.items()]
        for i in range(2)
    )  # fmt: skip
    options = [
        activation,
        *(["norm first"] if norm_first else []),
        *(["causal"] if causal else []),
        *(["with a mask"] if mask else []),
        *([] if bias else ["no biases"]),
        *([f"dropout {dropout_p:g}"] if dropout_p else []),
    ]
    return Problem(
        "transformer_layer",
        f"B{B} T{T} C{C} H{H} F{F} {', '.join(options)}",
        dtype,
        dict(B=B, T=T, C=C, H=H, F=F),
        (*forward, *reversed(backward)),
        not_fused,
    )


def _empty(*sizes: int, dtype: torch.dtype) -> Tensor:
    if math.prod(sizes) * dtype.itemsize >= 2**63:
        raise ValueError(
            f"a tensor of {'x'.join(map(str, sizes))} elements has 2**63 bytes or more"
        )
    return torch.empty(sizes, dtype=dtype, device="meta")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
