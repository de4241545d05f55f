"""Training that goes on from a trained model: its weights, its shape, its tokenizer, its rates."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import SHORT, TINY, Interrupted, assert_same_bits, interrupt_at, unclocked

pytest.importorskip("matplotlib", reason="needs the package matplotlib")
pytest.importorskip("safetensors", reason="needs the package safetensors")
pytest.importorskip("tokenizers", reason="needs the package tokenizers")

from test_corpus_manifest import manifest_of
from test_corpus_manifest import write as write_shards
from test_gpt_tokenizer_files import GPT2, meta, pairs
from test_gpt_tokenizer_files import write as write_files

from gptkernels import GPT, GPTConfig
from gptkernels.gpt import tokenizer_files
from gptkernels.gpt.corpus import manifest as manifests
from gptkernels.gpt.loading import load
from gptkernels.gpt.tokenizer import ByteTokenizer, CharacterTokenizer, PackageTokenizer
from gptkernels.gpt.training import prepared
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.pretrained import Pretrained
from gptkernels.gpt.training.recipes import GPT3, continuing_rate
from gptkernels.gpt.training.train import TrainResult, resume, train

pytestmark = pytest.mark.usefixtures("undrawn")

EVERYTHING = dataclasses.replace(
    SHORT, steps=4, ema=0.5, snapshot_interval=2, checkpoint_interval=2
)
TEXT = "The hero, he tells."
SETTINGS = {"tokenizer_config.json": {"eos_token": "he"}}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of Hugging Face's kind, whose tokenizer has no name and another end of text."""
    torch.manual_seed(3)
    GPT(dataclasses.replace(TINY, vocab_size=270)).save_pretrained(tmp_path / "foreign")
    files = {**pairs(), **SETTINGS}
    files["config.json"] = (tmp_path / "foreign" / "config.json").read_text()
    return write_files(tmp_path / "foreign", files)


@pytest.fixture
def nanogpt(text: Path, tmp_path: Path) -> Path:
    """A checkpoint of nanoGPT's, of characters."""
    characters = "".join(sorted(set(text.read_text() + TEXT)))
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "meta.pkl").write_bytes(pickle.dumps(meta(characters)))
    shape: dict[str, Any] = dict(
        n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, dropout=0.2
    )
    shape["vocab_size"] = len(characters)
    torch.manual_seed(4)
    model = GPT(GPTConfig(**shape, approximate="none"))
    content = {"model": model.state_dict(), "model_args": shape}
    torch.save(content, tmp_path / "nano" / "ckpt.pt")
    return tmp_path / "nano" / "ckpt.pt"


def leave_behind(run: Path) -> None:
    """The tokenizers of an earlier run in the same folder, whose checkpoint was removed."""
    other = tokenizer_files.read(write_files(run.with_name("other"), pairs()))
    assert isinstance(other, PackageTokenizer)
    for name in ("", "model", "model-ema", "snapshots/0", "snapshots/4"):
        (run / name).mkdir(parents=True, exist_ok=True)
        tokenizer_files.write(run / name, other)


@pytest.mark.parametrize("part", ["", "checkpoint.pt", "model"])
def test_a_run_goes_on_from_the_loss_that_the_last_one_ended_with(
    finished: tuple[Path, TrainResult], tmp_path: Path, part: str
) -> None:
    out, before = finished
    again = train(
        [out.parent / "text.txt"],
        tmp_path / "run",
        init=out / part,
        config=dataclasses.replace(SHORT, steps=2),
    )
    assert again.records[0]["validation_loss"] == before.records[-1]["validation_loss"]
    assert again.records[-1]["tokens"] == 2 * 2 * 4 * 16
    assert again.model.config == dataclasses.replace(TINY, dropout=0.0)
    # What it went on from stays as it was.
    assert_same_bits(GPT.from_pretrained(out / "model").state_dict(), before.model.state_dict())


@pytest.mark.parametrize("kind", ["foreign", "nanogpt"])
def test_a_tokenizer_of_its_own_is_kept_with_the_run(
    kind: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Everything that the run leaves has it, and it resumes to the same bits without its source."""
    source = request.getfixturevalue(kind)
    _, own = load(source, None)
    whole = train([text], tmp_path / "whole", init=source, config=EVERYTHING)
    leave_behind(tmp_path / "part")
    with pytest.raises(Interrupted):
        train([text], tmp_path / "part", init=source, config=EVERYTHING, observer=interrupt_at(4))
    shutil.rmtree(source if source.is_dir() else source.parent)
    resumed = resume(tmp_path / "part")
    assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())
    assert unclocked(whole.records) == unclocked(resumed.records)
    for name in ("", "checkpoint.pt", "model", "model-ema", "snapshots/0", "snapshots/4"):
        model, kept = load(tmp_path / "part" / name, None)
        assert model.config.vocab_size == whole.model.config.vocab_size
        assert kept.encode(TEXT) == own.encode(TEXT)
        assert (kept.vocab_size, kept.eos) == (own.vocab_size, own.eos)
    if kind == "nanogpt":
        return
    assert own.eos == GPT2["he"]
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "part" / "model")
    assert (theirs(TEXT)["input_ids"], theirs.eos_token_id) == (own.encode(TEXT), own.eos)


def test_a_tokenizer_is_on_the_disk_before_what_needs_it(
    foreign: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves no checkpoint and no weights without it."""
    synced: list[Path] = []
    monkeypatch.setattr("gptkernels.core.files._sync", synced.append)
    out = tmp_path / "run"
    train([text], out, init=foreign, config=dataclasses.replace(SHORT, steps=1))
    files = [(path.parent, path.name) for path in synced]
    for folder, needs in ((out, "checkpoint.pt"), (out / "model", "model.safetensors")):
        order = [name for parent, name in files if parent == folder]
        first = [
            next(i for i, name in enumerate(order) if name.startswith(f".{wanted}."))
            for wanted in ("tokenizer.json", "tokenizer_config.json", needs)
        ]
        assert first == sorted(first)


def test_a_run_without_its_tokenizer_is_told(foreign: Path, text: Path, tmp_path: Path) -> None:
    train([text], tmp_path / "run", init=foreign, config=dataclasses.replace(SHORT, steps=1))
    (tmp_path / "run" / "tokenizer.json").unlink()
    for use in (lambda: resume(tmp_path / "run", steps=2), lambda: load(tmp_path / "run", None)):
        with pytest.raises(FileNotFoundError, match=r"run has lost its own, tokenizer\.json or"):
            use()


def test_a_name_stays_a_name(finished: tuple[Path, TrainResult], tmp_path: Path) -> None:
    out, _ = finished
    leave_behind(tmp_path / "run")
    train([out.parent / "text.txt"], tmp_path / "run", init=out, config=EVERYTHING)
    assert tokenizer_files.read_files(tmp_path / "run") is None
    assert tokenizer_files.read_files(tmp_path / "run" / "model") is None
    assert isinstance(load(tmp_path / "run" / "model", None)[1], ByteTokenizer)


def test_a_head_of_its_own_is_trained_as_one(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = GPT(dataclasses.replace(TINY, norm="post", dropout=0.0))
    head = model.lm_head.weight.detach() + 0.01
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(tmp_path / "untied", tokenizer="bytes")
    result = train(
        [text],
        tmp_path / "run",
        init=tmp_path / "untied",
        config=dataclasses.replace(SHORT, steps=2),
    )
    for found in (result.model, GPT.from_pretrained(tmp_path / "run" / "model")):
        embedding = found.transformer.wte.weight
        assert not torch.equal(found.lm_head.weight, embedding)
        assert not torch.equal(found.lm_head.weight, head)
        assert not torch.equal(embedding, model.transformer.wte.weight)


def test_weights_of_another_dtype_are_trained_in_fp32(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(6)
    narrow = GPT(TINY).bfloat16()
    narrow.save_pretrained(tmp_path / "narrow", tokenizer="bytes")
    begun = Pretrained.load(tmp_path / "narrow")
    assert begun.model.lm_head.weight is begun.model.transformer.wte.weight
    assert_same_bits(begun.model.state_dict(), narrow.float().state_dict())
    config = dataclasses.replace(SHORT, steps=1)
    result = train([text], tmp_path / "run", init=begun, config=config)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def test_a_loaded_model_is_in_memory_alone(tmp_path: Path) -> None:
    """Nothing that happens to its file later changes it."""
    GPT(TINY).save_pretrained(tmp_path / "model", tokenizer="bytes")
    begun = Pretrained.load(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in begun.model.state_dict().items()}
    path = tmp_path / "model" / "model.safetensors"
    with path.open("r+b") as file:  # in place: a new file would be another one
        file.write(bytes(path.stat().st_size))
    assert_same_bits(begun.model.state_dict(), before)


def test_dropout_is_none_or_what_is_asked_for_and_a_context_may_be_shorter(
    finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    out, before = finished
    begun = Pretrained.load(out, dropout=0.3, block_size=7)
    assert begun.model.config == dataclasses.replace(TINY, dropout=0.3, block_size=7)
    tokens = torch.randint(256, (2, 7))
    whole = before.model.eval()(tokens)
    assert torch.equal(begun.model.set_impl("torch").eval()(tokens), whole)
    config = dataclasses.replace(SHORT, steps=1)
    result = train([out.parent / "text.txt"], tmp_path / "run", init=begun, config=config)
    assert result.records[-1]["tokens"] == 2 * 4 * 7
    again = resume(tmp_path / "run", steps=2)
    assert again.model.config == begun.model.config
    with pytest.raises(ValueError, match="block_size is 17, but the model to go on from has 16"):
        Pretrained.load(out, block_size=17)
    with pytest.raises(ValueError, match="dropout"):
        Pretrained.load(out, dropout=1.5)
    with pytest.raises(ValueError, match="block_size"):
        Pretrained.load(out, block_size=0)


# --- rates


@pytest.mark.parametrize(
    ("count", "rate"),
    [(124_439_808, 6e-5), (354_823_168, 3e-5), (774_030_080, 2e-5), (1_557_611_200, 1.6e-5)],
)
def test_gpt2s_go_on_at_a_tenth_of_gpt3s_rate(count: int, rate: float) -> None:
    assert continuing_rate(count) == pytest.approx(rate)


@given(st.integers(1, 4 * 10**11))
def test_the_rate_is_of_the_smallest_model_that_is_as_large(count: int) -> None:
    """By the paper's counts, but for those between its count and that of the shape, which differ
    by less than a tenth."""
    sizes = [125e6, 356e6, 760e6, 1.32e9, 2.65e9, 6.66e9, 12.85e9, 174.6e9]
    if any(0.97 < count / size < 1.03 for size in sizes):
        return
    enough = [r for r, size in zip(GPT3.values(), sizes, strict=True) if size >= count]
    wanted = enough[0] if enough else list(GPT3.values())[-1]
    assert continuing_rate(count) == pytest.approx(wanted.learning_rate / 10)


def test_a_rate_that_is_given_wins_and_the_least_is_a_tenth(
    finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    begun = Pretrained.load(finished[0])
    assert begun.settled(TrainConfig()).rates == pytest.approx((6e-5, 6e-6))
    assert begun.settled(TrainConfig(learning_rate=2e-4)).rates == pytest.approx((2e-4, 2e-5))
    given = TrainConfig(learning_rate=2e-4, min_learning_rate=0.0)
    assert begun.settled(given).rates == (2e-4, 0.0)
    with pytest.raises(ValueError, match=r"min_learning_rate is 0\.0005, at most learning_rate=6"):
        begun.settled(TrainConfig(min_learning_rate=5e-4))
    assert TrainConfig().rates == (1e-3, 1e-4)
    config = dataclasses.replace(SHORT, steps=3, log_interval=1)
    text = finished[0].parent / "text.txt"
    result = train([text], tmp_path / "run", init=begun, config=config)
    rates = [record["learning_rate"] for record in result.records[1:]]
    assert rates == pytest.approx([2e-5, 4e-5, 6e-5])


# --- shards


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared folder of ids of "gpt2", under which name a small vocabulary goes here."""
    small = tokenizer_files.read(write_files(tmp_path / "small", pairs()))
    monkeypatch.setattr(prepared, "load_tokenizer", lambda name: small)
    (tmp_path / "corpus").mkdir()
    write_shards(tmp_path / "corpus", [list(range(200))] * 3, 1000)
    fields = {"tokenizer": "gpt2", "vocab_size": 260}
    manifests.write(tmp_path / "corpus", manifest_of(tmp_path / "corpus", [[600, 3]], **fields))
    return tmp_path / "corpus"


def test_prepared_ids_are_trained_on_where_they_are_the_models(
    corpus: Path, foreign: Path, tmp_path: Path
) -> None:
    """Those of a named tokenizer whose vocabulary the model's own has."""
    train([corpus], tmp_path / "run", init=foreign, config=dataclasses.replace(SHORT, steps=1))
    assert resume(tmp_path / "run", steps=2).records[-1]["step"] == 2


def test_ids_of_another_tokenizer_are_refused(
    corpus: Path, foreign: Path, nanogpt: Path, finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    moved = {"vocab.json": {**GPT2, "he": GPT2["ll"], "ll": GPT2["he"]}}
    write_files(foreign, {**moved, "config.json": (foreign / "config.json").read_text()})
    sentence = "the tokenizer 'gpt2', whose ids are not those of the model's own tokenizer"
    for source, message in (
        (foreign, sentence),
        (nanogpt, sentence),
        (finished[0], "tokenizer is 'bytes', but .* says 'gpt2'"),
    ):
        with pytest.raises(ValueError, match=message):
            train([corpus], tmp_path / "run", init=source, config=SHORT)
    assert not (tmp_path / "run").exists()


def test_ids_without_a_manifest_are_taken_for_the_models(foreign: Path, tmp_path: Path) -> None:
    ids = [i % 260 for i in range(600)]
    (tmp_path / "a.bin").write_bytes(b"".join(i.to_bytes(2, "little") for i in ids))
    config = dataclasses.replace(SHORT, steps=1)
    result = train([tmp_path / "a.bin"], tmp_path / "run", init=foreign, config=config)
    assert result.records[-1]["step"] == 1


# --- what is refused


def test_a_tokenizer_is_named_only_where_none_is_known_or_it_is_the_same(
    foreign: Path, nanogpt: Path, finished: tuple[Path, TrainResult], text: Path, tmp_path: Path
) -> None:
    named = dataclasses.replace(SHORT, tokenizer="bytes", steps=1)
    for source in (foreign, nanogpt):
        with pytest.raises(ValueError, match=r"tokenizer is 'bytes', but .* has another one"):
            train([text], tmp_path / "run", init=Pretrained.load(source), config=named)
        with pytest.raises(ValueError, match=r"tokenizer is 'bytes', but .* has another one"):
            Pretrained.load(source, "bytes")
    train([text], tmp_path / "same", init=finished[0], config=named)
    (nanogpt.parent / "meta.pkl").unlink()
    with pytest.raises(ValueError, match=r"nothing beside .* name it with --tokenizer"):
        train([text], tmp_path / "run", init=nanogpt, config=SHORT)
    with pytest.raises(ValueError, match="tokenizer: bytes has 256 tokens, more than the model's"):
        train([text], tmp_path / "run", init=nanogpt, config=named)
    assert not (tmp_path / "run").exists()
    unknown = tmp_path / "unknown"
    GPT(TINY).save_pretrained(unknown)
    train([text], tmp_path / "named", init=unknown, config=named)
    assert isinstance(load(tmp_path / "named" / "model", None)[1], ByteTokenizer)


def test_a_models_own_folder_is_not_written_into(foreign: Path, text: Path) -> None:
    before = {path: path.read_bytes() for path in foreign.iterdir()}
    for source in ({"init": foreign}, {"model": TINY}):
        with pytest.raises(ValueError, match=r"out: .*foreign holds a model, name another"):
            train([text], foreign, config=SHORT, **source)
    assert {path: path.read_bytes() for path in foreign.iterdir()} == before


@pytest.mark.parametrize("given", [{}, {"model": TINY, "init": "folder"}])
def test_a_run_begins_with_a_shape_or_with_a_model(
    given: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="model, init: exactly one of the two is wanted"):
        train([text], tmp_path / "run", config=SHORT, **given)
    with pytest.raises(FileNotFoundError, match=r"init: .*nothing does not exist"):
        train([text], tmp_path / "run", init=tmp_path / "nothing", config=SHORT)
    assert not (tmp_path / "run").exists()


def test_a_text_outside_the_models_characters_is_refused(nanogpt: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("XYZ" * 200)
    with pytest.raises(ValueError, match="characters of the vocabulary alone"):
        train([tmp_path / "other.txt"], tmp_path / "run", init=nanogpt, config=SHORT)
    assert isinstance(load(nanogpt, None)[1], CharacterTokenizer)
