"""Batches of encoded examples: sequences of different lengths, padded at their ends.

    rows R = examples × sequences of an example; T the longest of them
    tokens     (R, T)   padded with 0. Attention is causal: nothing that counts sees the padding
    ends       (R,)     where <extract> stands
    places     (N,)     into tokens.flatten(): the positions that have a next token
    following  (N,)     those next tokens, the targets of the auxiliary language-model loss
    owner      (R,)     which example a row belongs to
    choice     (R,)     which of the example's rows it is
    targets    (B,)     class or choice, int64, or number, fp32
    size                B, and the most rows of an example: known without waiting for a GPU

Examples of like length share a batch, so that little is padded: the shuffled examples are sorted
within pools of 64 batches, and the batches are shuffled again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_POOL = 64  # batches


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as its sequences of tokens, and what is asked of it.

    Fields:
        rows: its sequences.
        target: the class's or the choice's index, or a number; None where it is not known.
        cut: whether it was too long for the model.
    """

    rows: list[list[int]]
    target: float | None
    cut: bool = False

    @property
    def length(self) -> int:
        """Of its longest sequence."""
        return max(map(len, self.rows))


@dataclass(frozen=True, slots=True)
class Batch:
    """Some examples as tensors (see the module)."""

    tokens: Tensor
    ends: Tensor
    places: Tensor
    following: Tensor
    owner: Tensor
    choice: Tensor
    targets: Tensor | None
    size: tuple[int, int]

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`."""
        moved: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
        return Batch(**moved)


def collate(examples: Sequence[Encoded], number: bool) -> Batch:
    """The batch of `examples`, on the CPU; targets are a `number` each, or indices, or, where one
    is not known, None."""
    rows = [row for example in examples for row in example.rows]
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    has_next = torch.arange(longest) < (lengths - 1)[:, None]
    places = has_next.flatten().nonzero().squeeze(1)
    targets = None
    if all(example.target is not None for example in examples):
        dtype = torch.float32 if number else torch.int64
        targets = torch.tensor([example.target for example in examples], dtype=dtype)
    return Batch(
        tokens=tokens,
        ends=lengths - 1,
        places=places,
        following=tokens.flatten()[places + 1],
        owner=torch.tensor([i for i, example in enumerate(examples) for _ in example.rows]),
        choice=torch.tensor([i for example in examples for i in range(len(example.rows))]),
        targets=targets,
        size=(len(examples), max(len(example.rows) for example in examples)),
    )


def epoch(
    examples: Sequence[Encoded], batch_size: int, generator: torch.Generator
) -> Iterator[list[Encoded]]:
    """Every example once, in random batches of like lengths; the last drawn one may be smaller."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    batches: list[list[int]] = []
    for first in range(0, len(order), _POOL * batch_size):
        pool = sorted(order[first : first + _POOL * batch_size], key=lambda i: examples[i].length)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield [examples[j] for j in batches[i]]


def in_order(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """The numbers of all examples, in batches from the longest to the shortest ones."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]
