"""gptkernels.flex_attention: masks and scores of a known form are right, whatever the functions are
written like; others are refused, with what was read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE, FP32, by_dtype
from op_inputs import attention_inputs
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    noop_mask,
    or_masks,
)
from torch.nn.attention.flex_attention import flex_attention as pytorchs

import gptkernels
from gptkernels import flex_attention
from gptkernels.truth import parity

B, H, T, D = 2, 4, 60, 16
LENGTHS = torch.tensor([51, 23], device=DEVICE)
TOKENS = torch.arange(T, device=DEVICE)
DOCUMENTS = TOKENS // 30
BY_ENTRY = torch.stack([TOKENS // 11, 9 - TOKENS // 40])
SLOPES = torch.tensor([0.5, 0.1, 0.03, 0.2], device=DEVICE)
SHIFT = torch.tensor(3, device=DEVICE)


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def padding(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx < LENGTHS[b]


def documents(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + SLOPES[h] * (kv_idx - q_idx)


def softcap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 2.0 * torch.tanh(score / 2.0)


def both(score: Tensor, *where: Tensor) -> Tensor:
    return alibi(softcap(score, *where), *where)


MASKS: dict[str, Callable[..., Any]] = {
    "nothing": noop_mask,
    "causal": causal,
    "causal, turned round": lambda b, h, q, kv: kv - q <= 0,
    "strictly causal": lambda b, h, q, kv: q > kv,
    "window": and_masks(causal, lambda b, h, q, kv: q - kv < 9),
    "window on both sides": lambda b, h, q, kv: torch.abs(q - kv) <= 12,
    "uneven window": lambda b, h, q, kv: (kv + 5 >= q) & torch.logical_and(q + 2 > kv, q > kv - 30),
    "a number of a tensor": lambda b, h, q, kv: (q - kv).abs() < 2 * SHIFT,
    "padding": padding,
    "causal padding": lambda b, h, q, kv: torch.where(padding(b, h, q, kv), q >= kv, False),
    "padding, inclusive": lambda b, h, q, kv: LENGTHS[b] - 2 >= kv,
    "an end": lambda b, h, q, kv: kv < 40,
    "documents": documents,
    "causal documents": and_masks(documents, causal),
    "documents of entries": lambda b, h, q, kv: (BY_ENTRY[b, q] == BY_ENTRY[b, kv]) & (q - kv < 8),
    "chunks": lambda b, h, q, kv: q // 16 == kv // 16,
}
SCORES: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "alibi": (alibi, causal),
    "alibi, computed": (
        lambda s, b, h, q, kv: s - torch.exp2(-((h + 1) * 8.0 / H)) * (q - kv).float(),
        causal,
    ),
    "alibi on both sides": (lambda s, b, h, q, kv: -(q - kv).abs() * SLOPES[h] + s, None),
    "alibi of entries": (
        lambda s, b, h, q, kv: s + (kv - q) * SLOPES[h] / (b + 1),
        and_masks(causal, documents),
    ),
    "softcap": (softcap, None),
    "softcap, then alibi": (both, and_masks(causal, padding)),
    "alibi in documents": (alibi, and_masks(causal, documents)),
    "a factor": (lambda s, b, h, q, kv: 0.5 * s, causal),
    "a mask": (
        lambda s, b, h, q, kv: torch.where(q >= kv, alibi(s, b, h, q, kv), -math.inf),
        padding,
    ),
}


def tensors(Tq: int = T, Tk: int = T, Hk: int = H, dtype: torch.dtype = FP32) -> dict[str, Any]:
    made = attention_inputs(B, Tq, Tk, H, Hk, D, dtype, seed=None)
    named = zip(("query", "key", "value"), made.values(), strict=True)
    return {name: x.transpose(1, 2) for name, x in named}


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """What the functions say of every score, all at once; out and lse."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = scores.to(torch.promote_types(scores.dtype, FP32))
    sizes = scores.shape
    where = [
        torch.arange(size, device=DEVICE).view(*(-1 if d == own else 1 for d in range(4)))
        for own, size in enumerate(sizes)
    ]
    if score_mod is not None:
        scores = score_mod(scores, *where)
    visible = scores > -math.inf
    if mask_mod is not None:
        visible = visible & mask_mod(*where)
    scores = scores.masked_fill(~visible, -math.inf)
    some = visible.any(-1)
    lse = torch.where(some[..., None], scores, 0).logsumexp(-1)
    weights = torch.where(visible, (scores - lse[..., None]).exp(), 0)
    return weights.to(value.dtype) @ value, lse.masked_fill(~some, -math.inf)


def hold(
    given: dict[str, Any],
    seed: int,
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    truth: Callable[..., Any] | None = None,
    gradients: bool = True,
    **options: Any,
) -> None:
    """Asserts that out, lse and gradients pass the parity rule."""
    Tq, Tk = given["query"].shape[2], given["key"].shape[2]
    block_mask = None
    if mask_mod is not None:
        block_mask = create_block_mask(mask_mod, B, None, Tq, Tk, DEVICE, BLOCK_SIZE=16)

    def candidate(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = flex_attention(
            **inputs, score_mod=score_mod, block_mask=block_mask,
            return_aux=AuxRequest(lse=True), **options,
        )  # fmt: skip
        return out, aux.lse

    right = functools.partial(formula, score_mod=score_mod, mask_mod=mask_mod)
    parity.assert_parity(
        candidate,
        right,
        truth or right,
        given,
        seed=seed,
        gradients=gradients,
        names=("out", "lse"),
    )


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, seed: int) -> None:
    hold(tensors(), seed, None, MASKS[name])


@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str, seed: int) -> None:
    hold(tensors(), seed, *SCORES[name])


@by_dtype
def test_fewer_key_heads(dtype: torch.dtype, seed: int) -> None:
    hold(tensors(Hk=2, dtype=dtype), seed, softcap, MASKS["causal padding"], enable_gqa=True)


@pytest.mark.parametrize(
    ("Tq", "Tk", "name"),
    [
        (40, 70, "causal"),
        (70, 60, "causal"),
        (40, 70, "window on both sides"),
        (70, 62, "window on both sides"),
        (33, 70, "causal padding"),
        (70, 40, "padding"),
    ],
)
def test_positions_count_from_the_first(Tq: int, Tk: int, name: str, seed: int) -> None:
    hold(tensors(Tq, Tk), seed, None, MASKS[name])


def test_alibi_counts_from_the_first(seed: int) -> None:
    hold(tensors(40, 70), seed, alibi, causal)


def test_it_is_pytorchs(seed: int) -> None:
    """PyTorch's own function in fp64 is the truth, with and without functions."""
    mask_mod = MASKS["causal documents"]
    block_mask = create_block_mask(mask_mod, B, None, T, T, DEVICE, BLOCK_SIZE=16)

    def truth(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = pytorchs(
            **inputs, score_mod=both, block_mask=block_mask, return_aux=AuxRequest(lse=True)
        )
        return out, aux.lse

    hold(tensors(), seed, both, mask_mod, truth, gradients=False)  # it has none on a CPU


def test_slopes_have_gradients(seed: int) -> None:
    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(slopes: Tensor, **inputs: Tensor) -> Any:
            def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
                return score + slopes[h] * (kv - q)

            return function(**inputs, score_mod=score_mod)

        return called

    heads, tokens = 256, 20  # PyTorch's error of a few slopes is random
    made = attention_inputs(1, tokens, H=heads, D=8, seed=None).values()
    given = dict(zip(("query", "key", "value"), (x.transpose(1, 2) for x in made), strict=True))
    given["slopes"] = torch.nn.Parameter(torch.rand(heads, device=DEVICE))
    block_mask = create_block_mask(causal, None, None, tokens, tokens, DEVICE)
    wanted = call(lambda **tensors: formula(**tensors, mask_mod=causal)[0])
    candidate = call(functools.partial(flex_attention, block_mask=block_mask))
    parity.assert_parity(candidate, wanted, wanted, given, seed=seed)


def test_functions_are_read_at_every_call() -> None:
    given, width = tensors(), 5
    lengths = LENGTHS.clone()

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx - kv_idx < width) & (q_idx >= kv_idx) & (kv_idx < lengths[b])

    def found() -> Tensor:
        block_mask = create_block_mask(mask_mod, B, None, T, T, DEVICE)
        return flex_attention(**given, block_mask=block_mask)

    first = found()
    width = 50
    second = found()
    lengths -= 20
    assert not torch.equal(first, second)
    assert not torch.equal(second, found())


def blocks(mask_mod: Callable[..., Any]) -> BlockMask:
    return create_block_mask(mask_mod, B, H, T, T, DEVICE, BLOCK_SIZE=16)


@pytest.mark.parametrize(
    ("score_mod", "mask_mod", "said"),
    [
        (None, or_masks(causal, padding), "the mask ((False | (q_idx >= kv_idx)) | (kv_idx < t"),
        (None, lambda b, h, q, kv: kv <= 2 * q, "the mask (kv_idx <= (2 * q_idx))"),
        (None, lambda b, h, q, kv: q < 30, "the mask (q_idx < 30)"),
        (None, lambda b, h, q, kv: kv >= 2, "the mask (kv_idx >= 2)"),
        (None, lambda b, h, q, kv: kv < LENGTHS[h // 2], "the mask (kv_idx < tensor[2][h // 2])"),
        (None, lambda b, h, q, kv: kv < LENGTHS[b] / 2.0, "must be an integer"),
        (None, lambda b, h, q, kv: q - h == kv - h, "the mask ((q_idx - h) == "),
        (None, lambda b, h, q, kv: (q % 2) == (kv % 2), "the documents (q_idx % 2) lie in pieces"),
        (None, and_masks(documents, padding), "documents together with ends of the keys"),
        (None, and_masks(documents, MASKS["strictly causal"]), "has to hold the query's own"),
        (lambda s, b, h, q, kv: s + SLOPES[q % 4], None, "(score + tensor[4][q_idx % 4])"),
        (lambda s, b, h, q, kv: 3 * torch.tanh(s), None, "the score (3 * tanh(score))"),
        (lambda s, b, h, q, kv: 3 * torch.tanh(s / 2), None, "the score (3 * tanh((score / 2)))"),
        (lambda s, b, h, q, kv: s + (kv - q + 1) * SLOPES[h], causal, "the score (score + (((kv_i"),
        (lambda s, b, h, q, kv: s * s, None, "the score (score * score)"),
        (lambda s, b, h, q, kv: s + kv, None, "the score (score + kv_idx)"),
        (lambda s, *where: softcap(alibi(s, *where), *where), causal, "the score (2.0 * tanh("),
        (
            lambda s, b, h, q, kv: torch.tanh(torch.where(q >= kv, s, -math.inf) / 2.0) * 2.0,
            None,
            "the score (tanh((where((q_idx >= kv_idx), score, -inf) / 2.0)) * 2.0)",
        ),
        (lambda s, b, h, q, kv: s if q > kv else -s, None, "score_mod cannot be read without"),
        (alibi, None, "where no key behind the query is visible"),
    ],
)  # fmt: skip
def test_other_forms_are_refused(score_mod: Any, mask_mod: Any, said: str) -> None:
    block_mask = None if mask_mod is None else blocks(mask_mod)
    with pytest.raises(NotImplementedError) as error:
        flex_attention(**tensors(), score_mod=score_mod, block_mask=block_mask)
    assert said in str(error.value)


def test_blocks_that_the_mask_does_not_say_are_refused() -> None:
    given = tensors()
    own = blocks(causal)
    fewer = BlockMask.from_kv_blocks(
        own.kv_num_blocks.clamp(max=0), own.kv_indices, own.full_kv_num_blocks,
        own.full_kv_indices, 16, causal, (T, T),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"^block_mask leaves out blocks that its mask_"):
        flex_attention(**given, block_mask=fewer)
    fuller = BlockMask.from_kv_blocks(
        own.full_kv_num_blocks, own.full_kv_indices, own.kv_num_blocks, own.kv_indices, 16, causal,
        (T, T),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"^block_mask lists blocks as full that its mas"):
        flex_attention(**given, block_mask=fuller)
    without_full = create_block_mask(
        causal, B, H, T, T, DEVICE, BLOCK_SIZE=16, separate_full_blocks=False
    )
    assert torch.equal(
        flex_attention(**given, block_mask=without_full), flex_attention(**given, block_mask=own)
    )


def test_arguments_are_refused() -> None:
    given = tensors()
    with pytest.raises(TypeError, match=r"^score_mod must be a function or None, got int"):
        flex_attention(**given, score_mod=1)
    with pytest.raises(TypeError, match=r"^block_mask must be a BlockMask, as create_.* function"):
        flex_attention(**given, block_mask=causal)
    with pytest.raises(TypeError, match=r"^return_aux must be an AuxRequest, got bool"):
        flex_attention(**given, return_aux=True)
    with pytest.raises(TypeError, match=r"^scale must be a number, got 'a'"):
        flex_attention(**given, scale="a")
    with pytest.raises(NotImplementedError, match=r"^kernel_options are .*, got \['BLOCK_M'\]; "):
        flex_attention(**given, kernel_options={"BLOCK_M": 64})
    with pytest.raises(NotImplementedError, match=r"^return_aux has no max_scores"):
        flex_attention(**given, return_aux=AuxRequest(max_scores=True))
    with pytest.raises(ValueError, match=r"^return_lse and return_aux exclude each other"):
        flex_attention(**given, return_lse=True, return_aux=AuxRequest())
    with pytest.raises(ValueError, match=r"^key must have the 4 heads of query unless enable_gqa"):
        flex_attention(**tensors(Hk=2))
    with pytest.raises(ValueError, match=r"^block_mask must be one of 2 or 1 entries, 30 queries "):
        flex_attention(**tensors(30, 30), block_mask=blocks(causal))
    window = create_block_mask(MASKS["window"], B, None, T, 20, DEVICE)
    with pytest.raises(NotImplementedError, match=r"^the last of 60 queries see no key"):
        flex_attention(**tensors(T, 20), block_mask=window)
    fewer = create_block_mask(causal, B, None, T, 50, DEVICE)
    with pytest.raises(NotImplementedError, match=r"^slopes of ALiBi .*, got 60 queries and 50 k"):
        flex_attention(**tensors(T, 50), score_mod=alibi, block_mask=fewer)


def test_results_are_those_asked_for() -> None:
    given = tensors()
    out, lse = flex_attention(**given, return_lse=True)
    assert torch.equal(flex_attention(**given, return_aux=AuxRequest(lse=True))[1].lse, lse)
    assert flex_attention(**given, return_aux=AuxRequest())[1].lse is None
    assert out.shape == (B, H, T, D)
    assert lse.shape == (B, H, T)
    assert gptkernels.flex_attention is flex_attention


def test_it_may_be_compiled_and_then_is_not() -> None:
    given = tensors() | {"score_mod": alibi, "block_mask": blocks(causal)}
    compiled = torch.compile(flex_attention, backend="eager")
    assert torch.equal(compiled(**given), flex_attention(**given))
