"""Guesses of what follows a text, which the engine checks in one step of the model.

Reading a model's weights takes most of a step's time, so a step of some tokens costs little more
than one of one. The tokens that the engine chooses are those that it would choose without a guess:
a wrong one is thrown away (Leviathan, Kalman, Matias, "Fast Inference from Transformers via
Speculative Decoding", 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptkernels.gpt.generation.cache import CachingModel, SlotCache
from gptkernels.gpt.generation.choices import choices_of, running

LOOKUP = "lookup"
_LONGEST = 3
_READ = 4096  # tokens of a text that a look-up reads, from its end


class Draft(Protocol):
    """What guesses."""

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow the text `tokens`."""


class Lookup:
    """What followed the text's last tokens, 3, 2 or 1 of them, where they stood last before:
    quotations, code and lists repeat themselves (Saxena, "Prompt Lookup Decoding", 2023)."""

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow the text `tokens`."""
        tokens = tokens[-_READ:]
        for size in range(min(_LONGEST, len(tokens) - 1), 0, -1):
            last = tokens[-size:]
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == last:
                    return list(tokens[start + size : start + size + count])
        return []


class SmallerModel:
    """The tokens that a smaller model with the same ids finds likeliest. Nothing is guessed where
    its context, or `max_tokens`, is full."""

    def __init__(self, model: CachingModel, max_tokens: int, vocab_size: int) -> None:
        """Only ids below `vocab_size` are guessed."""
        self._model, self._ids = model, vocab_size
        self._choices = choices_of(model)  # its layers are not those of the model that checks
        self._room = min(max_tokens, model.config.block_size)
        self._cache = SlotCache(model, 1, self._room)
        self._held: list[int] = []

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow the text `tokens`."""
        count = min(count, self._room - len(tokens) + 1)
        # A prompt may hold ids that only the larger model has.
        if count <= 0 or max(tokens) >= self._model.config.vocab_size:
            return []
        same = next(
            (i for i, (a, b) in enumerate(zip(self._held, tokens, strict=False)) if a != b),
            min(len(self._held), len(tokens) - 1),
        )
        logits = self._run(tokens[same:], same)
        found = [int(logits.argmax())]
        while len(found) < count:
            logits = self._run(found[-1:], len(tokens) + len(found) - 1)
            found.append(int(logits.argmax()))
        self._held = [*tokens, *found[:-1]]
        return found

    def _run(self, tokens: Sequence[int], held: int) -> Tensor:
        """The logits behind `tokens`, which follow the first `held` tokens in the cache."""
        device = self._cache.lengths.device
        given = torch.tensor([list(tokens)], device=device)
        with running(self._choices, device.type):
            if held == 0:
                hidden = self._model.hidden_states(given, cache=self._cache, slot=0)
            else:
                self._cache.cut(0, held)
                hidden = self._model.hidden_states(given, cache=self._cache)
            return self._model.logits(hidden[:, -1])[0, : self._ids]
