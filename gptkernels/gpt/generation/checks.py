"""What continuing a text refuses, whichever way its tokens are chosen."""

from __future__ import annotations

import math

import torch

from gptkernels.core.checks import check_count
from gptkernels.gpt.generation.cache import CachingModel
from gptkernels.gpt.generation.request import Request
from gptkernels.gpt.tokenizer import Tokenizer

SLOTS = 8
"""Texts run at a time in multiples of so many, or alone."""


def check_slots(slots: int | None, draft: object = None) -> int:
    """How many texts run at a time: `slots`, 1 or a multiple of SLOTS; None means SLOTS, or 1 with
    a draft. Raises TypeError for another type, and ValueError for any other number, or more than
    one with a draft."""
    if slots is None:
        return SLOTS if draft is None else 1
    if check_count("slots", slots) > 1 and slots % SLOTS:
        raise ValueError(f"slots must be 1 or a multiple of {SLOTS}, got {slots}")
    if draft is not None and slots != 1:
        raise ValueError(f"a draft takes slots=1, got {slots}")
    return slots


def usable_ids(model: CachingModel, vocab_size: int | None) -> int:
    """How many of the model's ids may be chosen: the first vocab_size; None means all. Raises
    TypeError and ValueError for a number out of range."""
    known = model.config.vocab_size
    if vocab_size is None:
        return known
    if check_count("vocab_size", vocab_size) > known:
        raise ValueError(f"vocab_size must be at most the model's {known}, got {vocab_size}")
    return vocab_size


def check_request(
    name: str, request: Request, model: CachingModel, ids: int, tokenizer: Tokenizer | None
) -> None:
    """Raises ValueError for a prompt, called `name`, that is empty, longer than block_size or not
    of the model's ids, for an eos that is none of the first `ids`, and for stop strings without a
    tokenizer; TypeError for anything but a Request."""
    if not isinstance(request, Request):
        raise TypeError(f"request must be a Request, got a {type(request).__name__}")
    if not request.tokens:
        raise ValueError(f"{name} is empty; it must hold at least one token")
    size = model.config.block_size
    if len(request.tokens) > size:
        raise ValueError(
            f"{name} must fit into block_size={size}, got {len(request.tokens)} tokens"
        )
    model.check_tokens(torch.tensor([list(request.tokens)]))
    if request.eos is not None and not 0 <= request.eos < ids:
        raise ValueError(f"eos must lie in 0...{ids - 1} or be None, got {request.eos}")
    if request.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, got none")


def check_logprob(logprob: float, tokens: int, name: str) -> None:
    """Raises RuntimeError unless the log-probability of a token, chosen behind `tokens` others of
    the prompt called `name`, is finite."""
    if not math.isfinite(logprob):
        raise RuntimeError(
            f"the model's logits hold NaN or infinity behind {tokens} tokens of {name}: its "
            f"weights are broken, or too large for its dtype"
        )
