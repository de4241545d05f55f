"""Cases become rows: each candidate is tried, checked and timed beside the others.

A row has

    op shape sizes series dtype direction    of its case
    impl kind                                the candidate; "baseline", "ours" or "peer"
    time_s low_s high_s min_s rounds host_s  `timing.Timing`, in seconds
    baseline_s ratio ratio_spread verdict    plain PyTorch's time; how many times as fast this is
    best_peer peer_ratio peer_spread peer_verdict
                                             of ours: the same beside the fastest of all others
    bytes flops bytes_per_s flops_per_s tokens_per_s
    bound ceiling memory_ceiling product_ceiling efficiency no_efficiency
                                             what limits the case here, at which rate, and the share
                                             of it that is reached, or why there is none
    error limit wrong                        against fp64, where the case has a check; what is far
                                             beyond the limit is wrong, and no best peer
    peak_bytes                               the most memory that one call takes

What was not measured is None. A candidate that was not timed has time_s None and the reason in
"skipped"; "failed" says whether that is an error rather than a limit of this machine.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptkernels.bench import timing
from gptkernels.bench.case import BASELINE, Call, Case
from gptkernels.bench.memory import peak_bytes
from gptkernels.bench.results import Row
from gptkernels.core import ceilings
from gptkernels.core.errors import first_line, in_a_line

# Calls that take longer need fewer samples: what disturbs them is averaged within each.
_SLOW_S, _ROUNDS, _FEW_ROUNDS = 1.0, 5, 3
_WRONG = 10.0  # limits; PyTorch's own sums in 16 bits on a CPU are some beyond
_MISTAKES = (ImportError, TypeError, AttributeError, KeyError)
_TOO_FAST = (
    "it took less than the fastest {what} measured on this machine would; that ceiling is too low"
)
_SAYS = {
    "memory": "copy or read of as many bytes",
    "arithmetic": "products of as many operations",
}


def rows(
    cases: Iterable[Case], *, device: torch.device | str = "cpu", budget_s: float = 1.0
) -> Iterator[Row]:
    """The rows of each case, as soon as it is measured. `budget_s` as of `timing.compare`."""
    for case in cases:
        yield from measure(case, device=device, budget_s=budget_s)


def measure(case: Case, *, device: torch.device | str = "cpu", budget_s: float = 1.0) -> list[Row]:
    """A row for each candidate of a case. Raises nothing that a candidate raises."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    candidates = _candidates(case)
    for candidate in candidates:
        _try(candidate, case, device)
    timings = _timed(candidates, device, budget_s)
    limits = _limits(case, device) if timings else {}
    skipped = [
        _Candidate(name, "ours", None, {"skipped": reason, "failed": False})
        for name, reason in case.skipped.items()
    ]
    found = []
    for candidate in candidates + skipped:
        timed = timings.get(candidate.name)
        row = {**_head(case), "impl": candidate.name, "kind": candidate.kind, "time_s": None}
        row |= candidate.found
        if timed is not None:
            row |= timed.as_dict() | _figures(case, timed.time_s, limits)
        found.append(row)
    _put_beside(found)
    return found


def spread(row: Row) -> float:
    """How far the time of a row is known: half of the interval that holds it, as a share."""
    share: float = (row["high_s"] - row["low_s"]) / 2 / row["time_s"]
    return share


def verdict(ratio: float, within: float) -> str:
    """Whether a ratio says "faster" or "slower"; "same" where it is no further from 1 than it is
    known."""
    if abs(math.log(ratio)) <= math.log1p(within):
        return "same"
    return "faster" if ratio > 1 else "slower"


@dataclass
class _Candidate:
    name: str
    kind: str
    make: Callable[[], Call] | None
    found: Row
    call: Call | None = None
    seconds: float = 0.0  # of one call, roughly


def _candidates(case: Case) -> list[_Candidate]:
    return [
        _Candidate(BASELINE, "baseline", case.plain, {}),
        *(_Candidate(name, "ours", make, {}) for name, make in case.ours.items()),
        *(_Candidate(name, "peer", make, {}) for name, make in case.peers.items()),
    ]


def _head(case: Case) -> Row:
    return {
        "op": case.op,
        "shape": case.shape,
        "sizes": case.sizes,
        "series": case.series,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": case.direction,
    }


def _try(candidate: _Candidate, case: Case, device: torch.device) -> None:
    """Makes the call, checks what it returns and sees what memory it takes. Where any of this
    raises, or a result of ours is wrong, the candidate gets no call, and says why."""
    assert candidate.make is not None
    try:
        call = candidate.make()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if case.check is not None:
            error, limit = case.check(result)
            # JSON has no other numbers.
            candidate.found |= {"error": error if math.isfinite(error) else None, "limit": limit}
            if candidate.kind == "ours" and not error <= limit:
                said = f"its error is {error:.1e}, beyond the limit of {limit:.1e}"
                candidate.found |= {"skipped": said, "failed": True}
                return
            if not error <= _WRONG * limit:
                candidate.found["wrong"] = True
        del result
        started = time.perf_counter()
        candidate.found["peak_bytes"] = peak_bytes(call, device)
        candidate.seconds = time.perf_counter() - started
        candidate.call = call
        return
    except Exception as error:
        _drop(candidate, error)
    # The next candidate needs the memory, which the error's frames held until here.
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a kernel's error stays with the process
            torch.cuda.empty_cache()


def _drop(candidate: _Candidate, error: Exception) -> None:
    """Takes a candidate out, for an error."""
    cannot = isinstance(error, NotImplementedError | torch.OutOfMemoryError)
    # A peer's own refusal is its limit; but a package that is here and does not import is broken,
    # and one that takes no such arguments is called wrongly.
    counts = candidate.kind == "ours" or isinstance(error, _MISTAKES)
    said = first_line if isinstance(error, NotImplementedError) else in_a_line
    candidate.found |= {"skipped": said(error), "failed": counts and not cannot}
    candidate.call = None


def _timed(
    candidates: Sequence[_Candidate], device: torch.device, budget_s: float
) -> dict[str, timing.Timing]:
    """Times those that have a call. One that raises now, beside all others (no memory is left,
    say), is dropped, and the rest begins again."""
    raised: list[tuple[_Candidate, Exception]] = []

    def guarded(candidate: _Candidate) -> Call:
        call = candidate.call
        assert call is not None

        def guard() -> Any:
            try:
                return call()
            except Exception as error:
                raised.append((candidate, error))
                raise

        return guard

    while running := [c for c in candidates if c.call is not None]:
        slow = max(c.seconds for c in running) > _SLOW_S
        try:
            return timing.compare(
                {c.name: guarded(c) for c in running},
                device=device,
                budget_s=budget_s,
                min_rounds=_FEW_ROUNDS if slow else _ROUNDS,
                warm_ups=1,  # each was called before, but gave its memory back
            )
        except Exception:
            if not raised:
                raise
            _drop(*raised.pop())
    return {}


def _limits(case: Case, device: torch.device) -> Row:
    """What the machine allows: the rates, which of the two binds, and the least seconds."""
    touched = case.working_set or case.bytes_moved
    memory = ceilings.memory_rate(device, touched) if touched else None
    products = ceilings.product_rate(device, case.dtype) if case.flops else None
    seconds = {
        "memory": case.bytes_moved / memory if memory else 0.0,
        "arithmetic": case.flops / products if products else 0.0,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    if seconds[bound] == 0:
        return {"bound": None, "ceiling": None, "floor_s": None}
    rates = {"memory_ceiling": memory, "product_ceiling": products}
    ceiling = memory if bound == "memory" else products
    return {"bound": bound, "ceiling": ceiling, "floor_s": seconds[bound], **rates}


def _figures(case: Case, time_s: float, limits: Row) -> Row:
    share = limits["floor_s"] / time_s if limits["floor_s"] else None
    why = None
    if share is None:
        why = "neither its bytes nor its operations are counted, or no ceiling could be measured"
    elif share > 1:
        share, why = None, _TOO_FAST.format(what=_SAYS[limits["bound"]])
    return {
        "bytes": case.bytes_moved or None,
        "flops": case.flops or None,
        "bytes_per_s": case.bytes_moved / time_s if case.bytes_moved else None,
        "flops_per_s": case.flops / time_s if case.flops else None,
        "tokens_per_s": case.tokens / time_s if case.tokens else None,
        **limits,
        "efficiency": share,
        "no_efficiency": why,
    }


def _put_beside(found: list[Row]) -> None:
    """Adds how each row stands to plain PyTorch, and ours to the fastest of the others."""
    timed = [row for row in found if row["time_s"] is not None]
    plain = next((row for row in timed if row["kind"] == "baseline"), None)
    others = [row for row in timed if row["kind"] != "ours" and not row.get("wrong")]
    best = min(others, key=lambda row: row["time_s"], default=None)
    for row in timed:
        ratio, within, said = _beside(row, plain)
        row |= {"baseline_s": plain["time_s"] if plain else None}
        row |= {"ratio": ratio, "ratio_spread": within, "verdict": said}
        if row["kind"] == "ours":
            ratio, within, said = _beside(row, best)
            row |= {"best_peer": best["impl"] if best else None}
            row |= {"peer_ratio": ratio, "peer_spread": within, "peer_verdict": said}


def _beside(row: Row, other: Row | None) -> tuple[float | None, float | None, str | None]:
    """The other's time over that of the row, how far that is known, and what it says."""
    if other is None:
        return None, None, None
    ratio = other["time_s"] / row["time_s"]
    within = 0.0 if other is row else math.hypot(spread(row), spread(other))
    return ratio, within, verdict(ratio, within)
