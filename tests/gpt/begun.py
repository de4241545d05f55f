"""A tokenizer that puts a token before every text, as a GPT-2 folder's add_bos_token does."""

from __future__ import annotations

from collections.abc import Iterable

from gptkernels.gpt.tokenizer import ByteTokenizer

START = 256
_START_TEXT = "<s>"


class Begun(ByteTokenizer):
    """Bytes behind START, which also ends a text; the text "<s>" is that token too."""

    vocab_size = 257
    eos = START

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        first, *others = [super(Begun, self).encode(part) for part in text.split(_START_TEXT)]
        return [START] * special + first + [i for part in others for i in (START, *part)]

    def decode(self, ids: Iterable[int]) -> str:
        text = bytearray()
        for i in ids:
            text += _START_TEXT.encode() if i == START else bytes([i])
        return text.decode(errors="replace")
