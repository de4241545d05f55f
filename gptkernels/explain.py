"""What `impl="cuda"` would launch for a problem: `gptkernels info --explain`, and what benchmarks
predict from. No GPU is needed and nothing is launched: the launchers themselves are asked.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels import cuda
from gptkernels.cuda import attention as attention_kernels
from gptkernels.cuda import layer_norm as layer_norm_kernels
from gptkernels.cuda import mlp as mlp_kernels
from gptkernels.ops.attention_options import bounds

# Of both chips: bytes of shared memory of an SM, of which each CTA costs 1 KiB more than it asks
# for, and the most threads and CTAs that an SM holds.
_RESERVED, _MOST_THREADS, _MOST_CTAS = 1024, 2048, 32


@dataclass(frozen=True)
class Machine:
    """What a plan has to know of a GPU."""

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


@dataclass(frozen=True)
class Launched:
    """One launch of a plan."""

    kernel: str
    shape: str
    grid: tuple[int, int, int]
    threads: int
    cluster: int
    shared_bytes: int
    tiles: int  # of work that a persistent grid shares; 0: one a CTA
    built: dict[str, Any] | None  # the candidate's members, as csrc/candidate.h names them

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
class Plan:
    """What one direction of a problem would launch, and what was made for the GPU but cannot."""

    launches: list[Launched]
    refusals: list[tuple[str, str]]  # kernel, reason


@dataclass(frozen=True)
class Direction:
    """The forward or the backward pass of a problem."""

    name: str
    run: Callable[..., Any]  # the launcher; takes candidate=N where the kernels have candidates
    list_name: str | None  # of the candidates, in the module

    def plan(self, machine: Machine, candidate: int = -1) -> Plan:
        """Raises ImportError where no module is built, ValueError where a launcher, or the
        candidate, cannot take the problem."""
        chosen = {"candidate": candidate} if candidate >= 0 else {}
        try:
            made = cuda.plan(
                lambda: self.run(**chosen),
                capability=machine.capability,
                multiprocessors=machine.multiprocessors,
            )
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(str(error)) from error
        launches = [Launched(**launch) for launch in made["launches"]]
        return Plan(launches, list(dict.fromkeys(made["refusals"])))

    def ways(
        self, machine: Machine, pick: Callable[[list[Launched]], Launched]
    ) -> list[tuple[int, Plan, bool]]:
        """Each candidate for the problem: its number, its plan, and whether the launcher's rule
        makes the same launch of that which `pick` picks. Before them, as -1, the kernel for any GPU
        where the rule takes that."""
        rule = self.plan(machine)
        own = pick(rule.launches)
        found = [] if own.built else [(-1, rule, True)]
        widths = {}
        # Elsewhere no candidate can run.
        candidates = self.candidates() if machine.arch == "sm90" else []
        for index, candidate in enumerate(candidates):
            try:
                made = self.plan(machine, index)
            except ValueError:  # of another head width, say
                continue
            found.append((index, made, pick(made.launches) == own))
            widths[index] = candidate["head_width"]
        # One for wider heads than need be can take them, and only loses.
        least = min(widths.values(), default=0)
        return [way for way in found if widths.get(way[0], least) == least]

    def candidates(self) -> list[dict[str, Any]]:
        """Every way in which the kernel for Hopper is built; index is the candidate's number."""
        return getattr(cuda.planner(), self.list_name)() if self.list_name else []


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one op."""

    op: str
    text: str
    dtype: torch.dtype
    sizes: dict[str, int]
    directions: tuple[Direction, ...]


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
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> Problem:
    """Raises TypeError, ValueError as `gptkernels.attention` does."""
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
    rng = _empty(2, dtype=torch.int64) if dropout_p > 0 else None
    scalars = (D**-0.5, left, right, softcap, dropout_p)
    out, lse = torch.empty_like(q), _empty(B, H, T, dtype=torch.float32)

    def forward(**chosen: int) -> Any:
        return attention_kernels.attention_fwd(
            q, k, v, slopes, lengths, None, rng, *scalars, **chosen
        )

    def backward(**chosen: int) -> Any:
        return attention_kernels.attention_bwd(
            torch.empty_like(q), None, q, k, v, out, lse, slopes, lengths, None, rng, *scalars,
            (True, True, True), False, deterministic, **chosen,
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
        "attention",
        f"B{B} {tokens} {heads} D{D} {', '.join(parts)}",
        dtype,
        dict(B=B, T=T, H=H, D=D, Hk=Hk, Tk=Tk, left=left, right=right),
        (
            Direction("forward", forward, "attention_fwd_candidates"),
            Direction("backward", backward, "attention_bwd_candidates"),
        ),
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

    def forward(**chosen: int) -> Any:
        return mlp_kernels.gelu_mlp_fwd(x, w1, b1, w2, b2, approximate, not recompute, **chosen)

    def backward(**chosen: int) -> Any:
        wanted = (True, True, bias, True, bias)
        return mlp_kernels.gelu_mlp_bwd(dy, x, w1, b1, w2, h, approximate, wanted, **chosen)

    parts = [*([] if bias else [" no biases"]), *([" recompute"] if recompute else [])]
    return Problem(
        "gelu_mlp",
        f"M{M} C{C} F{F}{','.join(parts)}",
        dtype,
        dict(M=M, C=C, F=F),
        (
            Direction("forward", forward, "mlp_candidates"),
            Direction("backward", backward, "mlp_candidates"),
        ),
    )


def layer_norm(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    dropout_p: float = 0.0,
) -> Problem:
    """Raises TypeError, ValueError as `gptkernels.layer_norm` does."""
    _check_sizes(rows=rows, cols=cols)
    x = _empty(rows, cols, dtype=dtype)
    weight, bias = (_empty(cols, dtype=dtype) for _ in range(2))
    added = torch.empty_like(x) if residual else None
    gptkernels.layer_norm(x, weight, bias, residual=added, dropout_p=dropout_p, impl="torch")
    rng = _empty(2, dtype=torch.int64) if dropout_p > 0 else None
    mean, rstd = (_empty(rows, dtype=torch.float32) for _ in range(2))
    has_sum = residual or dropout_p > 0

    def forward(**chosen: int) -> Any:
        return layer_norm_kernels.layer_norm_fwd(
            x, weight, bias, added, rng, dropout_p, 1e-5, dtype if has_sum else None, **chosen
        )

    def backward(**chosen: int) -> Any:
        return layer_norm_kernels.layer_norm_bwd(
            torch.empty_like(x), torch.empty_like(x) if residual else None, x, mean, rstd, weight,
            rng, dropout_p, dtype, dtype if residual and dropout_p > 0 else None, True, True,
            **chosen,
        )  # fmt: skip

    parts = [
        *([" + residual"] if residual else []),
        *([f" dropout {dropout_p:g}"] if dropout_p else []),
    ]
    return Problem(
        "layer_norm",
        f"{rows} rows of {cols}{','.join(parts)}",
        dtype,
        dict(rows=rows, cols=cols),
        (
            Direction("forward", forward, "layer_norm_fwd_candidates"),
            Direction("backward", backward, "layer_norm_bwd_candidates"),
        ),
    )


OPS: dict[str, Callable[..., Problem]] = {
    "attention": attention,
    "mlp": gelu_mlp,
    "layer_norm": layer_norm,
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}


def parse(op: str, words: Sequence[str], **options: Any) -> Problem:
    """The problem that a command line names: sizes and a dtype in words, options by name.

    Raises ValueError for a word or an option that is not as the op takes it.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    parameters = inspect.signature(OPS[op]).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    usage = f"{op} takes {' '.join(names)}, such as {_EXAMPLES[op]}"
    if len(words) != len(names):
        raise ValueError(f"{usage}; got {' '.join(words) or 'nothing'}")
    *sizes, dtype = words
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    for name, size in zip(names, sizes, strict=False):
        if not (size.isascii() and size.isdigit()):
            raise ValueError(f"{usage}; {name} cannot be {size!r}")
    for name in options:
        if name not in {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}:
            raise ValueError(f"{op} has no option {name.replace('_', '-')}")
    return OPS[op](*map(int, sizes), _DTYPES[dtype], **options)


_EXAMPLES = {
    "attention": "2 8192 32 128 bf16",
    "mlp": "8192 4096 16384 bf16",
    "layer_norm": "8192 4096 bf16",
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


def lines(problem: Problem, machine: Machine) -> Iterator[str]:
    """The report, line by line. Raises ImportError where no module is built."""
    dtype = str(problem.dtype).removeprefix("torch.")
    yield f"{problem.op} {problem.text}, {dtype}"
    yield (
        f"planned for {machine.arch}: {machine.name}, {machine.multiprocessors} multiprocessors; "
        'impl="auto" picks torch, this is impl="cuda"'
    )
    for direction in problem.directions:
        yield ""
        yield direction.name
        made = direction.plan(machine)
        for launched in made.launches:
            yield f"  {launched.kernel} on {launched.shape}"
            yield from (f"    {line}" for line in described(launched, machine))
        for kernel, reason in made.refusals:
            yield f"  not {kernel}: {reason}"
        if machine.arch == "sm90":
            yield from _candidate_lines(direction, machine, made)


def _candidate_lines(direction: Direction, machine: Machine, made: Plan) -> Iterator[str]:
    chosen = {launched.built["name"] for launched in made.launches if launched.built}
    candidates, cannot = direction.candidates(), 0
    for index, candidate in enumerate(candidates):
        try:
            direction.plan(machine, index)
        except ValueError:  # of another head width, say
            cannot += 1
            continue
        runs = "runs" if candidate["name"] in chosen else "could run"
        yield f"  candidate {index}, {candidate['name']}: {runs}"
    if cannot:
        yield f"  {_count(cannot, 'candidate')} cannot take it"


def described(launched: Launched, machine: Machine) -> Iterator[str]:
    """Tile, stages and the like, where they are known; grid, shared memory, waves."""
    if launched.built:
        yield built_as(launched.built)
    grid = "x".join(str(n) for n in launched.grid if n > 1 or n == launched.grid[0])
    resident = launched.resident(machine)
    cluster = f" in clusters of {launched.cluster}" if launched.cluster > 1 else ""
    tiles = f", {launched.tiles} tiles" if launched.tiles else ""
    yield (
        f"grid {grid}{cluster} of {launched.threads} threads, "
        f"{launched.shared_bytes / 1024:.1f} KiB of shared memory: at most {resident} "
        f"{'CTA' if resident == 1 else 'CTAs'} an SM{tiles}, {launched.waves(machine):.2f} waves"
    )


def built_as(candidate: dict[str, Any]) -> str:
    """A candidate's members in one line."""
    tile = "x".join(
        str(n) for n in (candidate["tile_m"], candidate["tile_n"], candidate["tile_k"]) if n
    )
    parts = [f"{candidate['name']}: tile {tile}", _count(candidate["stages"], "stage")]
    if candidate["consumers"]:
        turns = " taking turns" if candidate["pingpong"] else ""
        parts.append(_count(candidate["consumers"], "consumer warpgroup") + turns)
    if candidate["cluster"] > 1:
        parts.append(f"clusters of {candidate['cluster']}")
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
