"""Batches of encoded examples: what is padded, what counts, and that an epoch has each once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptkernels.gpt.finetuning.batches import Encoded, collate, epoch, in_order

ROW = st.lists(st.integers(1, 99), min_size=2, max_size=9)
EXAMPLES = st.lists(
    st.builds(Encoded, st.lists(ROW, min_size=1, max_size=3), st.integers(0, 5)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(EXAMPLES)
def test_a_batch_holds_every_row_its_end_and_its_next_tokens(examples: list[Encoded]) -> None:
    batch = collate(examples, number=False)
    rows = [row for example in examples for row in example.rows]
    assert batch.tokens.shape == (len(rows), max(map(len, rows)))
    for padded, row in zip(batch.tokens.tolist(), rows, strict=True):
        assert padded == row + [0] * (len(padded) - len(row))
    assert batch.ends.tolist() == [len(row) - 1 for row in rows]
    places = [(r, t) for r, row in enumerate(rows) for t in range(len(row) - 1)]
    width = batch.tokens.shape[1]
    assert batch.places.tolist() == [r * width + t for r, t in places]
    assert batch.following.tolist() == [rows[r][t + 1] for r, t in places]
    owners = [(i, j) for i, example in enumerate(examples) for j in range(len(example.rows))]
    assert list(zip(batch.owner.tolist(), batch.choice.tolist(), strict=True)) == owners


def test_targets_are_indices_or_numbers_or_unknown() -> None:
    known = [Encoded([[1, 2]], 3), Encoded([[1, 2]], 0)]
    indices, numbers = collate(known, number=False).targets, collate(known, number=True).targets
    assert indices is not None
    assert numbers is not None
    assert indices.dtype == torch.int64
    assert numbers.dtype == torch.float32
    assert indices.tolist() == numbers.tolist() == [3, 0]
    assert collate([*known, Encoded([[1, 2]], None)], number=False).targets is None
    assert collate(known, number=True).to(torch.device("meta")).tokens.is_meta


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(1, 5), st.integers(0, 2**63 - 1))
def test_an_epoch_has_every_example_once(count: int, size: int, seed: int) -> None:
    examples = [Encoded([[0] * (2 + i % 7)], i) for i in range(count)]
    first, again = (
        list(epoch(examples, size, torch.Generator().manual_seed(seed))) for _ in range(2)
    )
    drawn = [example.target for part in first for example in part]
    assert sorted(drawn) == list(range(count))
    assert first == again
    assert all(1 <= len(part) <= size for part in first)
    assert len(first) == -(-count // size)  # the number of steps that the learning rate falls in


def test_epochs_differ_and_their_batches_have_like_lengths() -> None:
    examples = [Encoded([[0] * (2 + i % 10)], i) for i in range(200)]
    generator = torch.Generator().manual_seed(0)
    first, second = (list(epoch(examples, 4, generator)) for _ in range(2))
    together = [{frozenset(e.target for e in part) for part in parts} for parts in (first, second)]
    assert len(together[0] & together[1]) < 10  # of fifty: others share a batch
    spread = [max(e.length for e in part) - min(e.length for e in part) for part in first]
    assert max(spread) == 0  # of each length there are twenty
    longest = [part[0].length for part in first]
    assert longest != sorted(longest)  # the batches themselves come in random order


@given(EXAMPLES, st.integers(1, 4))
def test_answering_goes_through_all_examples_from_the_longest(
    examples: list[Encoded], size: int
) -> None:
    parts = list(in_order(examples, size))
    drawn = [i for part in parts for i in part]
    assert sorted(drawn) == list(range(len(examples)))
    lengths = [examples[i].length for i in drawn]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(part) <= size for part in parts)
