"""The tokenizer beside a model's weights: ids and texts are those of transformers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptkernels.gpt import nanogpt, tokenizer_files
from gptkernels.gpt.tokenizer import ByteTokenizer, CharacterTokenizer, PackageTokenizer, holds

tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")

TEXT = "Hello hello<|endoftext|>the  hero [x]\n\u00e9!"
END = "<|endoftext|>"
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
# 256 bytes, three pairs, the end of text: ids that no other vocabulary has.
GPT2 = {text: i for i, text in enumerate([*BYTES, "he", "\u0120t", "ll", END])}
GPT2_MERGES = "#version: 0.2\nh e\n\u0120 t\nl l\n"
LETTERS = [chr(i) for i in range(97, 123)]
GPT1 = {text: i for i, text in enumerate([*LETTERS, *(x + "</w>" for x in LETTERS), "<unk>", "he"])}
GPT1_MERGES = "#version: 0.2\nh e\n"


def pairs(**files: Any) -> dict[str, Any]:
    return {"vocab.json": GPT2, "merges.txt": GPT2_MERGES, **files}


def whole(change: Callable[[Any], Any] = lambda tokenizer: None) -> str:
    """A tokenizer.json that `change` has changed."""
    model = tokenizers.models.BPE(vocab=GPT2, merges=[("h", "e"), ("\u0120", "t"), ("l", "l")])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END])
    change(made)
    return made.to_str()


def short(tokenizer: Any) -> None:
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9, pad_id=3)


def lowered(tokenizer: Any) -> None:
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()


def falling_back(tokenizer: Any) -> None:
    fallback, fuse = tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()
    tokenizer.decoder = tokenizers.decoders.Sequence([fallback, fuse])


def undecoded(tokenizer: Any) -> None:
    tokenizer.decoder = None


def begun(tokenizer: Any) -> None:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, GPT2[END])]
    )


def write(folder: Path, files: dict[str, Any], model_type: str = "gpt2") -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in {"config.json": {"model_type": model_type}, **files}.items():
        if not isinstance(content, bytes):
            text = content if isinstance(content, str) else json.dumps(content)
            content = text.encode("utf-8")
        (folder / name).write_bytes(content)
    return folder


GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
WORDS = {"tokenizer_class": "OpenAIGPTTokenizer", "eos_token": "he"}
ADDED = {"added_tokens_decoder": {"260": {"content": "[x]"}}}


@pytest.mark.parametrize(
    ("files", "model_type"),
    [
        (pairs(), "gpt2"),
        (pairs(**{"tokenizer_config.json": {"add_prefix_space": True}}), "gpt2"),
        (pairs(**{"tokenizer_config.json": {"add_bos_token": True}}), "gpt2"),
        (pairs(**{"tokenizer_config.json": {"eos_token": "he"}}), "gpt2"),
        (pairs(**{"special_tokens_map.json": {"eos_token": {"content": "he"}}}), "gpt2"),
        (pairs(**{"tokenizer_config.json": {"bos_token": "he", "eos_token": "ll"}}), "gpt2"),
        (pairs(**{"tokenizer_config.json": {"bos_token": None}}), "gpt2"),
        (pairs(**{"added_tokens.json": {"[x]": 260}}), "gpt2"),
        (pairs(**{"tokenizer_config.json": ADDED}), "gpt2"),
        ({"vocab.json": GPT1, "merges.txt": GPT1_MERGES}, "openai-gpt"),
        ({"tokenizer.json": whole()}, "gpt2"),
        ({"tokenizer.json": whole(), "vocab.json": {"a": 0}}, "gpt2"),
        ({"tokenizer.json": whole(begun)}, "gpt2"),
        ({"tokenizer.json": whole(), "tokenizer_config.json": {"eos_token": "he"}}, "gpt2"),
        (
            {
                "tokenizer.json": whole(),
                "special_tokens_map.json": {"bos_token": {"content": "he"}},
            },
            "gpt2",
        ),
        (
            {"tokenizer.json": whole(), "tokenizer_config.json": {**GENERIC, "eos_token": "he"}},
            "gpt2",
        ),
        ({"tokenizer.json": whole(undecoded), "tokenizer_config.json": GENERIC}, "gpt2"),
        ({"tokenizer.json": whole(short), "tokenizer_config.json": {"eos_token": END}}, "gpt2"),
        ({"tokenizer.json": whole(lowered), "tokenizer_config.json": GENERIC}, "gpt2"),
        ({"tokenizer.json": whole(), "tokenizer_config.json": {"add_prefix_space": True}}, "gpt2"),
        (
            {
                "tokenizer.json": whole(),
                "tokenizer_config.json": {**GENERIC, "add_prefix_space": True},
            },
            "gpt2",
        ),
    ],
)
def test_a_folders_tokenizer_is_that_of_transformers(
    tmp_path: Path, files: dict[str, Any], model_type: str
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    folder = write(tmp_path / "model", files, model_type)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokenizer_files.read(folder)
    assert ours is not None
    ids = theirs(TEXT)["input_ids"]
    assert ours.encode(TEXT) == ids
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize(
    "files",
    [
        pairs(**{"tokenizer_config.json": {"add_bos_token": True}}),
        {"tokenizer.json": whole(begun)},
    ],
)
def test_a_piece_of_a_text_gets_no_token_that_begins_one(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    read = tokenizer_files.read(write(tmp_path, files))
    assert read is not None
    assert read.encode("hell") == [GPT2[END], GPT2["he"], GPT2["ll"]]
    assert read.encode("hell", special=False) == [GPT2["he"], GPT2["ll"]]


@pytest.mark.parametrize(
    "files",
    [
        pairs(**{"tokenizer_config.json": {"add_prefix_space": True, "eos_token": "he"}}),
        pairs(**{"tokenizer_config.json": {"add_bos_token": True, "pad_token": "ll"}}),
        {"tokenizer.json": whole(lowered), "tokenizer_config.json": {**GENERIC, "eos_token": "ll"}},
        {"tokenizer.json": whole(undecoded), "tokenizer_config.json": GENERIC},
        {
            "tokenizer.json": whole(),
            "tokenizer_config.json": {"pad_token": "ll", "padding_side": "left"},
            "special_tokens_map.json": {"unk_token": "he"},
            "chat_template.jinja": "{{ messages[0] }}",
        },
        {"vocab.json": GPT1, "merges.txt": GPT1_MERGES, "tokenizer_config.json": WORDS},
    ],
)
def test_a_written_tokenizer_is_the_one_that_was_read(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    """By this package and by transformers, the tokens that begin and end a text included."""
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    first = tokenizer_files.read(write(tmp_path / "first", files))
    assert isinstance(first, PackageTokenizer)
    second = write(tmp_path / "second", {})
    tokenizer_files.write(second, first)
    again = tokenizer_files.read(second)
    theirs = transformers.AutoTokenizer.from_pretrained(second)
    assert again is not None
    assert first.eos is not None
    for ids, bos, eos in (
        (again.encode(TEXT), again.bos, again.eos),
        (theirs(TEXT)["input_ids"], theirs.bos_token_id, theirs.eos_token_id),
    ):
        assert (ids, bos, eos) == (first.encode(TEXT), first.bos, first.eos)
    assert again.decode(first.encode(TEXT)) == first.decode(first.encode(TEXT))
    before = transformers.AutoTokenizer.from_pretrained(tmp_path / "first")
    for name in ("special_tokens_map", "chat_template", "padding_side", "model_max_length"):
        assert getattr(theirs, name) == getattr(before, name), name


SAID = {
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": "he",
    "pad_token": {"content": "ll", "lstrip": True},
    "additional_special_tokens": ["t"],
    "padding_side": "left",
    "model_max_length": 77,
    "chat_template": "{{ messages[0] }}",
    "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]},
}


def test_what_was_said_of_a_tokenizer_is_written_but_no_code(tmp_path: Path) -> None:
    said = {"tokenizer.json": whole(), "tokenizer_config.json": SAID, "chat_template.jinja": "new"}
    read = tokenizer_files.read(write(tmp_path / "first", said))
    assert isinstance(read, PackageTokenizer)
    tokenizer_files.write(write(tmp_path / "second", {}), read)
    written = json.loads((tmp_path / "second" / "tokenizer_config.json").read_text())
    code = SAID["auto_map"]
    assert written == {
        **{key: value for key, value in SAID.items() if value != code},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "new",  # of the two, transformers takes the file of its own
        "bos_token": END,
        "eos_token": END,
    }


@pytest.mark.parametrize("ending", ["</s>", None])
def test_a_tokenizer_without_an_end_of_text_stays_one(tmp_path: Path, ending: str | None) -> None:
    """Whether its end is named and not in the vocabulary, or said to be none."""
    files = {"tokenizer.json": whole(), "tokenizer_config.json": {"eos_token": ending}}
    folder = write(tmp_path / "first", files)
    for copy in ("second", "third"):
        read = tokenizer_files.read(folder)
        assert isinstance(read, PackageTokenizer)
        assert (read.eos, read.bos) == (None, GPT2[END])
        folder = write(tmp_path / copy, {})
        tokenizer_files.write(folder, read)
        # By its name transformers would add it, past the ids that the model has.
        assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] is None


def test_a_class_that_is_no_name_is_one_that_is_not_known(tmp_path: Path) -> None:
    files = {"tokenizer.json": whole(), "tokenizer_config.json": {"tokenizer_class": ["x"]}}
    read = tokenizer_files.read(write(tmp_path, files))
    assert read is not None
    assert (read.bos, read.eos) == (None, GPT2[END])


def test_of_several_tokenizers_in_a_folder_the_last_one_counts(tmp_path: Path) -> None:
    read = tokenizer_files.read(write(tmp_path / "first", {"tokenizer.json": whole()}))
    assert isinstance(read, PackageTokenizer)
    folder = write(tmp_path / "second", {})
    for tokenizer, names in (
        (read, {"tokenizer.json", "tokenizer_config.json"}),
        (CharacterTokenizer(["a", "b"]), {"characters.json"}),
        (read, {"tokenizer.json", "tokenizer_config.json"}),
    ):
        tokenizer_files.write(folder, tokenizer)
        assert {path.name for path in folder.iterdir()} == {"config.json", *names}
    tokenizer_files.remove(folder)
    assert tokenizer_files.read(folder) is None


def test_written_characters_are_those_that_were_read(tmp_path: Path) -> None:
    characters = ["\n", "a", "\u00e9", "\U0001f600", "\ud83d", "\ude00"]
    tokenizer_files.write(tmp_path, CharacterTokenizer(characters))
    read = tokenizer_files.read(tmp_path)
    assert isinstance(read, CharacterTokenizer)
    assert read.characters == characters
    assert read.encode("a\U0001f600") == [1, 3]


def test_a_vocabulary_holds_one_whose_ids_it_has_too(tmp_path: Path) -> None:
    own, more, moved = (
        tokenizer_files.read(write(tmp_path / name, {**pairs(), **files}))
        for name, files in {
            "own": {},
            "more": {"added_tokens.json": {"[x]": 260}},
            "moved": {"vocab.json": {**GPT2, "he": GPT2["ll"], "ll": GPT2["he"]}},
        }.items()
    )
    assert own is not None
    assert more is not None
    assert moved is not None
    assert holds(own, own)
    assert holds(more, own)
    assert not holds(own, more)
    assert not holds(moved, own)
    assert holds(ByteTokenizer(), ByteTokenizer())
    characters = CharacterTokenizer([chr(i) for i in range(256)])
    assert not holds(ByteTokenizer(), characters)
    assert not holds(own, ByteTokenizer())


def test_the_name_in_config_json_counts_where_no_file_does(tmp_path: Path) -> None:
    assert tokenizer_files.read(write(tmp_path, {})) is None
    named = {"config.json": {"model_type": "gpt2", "gptkernels_tokenizer": "bytes"}}
    assert isinstance(tokenizer_files.read(write(tmp_path, named)), ByteTokenizer)
    read = tokenizer_files.read(write(tmp_path, pairs(**named)))
    assert read is not None
    assert read.encode("the") == [GPT2["t"], GPT2["he"]]


def test_gaps_between_ids_count(tmp_path: Path) -> None:
    spread = {text: 3 * i for text, i in GPT2.items()}
    read = tokenizer_files.read(write(tmp_path, {**pairs(), "vocab.json": spread}))
    assert read is not None
    assert read.vocab_size == 3 * 259 + 1
    assert read.decode(read.encode(TEXT)) == TEXT


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, r"tokenizer\.json is not a tokenizer that can be read \("),
        ({"tokenizer.json": whole(falling_back)}, r"tokenizer\.json decodes with ByteFallback"),
        ({"tokenizer.json": POINTER}, r"tokenizer\.json is a Git LFS pointer"),
        (pairs(**{"vocab.json": POINTER}), r"vocab\.json is a Git LFS pointer"),
        (pairs(**{"merges.txt": POINTER}), r"merges\.txt is a Git LFS pointer"),
        (pairs(**{"vocab.json": "[]"}), r"vocab\.json and merges\.txt are not a tokenizer"),
        (pairs(**{"merges.txt": "#version: 0.2\nx1 y2\n"}), "are not a tokenizer that can be read"),
        ({"vocab.json": GPT2}, r"must hold both of vocab\.json and merges\.txt, got vocab\.json"),
        ({"merges.txt": GPT2_MERGES}, r"and merges\.txt, got merges\.txt"),
        ({"tokenizer.model": "x"}, r"tokenizer\.model is of a kind that is not read here"),
        ({"vocab.txt": "x"}, r"vocab\.txt is of a kind that is not read here"),
        (
            pairs(**{"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}),
            "tokenizer_class must be GPT2Tokenizer or OpenAIGPTTokenizer .* 'LlamaTokenizer'",
        ),
        (pairs(**{"added_tokens.json": {"[x]": 300}}), r"'\[x\]' must have the id 300, but .* 260"),
        (pairs(**{"added_tokens.json": {"[x]": None}}), "must be texts with their ids"),
        (
            pairs(**{"tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>"}}),
            "add_bos_token needs '<s>' in the vocabulary",
        ),
        (pairs(**{"tokenizer_config.json": {"eos_token": 5}}), "must be a text, got 5"),
        (pairs(**{"tokenizer_config.json": {"add_prefix_space": "no"}}), "must be true or false"),
        (pairs(**{"chat_template.jinja": b"\xff"}), r"chat_template\.jinja is not a text in UTF-8"),
        (pairs(**{"tokenizer_config.json": "["}), r"tokenizer_config\.json is not a JSON file"),
        ({"characters.json": {}}, r"characters\.json must hold a list of single characters"),
        ({"characters.json": {"characters": ["ab"]}}, "a list of single characters, 'characters'"),
        ({"characters.json": {"characters": ["a", "a"]}}, "must hold each of its characters once"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer_files.read(write(tmp_path, files))
    assert "\n" not in str(caught.value)


# --- nanoGPT's characters


def meta(characters: str) -> dict[str, Any]:
    """What nanoGPT's prepare.py for characters writes."""
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }


def test_nanogpts_characters(tmp_path: Path) -> None:
    assert nanogpt.read_tokenizer(tmp_path / "ckpt.pt") is None
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta("\n aehlo\u00e9")))
    read = nanogpt.read_tokenizer(tmp_path / "ckpt.pt")
    assert read is not None
    assert (read.vocab_size, read.eos) == (8, None)
    assert read.encode("hell\u00e9") == [4, 3, 5, 5, 7]
    assert read.decode([4, 3, 5, 5, 7]) == "hell\u00e9"
    with pytest.raises(ValueError, match=r"8 characters of the vocabulary alone, but .* 1 is 'i'"):
        read.encode("hi")
    with pytest.raises(ValueError, match=r"ids must lie in 0\.\.\.7, got 8"):
        read.decode([8])


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.nn.Linear, "it asks for torch"),
        ([1], "must hold a dictionary 'itos'"),
        ({"itos": {1: "a"}}, "must hold a dictionary 'itos' of ids, 0 and up"),
        ({"itos": {0: "ab"}, "stoi": {"ab": 0}}, "must hold single characters"),
        ({"itos": {0: "a"}, "stoi": {"a": 1}}, "'stoi' that is its 'itos' the other way"),
        ({"itos": {0: "a", 1: "a"}, "stoi": {"a": 1}}, "'stoi' that is its 'itos'"),
    ],
)
def test_any_other_meta_pkl_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        nanogpt.read_tokenizer(tmp_path / "ckpt.pt")


def test_no_meta_pkl_runs_code(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Evil(tmp_path / "ran")}))
    with pytest.raises(ValueError, match="not a pickle of plain values alone"):
        nanogpt.read_tokenizer(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()
    for broken in (b"", b"hello\n", b"\x80\x04X\x05", POINTER.encode()):
        (tmp_path / "meta.pkl").write_bytes(broken)
        with pytest.raises(ValueError, match=r"meta\.pkl is (not a pickle|a Git LFS pointer)"):
            nanogpt.read_tokenizer(tmp_path / "ckpt.pt")
