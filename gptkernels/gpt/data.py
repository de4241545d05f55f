"""Training data: text files to one line of tokens, split in two, cut into random batches.

    text = the files, joined by a blank line          -> tokens (N,) int32
    tokens = training part | validation part          validation is the last `validation_fraction`
    batch: `batch_size` random starts s               x = tokens[s : s+T], y = tokens[s+1 : s+T+1]

The order of the batches belongs to a `torch.Generator` of its own: neither dropout nor
initialisation nor validation moves it, and its state is part of a checkpoint, so that a resumed run
sees the batches that the uninterrupted run would have seen. Validation walks evenly spaced windows:
no randomness at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptkernels.gpt.tokenizer import Tokenizer


def read_text(files: Sequence[str | Path]) -> str:
    """The UTF-8 text of `files`, joined by a blank line.

    Raises FileNotFoundError for a file that is not there and ValueError for no file, a folder,
    an empty file, or one that is not UTF-8.
    """
    if not files:
        raise ValueError("files: no text file was given, at least one is wanted")
    texts = []
    for file in map(Path, files):
        if not file.exists():
            raise FileNotFoundError(f"files: {file} does not exist, a UTF-8 text file is wanted")
        if not file.is_file():
            raise ValueError(f"files: {file} is a folder, a UTF-8 text file is wanted")
        try:
            # Bytes first: text mode would turn \r\n into \n, and the tokens would depend on it.
            text = file.read_bytes().decode("utf-8")
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


def digest(text: str) -> str:
    """A fingerprint of `text`: a resumed run must read what it read before."""
    return hashlib.sha256(text.encode()).hexdigest()


def split(tokens: Tensor, validation_fraction: float, block_size: int) -> tuple[Tensor, Tensor]:
    """The training part and, after it, the validation part of `tokens` (N,).

    The cut is one point in the text, so that no window of one part overlaps the other. Raises
    ValueError when a part is shorter than one context and the token after it.
    """
    cut = len(tokens) - round(len(tokens) * validation_fraction)
    parts = (tokens[:cut], tokens[cut:])
    for name, part in zip(("training", "validation"), parts, strict=True):
        if len(part) < block_size + 1:
            raise ValueError(
                f"files: the {name} part has {len(part)} of the text's {len(tokens)} tokens, "
                f"but one context of block_size={block_size} needs at least {block_size + 1}"
            )
    return parts


def gather(tokens: Tensor, starts: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the windows at `starts` (B,): two (B, block_size) int64 tensors."""
    windows = tokens[starts[:, None] + torch.arange(block_size + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Batches:
    """Endless random batches, drawn with replacement, the same for the same seed on every machine.

    Args:
        tokens: (N,) integer tensor on the CPU, N > block_size.
        block_size: the length T of a window.
        batch_size: the number B of windows in a batch.
        seed: of the sampler's own generator.

    Iterating yields (x, y), both (B, T) int64 on the CPU, y being x moved by one token.
    """

    def __init__(self, tokens: Tensor, block_size: int, batch_size: int, seed: int) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(
            len(self.tokens) - self.block_size, (self.batch_size,), generator=self.generator
        )
        return gather(self.tokens, starts, self.block_size)

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides the next batches, besides the tokens."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict()` was taken."""
        self.generator.set_state(state["generator"])


def validation_batches(
    tokens: Tensor, block_size: int, batch_size: int, count: int
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
