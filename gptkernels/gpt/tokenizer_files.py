"""The tokenizer in a Hugging Face folder, beside the weights: the first that is there of

    tokenizer.json               whatever the package `tokenizers` runs
    vocab.json and merges.txt    GPT-2's or GPT-1's kind, as a config of the folder says
    characters.json              {"characters": [...]}, whose places are the ids; ours alone
    the name in config.json      which `GPT.save_pretrained` keeps

tokenizer_config.json, special_tokens_map.json and added_tokens.json add what they add in
transformers: special tokens, those that begin and end a text, a first space. Where there is nothing
to read, nothing is guessed: two vocabularies of one size need not be the same.

Written: tokenizer.json, with a tokenizer_config.json that names the tokens that begin and end a
text, and says what was said of it where it was read, such as its chat template; or characters.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptkernels.core.files import check_no_pointer, replacing
from gptkernels.gpt import weights
from gptkernels.gpt.tokenizer import (
    END_OF_TEXT,
    CharacterTokenizer,
    PackageTokenizer,
    Tokenizer,
    load_tokenizer,
    pairs_of_bytes,
    pairs_of_words,
    tokenizers_package,
)

_WHOLE, _PAIRS = "tokenizer.json", ("vocab.json", "merges.txt")
_CHARACTERS, _SETTINGS = "characters.json", "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_FOREIGN = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_BYTES = ("GPT2Tokenizer", "GPT2TokenizerFast", "gpt2")
_WORDS = ("OpenAIGPTTokenizer", "OpenAIGPTTokenizerFast", "openai-gpt")
_NAMED = ("bos_token", "eos_token", "unk_token")
_SPECIAL = (*_NAMED, "pad_token")
# What transformers' class of a kind takes where the folder does not name it.
_ELSE = {
    **{kind: dict.fromkeys(_NAMED, END_OF_TEXT) for kind in _BYTES},
    **{kind: {"unk_token": "<unk>"} for kind in _WORDS},
}


def read(folder: Path) -> Tokenizer | None:
    """The tokenizer in `folder`; None where it says nothing of one.

    Raises ValueError, in one sentence, for one that is broken, incomplete or of another kind, and
    ImportError where its package is missing.
    """
    tokenizer = read_files(folder)
    if tokenizer is None and (name := weights.read_tokenizer(folder)) is not None:
        return load_tokenizer(name)
    return tokenizer


def read_files(folder: Path) -> Tokenizer | None:
    """As `read`, from the tokenizer's own files alone: what config.json names is not looked at."""
    if (folder / _WHOLE).is_file():
        return _read_whole(folder / _WHOLE)
    there = [name for name in _PAIRS if (folder / name).is_file()]
    if len(there) == 1:
        raise ValueError(f"{folder} must hold both of {' and '.join(_PAIRS)}, got {there[0]}")
    if there:
        return _read_pairs(folder)
    for foreign in _FOREIGN:
        if (folder / foreign).is_file():
            raise ValueError(
                f"{folder / foreign} is of a kind that is not read here, {_WHOLE} is wanted"
            )
    path = folder / _CHARACTERS
    return _read_characters(path) if path.is_file() else None


def write(folder: Path, tokenizer: PackageTokenizer | CharacterTokenizer) -> None:
    """Write a tokenizer into `folder`, as `read` reads it and, but for characters, transformers.

    Each file is complete before it gets its name, and survives a power cut. Files of the other kind
    are removed. Raises OSError where it cannot be written.
    """
    if isinstance(tokenizer, CharacterTokenizer):
        _write_object(folder / _CHARACTERS, {"characters": list(tokenizer.characters)})
        remove(folder, (_WHOLE, _SETTINGS))
        return
    tokenizer.save(folder / _WHOLE)
    settings, texts = dict(tokenizer.settings), tokenizer.texts()
    # The generic class adds nothing to what tokenizer.json says, and needs no code in the folder.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("auto_map", None)
    # Where there is none this is said: an end that is left out is taken for <|endoftext|>.
    for key, token in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        settings[key] = None if token is None else texts[token]
    _write_object(folder / _SETTINGS, settings)
    remove(folder, (_CHARACTERS,))


def remove(folder: Path, names: Sequence[str] = (_WHOLE, _SETTINGS, _CHARACTERS)) -> None:
    """Remove from `folder` what `write` may have left there before. Raises OSError."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _write_object(path: Path, content: dict[str, Any]) -> None:
    with replacing(path, durable=True) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_characters(path: Path) -> CharacterTokenizer:
    characters = weights.json_object(path).get("characters")
    if not isinstance(characters, list) or not all(
        isinstance(character, str) and len(character) == 1 for character in characters
    ):
        raise ValueError(f"{path} must hold a list of single characters, 'characters'")
    if len(set(characters)) != len(characters):
        raise ValueError(f"{path} must hold each of its characters once")
    return CharacterTokenizer(characters)


def _read_whole(path: Path) -> Tokenizer:
    package, settings = tokenizers_package(), _settings(path.parent)
    check_no_pointer(path)
    try:
        tokenizer = package.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more precise
        raise ValueError(f"{path} is not a tokenizer that can be read ({error})") from None
    # One byte that is wrong changes all bytes of its run there, those already printed too.
    if tokenizer.decoder is not None and b"ByteFallback" in tokenizer.decoder.__getstate__():
        raise ValueError(f"{path} decodes with ByteFallback, which no text can be streamed with")
    # transformers' class for GPT-2 sets this itself, its generic class leaves it as it is.
    kind, spaces = str(settings.get("tokenizer_class") or "gpt2"), tokenizer.pre_tokenizer
    if kind in _BYTES and isinstance(spaces, package.pre_tokenizers.ByteLevel):
        spaces.add_prefix_space = _first_space(settings, spaces.add_prefix_space)
    return _finished(tokenizer, settings, kind)


def _read_pairs(folder: Path) -> Tokenizer:
    package, settings = tokenizers_package(), _settings(folder)
    model_type = weights.json_object(folder / "config.json").get("model_type", "gpt2")
    kind = settings.get("tokenizer_class") or model_type
    if kind not in (*_BYTES, *_WORDS):
        raise ValueError(
            f"{folder}: tokenizer_class must be {_BYTES[0]} or {_WORDS[0]} where the tokenizer is "
            f"{' and '.join(_PAIRS)}, got {kind!r}"
        )
    vocabulary, merges = (folder / name for name in _PAIRS)
    check_no_pointer(vocabulary)
    check_no_pointer(merges)
    try:
        if kind in _BYTES:
            tokenizer = pairs_of_bytes(vocabulary, merges, _first_space(settings))
        else:
            tokenizer = pairs_of_words(vocabulary, merges)
        tokenizer.encode("a")
    except Exception as error:  # the package raises nothing more precise
        raise ValueError(
            f"{vocabulary} and {merges.name} are not a tokenizer that can be read ({error})"
        ) from None
    for text, i in _added(folder, settings):
        tokenizer.add_tokens([text])
        if tokenizer.token_to_id(text) != i:
            raise ValueError(
                f"{folder}: the added token {text!r} must have the id {i}, but the vocabulary "
                f"gives it {tokenizer.token_to_id(text)}"
            )
    if settings.get("add_bos_token") and kind in _BYTES:
        first = _text(settings.get("bos_token") or END_OF_TEXT)
        i = tokenizer.token_to_id(first)
        if i is None:
            raise ValueError(f"{folder}: add_bos_token needs {first!r} in the vocabulary")
        tokenizer.post_processor = package.processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, i)]
        )
    return _finished(tokenizer, settings, kind)


def _finished(tokenizer: Any, settings: dict[str, Any], kind: str) -> Tokenizer:
    """With its special tokens, which no text around them is joined to, and those that begin and
    end a text."""
    for key, text in _ELSE.get(kind, {}).items():
        if tokenizer.token_to_id(text) is not None:
            settings.setdefault(key, text)
    given = [settings.get(key) for key in _SPECIAL]
    given += settings.get("additional_special_tokens") or []
    texts = [_text(token) for token in given if token is not None]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text in (*texts, END_OF_TEXT):
        if text not in known and tokenizer.token_to_id(text) is not None:
            tokenizer.add_special_tokens([text])
    # One that is null is none; where nothing names the end of a text, it is the usual one.
    eos, bos = (
        None if token is None else tokenizer.token_to_id(_text(token))
        for token in (settings.get("eos_token", END_OF_TEXT), settings.get("bos_token"))
    )
    return PackageTokenizer(tokenizer, eos, bos, settings)


def _settings(folder: Path) -> dict[str, Any]:
    """What is said beside the tokenizer."""
    names = ("special_tokens_map.json", _SETTINGS)
    there = [folder / name for name in names if (folder / name).is_file()]
    settings = {key: value for path in there for key, value in weights.json_object(path).items()}
    if (path := folder / _TEMPLATE).is_file():
        try:
            settings["chat_template"] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text in UTF-8 ({error})") from None
    return settings


def _added(folder: Path, settings: dict[str, Any]) -> list[tuple[str, int]]:
    """The tokens beyond the vocabulary, and their ids, in the ids' order."""
    path = folder / "added_tokens.json"
    try:
        tokens = settings.get("added_tokens_decoder") or {}
        added = {_text(token): int(i) for i, token in tokens.items()}
        if path.is_file():
            added |= {text: int(i) for text, i in weights.json_object(path).items()}
    except (AttributeError, TypeError):
        raise ValueError(f"{folder}: added tokens must be texts with their ids") from None
    return sorted(added.items(), key=lambda token: token[1])


def _first_space(settings: dict[str, Any], default: bool = False) -> bool:
    """Whether a space is put before the first word."""
    wanted = settings.get("add_prefix_space", default)
    if not isinstance(wanted, bool):
        raise ValueError(f"add_prefix_space must be true or false, got {wanted!r}")
    return wanted


def _text(token: Any) -> str:
    """The text of a token, which may be written as an object with its other properties."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"a special token must be a text, got {text!r}")
    return text
