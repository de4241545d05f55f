"""The small case that attention's canary runs (`canary`), and what has to hold of its results."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptkernels.core import masks, philox
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch.blocks import hidden_keys

# Of the small case: more than one tile of any kernel, and no multiple of one.
_QUERIES, _KEYS, _CACHE, _PAGE, _NEW = 163, 200, 700, 32, 3
_LEFT, _RIGHT = 70, 9
# Those of the parity rule (gptkernels.truth.parity).
_K_FORWARD, _K_GRADIENT = 2.0, 3.0


class Kind(NamedTuple):
    """What calls have in common that one canary stands for: all that selects a kernel."""

    op: str
    training: bool
    dtype: torch.dtype
    width: int
    device: tuple[str, int | None]
    grouped: bool
    paged: bool
    one_new_token: bool  # whose kernel has other masks
    lse: bool
    left: bool
    right: int  # -1, 0 or 1
    softcap: bool
    alibi: bool
    alibi_by_entry: bool
    alibi_learned: bool
    sinks: bool
    dropout: bool
    lengths: bool
    narrow_values: bool  # or wide ones: not as wide as the keys


class _Part(NamedTuple):
    """A batch entry, or a packed sequence, by itself."""

    number: int
    batch: slice
    queries: slice
    keys: slice
    length: int | None  # of its keys, if some are hidden by their number

    def of_queries(self, x: Tensor) -> Tensor:
        return x[self.batch, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        return x[self.batch, self.keys]

    def of_lse(self, x: Tensor) -> Tensor:
        return x[self.batch, :, self.queries]


class _Case(NamedTuple):
    """`run` returns out, lse, and, where the kind is of training, dq, dk, dv, and by_query where
    the slopes are learned."""

    tensors: tuple[Tensor, Tensor, Tensor]
    cotangents: tuple[Tensor, Tensor | None]
    options: AttentionOptions
    parts: list[_Part]
    run: Callable[[Any], list[Tensor]]


def _case(kind: Kind, D: int, Dv: int, given: AttentionOptions, device: torch.device) -> _Case:
    # On the CPU, so that nobody's random numbers are others than without a canary.
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int, dtype: torch.dtype = kind.dtype) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    def integers(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    packed = kind.op == "attention_varlen"
    H, Hk = (4, 2) if kind.grouped else (2, 2)
    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(H)], device=device)
    if kind.alibi_by_entry:
        slopes = torch.stack([slopes, slopes / 2, slopes / 4][: 3 if packed else 2])
    options = given._replace(
        left=min(given.left, _LEFT),
        right=min(given.right, _RIGHT),
        backend=-1,
        alibi_slopes=slopes if kind.alibi else None,
        sinks=draw(H, dtype=torch.float32) if kind.sinks else None,
        rng=integers(1234, 5, dtype=torch.int64) if kind.dropout else None,
    )
    if kind.op == "attention_decode":
        return _decoding(kind, options, draw, integers, (H, Hk, D, Dv))
    queries, keys = [_QUERIES, _QUERIES], [_KEYS, _KEYS]
    if packed:
        queries, keys = [_QUERIES, 20, 1], [_KEYS, 45, 7]
        q = draw(1, sum(queries), H, D)
        k, v = (draw(1, sum(keys), Hk, width) for width in (D, Dv))
        options = options._replace(
            cu_seqlens_q=integers(*_ends(queries)),
            cu_seqlens_k=integers(*_ends(keys)),
            max_seqlen_q=max(queries),
            max_seqlen_k=max(keys),
        )
        inside = zip(_slices(queries), _slices(keys), strict=True)
        parts = [_Part(b, slice(None), rows, cols, None) for b, (rows, cols) in enumerate(inside)]
    else:
        q = draw(2, _QUERIES, H, D)
        k, v = (draw(2, _KEYS, Hk, width) for width in (D, Dv))
        lengths = [_KEYS, _KEYS // 3] if kind.lengths else [None, None]
        if kind.lengths:
            options = options._replace(key_lengths=integers(_KEYS, _KEYS // 3))
        every = slice(None)
        parts = [_Part(b, slice(b, b + 1), every, every, n) for b, n in enumerate(lengths)]
    dout = draw(*q.shape[:-1], Dv)
    dlse = draw(q.shape[0], H, q.shape[1], dtype=torch.float32) if kind.lse else None

    def run(launchers: Any) -> list[Tensor]:
        out, lse = launchers.attention_fwd(q, k, v, options)
        if not kind.training:
            return [out, lse]
        wanted = (True, True, True, False, kind.alibi_learned)
        *gradients, _, by_query = launchers.attention_bwd(
            dout, dlse, q, k, v, out, lse, options, wanted, True
        )
        return [out, lse, *gradients, *([by_query] if kind.alibi_learned else [])]

    return _Case((q, k, v), (dout, dlse), options, parts, run)


def _decoding(
    kind: Kind,
    options: AttentionOptions,
    draw: Callable[..., Tensor],
    integers: Callable[..., Tensor],
    sizes: tuple[int, int, int, int],
) -> _Case:
    H, Hk, D, Dv = sizes
    pages = -(-_CACHE // _PAGE)
    lengths = [_CACHE - 13, _CACHE // 16]
    q = draw(2, 1 if kind.one_new_token else _NEW, H, D)
    k, v = (draw(2, pages * _PAGE, Hk, width) for width in (D, Dv))
    # A bound that hides a key from the first of the new tokens.
    right = min(options.right, _NEW - 2)
    options = options._replace(key_lengths=integers(*lengths), right=right)
    table, caches = None, [k, v]
    if kind.paged:  # the pages in another order
        table = integers(*reversed(range(2 * pages))).view(2, pages)
        caches = [x.view(2 * pages, _PAGE, Hk, D).flip(0).contiguous() for x in caches]

    def run(launchers: Any) -> list[Tensor]:
        return list(launchers.attention_decode_fwd(q, *caches, table, 0, options))

    every = slice(None)
    parts = [
        _Part(b, slice(b, b + 1), every, slice(0, length), None) for b, length in enumerate(lengths)
    ]
    return _Case((q, k, v), (q, None), options, parts, run)


def _ends(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    ends = _ends(lengths)
    return (slice(a, b) for a, b in itertools.pairwise(ends))


def wrong(kind: Kind, q: Tensor, v: Tensor, options: AttentionOptions) -> str | None:
    """What is wrong with Triton's results for the small case; None where nothing is."""
    case = _case(kind, q.shape[-1], v.shape[-1], options, q.device)
    launchers = importlib.import_module("gptkernels.ops.attention.triton")
    with _Poisoning():
        found = case.run(launchers)
        again = case.run(launchers)
    if not all(torch.equal(x, y) for x, y in zip(found, again, strict=True)):
        return "two runs gave different bits"
    names = ("out", "lse", "dq", "dk", "dv", "what the slopes' gradient is the sum of")
    for part in case.parts:
        queries, keys, rows = part.of_queries, part.of_keys, part.of_lse
        cuts = (queries, rows, queries, keys, keys, rows)
        plain = _plain(kind, case, part, kind.dtype)
        truth = _plain(kind, case, part, torch.float64)
        for i, (name, cut, x, b, t) in enumerate(
            zip(names, cuts, found, plain, truth, strict=False)
        ):
            k = _K_FORWARD if i < 2 else _K_GRADIENT
            largest = t.masked_fill(t == -math.inf, 0).abs().max().item()
            limit = k * _error(b, t) + 2 * torch.finfo(x.dtype).eps * largest
            error = _error(cut(x), t)
            if not error <= limit < math.inf:
                return f"{name} is wrong: error {error:.1e}, limit {limit:.1e}"
    return None


def _plain(kind: Kind, case: _Case, part: _Part, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of a part by PyTorch's operators in a dtype, all scores in memory."""
    q, k, v = case.tensors
    q, k, v = (
        x.to(dtype).detach().requires_grad_(kind.training)
        for x in (part.of_queries(q), part.of_keys(k), part.of_keys(v))
    )
    slopes = _slopes_of_queries(kind, case, part, torch.promote_types(dtype, torch.float32))
    with torch.set_grad_enabled(kind.training):
        out, lse = _scored(q, k, v, slopes, case.options, part)
    if not kind.training:
        return [out, lse]
    dout, dlse = case.cotangents
    outputs, given = [out], [part.of_queries(dout).to(dtype)]
    if dlse is not None:
        outputs.append(lse)
        given.append(part.of_lse(dlse).to(dtype))
    learned = [slopes] if kind.alibi_learned and slopes is not None else []
    dq, dk, dv, *dslopes = torch.autograd.grad(outputs, (q, k, v, *learned), given)
    return [out.detach(), lse.detach(), dq, dk, dv, *(-x for x in dslopes)]


def _slopes_of_queries(kind: Kind, case: _Case, part: _Part, dtype: torch.dtype) -> Tensor | None:
    """The slopes of a part, one for each of its queries: (1, H, Tq)."""
    slopes = case.options.entries(part.number, part.number + 1).alibi_slopes
    if slopes is None:
        return None
    Tq = part.of_queries(case.tensors[0]).shape[1]
    return slopes.to(dtype).view(1, -1, 1).repeat(1, 1, Tq).requires_grad_(kind.alibi_learned)


def _scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    options: AttentionOptions,
    part: _Part,
) -> tuple[Tensor, Tensor]:
    (_, Tq, H, _), (Tk, Hk) = q.shape, k.shape[1:3]
    q = q.transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(H // Hk, 1) for x in (k, v))
    s = q @ k.mT * options.softmax_scale
    if options.softcap > 0:
        s = options.softcap * torch.tanh(s / options.softcap)
    if slopes is not None:
        position = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
        away = (position - torch.arange(Tk, device=q.device)).abs()
        s = s - (slopes[..., None] * away).to(s.dtype)
    bounds = options._replace(key_lengths=None)
    hidden = hidden_keys(bounds, slice(0, Tq), slice(0, Tk), Tq, Tk, q.device)
    if part.length is not None:
        hidden = hidden | (torch.arange(Tk, device=q.device) >= part.length)
    s = s.masked_fill(hidden, -math.inf)
    sinks = s.new_full((H,), -math.inf) if options.sinks is None else options.sinks.to(s.dtype)
    s = torch.cat((s, sinks.view(H, 1, 1).expand(*s.shape[:-1], 1)), -1)
    # A row without keys and sinks gets finite scores first: its softmax would be NaN.
    empty = s.amax(-1, keepdim=True) == -math.inf
    s = s.masked_fill(empty, 0)
    p = torch.softmax(s, -1).masked_fill(empty, 0)[..., :Tk]
    lse = torch.logsumexp(s, -1, keepdim=True).masked_fill(empty, -math.inf).squeeze(-1)
    if options.dropout_p > 0:
        keep = masks.attention_keep(options.rng, options.dropout_p, 1, H, Tq, Tk, 0, part.number)
        p = p.masked_fill(~keep, 0) * philox.scale(options.dropout_p)
    return (p @ v).transpose(1, 2), lse


def _error(x: Tensor, truth: Tensor) -> float:
    """The largest difference; infinite where an infinity or NaN is missing, or in a wrong place."""
    x, finite = x.double(), torch.isfinite(truth)
    if not torch.equal(x[~finite], truth[~finite].double()):
        return math.inf
    error = (x[finite] - truth[finite]).abs()
    if not error.numel():  # such as lse where no row sees a key
        return 0.0
    return math.inf if error.isnan().any() else error.max().item()


class _Poisoning(TorchFunctionMode):
    """Inside, in this thread, tensors that launchers allocate hold NaN, so that an element that no
    kernel writes is seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, Tensor.new_empty):
            worst = math.nan if found.is_floating_point() else torch.iinfo(found.dtype).max
            found.fill_(worst)
        return found
