"""The parity table: it compares each op, implementation, dtype and direction with the truth, on
fresh inputs and by the rule of `gptkernels.truth.parity`.

`gptkernels verify` prints it. The demo, the GPU run and the tests use the same cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.core import native, philox
from gptkernels.core.checks import DTYPES, check_seed, dtype_name
from gptkernels.core.choice import IMPLEMENTATIONS, check_impl, unavailable
from gptkernels.core.errors import in_a_line
from gptkernels.core.names import check_name
from gptkernels.truth import baseline, parity, reference

Randn = Callable[..., Tensor]  # takes sizes, returns a standard normal tensor


@dataclass(frozen=True)
class Case:
    """One call of one op. The op, its reference and its baseline all get the same arguments."""

    op: str
    name: str
    inputs: Callable[[Randn], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    op_options: dict[str, Any] = field(default_factory=dict)  # for the op alone, such as recompute
    outputs: tuple[str, ...] = ("y",)
    directions: tuple[str, ...] = ("forward", "gradient")


@dataclass(frozen=True)
class Row:
    """One line of the table: the tensor whose error is closest to its limit, or why nothing ran."""

    op: str
    case: str
    impl: str
    dtype: str
    direction: str  # "forward" | "gradient"
    status: str  # "pass" | "fail" | "skipped"
    tensor: str = ""
    error: float | None = None  # max|result - truth|
    baseline_error: float | None = None  # max|eager PyTorch - truth|
    limit: float | None = None
    reason: str = ""
    seed: int | None = None  # the seed of the inputs
    arch: str | None = None  # the GPU that the emulator imitated, where the caller named one
    note: str = ""  # which kernels made for that GPU did not run, and why

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values for JSON."""
        return asdict(self)


def _mlp(randn: Randn, *sizes: int) -> dict[str, Any]:
    """Returns gelu_mlp's inputs; `sizes` are x's sizes (..., C), then F. The weights are scaled so
    that h and y are about 1."""
    *_, width, inner = sizes
    return dict(
        x=randn(*sizes[:-1]),
        w1=randn(inner, width) * width**-0.5,
        b1=randn(inner),
        w2=randn(width, inner) * inner**-0.5,
        b2=randn(width),
    )


def _head(randn: Randn, *sizes: int, bias: bool = False) -> dict[str, Any]:
    """Returns linear_cross_entropy's inputs; `sizes` are x's sizes (..., C), then V. Every fifth
    target is -100. The logits are about 2, so that rows differ in their losses."""
    *rows, width, classes = sizes
    x, weight = randn(*rows, width), randn(classes, width) * (2 * width**-0.5)
    drawn = randn(*rows)
    targets = (drawn.double().abs() * 1e4).long() % classes
    targets.view(-1)[::5] = -100
    found = dict(x=x, weight=weight, targets=targets)
    return found | (dict(bias=randn(classes)) if bias else {})


def _qkv(
    randn: Randn, B: int, Tq: int, Tk: int, H: int, Hk: int, D: int, *lengths: int
) -> dict[str, Any]:
    """Returns attention's inputs, with key_lengths if `lengths` are given."""
    q, k, v = randn(B, Tq, H, D), randn(B, Tk, Hk, D), randn(B, Tk, Hk, D)
    ends = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    return dict(q=q, k=k, v=v) | (dict(key_lengths=ends) if lengths else {})


def _packed(
    randn: Randn, queries: tuple[int, ...], keys: tuple[int, ...], H: int, Hk: int, D: int
) -> dict[str, Any]:
    """Returns attention_varlen's inputs for sequences of these lengths."""
    q, k, v = randn(sum(queries), H, D), randn(sum(keys), Hk, D), randn(sum(keys), Hk, D)
    ends_q, ends_k = (
        torch.tensor([0, *lengths]).cumsum(0).to(q.device, torch.int32)
        for lengths in (queries, keys)
    )
    return dict(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=ends_q,
        cu_seqlens_k=ends_k,
        max_seqlen_q=max(queries),
        max_seqlen_k=max(keys),
    )


def _cache(
    randn: Randn, lengths: tuple[int, ...], Tq: int, H: int, Hk: int, D: int, page: int | None
) -> dict[str, Any]:
    """Returns attention_decode's inputs: caches as long as the longest entry or, with `page`, pages
    in reverse order."""
    B, Tmax = len(lengths), max(lengths)
    q = randn(B, Tq, H, D)
    ends = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    if page is None:
        k, v = randn(B, Tmax, Hk, D), randn(B, Tmax, Hk, D)
        return dict(q=q, k_cache=k, v_cache=v, cache_lengths=ends)
    pages = B * -(-Tmax // page)
    k, v = randn(pages, page, Hk, D), randn(pages, page, Hk, D)
    table = torch.arange(pages, dtype=torch.int32, device=q.device).flip(0).view(B, -1)
    return dict(q=q, k_cache=k, v_cache=v, cache_lengths=ends, block_table=table)


CASES: tuple[Case, ...] = (
    Case(
        "layer_norm",
        "C 768",
        lambda randn: dict(x=randn(6, 768), weight=randn(768), bias=randn(768)),
    ),
    Case(
        "layer_norm",
        "C 100, residual, prenorm, no bias",
        lambda randn: dict(x=randn(2, 9, 100), weight=randn(100), residual=randn(2, 9, 100)),
        dict(prenorm=True),
        outputs=("y", "s"),
    ),
    Case(
        "layer_norm",
        "C 96, fp32 residual, dropout",
        lambda randn: dict(
            x=randn(33, 96), weight=randn(96), bias=randn(96), residual=randn(33, 96).float()
        ),
        dict(prenorm=True, dropout_p=0.2),
        outputs=("y", "s"),
    ),
    Case(
        "layer_norm",
        "C 9001, dropout",
        lambda randn: dict(x=randn(3, 9001), weight=randn(9001), bias=randn(9001)),
        dict(dropout_p=0.1),
    ),
    Case(
        "layer_norm",
        "2050 rows, C 16",
        lambda randn: dict(x=randn(2050, 16), weight=randn(16), bias=randn(16)),
    ),
    Case(
        "attention",
        "causal, T 140, D 64",
        lambda randn: _qkv(randn, 1, 140, 140, 1, 1, 64),
        outputs=("out",),
    ),
    Case(
        "attention",
        "4 heads on 2, Tq 33, Tk 70, window, lse, D 40",
        lambda randn: _qkv(randn, 1, 33, 70, 4, 2, 40),
        dict(window=(20, 0), return_lse=True),
        outputs=("out", "lse"),
    ),
    Case(
        "attention",
        "not causal, softcap, ALiBi, D 96",
        lambda randn: _qkv(randn, 1, 40, 40, 2, 2, 96),
        dict(causal=False, softcap=5.0, alibi_slopes=(0.25, 0.0625)),
        outputs=("out",),
    ),
    Case(
        "attention",
        "key lengths, dropout, D 16",
        lambda randn: _qkv(randn, 2, 50, 50, 1, 1, 16, 50, 33),
        dict(dropout_p=0.2),
        outputs=("out",),
    ),
    Case(
        "attention",
        "48 heads on 1, not causal, Tq 60, Tk 9, D 16",
        lambda randn: _qkv(randn, 1, 60, 9, 48, 1, 16),
        dict(causal=False),
        outputs=("out",),
    ),
    Case(
        "attention",
        "sinks, 48 heads on 16, window, v 24 wide, lse, D 16",
        lambda randn: (
            _qkv(randn, 1, 20, 25, 48, 16, 16) | dict(v=randn(1, 25, 16, 24), sinks=randn(48))
        ),
        dict(window=(12, 0), return_lse=True),
        outputs=("out", "lse"),
    ),
    Case(
        "attention",
        "learned ALiBi slopes of each entry, 48 heads, D 16",
        lambda randn: (
            _qkv(randn, 2, 20, 20, 48, 48, 16) | dict(alibi_slopes=randn(2, 48).float().abs() / 8)
        ),
        outputs=("out",),
    ),
    Case(
        "attention",
        "causal, T 40, D 320",
        lambda randn: _qkv(randn, 1, 40, 40, 1, 1, 320),
        outputs=("out",),
    ),
    Case(
        "attention_varlen",
        "causal, T 30 + 0 + 140 + 1 + 70, D 64",
        lambda randn: _packed(randn, (30, 0, 140, 1, 70), (30, 0, 140, 1, 70), 1, 1, 64),
        outputs=("out",),
    ),
    Case(
        "attention_varlen",
        "T 33/40 + 10/70, window, ALiBi, dropout, lse, D 40",
        lambda randn: _packed(randn, (33, 10), (40, 70), 2, 1, 40),
        dict(window=(20, 0), alibi_slopes=(0.25, 0.0625), dropout_p=0.2, return_lse=True),
        outputs=("out", "lse"),
    ),
    Case(
        "attention_decode",
        "8 heads on 2, 300 and 13 keys, lse, D 64",
        lambda randn: _cache(randn, (300, 13), 1, 8, 2, 64, None),
        dict(return_lse=True),
        outputs=("out", "lse"),
        directions=("forward",),
    ),
    Case(
        "attention_decode",
        "3 tokens, pages, window, softcap, ALiBi, D 40",
        lambda randn: _cache(randn, (90, 70), 3, 2, 1, 40, 16),
        dict(window=(40, 0), softcap=5.0, alibi_slopes=(0.25, 0.0625)),
        dict(num_splits=2),
        outputs=("out",),
        directions=("forward",),
    ),
    Case(
        "attention_decode",
        "not causal, 3 tokens, sinks, slopes of each entry, 300 and 13 keys, D 16",
        lambda randn: (
            _cache(randn, (300, 13), 3, 8, 4, 16, None)
            | dict(sinks=randn(8), alibi_slopes=randn(2, 8).float().abs() / 8)
        ),
        dict(causal=False, return_lse=True),
        outputs=("out", "lse"),
        directions=("forward",),
    ),
    Case(
        "gelu_mlp",
        "C 64, F 256",
        lambda randn: _mlp(randn, 2, 19, 64, 256),
    ),
    Case(
        "gelu_mlp",
        "C 33, F 130, erf, recompute",
        lambda randn: _mlp(randn, 70, 33, 130),
        dict(approximate="none"),
        dict(recompute=True),
    ),
    Case(
        "gelu_mlp",
        "C 96, F 72, no biases",
        lambda randn: _mlp(randn, 100, 96, 72) | dict(b1=None, b2=None),
    ),
    Case(
        "gelu_mlp",
        "2050 rows, C 16, F 24",
        lambda randn: _mlp(randn, 2050, 16, 24),
    ),
    Case(
        "linear_cross_entropy",
        "C 64, V 517",
        lambda randn: _head(randn, 2, 50, 64, 517),
        dict(reduction="none"),
        outputs=("losses",),
    ),
    Case(
        "linear_cross_entropy",
        "C 33, V 130, bias, mean",
        lambda randn: _head(randn, 70, 33, 130, bias=True),
        # A mean is one number: chance may bring PyTorch's as near to the truth as you like.
        directions=("gradient",),
    ),
    Case(
        "linear_cross_entropy",
        "C 96, V 1000, smoothing, z-loss, softcap",
        lambda randn: _head(randn, 40, 96, 1000, bias=True),
        dict(label_smoothing=0.1, z_loss=1e-2, softcap=3.0, reduction="none"),
        outputs=("losses",),
    ),
    Case(
        "linear_cross_entropy",
        "2050 rows, C 16, V 70, sum",
        lambda randn: _head(randn, 2050, 16, 70),
        dict(reduction="sum"),
        directions=("gradient",),
    ),
)

OPS = tuple(dict.fromkeys(case.op for case in CASES))


def run(
    impls: Iterable[str] = IMPLEMENTATIONS,
    ops: Iterable[str] = OPS,
    dtypes: Iterable[torch.dtype] = DTYPES,
    device: torch.device | str | None = None,
    seed: int | None = None,
    arch: str | None = None,
) -> Iterator[Row]:
    """Yields the rows as they are measured. `device` is by default the GPU if there is one, else
    the CPU.

    Without a `seed` the inputs are new on every run; each row holds the seed. `arch`, "sm80" or
    "sm90", is the GPU that the emulator imitates during the run. A row of sm90 has a note where a
    kernel for any GPU ran instead of Hopper's own, with the reason.

    Raises ValueError before the first row: for an unknown implementation, op, dtype or
    architecture, for a seed out of range, and for an architecture without the emulator.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    impls, ops, dtypes = tuple(impls), tuple(ops), tuple(dtypes)
    for op in ops:
        check_name("op", op, OPS)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}")
    for impl in impls:
        check_impl(impl, auto=False)
    _check_arch(arch, impls)
    used = fresh_seed() if seed is None else seed
    check_seed("seed", used)
    return (
        row
        for case in CASES
        if case.op in ops
        for impl in impls
        for dtype in dtypes
        for row in check(case, impl, dtype, torch.device(chosen), used, arch)
    )


def _check_arch(arch: str | None, impls: tuple[str, ...]) -> None:
    if arch is None:
        return
    if arch not in native.ARCHITECTURES:
        raise ValueError(f"arch must be {' or '.join(native.ARCHITECTURES)}, got {arch!r}")
    if not native.EMULATED or impls != ("cuda",):
        raise ValueError(
            "arch is the GPU that the emulator is: it goes with impl='cuda' alone, and "
            "GPTKERNELS_EMULATE=1 in the environment"
        )


def fresh_seed() -> int:
    """Returns a random number of 24 bits from the operating system."""
    return int.from_bytes(os.urandom(3), "big")


def check(
    case: Case,
    impl: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    arch: str | None = None,
) -> list[Row]:
    """Returns the rows of one case, one for each direction; `arch` is that of `run`."""
    identity = (case.op, case.name, impl, dtype_name(dtype))

    def unmeasured(status: str, reason: str, seed: int | None = None) -> list[Row]:
        return [
            Row(*identity, direction, status, reason=reason, seed=seed, arch=arch)
            for direction in case.directions
        ]

    reason = unavailable(impl, device.type, dtype)
    if reason is not None:
        return unmeasured("skipped", reason)
    refusals: list[tuple[str, str]] = []
    try:
        if arch is None:
            measurements = measure(case, impl, dtype, device, seed)
        else:
            measurements, refusals = _measure_as(arch, case, dtype, device, seed)
    except NotImplementedError as error:
        return unmeasured("skipped", str(error))
    except Exception as error:  # one case failed (a kernel too large for this GPU, say): go on
        return unmeasured("fail", in_a_line(error), seed)
    rows = []
    for direction in case.directions:
        worst = max((m for m in measurements if m.direction == direction), key=_closeness)
        passed = all(m.passed for m in measurements if m.direction == direction)
        rows.append(
            Row(
                *identity,
                direction,
                "pass" if passed else "fail",
                worst.name,
                worst.error,
                worst.baseline_error,
                worst.limit,
                seed=seed,
                arch=arch,
                note=_note(direction, refusals),
            )
        )
    return rows


def _measure_as(
    arch: str, case: Case, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[list[parity.Measurement], list[tuple[str, str]]]:
    """Returns the measurements with the emulator imitating that GPU, and the kernels made for the
    GPU that did not run, each with the reason."""
    measurements: list[parity.Measurement] = []
    before = os.environ.get(native.ARCH_VARIABLE)
    os.environ[native.ARCH_VARIABLE] = arch
    try:
        made = native.record(
            lambda: measurements.extend(measure(case, "cuda", dtype, device, seed))
        )
    finally:
        if before is None:
            del os.environ[native.ARCH_VARIABLE]
        else:
            os.environ[native.ARCH_VARIABLE] = before
    return measurements, list(dict.fromkeys(made["refusals"]))


def _note(direction: str, refusals: list[tuple[str, str]]) -> str:
    other = "_bwd" if direction == "forward" else "_fwd"
    reasons = [f"not {kernel}: {reason}" for kernel, reason in refusals if other not in kernel]
    return "; ".join(reasons)


def measure(
    case: Case, impl: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[parity.Measurement]:
    """Measures every output and gradient of one case, with the dropout mask of `seed`. The op runs
    on poisoned memory."""
    op = getattr(gptkernels, case.op)
    inputs = case.inputs(_randn(dtype, device, seed))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        drawn = dict(rng=philox.draw(device)) if "dropout_p" in case.options else {}

        def candidate(**leaves: Any) -> Any:
            torch.manual_seed(seed)  # so that the op draws the same (seed, offset)
            return op(**leaves, **case.options, **case.op_options, impl=impl)

        return parity.measure(
            candidate,
            lambda **leaves: getattr(baseline, case.op)(**leaves, **case.options, **drawn),
            lambda **leaves: getattr(reference, case.op)(**leaves, **case.options, **drawn),
            inputs,
            gradients="gradient" in case.directions,
            names=case.outputs,
            seed=seed,
        )


def _randn(dtype: torch.dtype, device: torch.device, seed: int) -> Randn:
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes: torch.randn(sizes, generator=generator).to(device=device, dtype=dtype)


def _closeness(measurement: parity.Measurement) -> float:
    """Returns error / limit, so that the largest value belongs to the worst tensor."""
    if measurement.limit > 0:
        return measurement.error / measurement.limit
    return float("inf") if measurement.error > 0 else 0.0
