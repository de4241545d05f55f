"""The ways of ours that are tried for a class of calls on a GPU.

A way with a variant has the keywords of the launcher behind the registered op (`core.registry`):

    torch:backend=N        a fused op behind F.scaled_dot_product_attention; attention alone
    triton:tile=...        attention and layer_norm, the product with GELU of gelu_mlp and that of
                           linear_cross_entropy's logits; of attention's backward pass queries_tile
                           and keys_tile
    cuda:build=N           a build for compute capability 9.0, by its number in the module's list
                           for the op and the pass; of gelu_mlp all products of the pass take it

attention_decode has no variants: its launchers choose by the lengths of the caches. The launchers
of one op have other keywords, and other lists of builds, for each pass: a way of a training call
names both, as FORWARD+BACKWARD.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptkernels.bench import dry_run
from gptkernels.bench.dry_run import Direction
from gptkernels.core.choice import unavailable
from gptkernels.core.tuned import TRAINING, Key
from gptkernels.ops.attention import limits
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import named
from gptkernels.ops.attention.widths import widened
from gptkernels.ops.linear_cross_entropy.options import LossOptions
from gptkernels.tuning import tiles

# Tiles and builds that are tried for a pass beside the launcher's own. Triton compiles a kernel in
# one to four seconds, and a GPT has some ten classes of calls that are new to it: with two tiles
# for a pass that is most of the minute that a tune of one model may take. Builds are compiled
# already; a trial of one takes a tenth of a second.
MOST_TILES, MOST_BUILDS = 2, 4


class Ways(NamedTuple):
    """Implementations, with variants, for each pass, the likeliest first. `backward` is empty for a
    call without gradients."""

    forward: list[str]
    backward: list[str]


class _Kernels(NamedTuple):
    """The ways of impl="torch", whether they are likely the fastest, and of each pass Triton's
    tiles and the CUDA C++ launcher."""

    torch: list[str]
    torch_first: bool
    tiles: Callable[[], Sequence[tiles.Choices]]
    directions: Callable[[], Sequence[Direction]]


def ways(key: Key, inputs: Mapping[str, Any]) -> Ways:
    """The ways to try for a class, in the order of likelihood.

    Args:
        key: The class, in eager mode, of calls on a GPU.
        inputs: The tensors of one of its calls, by the names of the public function's parameters,
            on the GPU or without content on the device meta. Options are taken from the facts of
            the class, but for those that are here, such as cu_seqlens_q.
    """
    facts = dict(key.facts)
    training = key.direction == TRAINING
    found = _MAKERS[key.op](facts, inputs)
    passes = ([], []) if limits.of_class(facts, key.op) else _ours(facts, found)
    forward, backward = (
        [*found.torch, *ours] if found.torch_first else [*ours, *found.torch] for ours in passes
    )
    return Ways(forward, backward if training else [])


def _ours(facts: Mapping[str, Any], kernels: _Kernels) -> tuple[list[str], list[str]]:
    """The kernels for each pass."""
    dtype: torch.dtype = getattr(torch, facts["dtype"])
    found: tuple[list[str], list[str]] = ([], [])
    if unavailable("cuda", facts["device"], dtype) is None:
        for place, direction in zip(found, kernels.directions(), strict=False):
            place += _builds(direction)
    if unavailable("triton", facts["device"], dtype) is None:
        for place, choices in zip(found, kernels.tiles(), strict=False):
            place += _tiles(choices)
    return found


def _tiles(choices: tiles.Choices) -> list[str]:
    """Triton's own choice, then other tiles, of one kernel at a time: the kernels of a pass do not
    affect each other."""
    others = (
        [f"triton:{keyword}={'x'.join(map(str, tile))}" for tile in others]
        for keyword, (_, *others) in choices.items()
    )
    by_turns = itertools.chain.from_iterable(itertools.zip_longest(*others))
    return ["triton", *list(filter(None, by_turns))[:MOST_TILES]]


def _builds(direction: Direction) -> list[str]:
    """The CUDA C++ launcher's own choice, then other builds, those that the launcher predicts to
    take the fewest clocks first; nothing where no kernel takes the call."""
    machine = dry_run.machine_here()
    try:
        rule = direction.dry_run(machine)
    except (ImportError, ValueError):
        return []
    others = [
        (sum(launch.clocks for launch in made.launches), index)
        for index, (_, made) in enumerate(direction.tried(machine))
        if made is not None and made.launches != rule.launches
    ]
    return ["cuda", *(f"cuda:build={index}" for _, index in sorted(others)[:MOST_BUILDS])]


# ---- attention


def _attention(facts: Mapping[str, Any], inputs: Mapping[str, Any]) -> _Kernels:
    q, k, v = (_converted(inputs[name], facts) for name in ("q", "k", "v"))
    options = _options(facts, q)
    if facts["lengths"]:
        options = options._replace(key_lengths=_meta(q.shape[0], dtype=torch.int32))
    return _of_attention(facts, q, k, v, options)


def _varlen(facts: Mapping[str, Any], inputs: Mapping[str, Any]) -> _Kernels:
    q, k, v = (_converted(inputs[name], facts)[None] for name in ("q", "k", "v"))
    ends = inputs.get("cu_seqlens_q")
    # Where the lengths are not told, one sequence: how many there are changes no choice.
    count = 1 if ends is None else ends.shape[0] - 1
    packed = _meta(count + 1, dtype=torch.int32)
    options = _options(facts, q)._replace(
        cu_seqlens_q=packed,
        cu_seqlens_k=packed,
        max_seqlen_q=inputs.get("max_seqlen_q", q.shape[1]),
        max_seqlen_k=inputs.get("max_seqlen_k", k.shape[1]),
    )
    return _of_attention(facts, q, k, v, options)


def _of_attention(
    facts: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> _Kernels:
    fused = [] if facts["mask"] != "none" else named.usable(q, k, v, options)
    # "torch" is SDPA's own pick, which may be another at other sizes of the class.
    backends = [f"torch:backend={name}" for name in fused] if len(fused) > 1 else []

    def directions() -> Sequence[Direction]:
        from gptkernels.ops.attention import cuda as kernels

        q_, k_, v_ = (_like(x) for x in (q, k, v))
        B, Tq, H, _ = q.shape
        lse = _meta(B, H, Tq, dtype=torch.float32)
        dlse = lse if facts["lse"] else None
        out = _meta(*q.shape, dtype=q.dtype)

        def forward(**build: Any) -> Any:
            return kernels.attention_fwd(q_, k_, v_, options, **build)

        def backward(**build: Any) -> Any:
            return kernels.attention_bwd(
                torch.empty_like(out), dlse, q_, k_, v_, out, lse, options,
                (True, True, True, False, False), facts["deterministic"], **build,
            )  # fmt: skip

        return _both(forward, backward, "attention_fwd_builds", "attention_bwd_builds")

    shown = functools.partial(tiles.attention, widened(q, k, v)[0], options)
    return _Kernels(["torch", *backends], bool(fused), shown, directions)


def _decode(facts: Mapping[str, Any], inputs: Mapping[str, Any]) -> _Kernels:
    q, k, v = (_like(_converted(inputs[name], facts)) for name in ("q", "k_cache", "v_cache"))
    table = inputs.get("block_table")
    if facts["paged"] and table is None:  # all pages, shared out
        pages = max(1, k.shape[0] // max(1, q.shape[0]))
        table = _meta(q.shape[0], pages, dtype=torch.int32)
    table = None if table is None else _like(table)
    options = _options(facts, q)._replace(key_lengths=_meta(q.shape[0], dtype=torch.int32))

    def directions() -> Sequence[Direction]:
        from gptkernels.ops.attention import cuda as kernels

        def forward() -> Any:
            return kernels.attention_decode_fwd(q, k, v, table, 0, options)

        return [Direction("forward", forward, None)]

    return _Kernels(["torch"], False, lambda: [{}], directions)


def _options(facts: Mapping[str, Any], q: Tensor) -> AttentionOptions:
    """As the class has them; the tensors among them have no content."""
    H, D = q.shape[-2:]
    slopes = _meta(H, dtype=torch.float32) if facts["alibi"] else None
    if slopes is not None and facts.get("slopes by entry"):
        slopes = slopes.expand(len(q), H)
    return AttentionOptions(
        softmax_scale=D**-0.5,
        left=facts["left"],
        right=facts["right"],
        softcap=float(facts["softcap"]),
        dropout_p=0.1 if facts["dropout"] else 0.0,
        alibi_slopes=slopes,
        sinks=_meta(H, dtype=torch.float32) if facts.get("sinks") else None,
        rng=_meta(2, dtype=torch.int64) if facts["dropout"] else None,
    )


# ---- the others


def _mlp(facts: Mapping[str, Any], inputs: Mapping[str, Any]) -> _Kernels:
    x = _converted(inputs["x"], facts)
    x = x.reshape(-1, x.shape[-1])
    # Transposed weights are copied for the kernels.
    w1, w2 = (_converted(inputs[name], facts).contiguous() for name in ("w1", "w2"))
    (M, C), inner, approximate = x.shape, w1.shape[0], facts["approximate"]

    def directions() -> Sequence[Direction]:
        from gptkernels.ops.gelu_mlp import cuda as kernels

        x_, w1_, w2_ = (_like(t) for t in (x, w1, w2))
        b1, b2 = (
            _meta(n, dtype=x.dtype) if facts[name] else None
            for name, n in (("b1", inner), ("b2", C))
        )
        h = None if facts["recompute"] else _meta(M, inner, dtype=x.dtype)

        def forward(**build: Any) -> Any:
            keep_h = not facts["recompute"]
            return kernels.gelu_mlp_fwd(x_, w1_, b1, w2_, b2, approximate, keep_h, **build)

        def backward(**build: Any) -> Any:
            wanted = (True, True, b1 is not None, True, b2 is not None)
            dy = _meta(M, C, dtype=x.dtype)
            return kernels.gelu_mlp_bwd(dy, x_, w1_, b1, w2_, h, approximate, wanted, **build)

        return _both(forward, backward, "gelu_mlp_builds", "gelu_mlp_builds")

    dy = torch.empty((M, C), dtype=x.dtype, device=x.device)
    # Products of matrices are cuBLAS's there.
    shown = functools.partial(tiles.gelu_mlp, x, w1, dy, w2)
    return _Kernels(["torch"], True, shown, directions)


def _head(facts: Mapping[str, Any], inputs: Mapping[str, Any]) -> _Kernels:
    x, weight = (_converted(inputs[name], facts) for name in ("x", "weight"))
    shown = functools.partial(tiles.linear_cross_entropy, x.reshape(-1, x.shape[-1]), weight)
    rows = x.numel() // x.shape[-1]

    def directions() -> Sequence[Direction]:
        from gptkernels.ops.linear_cross_entropy import cuda as kernels

        x_, weight_ = _meta(rows, x.shape[-1], dtype=x.dtype), _like(weight)
        bias = _meta(len(weight), dtype=x.dtype) if facts["bias"] else None
        targets, lse = _meta(rows, dtype=torch.int64), _meta(rows, dtype=torch.float32)
        options = LossOptions(softcap=30.0 if facts["softcap"] else 0.0)
        wanted = tuple(letter in facts["gradients"] for letter in "xwb")

        def forward(**build: Any) -> Any:
            given = x_, weight_, bias, targets, None, options, (False,) * 3
            return kernels.linear_cross_entropy_fwd(*given, **build)

        def backward(**build: Any) -> Any:
            given = torch.empty_like(lse), x_, weight_, bias, targets, lse, options, wanted
            return kernels.linear_cross_entropy_bwd(*given, **build)

        name = "linear_cross_entropy_builds"
        return _both(forward, backward, name, name)

    # Products of matrices are cuBLAS's there.
    return _Kernels(["torch"], True, shown, directions)


def _layer_norm(facts: Mapping[str, Any], inputs: Mapping[str, Any]) -> _Kernels:
    x, weight, bias = inputs["x"], inputs.get("weight"), inputs.get("bias")
    residual = inputs.get("residual")
    dropout_p = 0.1 if facts["dropout"] else 0.0

    def directions() -> Sequence[Direction]:
        from gptkernels.ops.layer_norm import cuda as kernels

        x_ = _like(x)
        C, dtype = x.shape[-1], x.dtype
        rows = x.numel() // C
        ones = (dtype if bias is None else bias.dtype) if weight is None else weight.dtype
        weight_ = _meta(C, dtype=ones)
        bias_ = None if bias is None else _like(bias)
        residual_ = None if residual is None else _like(residual)
        wide = facts["wide"] or (residual is not None and residual.dtype == torch.float32)
        sums = torch.float32 if wide else dtype
        is_x = residual is None and dropout_p == 0 and sums == dtype
        rng = _meta(2, dtype=torch.int64) if dropout_p > 0 else None
        mean, rstd = (_meta(rows, dtype=torch.float32) for _ in range(2))
        s = x_ if is_x else _meta(*x.shape, dtype=sums)
        dsum = torch.empty_like(s) if facts["prenorm"] and not is_x else None
        of_residual = None
        if residual is not None and (dropout_p > 0 or residual.dtype != dtype):
            of_residual = residual.dtype

        def forward(**build: Any) -> Any:
            sum_dtype = None if is_x else sums
            return kernels.layer_norm_fwd(
                x_, weight_, bias_, residual_, rng, dropout_p, 1e-5, sum_dtype, **build
            )

        def backward(**build: Any) -> Any:
            return kernels.layer_norm_bwd(
                _meta(*x.shape, dtype=dtype), dsum, s, mean, rstd, weight_, rng, dropout_p, dtype,
                of_residual, weight is not None, bias is not None, **build,
            )  # fmt: skip

        return _both(forward, backward, "layer_norm_fwd_builds", "layer_norm_bwd_builds")

    # A fused pass over memory has fewer bytes to move.
    return _Kernels(["torch"], False, functools.partial(tiles.layer_norm, x), directions)


_MAKERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], _Kernels]] = {
    "attention": _attention,
    "attention_varlen": _varlen,
    "attention_decode": _decode,
    "gelu_mlp": _mlp,
    "linear_cross_entropy": _head,
    "layer_norm": _layer_norm,
}


def _both(
    forward: Callable[..., Any], backward: Callable[..., Any], *builds: str
) -> list[Direction]:
    return [
        Direction("forward", forward, builds[0]),
        Direction("backward", backward, builds[1]),
    ]


def _converted(x: Tensor, facts: Mapping[str, Any]) -> Tensor:
    """As autocast hands it on: what is of another dtype is converted."""
    dtype: torch.dtype = getattr(torch, facts["dtype"])
    return x if x.dtype == dtype else x.to(dtype)


def _like(x: Tensor) -> Tensor:
    """A tensor with the layout of x and without content, for a dry run."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _meta(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")
