"""Sampling from a GPT, one token after another.

    p = softmax(logits / temperature), cut to the top_k likeliest tokens, then to the smallest set
    of the likeliest whose probability reaches top_p (Holtzman et al., "The Curious Case of Neural
    Text Degeneration", 2020)

Each step computes the newest token alone: the keys and values of those before it stay in one
`KVCache` a block.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gptkernels.gpt.config import check_number
from gptkernels.layers import KVCache
from gptkernels.ops.checks import check_count, check_seed

if TYPE_CHECKING:
    from gptkernels.gpt.model import GPT


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    seed: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """`tokens` (B, T) int64 with up to max_new_tokens more behind each row: (B, T + n) int64.

    temperature: 0 takes the likeliest token (the first of several); else the logits are divided by
    it.
    top_k, top_p: sample among the top_k likeliest tokens; among the likeliest that together reach
    top_p.
    eos: an id that ends its row, which is then filled up with it; generation stops once every row
    has ended.
    seed: for the same samples again (same device, same batch); None goes on with torch's own
    generator.
    vocab_size: choose among the ids below it alone, for a model whose vocabulary is padded past its
    tokenizer's; None chooses among all of the model's.
    use_cache: False computes the whole text anew for each token: slower, to check the cache
    against.

    The model runs in evaluation mode, and is left in the mode it was in. Text past the context is
    refused, not cut: T + max_new_tokens is at most block_size. Raises ValueError for that and for
    any argument out of range, TypeError for tokens that are not int64 and for any argument of
    another type.
    """
    ids = model.config.vocab_size if vocab_size is None else vocab_size
    _check(model, tokens, max_new_tokens, temperature, top_k, top_p, eos, seed, ids)
    generator = None
    if seed is not None:
        generator = torch.Generator(device=tokens.device).manual_seed(seed)
    prompt, total = tokens.shape[1], tokens.shape[1] + max_new_tokens
    caches = None
    if use_cache:
        caches = [KVCache(total) for _ in range(model.config.n_layer)]
    text = tokens.new_empty(tokens.shape[0], total)
    text[:, :prompt] = tokens
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    with _evaluating(model):
        seen = 0  # how many tokens the caches hold
        for end in range(prompt, total):
            hidden = model.hidden_states(text[:, seen:end], caches=caches)
            seen = end if use_cache else 0
            logits = model.lm_head(hidden[:, -1])[:, :ids]
            chosen = _choose(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                chosen = chosen.masked_fill(ended, eos)
                ended |= chosen == eos
            text[:, end] = chosen
            if eos is not None and ended.all():
                return text[:, : end + 1]
    return text


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One id for each row of logits (B, V): (B,) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Less the largest, so that a tiny temperature gives 0 and -inf, not inf and NaN. In fp64,
    # divided by a normal number at least: a GPU multiplies by the reciprocal, which would be inf.
    logits = logits.double()
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = (logits / max(temperature, sys.float_info.min)).float()
    if top_k is not None and top_k < logits.shape[-1]:
        _, kept = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:  # at 1 a rounded sum would cut the tail off
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it have not reached top_p; the first always does.
        before = ordered.cumsum(dim=-1) - ordered
        kept = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, kept)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos: int | None,
    seed: int | None,
    vocab_size: int,
) -> None:
    model.check_tokens(tokens)
    config = model.config
    check_count("vocab_size", vocab_size)
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"vocab_size must be at most the model's {config.vocab_size}, got {vocab_size}"
        )
    _check_integer("max_new_tokens", max_new_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if tokens.shape[1] + max_new_tokens > config.block_size:
        raise ValueError(
            f"the prompt and max_new_tokens must fit into block_size={config.block_size} together, "
            f"got {tokens.shape[1]} + {max_new_tokens}"
        )
    check_number("temperature", temperature)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None:
        check_number("top_p", top_p)
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must lie above 0 and at most at 1, or be None, got {top_p}")
    if eos is not None:
        _check_integer("eos", eos)
        if not 0 <= eos < vocab_size:
            raise ValueError(f"eos must lie in 0...{vocab_size - 1} or be None, got {eos}")
    if seed is not None:
        check_seed("seed", seed)


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
