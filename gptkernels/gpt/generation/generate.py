"""Continuing texts with a GPT: a whole batch at once, or events as tokens come.

The engine is in engine.py, the choice of tokens in sampling.py, the keys and values in cache.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gptkernels.core.checks import check_seed
from gptkernels.gpt.generation.cache import CachingModel
from gptkernels.gpt.generation.engine import Engine
from gptkernels.gpt.generation.request import Event, Request
from gptkernels.gpt.generation.sampling import Sampling
from gptkernels.gpt.tokenizer import Tokenizer


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
    slots: int = 8,
) -> Tensor:
    """`tokens` (B, T) int64 with up to max_new_tokens more behind each row: (B, T + n) int64.

    temperature: 0 takes the likeliest token (the first of several); else the logits are divided by
    it.
    top_k, top_p, min_p: sample among the top_k likeliest tokens; among the likeliest that together
    reach top_p; among those at least min_p times as likely as the likeliest.
    repetition_penalty: above 1 makes tokens that the row holds already less likely.
    eos: an id that ends its row, which is then filled up with it; generation stops once every row
    has ended.
    seed: for the same samples again (same device): one for each row, whose samples then depend on
    it and on the row's tokens alone; or one for all, of which row b takes sample b. None draws one
    from PyTorch's generator for the CPU.
    vocab_size: choose among the ids below it alone, for a model whose vocabulary is padded past its
    tokenizer's; None chooses among all of the model's.
    slots: how many rows run at a time: 1, or rounded up to a multiple of 8. Every step computes so
    many, however few there are: that is why a row's tokens do not depend on the others. 1 is the
    quickest for a single row.

    T is at most block_size; text past that slides: once block_size tokens are held, the model goes
    on from the last half of them. The model runs in evaluation mode, and is left in the mode it was
    in. Raises ValueError for an argument out of range, TypeError for tokens that are not int64 and
    for any argument of another type, and RuntimeError where the model's logits hold NaN or
    infinity.
    """
    model.check_tokens(tokens)
    B, T = tokens.shape
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    wanted = Request((), max_new_tokens, sampling, eos=eos)
    numbered = isinstance(seed, int) or seed is None
    requests = [
        replace(wanted, tokens=row, first_sample=b if numbered else 0, seed=given)
        for b, (row, given) in enumerate(zip(tokens.tolist(), _seeds(seed, B), strict=True))
    ]
    engine = Engine(model, slots=slots, vocab_size=vocab_size, max_tokens=T + max_new_tokens)
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
    slots: int = 8,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
) -> Iterator[Event]:
    """The tokens of all samples of all requests, as they are chosen: an `Event` each.

    Requests are taken from the iterable when slots get free. Prompts may differ in length, and so
    may everything else between requests. Arguments and errors are those of `Engine`.
    """
    engine = Engine(model, slots=slots, tokenizer=tokenizer, vocab_size=vocab_size)
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
    """One for each row."""
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
