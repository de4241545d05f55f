"""What the engine is asked for, and what it answers: a Request, and an Event for each token."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gptkernels.core.checks import check_count, check_integer, check_seed
from gptkernels.gpt.generation.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Fields:
        tokens: the prompt's ids, at least one and at most block_size.
        max_new_tokens: the most tokens that are added.
        sampling: how they are chosen.
        samples: how many continuations; the prompt is computed once for all of them.
        first_sample: the number of the first. Seed and number together decide a continuation.
        seed: None draws one from PyTorch's generator for the CPU.
        stop: strings that end a text, which then ends before them; they need a tokenizer.
        eos: an id that ends a text.

    tokens and stop become tuples. Raises TypeError and ValueError for values of another type or out
    of range; what depends on the model is checked by `Engine.submit`.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    first_sample: int = 0
    seed: int | None = None
    stop: Sequence[str] = ()
    eos: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("tokens", int), ("stop", str)):
            object.__setattr__(self, name, _tuple_of(kind, name, getattr(self, name)))
        for name in ("max_new_tokens", "first_sample"):
            check_integer(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {self.sampling!r}")
        check_count("samples", self.samples)
        if self.seed is not None:
            check_seed("seed", self.seed)
        if not all(self.stop):
            raise ValueError("stop must hold no empty string")
        if self.eos is not None:
            check_integer("eos", self.eos)


@dataclass(frozen=True)
class Event:
    """One token of one sample, as it is chosen.

    Fields:
        request: number of the request, as `Engine.submit` returned it.
        sample: number of the sample; the first has the request's first_sample.
        token: its id; None where max_new_tokens is 0.
        logprob: its log-probability by the model's own distribution, before `Sampling` changes it.
        text: the text that this token makes certain: empty without a tokenizer, or while it may
            be part of a longer character or of a stop string.
        finish_reason: what ended the text, with its last token: "stop" (a stop string), "eos" or
            "length"; None with the others.
    """

    request: int
    sample: int
    token: int | None
    logprob: float | None
    text: str
    finish_reason: str | None


def _tuple_of(kind: type, name: str, values: Any) -> tuple[Any, ...]:
    """`values` as a tuple; each must be a `kind` and no bool. Raises TypeError."""
    # A str is a sequence of strs too, and a tensor one of tensors: neither is meant.
    if isinstance(values, Iterable) and not isinstance(values, str | Tensor):
        items = tuple(values)
        if all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
            return items
    raise TypeError(f"{name} must be a sequence of {kind.__name__}, got {reprlib.repr(values)}")
