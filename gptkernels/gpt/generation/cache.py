"""The keys and values of all texts that are being continued, allocated once.

    slot r holds    k, v (Tmax, Hk, D) for each layer; the first lengths[r] tokens count

2 * n_layer * R * Tmax * Hk * D elements in all. Slots are independent: each has its own length, and
can be filled, continued and emptied while the others stay as they are. Every step runs all slots,
so shapes never change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.checks import check_count
from gptkernels.gpt.config import GPTConfig
from gptkernels.nn.layers import CausalSelfAttention, KVCache


class CachingModel(Protocol):
    """What generation needs of a model. `gptkernels.GPT` has it; generation does not import it."""

    @property
    def config(self) -> GPTConfig:
        """Its vocab_size and block_size."""

    def modules(self) -> Iterator[nn.Module]:
        """As `nn.Module.modules`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As `nn.Module.parameters`."""

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise TypeError or ValueError for tokens that the model cannot take."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) to logits (..., V)."""

    def hidden_states(self, tokens: Tensor, *, cache: SlotCache, slot: int | None = None) -> Tensor:
        """Tokens (B, T) to hidden states (B, T, C); `cache` takes their keys and values."""


class SlotCache:
    """Keys and values of R slots of at most `max_tokens` tokens each, for every block of `model`,
    on its device and in the dtype that its attention computes in.

    lengths: (R,) int32, on the device: how many tokens each slot holds. An empty
        slot stays empty when all slots are continued; the results for it mean nothing.
    """

    def __init__(self, model: CachingModel, slots: int, max_tokens: int) -> None:
        """Raises TypeError and ValueError unless slots and max_tokens are ints of at least 1."""
        self.slots = check_count("slots", slots)
        self.max_tokens = check_count("max_tokens", max_tokens)
        first = next(model.parameters())  # c_attn may be quantised, and then has none
        dtype, device = autocast_dtype(first), first.device
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self._rows = torch.arange(slots, device=device)[:, None]
        self._buffers = []
        for layer in model.modules():
            if isinstance(layer, CausalSelfAttention):
                shape = (slots, max_tokens, layer.n_kv_head, layer.head_dim)
                k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
                self._buffers.append((k, v))

    def caches(self, tokens: int, slot: int | None = None) -> list[KVCache]:
        """For each block, where the next `tokens` tokens go: behind what each slot holds or, with
        `slot`, to the start of this slot alone. `keep` then makes them count."""
        if slot is not None:
            row = slice(slot, slot + 1)
            lengths = torch.full_like(self.lengths[row], tokens)
            return [KVCache(k[row], v[row], None, lengths) for k, v in self._buffers]
        positions = self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)
        lengths = (self.lengths + tokens) * (self.lengths > 0)
        return [KVCache(k, v, (self._rows, positions), lengths) for k, v in self._buffers]

    def keep(self, caches: list[KVCache], slot: int | None = None) -> None:
        """Count the tokens that the blocks have stored in `caches`."""
        rows = slice(None) if slot is None else slice(slot, slot + 1)
        self.lengths[rows] = caches[0].lengths

    def copy(self, slots: int | slice, source: SlotCache, source_slot: int, tokens: int) -> None:
        """Let one slot, or each slot of a slice, hold the first `tokens` tokens of a slot of
        `source`, which is none of them."""
        self.lengths[slots] = tokens
        for ours, theirs in zip(self._buffers, source._buffers, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                mine[slots, :tokens] = other[source_slot, :tokens]

    def reorder(self, sources: Sequence[int], start: int, end: int) -> None:
        """Let slot i hold the `end` tokens that slot sources[i] holds. All slots have the first
        `start` of them in common, and keep these where there is no source for them, too."""
        # An empty slot would be continued at its first token.
        self.lengths[:] = end
        moved = [(slot, source) for slot, source in enumerate(sources) if slot != source]
        if moved:
            slots, read = torch.tensor(moved, device=self.lengths.device).unbind(1)
            for buffer in itertools.chain(*self._buffers):
                # Indexing copies all that is read before anything is written.
                buffer[slots, start:end] = buffer[read, start:end]

    def cut(self, slot: int, tokens: int) -> None:
        """Let `slot` hold its first `tokens` tokens alone."""
        self.lengths[slot] = tokens

    def release(self, slot: int) -> None:
        """Empty `slot`."""
        self.lengths[slot] = 0

    def longest(self) -> int:
        """How many tokens the fullest slot holds. On a GPU this waits for the device."""
        return int(self.lengths.max())
