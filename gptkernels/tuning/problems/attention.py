"""Calls of attention. Checked are the first batch entry, or packed sequence, and of it the first
key head with its query heads: all queries and keys of them, so all gradients too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gptkernels.core.tuned import TRAINING, Key
from gptkernels.tuning.problems.problem import Part, Problem, drawing, dtype_of

_CAP = 20.0
_LARGEST_H = 16
_PAGE = 64


def dense(key: Key, sizes: Mapping[str, int]) -> Problem:
    """`sizes` has Tq, Tk and heads, those of all batch entries."""
    facts, Tq, Tk = dict(key.facts), sizes["Tq"], sizes["Tk"]
    B, H, Hk = _heads(facts, sizes["heads"])
    device = facts["device"]
    q, k, v = _tensors(facts, B, Tq, Tk, H, Hk)
    options = _options(facts, B, H, q)
    if facts["lengths"]:
        options["key_lengths"] = torch.full((B,), Tk, dtype=torch.int32, device=device)
    if facts["mask"] == "bool":
        generator = torch.Generator(device).manual_seed(2)
        seen = torch.rand(Tq, Tk, generator=generator, device=device) < 0.8
        seen[:, 0] = True
        options["attn_mask"] = seen
    elif facts["mask"] != "none":
        options["attn_mask"] = drawing(device, 2)(Tq, Tk, dtype=dtype_of(facts["mask"]))
    own = _of_first_head(options, facts["group"])
    if facts["lengths"]:
        own["key_lengths"] = options["key_lengths"][:1]
    return _problem("attention", key, (q, k, v), options, own)


def varlen(key: Key, sizes: Mapping[str, int]) -> Problem:
    """The sequences are all as long as the longest. `sizes` as of `dense`."""
    facts, Tq, Tk = dict(key.facts), sizes["Tq"], sizes["Tk"]
    N, H, Hk = _heads(facts, sizes["heads"])
    q, k, v = (x.flatten(0, 1) for x in _tensors(facts, N, Tq, Tk, H, Hk))
    options = _options(facts, N, H, q)

    def packed(T: int, count: int) -> Tensor:
        return torch.arange(0, T * count + 1, T, dtype=torch.int32, device=q.device)

    def lengths(count: int) -> dict[str, Any]:
        return {
            "cu_seqlens_q": packed(Tq, count),
            "cu_seqlens_k": packed(Tk, count),
            "max_seqlen_q": Tq,
            "max_seqlen_k": Tk,
        }

    options |= lengths(N)
    own = _of_first_head(options, facts["group"]) | lengths(1)
    return _problem("attention_varlen", key, (q, k, v), options, own, (Tq, Tk))


def decode(key: Key, sizes: Mapping[str, int]) -> Problem:
    """The caches are full. `sizes` as of `dense`."""
    facts, Tq, Tk = dict(key.facts), sizes["Tq"], sizes["Tk"]
    if Tk < Tq:
        raise NotImplementedError("a cache holds the new tokens at least")
    B, H, Hk = _heads(facts, sizes["heads"])
    dtype, draw = dtype_of(facts["dtype"]), drawing(facts["device"])
    widths = facts["D"], facts.get("Dv") or facts["D"]
    q = draw(B, Tq, H, facts["D"], dtype=dtype)
    lengths = torch.full((B,), Tk, dtype=torch.int32, device=q.device)
    options = _options(facts, B, H, q) | {"cache_lengths": lengths}
    options["causal"] = not facts.get("full")
    del options["dropout_p"], options["deterministic"]
    own = _of_first_head(options, facts["group"]) | {"cache_lengths": lengths[:1]}
    if facts["paged"]:
        pages = -(-Tk // _PAGE)
        k, v = (draw(B * pages, _PAGE, Hk, width, dtype=dtype) for width in widths)
        table = torch.arange(B * pages, dtype=torch.int32, device=q.device).view(B, pages)
        options["block_table"], own["block_table"] = table, table[:1]
    else:
        k, v = (draw(B, Tk, Hk, width, dtype=dtype) for width in widths)

    def cut(x: Tensor) -> Tensor:
        return x[:1, :, : facts["group"]] if x.dim() == 4 else x[:1, : facts["group"]]

    first = slice(None) if facts["paged"] else slice(1)
    inputs = {"q": q, "k_cache": k, "v_cache": v}
    part = {"q": cut(q), "k_cache": k[first, :, :1], "v_cache": v[first, :, :1]}
    return Problem(
        op="attention_decode",
        inputs=inputs,
        options=options,
        differentiated=list(inputs),
        dtype=dtype,
        parts=[Part(part, own, cut, cut, {})],
        training=False,
    )


def _heads(facts: Mapping[str, Any], heads: int) -> tuple[int, int, int]:
    """Batch entries, query heads and key heads. The product of the first two is `heads`, rounded up
    to whole groups; an entry has the most heads up to 16 that divide it, or else all."""
    group = facts["group"]
    whole = group * -(-heads // group)
    *_, H = [n for n in range(group, _LARGEST_H + 1, group) if whole % n == 0] or [whole]
    if group == H:
        H = whole
    return whole // H, H, H // group


def _tensors(
    facts: Mapping[str, Any], B: int, Tq: int, Tk: int, H: int, Hk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; what is not contiguous lies as a projection of all three leaves it."""
    dtype, draw, D = dtype_of(facts["dtype"]), drawing(facts["device"]), facts["D"]
    if facts["converted"]:
        raise NotImplementedError(
            "q, k and v are converted by autocast: only their own is measured"
        )
    Dv = facts.get("Dv") or D
    if facts["layout"] == "contiguous" or Dv != D:
        shapes = (B, Tq, H, D), (B, Tk, Hk, D), (B, Tk, Hk, Dv)
        q, k, v = (draw(*shape, dtype=dtype) for shape in shapes)
        return q, k, v
    q, k, v = (
        draw(B, T, H + 2 * Hk, D, dtype=dtype)[:, :, first : first + n]
        for T, first, n in ((Tq, 0, H), (Tk, H, Hk), (Tk, H + Hk, Hk))
    )
    return q, k, v


def _options(facts: Mapping[str, Any], B: int, H: int, q: Tensor) -> dict[str, Any]:
    window = None
    if facts["left"] >= 0 or facts["right"] > 0 or (facts["right"] == 0 and not facts["causal"]):
        window = facts["left"], facts["right"]
    options: dict[str, Any] = {
        "causal": facts["causal"],
        "window": window,
        "softcap": _CAP if facts["softcap"] else 0.0,
        "dropout_p": 0.1 if facts["dropout"] else 0.0,
        "return_lse": facts["lse"],
        "deterministic": facts["deterministic"],
    }
    if facts.get("learned slopes"):
        raise NotImplementedError("the gradient of ALiBi slopes is not measured")
    if facts["alibi"]:
        slopes = torch.tensor([2 ** (-8 * (h + 1) / H) for h in range(H)], device=q.device)
        options["alibi_slopes"] = slopes.repeat(B, 1) if facts.get("slopes by entry") else slopes
    if facts.get("sinks"):
        options["sinks"] = torch.linspace(-1, 1, H, device=q.device)
    return options


def _of_first_head(options: dict[str, Any], group: int) -> dict[str, Any]:
    """The options of the formula for the first key head's query heads."""
    own = {name: value for name, value in options.items() if name != "deterministic"}
    if "alibi_slopes" in own:
        slopes = own["alibi_slopes"]
        own["alibi_slopes"] = slopes[:group] if slopes.dim() == 1 else slopes[:1, :group]
    if "sinks" in own:
        own["sinks"] = own["sinks"][:group]
    return own


def _problem(
    op: str,
    key: Key,
    tensors: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
    own: dict[str, Any],
    packed: tuple[int, int] | None = None,
) -> Problem:
    facts = dict(key.facts)
    group = facts["group"]

    def of(heads: int, T: int | None) -> Callable[[Tensor], Tensor]:
        if T is not None:  # packed: (tokens, H, D), lse (H, tokens)
            return lambda x: x[:T, :heads] if x.dim() == 3 else x[:heads, :T]
        return lambda x: x[:1, :, :heads] if x.dim() == 4 else x[:1, :heads]

    Tq, Tk = packed or (None, None)
    cuts = {"q": of(group, Tq), "k": of(1, Tk), "v": of(1, Tk)}
    inputs = dict(zip(cuts, tensors, strict=True))
    part = {name: cut(inputs[name]) for name, cut in cuts.items()}
    return Problem(
        op=op,
        inputs=inputs,
        options=options,
        differentiated=list(inputs),
        dtype=dtype_of(facts["dtype"]),
        parts=[Part(part, own, cuts["q"], cuts["q"], cuts)],
        training=key.direction == TRAINING,
    )
