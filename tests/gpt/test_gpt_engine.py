"""The engine: streams of events, the same bits in any batch, stop strings, slots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from begun import Begun
from hypothesis import given
from hypothesis import strategies as st
from models import sharpened
from torch.utils._python_dispatch import TorchDispatchMode

from gptkernels import GPT, GPTConfig
from gptkernels.core.choice import automatic
from gptkernels.gpt.generation.engine import Engine, Event, Request
from gptkernels.gpt.generation.generate import stream
from gptkernels.gpt.generation.sampling import Sampling
from gptkernels.gpt.generation.text import TextStream
from gptkernels.gpt.tokenizer import ByteTokenizer, load_tokenizer

CONTEXT = 16


@pytest.fixture(scope="module")
def model() -> GPT:
    """Of bytes, with widths and slots that begin at no multiple of 64 bytes."""
    torch.manual_seed(0)
    config = GPTConfig(256, CONTEXT - 1, n_layer=2, n_head=3, n_embd=24, n_inner=50, window=5)
    return sharpened(GPT(config).eval(), 6.0)


def mixed(count: int) -> list[Request]:
    """Prompts, settings, lengths and seeds of all kinds."""
    generator = torch.Generator().manual_seed(1)
    kinds = [
        Sampling(),
        Sampling(temperature=0),
        Sampling(temperature=0.7, top_k=9),
        Sampling(top_p=0.8, repetition_penalty=1.3),
        Sampling(temperature=2.0, top_k=50, top_p=0.9, min_p=0.02),
    ]
    return [
        Request(
            torch.randint(256, (1 + i % (CONTEXT - 1),), generator=generator).tolist(),
            max_new_tokens=(5, 20, 0, 1)[i % 4],
            sampling=kinds[i % 5],
            seed=i // 2,
            eos=(None, 101)[i % 2],
        )
        for i in range(count)
    ]


def results(model: GPT, requests: Iterable[Request], **options: Any) -> dict[Any, list[Any]]:
    """For each request and sample its tokens, log-probabilities (bit for bit) and end."""
    got: dict[Any, list[Any]] = {}
    for event in stream(model, requests, **options):
        got.setdefault((event.request, event.sample), []).append(
            (event.token, event.logprob, event.text, event.finish_reason)
        )
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_request_gives_the_same_bits_alone_and_in_a_batch_of_64(
    model: GPT, dtype: torch.dtype
) -> None:
    """In any order, and so in any slot and beside any others."""
    model = sharpened(GPT(model.config).eval(), 6.0).to(dtype)
    count = 64 if dtype == torch.float32 else 16
    requests = mixed(count)
    whole = results(model, requests)
    assert len(whole) == count
    order = torch.randperm(count).tolist()
    other = results(model, [requests[i] for i in order])
    for place, i in enumerate(order):
        assert other[place, 0] == whole[i, 0]
    for i in (1, 3, 13):
        assert results(model, [requests[i]])[0, 0] == whole[i, 0]
    beside = [Request(torch.randint(256, (3,)).tolist(), 30, seed=9) for _ in range(7)]
    assert results(model, [*beside, requests[13]])[7, 0] == whole[13, 0]  # in the last slot


def test_samples_share_one_prefill(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(b"a prompt")
    begun = []
    forward = GPT.hidden_states

    def spy(self: GPT, tokens: Any, **options: Any) -> Any:
        if options.get("slot") is not None:
            begun.append(tokens.shape[1])
        return forward(self, tokens, **options)

    monkeypatch.setattr(GPT, "hidden_states", spy)
    all_of = results(model, [Request(prompt, 7, samples=11, seed=3), Request([1], 2)])
    assert begun == [8, 1]
    assert len({tuple(token for token, *_ in all_of[0, sample]) for sample in range(11)}) > 5
    for sample in range(11):
        alone = Request(prompt, 7, first_sample=sample, seed=3)
        assert results(model, [alone])[0, sample] == all_of[0, sample]


def test_the_memory_of_the_cache_never_changes(model: GPT) -> None:
    engine = Engine(model)

    def places() -> list[int]:
        caches = (engine._cache, engine._prompt)
        pairs = [pair for cache in caches for pair in cache._buffers]
        tensors = [t for pair in pairs for t in pair] + [cache.lengths for cache in caches]
        return [tensor.data_ptr() for tensor in tensors]

    first = places()
    for request in mixed(24):
        engine.submit(request)
    while engine.busy:
        engine.step()
        assert places() == first


def test_a_step_makes_no_indices_a_layer(model: GPT) -> None:
    class Arange(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.count += func.overloadpacket is torch.ops.aten.arange
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (1, 5):
        engine = Engine(GPT(dataclasses.replace(model.config, n_layer=layers)))
        engine.submit(Request([1, 2], 3))
        engine.step()
        with Arange() as mode:
            engine.step()
        counts.append(mode.count)
    assert counts[0] == counts[1] > 0


def test_max_tokens_is_counted_from_one(model: GPT) -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        Engine(model, max_tokens=0)
    for slots in (3, 12):  # a number that is no multiple of 8 is not rounded in silence
        with pytest.raises(ValueError, match=f"slots must be 1 or a multiple of 8, got {slots}"):
            Engine(model, slots=slots)


def test_requests_are_taken_when_slots_are_free(model: GPT) -> None:
    taken = []

    def source() -> Iterable[Request]:
        for i in range(11):
            taken.append(i)
            yield Request([i], 3, seed=i)

    seen = [(event.request, len(taken)) for event in stream(model, source(), slots=8)]
    assert seen[0] == (0, 8)
    assert {request for request, _ in seen} == set(range(11))
    assert all(count <= request + 8 for request, count in seen)


def test_a_prompt_may_come_while_others_run(model: GPT) -> None:
    engine = Engine(model)
    assert not engine.busy
    assert engine.hungry
    engine.submit(Request([1, 2], 9, seed=1))
    early = [event for _ in range(4) for event in engine.step()]
    assert len(early) == 4
    number = engine.submit(Request([3], 2, seed=1))
    late = []
    while engine.busy:
        late += engine.step()
    assert [e.finish_reason for e in late if e.request == number] == [None, "length"]
    assert len([e for e in late if e.request == 0]) == 5


def test_one_slot_gives_the_same_bits_too(model: GPT) -> None:
    requests = mixed(12)
    whole = results(model, requests, slots=1)
    backwards = results(model, requests[::-1], slots=1)
    assert {11 - i: events for (i, _), events in backwards.items()} == {
        i: events for (i, _), events in whole.items()
    }
    assert results(model, requests[5:6], slots=1)[0, 0] == whole[5, 0]


@pytest.mark.skipif(automatic("cpu") != "cpu", reason="'auto' takes no CPU kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cpu_kernels_give_the_same_bits_for_1_8_and_16_slots(
    model: GPT, dtype: torch.dtype
) -> None:
    model = sharpened(GPT(model.config).eval(), 6.0).to(dtype)
    requests = mixed(20)
    wanted = results(model, requests, slots=1)
    for slots in (8, 16):
        assert results(model, requests, slots=slots) == wanted


# Text


def given_out(prompt: list[int], tokens: list[int], stop: tuple[str, ...] = ()) -> str:
    text = TextStream(ByteTokenizer(), prompt, stop)
    out = ""
    for token in tokens:
        new = text.push(token)
        out += new
        if text.stopped:
            return out
    return out + text.end()


@given(
    prompt=st.lists(st.integers(0, 255), max_size=3) | st.text(max_size=3).map(str.encode),
    tokens=st.lists(st.integers(0, 255), max_size=12) | st.text(max_size=8).map(str.encode),
)
def test_pieces_of_text_are_the_text(prompt: Any, tokens: Any) -> None:
    prompt, tokens = list(prompt), list(tokens)
    decode = ByteTokenizer().decode
    before = decode(prompt)
    if before.encode() != bytes(prompt):
        before = before.removesuffix("\ufffd")
    assert before + given_out(prompt, tokens) == decode(prompt + tokens)


def test_a_prompt_that_ends_in_a_replacement_character() -> None:
    """It is no unfinished character."""
    for prompt in ("ab\ufffd", "\ufffd", "\ufffd\ufffd"):
        assert given_out(list(prompt.encode()), list(b"cd")) == "cd"
    snow = list("\u2603".encode())
    assert given_out(list("a\ufffd".encode()), snow) == "\u2603"
    assert given_out(list("a\ufffd".encode()) + snow[:2], snow[2:]) == "\u2603"


def test_a_prompt_with_its_beginning_is_recognised() -> None:
    """Its text has that beginning already, and so does not get another one."""
    stream = TextStream(Begun(), Begun().encode("a\ufffd"), ())
    assert stream.push(ord("b")) == "b"


def test_no_token_is_decoded_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is behind it, and whether or not a character is ever finished."""
    decode, sizes = ByteTokenizer.decode, []

    def spy(self: ByteTokenizer, ids: Any) -> str:
        sizes.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(ByteTokenizer, "decode", spy)
    for tokens in ([0x80] * 50, [0xF0] * 50, list("\U0001f600".encode()) * 12, [97] * 50):
        sizes.clear()
        text = given_out([97] * 100, tokens, stop=("zz",))
        assert len(sizes) <= 2 * len(tokens) + 2
        assert max(sizes) <= 5
        assert text == bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("name", ["gpt1", "gpt2"])
def test_pieces_of_text_of_other_tokenizers(name: str) -> None:
    try:
        tokenizer = load_tokenizer(name)
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))
    for _ in range(20):
        ids = torch.randint(tokenizer.vocab_size, (12,)).tolist()
        text = TextStream(tokenizer, ids[:4], ())
        out = tokenizer.decode(ids[:4]).removesuffix("\ufffd")
        for token in ids[4:]:
            out += text.push(token)
            assert tokenizer.decode(ids).startswith(out)
        assert out + text.end() == tokenizer.decode(ids)


@given(
    text=st.text("abc", max_size=14),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """As if every stop string were looked for behind each character."""
    expected = text
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            expected = text[: end - max(map(len, found))]
            break
    stream = TextStream(ByteTokenizer(), [120], tuple(stop))
    out = ""
    for token in text.encode():
        out += stream.push(token)
        assert expected.startswith(out)
        if stream.stopped:
            break
    else:
        out += stream.end()
    assert out == expected
    assert stream.stopped == (expected != text or any(map(text.endswith, stop)))


@dataclasses.dataclass
class Chunks:
    """Tokens of several characters, in which a stop string may begin, end, or both."""

    pieces: tuple[str, ...]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("pieces", "stop", "out"),
    [
        (("one END two", " rest"), ("END",), ["one "]),
        (("one E", "N", "D two"), ("END",), ["one ", "", ""]),
        (("one E", "N", "E"), ("END",), ["one ", "", "EN", "E"]),
        (("aXb", "Yc"), ("Y", "X"), ["a"]),
        (("abc", "d"), ("bc", "abcd"), ["a"]),
        (("ab", "cd"), ("cd", "bcd"), ["a", ""]),
    ],
)
def test_stop_strings_across_tokens(
    pieces: tuple[str, ...], stop: tuple[str, ...], out: list[str]
) -> None:
    text: Any = TextStream(Chunks((*pieces, "prompt")), [len(pieces)], stop)
    got = []
    for token in range(len(pieces)):
        got.append(text.push(token))
        if text.stopped:
            break
    else:
        got.append(text.end())
    assert got == out


def test_stops_end_texts_of_the_engine(model: GPT) -> None:
    tokenizer = ByteTokenizer()
    wanted = Request([70], 40, Sampling(top_k=3), samples=4, seed=2)
    free = results(model, [wanted], tokenizer=tokenizer)
    for sample in range(4):
        tokens = [token for token, *_ in free[0, sample]]
        text = "".join(piece for _, _, piece, _ in free[0, sample])
        assert text == tokenizer.decode([70, *tokens])[1:]
        assert [end for *_, end in free[0, sample]] == [None] * 39 + ["length"]
        stop = text[11:14]
        one = dataclasses.replace(wanted, stop=[stop], samples=1, first_sample=sample)
        got = results(model, [one], tokenizer=tokenizer)[0, sample]
        assert "".join(piece for _, _, piece, _ in got) == text[: text.find(stop)]
        assert got[-1][3] == "stop"
        assert [token for token, *_ in got] == tokens[: len(got)]  # the stop string's included
        eos = tokens[7]
        one = dataclasses.replace(one, stop=[], eos=eos)
        got = results(model, [one], tokenizer=tokenizer)[0, sample]
        end = tokens.index(eos)
        assert [token for token, *_ in got] == tokens[: end + 1]
        assert "".join(piece for _, _, piece, _ in got) == tokenizer.decode(tokens[:end])
        assert got[-1][3] == "eos"


# What is refused


def test_logits_of_nan_are_one_sentence(model: GPT) -> None:
    for value, where in ((math.nan, 0), (math.inf, 3)):
        broken = GPT(model.config).eval()
        with torch.no_grad():
            broken.transformer.wte.weight[where] = value
        message = "the model's logits hold NaN or infinity behind 2 tokens of prompt 0: its weights"
        for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_p=0.5, top_k=4)):
            with pytest.raises(RuntimeError, match=message):
                list(stream(broken, [Request([1, 2], 4, sampling)]))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tokens": []}, ValueError, "prompt 0 is empty; it must hold at least one token"),
        ({"tokens": [1] * 16}, ValueError, "prompt 0 must fit into block_size=15, got 16 tokens"),
        ({"tokens": [256]}, ValueError, r"tokens must lie in 0\.\.\.255"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"first_sample": -1}, ValueError, "first_sample must be at least 0, got -1"),
        ({"stop": "x"}, TypeError, "stop must be a sequence of str, got 'x'"),
        ({"stop": [1]}, TypeError, r"stop must be a sequence of str, got \[1\]"),
        ({"stop": None}, TypeError, "stop must be a sequence of str, got None"),
        ({"stop": 5}, TypeError, "stop must be a sequence of str, got 5"),
        ({"tokens": [True, 2]}, TypeError, r"tokens must be a sequence of int, got \[True, 2\]"),
        ({"tokens": "abc"}, TypeError, "tokens must be a sequence of int, got 'abc'"),
        ({"tokens": torch.tensor([1, 2])}, TypeError, r"tokens must be a sequence of int, got ten"),
        ({"tokens": 1}, TypeError, "tokens must be a sequence of int, got 1"),
        ({"tokens": torch.tensor(1)}, TypeError, "tokens must be a sequence of int, got tensor"),
        ({"sampling": None}, TypeError, "sampling must be a Sampling, got None"),
        ({"sampling": {"top_k": 1}}, TypeError, "sampling must be a Sampling, got {'top_k': 1}"),
        ({"stop": ["a", ""]}, ValueError, "stop must hold no empty string"),
        ({"stop": ["a"]}, ValueError, "stop strings need a tokenizer, got none"),
        ({"seed": "1"}, TypeError, "seed must be an int, got '1'"),
        ({"eos": 256}, ValueError, r"eos must lie in 0\.\.\.255 or be None, got 256"),
    ],
)
def test_requests_are_checked(
    model: GPT, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    events: list[Event] = []
    with pytest.raises(error, match=message):
        events += stream(model, [Request(**{"tokens": [1], "max_new_tokens": 3, **fields})])
    assert not events


def test_iterators_are_read_once() -> None:
    request = Request(iter([1, 2]), 3, stop=iter(["a"]))  # type: ignore[arg-type]
    assert (request.tokens, request.stop) == ((1, 2), ("a",))


@pytest.mark.parametrize(("given", "kind"), [([1, 2], "list"), (None, "NoneType")])
def test_what_is_no_request(model: GPT, given: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"request must be a Request, got a {kind}"):
        list(stream(model, [given]))
