"""Training data: text and token shards, the split, epochs of batches, validation windows."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.training import data
from gptkernels.gpt.training import shards as shards_module
from gptkernels.gpt.training.shards import Shards


@given(
    length=st.integers(9, 200),
    block=st.integers(1, 8),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_batches_are_windows_and_their_targets(
    length: int, block: int, batch: int, seed: int
) -> None:
    tokens = torch.arange(length, dtype=torch.int32)
    batches = data.Batches(tokens, block, batch, seed)
    for _ in range(3):
        x, y = next(batches)
        assert x.shape == y.shape == (batch, block)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1)  # consecutive tokens are consecutive numbers here
        assert torch.equal(x - x[:, :1], torch.arange(block).expand(batch, -1))
        assert x.min() >= 0
        assert y.max() < length


@given(
    length=st.integers(9, 120),
    block=st.integers(1, 8),
    batch=st.integers(1, 7),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_every_window_once(length: int, block: int, batch: int, seed: int) -> None:
    one_by_one = data.Batches(torch.arange(length), block, 1, seed)
    firsts = []
    for epoch in range(1, 4):
        drawn = []
        while one_by_one.epochs < epoch:
            drawn.append(int(next(one_by_one)[0][0, 0]))
        offset = min(drawn)
        assert offset < block
        assert sorted(drawn) == list(range(offset, length - block, block))
        firsts += drawn
    together = data.Batches(torch.arange(length), block, batch, seed)  # over the ends of epochs
    seen = [int(first) for _ in range(len(firsts) // batch) for first in next(together)[0][:, 0]]
    assert seen == firsts[: len(seen)]


def test_epochs_differ_in_order_and_offset() -> None:
    batches = data.Batches(torch.arange(1001), block_size=10, batch_size=1, seed=0)
    firsts = []
    while batches.epochs < 4 or len(firsts) < 300:
        firsts.append(int(next(batches)[0][0, 0]))
    assert len({first % 10 for first in firsts}) > 1
    assert firsts[:50] != sorted(firsts[:50])
    assert set(firsts[:90]) != set(firsts[100:190])


@pytest.mark.parametrize("before", [0, 1, 61, 125, 126, 400])
def test_sampler_continues_where_its_state_was_taken(before: int) -> None:
    tokens = torch.arange(1000)
    batches = data.Batches(tokens, 8, 4, seed=1)
    for _ in range(before):
        next(batches)
    state = copy.deepcopy(batches.state_dict())
    epochs = batches.epochs
    wanted = [next(batches)[0] for _ in range(70)]
    other = data.Batches(tokens, 8, 4, seed=99)
    next(other)
    torch.manual_seed(7)
    before_loading = torch.get_rng_state()
    other.load_state_dict(state)
    assert other.epochs == epochs
    assert all(torch.equal(next(other)[0], x) for x in wanted)
    assert torch.equal(before_loading, torch.get_rng_state())  # dropout's generator is left alone


@given(length=st.integers(5, 300), block=st.integers(1, 4), batch=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_validation_windows_never_overlap_and_never_change(
    length: int, block: int, batch: int
) -> None:
    tokens = torch.arange(length)
    once = list(data.validation_batches(tokens, block, batch, 3))
    again = list(data.validation_batches(tokens, block, batch, 3))
    x = torch.cat([pair[0] for pair in once])
    assert torch.equal(x, torch.cat([pair[0] for pair in again]))
    assert len(x) == min(3 * batch, (length - 1) // block)
    assert x.flatten().unique().numel() == x.numel()
    assert all(torch.equal(y, inputs + 1) and y.max() < length for inputs, y in once)


def test_split_is_one_cut_and_reading_joins_files(tmp_path: Path) -> None:
    tokens = torch.arange(100)
    training, validation = data.split(tokens, 0.1, 4)
    assert torch.equal(training, tokens[:90])
    assert torch.equal(validation, tokens[90:])
    (tmp_path / "a").write_bytes("\ufeffé\r\n".encode())  # the byte order mark is left out
    (tmp_path / "b").write_bytes("\ufeffb\ufeff".encode())
    assert data.read_text([tmp_path / "a", tmp_path / "b"]) == "é\r\n\n\nb\ufeff"


def test_text_that_cannot_be_trained_on_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FileNotFoundError, match=r"nothere does not exist"):
        data.read_text([tmp_path / "nothere"])
    with pytest.raises(ValueError, match=r"is a folder"):
        data.read_text([tmp_path])
    with pytest.raises(ValueError, match=r"empty is empty"):
        data.read_text([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"latin is not UTF-8 text \(byte 3"):
        data.read_text([tmp_path / "latin"])
    with pytest.raises(ValueError, match=r"pointer is a Git LFS pointer"):
        data.read_text([tmp_path / "pointer"])
    with pytest.raises(ValueError, match=r"no text file"):
        data.read_text([])
    with pytest.raises(ValueError, match=r"validation part has 10 of .* at least 17"):
        data.split(torch.arange(100), 0.1, 16)
    with pytest.raises(ValueError, match=r"training part has 90 of .* at least 101"):
        data.split(torch.arange(100), 0.1, 100)


# --- token shards


def write_shards(folder: Path, ids: torch.Tensor, sizes: list[int], dtype: str) -> list[Path]:
    kind = {"uint16": torch.uint16, "uint32": torch.uint32}[dtype]
    files = []
    for i, part in enumerate(ids.split(sizes)):
        files.append(folder / f"shard_{i}.bin")
        files[-1].write_bytes(bytes(part.to(kind).view(torch.uint8).tolist()))
    return files


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 2**16 - 1), ("uint32", 2**32 - 1)])
def test_shards_are_one_sequence(tmp_path: Path, dtype: str, largest: int) -> None:
    ids = torch.randint(largest + 1, (50,))
    ids[7], ids[20] = largest, 0
    shards = Shards(write_shards(tmp_path, ids, [20, 1, 29], dtype), dtype, largest + 1)
    assert len(shards) == 50
    assert torch.equal(shards.windows(torch.arange(50 - 5), 6), ids.unfold(0, 6, 1))
    assert torch.equal(shards.windows(torch.tensor([0]), 50)[0], ids)
    training, validation = data.split(shards, 0.2, 4)
    assert (len(training), len(validation)) == (40, 10)
    assert torch.equal(validation.windows(torch.tensor([0]), 10)[0], ids[40:])
    x, y = data.gather(training, torch.tensor([3, 18]), 4)
    assert torch.equal(x, torch.stack([ids[3:7], ids[18:22]]))
    assert torch.equal(y, torch.stack([ids[4:8], ids[19:23]]))


def test_batches_of_shards_are_those_of_the_same_tokens_as_text(tmp_path: Path) -> None:
    text = "It is a truth universally acknowledged. " * 20
    (tmp_path / "a.txt").write_text(text)
    ids = data.tokenize(text, ByteTokenizer())
    files = write_shards(tmp_path, ids, [300, len(ids) - 300], "uint16")
    of_text, _ = data.read([tmp_path / "a.txt"], ByteTokenizer(), "uint16", 256)
    of_shards, _ = data.read(files, ByteTokenizer(), "uint16", 256)
    first, second = (data.Batches(t, 16, 4, seed=3) for t in (of_text, of_shards))
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(next(first), next(second), strict=True))


def test_a_fingerprint_changes_with_the_shards(tmp_path: Path) -> None:
    ids = torch.arange(60)
    files = write_shards(tmp_path, ids, [30, 30], "uint16")
    before = Shards(files, "uint16", 60).digest()
    assert Shards(files, "uint16", 60).digest() == before
    assert Shards(files[::-1], "uint16", 60).digest() != before
    write_shards(tmp_path, ids.flip(0), [30, 30], "uint16")
    assert Shards(files, "uint16", 60).digest() != before


def test_shards_that_cannot_be_read_are_refused_in_one_sentence(tmp_path: Path) -> None:
    files = write_shards(tmp_path, torch.arange(60), [30, 30], "uint16")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "text").write_text("text")
    for name, message in (("empty", "has 0 bytes"), ("odd", "has 3 bytes, a whole number of uint")):
        with pytest.raises(ValueError, match=message):
            Shards([tmp_path / f"{name}.bin"], "uint16", 60)
    with pytest.raises(FileNotFoundError, match=r"nothere\.bin does not exist"):
        Shards([tmp_path / "nothere.bin"], "uint16", 60)
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(ValueError, match=r"folder\.bin is not a file, a token shard is wanted"):
        Shards([tmp_path / "folder.bin"], "uint16", 60)
    with pytest.raises(ValueError, match="do not mix"):
        data.read([*files, tmp_path / "text"], ByteTokenizer(), "uint16", 60)
    shards = Shards(files, "uint16", 59)
    assert shards.windows(torch.tensor([0]), 59).max() == 58
    with pytest.raises(ValueError, match=r"shard_1\.bin holds the id 59, .* vocab_size=59"):
        shards.windows(torch.tensor([0]), 60)


def header(magic: int) -> bytes:
    """256 int32, as llm.c and modded-nanogpt put before their ids."""
    return bytes(torch.tensor([magic, 1, 60] + [0] * 253, dtype=torch.int32).view(torch.uint8))


def as_bytes(ids: torch.Tensor, dtype: torch.dtype) -> bytes:
    return bytes(ids.to(dtype).view(torch.uint8))


IDS = torch.arange(6000) % 50257


@pytest.mark.parametrize(
    ("content", "dtype", "message"),
    [
        (header(20240520) + as_bytes(IDS, torch.int16), "uint16", "header of llm.c and modded-nan"),
        (header(20240801) + as_bytes(IDS, torch.int32), "uint32", "header of llm.c .*1024 bytes$"),
        (as_bytes(IDS, torch.int32), "uint16", "wider than 16 bits"),
        (as_bytes(IDS, torch.int64), "uint16", "wider than 16 bits"),
        (as_bytes(IDS, torch.int64), "uint32", "wider than 32 bits"),
        (as_bytes(IDS, torch.int16), "uint32", r"holds the id \d+, .* as uint32, see token_dtype"),
        (("It is a truth.\r\n" * 50).encode(), "uint16", r"is text, .* such as \.txt"),
        (("\u65e5\u672c\u8a9e" * 64).encode(), "uint16", "is text"),
        (("caf\u00e9 " * 64).encode("latin-1"), "uint16", "is text"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "uint16", "a Git LFS pointer"),
        (b"\x93NUMPY\x01\x00v\x00" + as_bytes(IDS, torch.int16), "uint16", "an array of numpy"),
        (b"\x1f\x8b\x08\x00" + as_bytes(IDS, torch.int16), "uint16", "compressed with gzip"),
    ],
)
def test_what_is_no_shard_is_told_before_any_training(
    tmp_path: Path, content: bytes, dtype: str, message: str
) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.read([tmp_path / "a.bin"], ByteTokenizer(), dtype, 50257)
    assert str(caught.value).count(str(tmp_path / "a.bin")) == 1


def test_a_shard_may_begin_with_any_id(tmp_path: Path) -> None:
    """gzip's first two bytes are GPT-2's id 35615."""
    (tmp_path / "a.bin").write_bytes(b"\x1f\x8b" + as_bytes(IDS[1:], torch.int16))
    data.read([tmp_path / "a.bin"], ByteTokenizer(), "uint16", 50257)


@pytest.mark.parametrize("place", [0, 99_999, 199_999])
@pytest.mark.parametrize(("dtype", "vocab_size"), [("uint16", 40000), ("uint32", 2**31 + 5)])
def test_an_id_past_the_vocabulary_is_found_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, dtype: str, vocab_size: int
) -> None:
    monkeypatch.setattr(shards_module, "_PIECE", 4096)
    ids = torch.randint(vocab_size, (200_000,))
    ids[0] = vocab_size - 1  # the largest that is right
    files = write_shards(tmp_path, ids, [150_000, 50_000], dtype)
    data.read(files, ByteTokenizer(), dtype, vocab_size)
    ids[place] = vocab_size
    write_shards(tmp_path, ids, [150_000, 50_000], dtype)
    with pytest.raises(ValueError, match=rf"shard_\d\.bin holds the id {vocab_size}, but"):
        data.read(files, ByteTokenizer(), dtype, vocab_size)


def test_a_scan_of_large_shards_reads_evenly_spaced_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_PIECE", 1024)
    monkeypatch.setattr(shards_module, "_SCANNED", 4096)
    ids = torch.randint(100, (8192,))  # 16 KiB: every fourth piece of 512 ids is read
    for place, found in ((511, True), (512, False), (2047, False), (2048, True), (8191, False)):
        wrong = ids.clone()
        wrong[place] = 100
        shards = Shards(write_shards(tmp_path, wrong, [8192], "uint16"), "uint16", 100)
        if found:
            with pytest.raises(ValueError, match="holds the id 100"):
                shards.scan()
        else:
            shards.scan()
            with pytest.raises(ValueError, match="holds the id 100"):
                shards.windows(torch.tensor([place - 3]), 4)


@pytest.mark.parametrize("read_before", [False, True])
def test_a_shard_that_goes_or_shrinks_is_noticed(tmp_path: Path, read_before: bool) -> None:
    files = write_shards(tmp_path, torch.arange(60), [30, 30], "uint16")
    shards = Shards(files, "uint16", 60)
    if read_before:
        shards.windows(torch.tensor([40]), 3)
    files[1].write_bytes(b"ab")
    with pytest.raises(ValueError, match=r"shard_1\.bin has changed its size"):
        shards.windows(torch.tensor([40]), 3)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_1\.bin does not exist"):
        shards.windows(torch.tensor([40]), 3)
    assert shards.windows(torch.tensor([0]), 3).tolist() == [[0, 1, 2]]
