"""Training data: one sequence of tokens, from text or token shards, split in two and batched.

    text = the files, joined by a blank line          -> tokens (N,) int32
    shards (.bin), or folders of them (prepared.py)   -> tokens, mapped into memory
    tokens = training part | validation part          validation is the last `validation_fraction`
    epoch: a random offset o < T, then every window from o, o + T, o + 2 T ... once, in random order
    batch: the next `batch_size` starts s             x = tokens[s : s+T], y = tokens[s+1 : s+T+1]

The order of the batches has a `torch.Generator` of its own, so that it does not depend on dropout,
initialisation or validation. Its state is part of a checkpoint: a resumed run sees the batches that
the uninterrupted run would have seen, even in the middle of an epoch. Validation reads evenly
spaced windows, without randomness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gptkernels.core.files import check_no_pointer
from gptkernels.gpt.tokenizer import Tokenizer
from gptkernels.gpt.training import prepared
from gptkernels.gpt.training.shards import Shards

Tokens: TypeAlias = Tensor | Shards


def read(
    files: Sequence[str | Path], tokenizer: Tokenizer, token_dtype: str, vocab_size: int
) -> tuple[Tokens, str]:
    """The tokens of `files`, all of them text or all of them shards (.bin, or prepared folders of
    them), and a fingerprint, by which a resumed run knows that it reads the same.

    Raises ValueError for a mixture, and what `prepared.checked`, `read_text` and `Shards` raise.
    """
    files = prepared.checked(files, tokenizer)
    shards = [file.suffix == ".bin" for file in files]
    if files and all(shards):
        opened = Shards(files, token_dtype, vocab_size)
        opened.scan()
        return opened, opened.digest()
    if any(shards):
        raise ValueError("files: text and token shards (.bin) do not mix")
    text = read_text(files)
    return tokenize(text, tokenizer), hashlib.sha256(text.encode()).hexdigest()


def read_text(files: Sequence[str | Path]) -> str:
    """The UTF-8 text of `files`, without byte order marks, joined by a blank line.

    Raises FileNotFoundError for a file that is not there and ValueError for no file, a folder,
    an empty file, one that is not UTF-8, or a Git LFS pointer.
    """
    if not files:
        raise ValueError("files: no text file was given, at least one is wanted")
    texts = []
    for file in map(Path, files):
        if not file.exists():
            raise FileNotFoundError(f"files: {file} does not exist, a UTF-8 text file is wanted")
        if not file.is_file():
            raise ValueError(f"files: {file} is a folder, a UTF-8 text file is wanted")
        check_no_pointer(file)
        try:
            # As bytes: text mode would turn \r\n into \n, which changes the tokens. The mark that
            # some editors put first is no part of the text.
            text = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"files: {file} is not UTF-8 text (byte {error.start} cannot be decoded)"
            ) from None
        if not text.strip():
            raise ValueError(f"files: {file} is empty, a UTF-8 text file is wanted")
        texts.append(text)
    return "\n\n".join(texts)


def tokenize(text: str, tokenizer: Tokenizer) -> Tensor:
    """The tokens of `text`: (N,) int32."""
    return torch.tensor(tokenizer.encode(text), dtype=torch.int32)


def split(tokens: Tokens, validation_fraction: float, block_size: int) -> tuple[Tokens, Tokens]:
    """The training part and, after it, the validation part of `tokens` (N,).

    The cut is one point in the text, so that no window of one part overlaps the other. Raises
    ValueError when a part is shorter than one context and the token after it.
    """
    count = len(tokens)
    cut = count - round(count * validation_fraction)
    for name, length in (("training", cut), ("validation", count - cut)):
        if length < block_size + 1:
            smaller = f" or a block_size of at most {length - 1}" if length > 1 else ""
            raise ValueError(
                f"files: the {name} part has {length} of the text's {count} tokens, "
                f"but one context of block_size={block_size} needs at least {block_size + 1}: "
                f"take a longer text{smaller}"
            )
    return tokens[:cut], tokens[cut:]


def gather(tokens: Tokens, starts: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the windows at `starts` (B,): two (B, block_size) int64 tensors."""
    if isinstance(tokens, Shards):
        windows = tokens.windows(starts, block_size + 1)
    else:
        windows = tokens[starts[:, None] + torch.arange(block_size + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Batches:
    """Endless random batches, epoch after epoch, the same for the same seed on every machine.

    Args:
        tokens: N > block_size integers on the CPU.
        block_size: the length T of a window.
        batch_size: the number B of windows in a batch; one may end an epoch and begin the next.
        seed: of the sampler's own generator.

    Iterating yields (x, y), both (B, T) int64 on the CPU, y being x moved by one token.
    """

    def __init__(self, tokens: Tokens, block_size: int, batch_size: int, seed: int) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self._epoch = -1
        self._next_epoch()

    @property
    def epochs(self) -> float:
        """How many epochs have been drawn so far; the fraction is of the current one."""
        return self._epoch + self._position / len(self._starts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        drawn: list[Tensor] = []
        wanted = self.batch_size
        while wanted:
            if self._position == len(self._starts):
                self._next_epoch()
            drawn.append(self._starts[self._position : self._position + wanted])
            self._position += len(drawn[-1])
            wanted -= len(drawn[-1])
        return gather(self.tokens, torch.cat(drawn), self.block_size)

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next batches, besides the tokens."""
        return {
            "generator": self._before_epoch.clone(),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken."""
        self.generator.set_state(state["generator"])
        self._epoch = state["epoch"] - 1
        self._next_epoch()
        self._position = min(state["position"], len(self._starts))

    def _next_epoch(self) -> None:
        self._before_epoch = self.generator.get_state()
        room = len(self.tokens) - 1 - self.block_size
        offsets = min(self.block_size, room + 1)
        offset = int(torch.randint(offsets, (), generator=self.generator))
        windows = (len(self.tokens) - 1 - offset) // self.block_size
        order = torch.randperm(windows, generator=self.generator)
        self._starts = offset + order * self.block_size
        self._epoch += 1
        self._position = 0


def validation_batches(
    tokens: Tokens, block_size: int, batch_size: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `count` batches of evenly spaced windows: the same ones every time.

    Windows do not overlap: a short validation part gives fewer of them, and a last batch that may
    be smaller.
    """
    windows = min(count * batch_size, (len(tokens) - 1) // block_size)
    last = len(tokens) - 1 - block_size
    starts = torch.linspace(0, last, windows, dtype=torch.float64).long()
    for chunk in starts.split(batch_size):
        yield gather(tokens, chunk, block_size)
