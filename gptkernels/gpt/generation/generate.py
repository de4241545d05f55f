"""Continuing texts with a GPT: a whole batch at once, or events as tokens come.

The engine is in engine.py, the choice of tokens in sampling.py, the keys and values in cache.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Never

import torch
from torch import Tensor

from gptkernels.core.checks import check_seed
from gptkernels.core.keywords import refuse, renamed, without_unknown
from gptkernels.gpt.generation.cache import CachingModel
from gptkernels.gpt.generation.engine import MOST_DRAFTED, Engine
from gptkernels.gpt.generation.request import Event, Request
from gptkernels.gpt.generation.sampling import Sampling
from gptkernels.gpt.tokenizer import Tokenizer

# What transformers' generate has and this one has not, or under another name.
_ELSEWHERE = {
    **renamed("eos", "eos_token_id"),
    "do_sample": "temperature=0 takes the likeliest token, any other samples",
    "max_length": "max_new_tokens counts the new ones alone",
    "num_return_sequences": "repeat the rows of tokens",
    "attention_mask": "gptkernels.GPTForCausalLM(model).generate takes padded rows",
}


@without_unknown
def generate(
    model: CachingModel,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos: int | None = None,
    seed: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    slots: int | None = None,
    draft: str | CachingModel | None = None,
    draft_tokens: int = MOST_DRAFTED,
    **unknown: Never,
) -> Tensor:
    """`tokens` (B, T) int64 with up to max_new_tokens more behind each row: (B, T + n) int64.

    It is also a method of the model: `model.generate(tokens, max_new_tokens, ...)`.

    temperature: the logits are divided by it; 0 takes the likeliest token (the first of several).
    top_k: sample among the top_k likeliest tokens.
    top_p: sample among the likeliest tokens that together reach this probability.
    min_p: sample among the tokens at least min_p times as likely as the likeliest.
    repetition_penalty: above 1 makes tokens that the row already holds less likely.
    eos: an id that ends its row, which is then filled up with it; generation stops once every row
    has ended.
    seed: gives the same tokens again on the same device. A sequence has a seed for each row, whose
    tokens then depend on its seed and its prompt alone. A single seed serves all rows: row b takes
    its sample b. None draws a seed from PyTorch's generator for the CPU.
    vocab_size: only ids below it are chosen, for a model whose vocabulary is padded past its
    tokenizer's; None allows all of the model's.
    slots: how many rows run at a time: 1 or a multiple of 8; None means 8, or 1 with a draft. Every
    step computes that many rows, even where fewer are left, so that a row's tokens do not depend on
    the others. 1 is the quickest for a single row.
    draft, draft_tokens: guesses of the next tokens, which are then checked together, as `Engine`
    says; slots must be 1. With the CPU kernels the tokens are the same; they come sooner where
    guesses are often right.

    T is at most block_size. A longer text slides: when it holds block_size tokens, the model goes
    on from the last half of them. The model runs in evaluation mode, and is left in the mode it was
    in. Raises ValueError for an argument out of range, TypeError for tokens that are not int64 and
    for any argument of another type, and RuntimeError where the model's logits hold NaN or
    infinity.
    """
    if unknown:
        refuse(generate, unknown, _ELSEWHERE)
    model.check_tokens(tokens)
    B, T = tokens.shape
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    wanted = Request((), max_new_tokens, sampling, eos=eos)
    numbered = isinstance(seed, int) or seed is None
    requests = [
        replace(wanted, tokens=row, first_sample=b if numbered else 0, seed=given)
        for b, (row, given) in enumerate(zip(tokens.tolist(), _seeds(seed, B), strict=True))
    ]
    engine = Engine(
        model, slots=slots, vocab_size=vocab_size, max_tokens=T + max_new_tokens, draft=draft,
        draft_tokens=draft_tokens,
    )  # fmt: skip
    for request in requests:
        engine.submit(request)
    new: list[list[int]] = [[] for _ in requests]
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                new[event.request].append(event.token)
    longest = max(map(len, new), default=max_new_tokens)
    text = tokens.new_empty(B, T + longest)
    text[:, :T] = tokens
    for b, added in enumerate(new):
        # A row is shorter than another only where eos ended it.
        text[b, T:] = tokens.new_tensor(added + [eos or 0] * (longest - len(added)))
    return text


def stream(
    model: CachingModel,
    requests: Iterable[Request],
    *,
    slots: int | None = None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    draft: str | CachingModel | None = None,
    draft_tokens: int = MOST_DRAFTED,
) -> Iterator[Event]:
    """An `Event` for each token of each sample of each request, as it is chosen.

    Requests are taken from the iterable when slots get free. They may differ in everything, such as
    the length of their prompts. Arguments and errors are those of `Engine`.
    """
    engine = Engine(
        model, slots=slots, tokenizer=tokenizer, vocab_size=vocab_size, draft=draft,
        draft_tokens=draft_tokens,
    )  # fmt: skip
    waiting = iter(requests)
    more = True
    while more or engine.busy:
        while more and engine.hungry:
            try:
                request = next(waiting)
            except StopIteration:
                more = False
            else:
                engine.submit(request)
        yield from engine.step()


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """A seed for each row."""
    if seed is None:
        return [int(torch.randint(2**63 - 1, ()))] * rows
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != rows:
            raise ValueError(f"seed must be one for each of {rows} rows, got {len(seed)}")
        for one in seed:
            check_seed("seed", one)
        return list(seed)
    check_seed("seed", seed)
    return [seed] * rows
