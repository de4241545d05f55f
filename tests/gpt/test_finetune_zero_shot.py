"""Zero-shot answers: against a computation of one row at a time, and by a model that knows them."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from begun import START, Begun
from harness import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shaken

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.finetuning import zero_shot
from gptkernels.gpt.finetuning.reading import Example, read_split
from gptkernels.gpt.finetuning.task import Task, ZeroShot, load_task
from gptkernels.gpt.finetuning.zero_shot import guesses, questions
from gptkernels.gpt.tokenizer import ByteTokenizer

SHAPE = GPTConfig(vocab_size=256, block_size=24, n_layer=2, n_head=2, n_embd=16)
BYTES = ByteTokenizer()
FILES = {"train": "train"}
MOOD = Task(
    "mood", "classification", ("accuracy",), "tsv", FILES, texts=("text",),
    labels={"-": "low", "+": "high"}, zero_shot=ZeroShot(" so", (" low", " highest")),
)  # fmt: skip
ENDING = Task(
    "ending", "choice", ("accuracy",), "jsonl", FILES, texts=("text",), choices=("endings",),
    zero_shot=ZeroShot(),
)  # fmt: skip

words = st.text("abcdef ", max_size=30).map(lambda text: "x" + text)


def model(seed: int) -> GPT:
    """Whose probabilities depend on all that it has read."""
    torch.manual_seed(seed)
    return shaken(GPT(SHAPE), 0.4).set_impl("torch")


@torch.inference_mode()
def one_by_one(network: GPT, task: Task, example: Example) -> list[float]:
    """The answers' scores by their definition: a token at a time, each read with all before it."""
    prompt = task.zero_shot.prompt if task.zero_shot else ""
    answers = [" " + choice for choice in example.choices]
    if not task.choice and task.zero_shot:
        answers = list(task.zero_shot.answers)
    room = SHAPE.block_size - max(map(len, answers))
    text = (example.texts[0].rstrip() + prompt)[-room:]
    scores = []
    for answer in answers:
        total = 0.0
        for end in range(len(answer)):
            logits = network(torch.tensor([BYTES.encode(text + answer[:end])]))[0, -1]
            total += logits.double().log_softmax(0)[ord(answer[end])].item()
        scores.append(total / len(answer) if task.choice else total)
    return scores


def assert_best(network: GPT, task: Task, examples: list[Example], size: int) -> None:
    network.train()  # the guesses leave dropout out by themselves
    network.config = dataclasses.replace(network.config, dropout=0.5)
    found = guesses(network, task, questions(task, examples, BYTES, 24), size, torch.float32)
    assert len(found) == len(examples)
    for guess, example in zip(found, examples, strict=True):
        scores = one_by_one(network, task, example)
        assert scores[guess] > max(scores) - 1e-4, (guess, scores)


@given(seed=st.integers(0, 10**6), texts=st.lists(words, min_size=1, max_size=5))
@settings(max_examples=12)
def test_the_likelier_answer_is_the_guess(seed: int, texts: list[str]) -> None:
    assert_best(model(seed), MOOD, [Example((text,)) for text in texts], 1 + seed % 3)


@given(
    seed=st.integers(0, 10**6),
    asked=st.lists(
        st.tuples(words, st.lists(st.text("abc", min_size=1, max_size=9), min_size=2, max_size=4)),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=12)
def test_of_choices_the_mean_of_a_token_decides(
    seed: int, asked: list[tuple[str, list[str]]]
) -> None:
    examples = [Example((text,), tuple(choices)) for text, choices in asked]
    assert_best(model(seed), ENDING, examples, 1 + seed % 3)


def favouring(letter: str) -> GPT:
    """A model that gives this letter a probability of 0.9 after anything, and all others alike."""
    network = GPT(dataclasses.replace(SHAPE, n_embd=8))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.transformer.ln_f.bias[0] = 1.0
        network.lm_head.weight = torch.nn.Parameter(torch.zeros(256, 8))
        network.lm_head.weight[ord(letter), 0] = 7.7
    return network.set_impl("torch")


def test_choices_are_judged_by_their_mean_and_classes_by_their_sum() -> None:
    network = favouring("a")
    choice = [Example(("x",), ("b", "aaaaab"))]  # the longer one is less likely, its tokens more so
    asked = questions(ENDING, choice, BYTES, 24)
    assert guesses(network, ENDING, asked, 4, torch.float32) == [1]
    task = dataclasses.replace(MOOD, zero_shot=ZeroShot(" so", ("b", "bbaaaaaaaa")))
    asked = questions(task, [Example(("x",))], BYTES, 24)
    assert guesses(network, task, asked, 4, torch.float32) == [0]


def test_a_model_that_has_read_the_answers_knows_them() -> None:
    torch.manual_seed(0)
    network = GPT(dataclasses.replace(SHAPE, n_embd=32)).set_impl("torch")
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)

    def text(high: bool) -> str:
        return draw.choice("abc") + "-+"[high]

    for _ in range(80):
        highs = [draw.random() < 0.5 for _ in range(16)]
        lines = [f"{text(high)} so {'high' if high else 'lows'}" for high in highs]
        tokens = torch.tensor([BYTES.encode(line) for line in lines])
        network(tokens[:, :-1], tokens[:, 1:].contiguous()).backward()
        optimizer.step()
        optimizer.zero_grad()
    task = dataclasses.replace(MOOD, zero_shot=ZeroShot(" so", (" lows", " high")))
    highs = [draw.random() < 0.5 for _ in range(60)]
    asked = questions(task, [Example((text(high) + "  ",)) for high in highs], BYTES, 24)
    found = guesses(network, task, asked, 7, torch.float32)
    assert sum(guess == high for guess, high in zip(found, highs, strict=True)) >= 57


@given(text=words, prompt=st.sampled_from(["", " very", "\n"]))
@settings(max_examples=40)
def test_a_text_loses_its_beginning(text: str, prompt: str) -> None:
    task = dataclasses.replace(MOOD, zero_shot=ZeroShot(prompt, (" low", " highest")))
    (question,) = questions(task, [Example((text,), target=1)], BYTES, 16)
    whole = text.rstrip() + prompt
    kept = whole[-(16 - len(" highest")) :]
    assert [BYTES.decode(row) for row in question.rows] == [kept + " low", kept + " highest"]
    assert question.given == len(kept)
    assert question.cut == (kept != whole)
    assert question.target == 1


@pytest.mark.parametrize(("prompt", "gap"), [("", " "), (" So", " "), ("\n", "")])
def test_a_choice_begins_a_word(prompt: str, gap: str) -> None:
    task = dataclasses.replace(ENDING, zero_shot=ZeroShot(prompt))
    (question,) = questions(task, [Example(("one \n", "two "), ("a", "bc"))], BYTES, 24)
    start = f"one \n\ntwo{prompt}{gap}"
    assert [BYTES.decode(row) for row in question.rows] == [start + "a", start + "bc"]


def test_no_logits_but_those_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    network, rows = model(0), []
    of_head = network.logits
    monkeypatch.setattr(
        network, "logits", lambda hidden: rows.append(len(hidden)) or of_head(hidden)
    )
    asked = questions(MOOD, [Example(("a" * 10,)), Example(("b" * 3,))], BYTES, 24)
    guesses(network, MOOD, asked, 2, torch.float32)
    assert rows == [2 * len(" low highest")]


def test_a_narrow_dtype_is_for_the_body_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seen = model(0), []
    full_logits = zero_shot.full_logits

    def spied(network: GPT, hidden: torch.Tensor) -> torch.Tensor:
        logits = full_logits(network, hidden)
        seen.append((narrow(hidden), logits.dtype, narrow(logits)))
        return logits

    def narrow(values: torch.Tensor) -> bool:
        return torch.equal(values, values.bfloat16().to(values.dtype))

    monkeypatch.setattr(zero_shot, "full_logits", spied)
    asked = questions(MOOD, [Example(("a",))], BYTES, 24)
    guesses(network, MOOD, asked, 2, torch.bfloat16)
    guesses(network, MOOD, asked, 2, torch.float32)
    assert seen == [(True, torch.float32, False), (False, torch.float32, False)]


def test_what_cannot_be_asked_is_refused() -> None:
    plain = dataclasses.replace(MOOD, zero_shot=None)
    with pytest.raises(ValueError, match=r"task mood has no \[zero_shot\]"):
        questions(plain, [Example(("a",))], BYTES, 24)
    with pytest.raises(ValueError, match=r"an answer of 8 tokens leaves no room .* of 8 tokens"):
        questions(MOOD, [Example(("a",))], BYTES, 8)
    with pytest.raises(ValueError, match="the text '  ' or an answer to it has no token"):
        questions(ENDING, [Example(("  ",), ("a", "b"))], BYTES, 24)


@pytest.mark.parametrize(("name", "answers"), [("sst-2", 2), ("mctest", 4)])
def test_the_tasks_of_the_package_can_be_asked(name: str, answers: int) -> None:
    task = load_task(name)
    folder = DATA / task.folder
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: set GPTKERNELS_DATA to a folder that holds it")
    shape = dataclasses.replace(SHAPE, block_size=256)
    asked = questions(task, read_split(task, folder, "test")[:6], BYTES, shape.block_size)
    assert all(len(one.rows) == answers and len(max(one.rows)) <= 256 for one in asked)
    assert any(one.cut for one in asked) == (name == "mctest")
    found = guesses(GPT(shape).set_impl("torch"), task, asked, 2, torch.float32)
    assert all(0 <= guess < answers for guess in found)


def test_an_answer_follows_its_text_without_another_beginning() -> None:
    (asked,) = questions(MOOD, [Example(("x",))], Begun(), 24)
    assert asked.rows == [[START, *b"x so low"], [START, *b"x so highest"]]
