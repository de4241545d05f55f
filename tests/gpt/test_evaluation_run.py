"""Tasks asked of a model: scores by their definition, each kind, what is counted and written."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from models import shaken

pytest.importorskip("scipy")

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.evaluation import folder
from gptkernels.gpt.evaluation.config import RunConfig, TaskConfig, TextConfig
from gptkernels.gpt.evaluation.evaluate import Evaluation, evaluate
from gptkernels.gpt.evaluation.subject import Subject
from gptkernels.gpt.evaluation.task import Task
from gptkernels.gpt.evaluation.template import Template
from gptkernels.gpt.evaluation.texts import evaluate_texts, total
from gptkernels.gpt.tokenizer import ByteTokenizer

SHAPE = GPTConfig(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=16)
BYTES = ByteTokenizer()
FILES = {"train": "train.jsonl", "test": "test.jsonl"}
CHOICE = Task(
    "choice", "choice", "jsonl", FILES, Template("{text}"), label="right",
    labels={"a": "no", "b": "certainly", "c": "perhaps"}, separator="\n", unconditional="So",
)  # fmt: skip
ROWS = [{"text": f"{i} and {i * i % 7}", "right": "abc"[i % 3]} for i in range(30)]


@pytest.fixture
def subject() -> Subject:
    """Whose probabilities depend on all that it has read."""
    torch.manual_seed(0)
    return Subject(shaken(GPT(SHAPE), 0.3).eval(), BYTES, RunConfig(device="cpu"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, rows in (("train", ROWS), ("test", ROWS[:12])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


@torch.inference_mode()
def likelihood(model: GPT, given: str, text: str) -> float:
    """log p(text | given), of whole rows: the definition."""
    tokens = torch.tensor([BYTES.encode(given + text)])
    chances = model(tokens)[0].double().log_softmax(1)
    start = len(BYTES.encode(given))
    return sum(chances[i - 1, tokens[0, i]].item() for i in range(start, tokens.shape[1]))


def close(ours: Sequence[float], truth: Sequence[float]) -> None:
    torch.testing.assert_close(
        torch.tensor(ours, dtype=torch.float64),
        torch.tensor(truth, dtype=torch.float64),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("how", ["none", "tokens", "unconditional"])
@pytest.mark.parametrize("shots", ["0", "2"])
def test_scores_are_by_their_definition(subject: Subject, data: Path, how: str, shots: str) -> None:
    config = TaskConfig(shots=shots, normalise=how, examples=6)
    (outcome,) = evaluate(subject, CHOICE, data=data, config=config).outcomes
    answers = [" no", " certainly", " perhaps"]
    for answer in outcome.answers:
        truth = [likelihood(subject.model, answer.prompt.text, text) for text in answers]
        if how == "tokens":  # of which each byte is one
            truth = [value / len(text) for value, text in zip(truth, answers, strict=True)]
        if how == "unconditional":
            alone = [likelihood(subject.model, "So", text) for text in answers]
            truth = [a - b for a, b in zip(truth, alone, strict=True)]
        close(answer.scores, truth)
        assert answer.text == answers[truth.index(max(truth))]


class TwoBytes(ByteTokenizer):
    """Tokens that are not characters: pairs of them, so a count of one is not that of the other."""

    vocab_size = 256

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        raw = text.encode()
        return [raw[i] ^ (raw[i + 1] if i + 1 < len(raw) else 0) for i in range(0, len(raw), 2)]

    def decode(self, ids: object) -> str:
        return "?"


def test_length_is_counted_in_tokens(subject: Subject, data: Path) -> None:
    """Brown et al. 2020, section 2.4: "normalize for length" by "the per-token likelihood"."""
    pairs = dataclasses.replace(subject, tokenizer=TwoBytes())
    found = {
        how: evaluate(pairs, CHOICE, data=data, config=TaskConfig(normalise=how)).outcomes[0]
        for how in ("none", "tokens")
    }
    for whole, each in zip(found["none"].answers, found["tokens"].answers, strict=True):
        counts = [len(answer) for answer in whole.prompt.answers]
        assert counts == [2, 5, 4]  # of 3, 10 and 8 characters
        scores = [total / n for total, n in zip(whole.scores, counts, strict=True)]
        close(each.scores, scores)


def test_accuracy_chance_and_interval(subject: Subject, data: Path) -> None:
    (outcome,) = evaluate(subject, CHOICE, data=data).outcomes
    right = [
        answer.place == "abc".index(row["right"])
        for answer, row in zip(outcome.answers, ROWS[:12], strict=True)
    ]
    assert outcome.metrics == {"accuracy": sum(right) / 12}
    assert outcome.chance == pytest.approx(1 / 3)
    low, high = outcome.intervals["accuracy"]
    assert 0 <= low <= sum(right) / 12 <= high <= 1


def test_a_prompt_is_computed_once_for_all_its_candidates(
    subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []  # tokens that the model's body has read
    forward = subject.model.transformer.forward

    def counting(tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        read.append(tokens.numel())
        return forward(tokens, *rest)

    monkeypatch.setattr(subject.model.transformer, "forward", counting)
    (outcome,) = evaluate(subject, CHOICE, data=data, config=TaskConfig(shots="1")).outcomes
    prompts = [len(answer.prompt.tokens) for answer in outcome.answers]
    assert outcome.counts.prefixes == 12
    assert outcome.counts.prefix_tokens == sum(prompts)
    assert outcome.counts.reused_tokens == 2 * sum(prompts)
    # The candidates in one padded batch, without each one's last token: 3 rows of 9.
    assert sum(read) == sum(prompts) + 12 * 3 * 9


def test_several_numbers_of_shots_and_the_control(subject: Subject, data: Path) -> None:
    found = evaluate(subject, CHOICE, data=data, config=TaskConfig(shots="2,0,1"))
    assert [outcome.shots for outcome in found.outcomes] == [0, 1, 2]
    again = evaluate(subject, CHOICE, data=data, config=TaskConfig(shots="2"))
    assert again.outcomes[0].answers == found.outcomes[2].answers
    control = evaluate(
        subject, CHOICE, data=data, config=TaskConfig(shots="2", random_answers=True)
    )
    assert control.outcomes[0].answers != again.outcomes[0].answers
    other = evaluate(subject, CHOICE, data=data, config=TaskConfig(shots="2", seed=5))
    assert other.outcomes[0].answers != again.outcomes[0].answers


def test_fewer_shots_and_cut_questions_are_counted(subject: Subject, data: Path) -> None:
    (outcome,) = evaluate(subject, CHOICE, data=data, config=TaskConfig(shots="8")).outcomes
    assert outcome.fewer == 12
    assert outcome.cut == 0
    assert all(0 < answer.prompt.shots < 8 for answer in outcome.answers)
    long = {"text": "long " * 20, "right": "a"}
    (data / "test.jsonl").write_text(json.dumps(long) + "\n")
    (outcome,) = evaluate(subject, CHOICE, data=data).outcomes
    assert (outcome.cut, len(outcome.answers[0].prompt.tokens)) == (1, 64 - 9)


def test_the_last_word(subject: Subject, data: Path) -> None:
    task = Task("last", "last-word", "lines", {"test": "test.txt"}, Template("{text}"))
    # The model's own next bytes as the word of every second text.
    start = "to be"
    byte = int(subject.model(torch.tensor([BYTES.encode(start + " ")]))[0, -1].argmax())
    space = int(subject.model(torch.tensor([BYTES.encode(start)]))[0, -1].argmax())
    texts = [f"{start} {chr(byte)}", f"{start} z{chr(byte)}"]
    (data / "test.txt").write_text("\n".join(texts), encoding="latin-1")
    if byte > 127:
        pytest.skip("the model's next byte is no character")
    (outcome,) = evaluate(subject, task, data=data).outcomes
    greedy = [answer.greedy for answer in outcome.answers]
    assert greedy == [space == ord(" "), False]
    truth = [likelihood(subject.model, start, text.removeprefix(start)) for text in texts]
    close([answer.scores[0] for answer in outcome.answers], truth)
    assert outcome.metrics["perplexity"] == pytest.approx(math.exp(-sum(truth) / 2), rel=1e-4)
    low, high = outcome.intervals["perplexity"]
    assert low < outcome.metrics["perplexity"] < high
    assert outcome.chance is None


def test_a_cloze_weighs_the_rest_of_the_sentence(subject: Subject, data: Path) -> None:
    task = Task(
        "cloze", "cloze", "jsonl", FILES, Template("{text}"), blank="__", label="right",
        choices=("words",),
    )  # fmt: skip
    row = {"text": "The __ sat down.", "words": ["cat", "table", "sun"], "right": "cat"}
    (data / "test.jsonl").write_text(json.dumps(row) + "\n")
    (outcome,) = evaluate(subject, task, data=data).outcomes
    rest = [f" {word} sat down." for word in row["words"]]
    close(outcome.answers[0].scores, [likelihood(subject.model, "The", text) for text in rest])


def test_free_answers(subject: Subject, data: Path) -> None:
    pytest.importorskip("sacrebleu")
    task = Task(
        "free", "generation", "jsonl", FILES, Template("{text} ="), references=("right",),
        metrics=("exact", "f1", "bleu"), max_new_tokens=5, separator="\n",
    )  # fmt: skip
    config = TaskConfig(shots="1", examples=3, beam_width=3)
    (outcome,) = evaluate(subject, task, data=data, config=config).outcomes
    assert set(outcome.metrics) == set(outcome.intervals) == {"exact", "f1", "bleu"}
    narrow = evaluate(subject, task, data=data, config=dataclasses.replace(config, beam_width=1))
    greedy = narrow.outcomes[0].answers
    for wide, one in zip(outcome.answers, greedy, strict=True):
        assert wide.prompt == one.prompt
        assert wide.scores[0] >= one.scores[0]
    tokens = subject.model.generate(torch.tensor([greedy[0].prompt.tokens]), 5, temperature=0)
    text = BYTES.decode(tokens[0, -5:].tolist()).partition("\n")[0]
    assert greedy[0].text == text.strip()
    folder.write_task(data / "out", narrow, subject.run, "mine")
    results = json.loads((data / "out" / "results.json").read_text())
    assert results["bleu_signature"].startswith("nrefs:1|case:mixed")
    line = json.loads((data / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert line["answer"] == greedy[0].text
    assert line["references"] == [f" {ROWS[line['example']]['right']}"]


@pytest.mark.parametrize(
    ("task", "config", "wrong"),
    [
        (CHOICE, {"split": "validation"}, "task choice has no validation part"),
        (CHOICE, {"shots": "31"}, "shots: 31 examples are asked for"),
        (
            dataclasses.replace(CHOICE, unconditional=""),
            {"normalise": "unconditional"},
            "normalise: task choice names no unconditional text",
        ),
        (
            dataclasses.replace(CHOICE, files={"test": "test.jsonl"}),
            {"shots": "1"},
            "shots: task choice has neither a train nor a validation part",
        ),
    ],
)
def test_what_cannot_be_asked(
    subject: Subject, data: Path, task: Task, config: dict[str, object], wrong: str
) -> None:
    with pytest.raises(ValueError, match=wrong):
        evaluate(subject, task, data=data, config=TaskConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize("shots", ["", "x", "1,", "-1", "1.5"])
def test_shots_are_numbers(shots: str) -> None:
    with pytest.raises(ValueError, match=r"shots is .*, a number, or several such as 0,1,4"):
        TaskConfig(shots=shots)
    assert TaskConfig(shots="4, 0,4").counts == (0, 4)


def test_what_is_written(subject: Subject, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found: Evaluation = evaluate(subject, CHOICE, data=data, config=TaskConfig(shots="0,1"))
    folder.write_task(tmp_path / "out", found, subject.run, "mine")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 24
    line = json.loads(lines[13])
    assert line["shots"] == 1
    assert line["example"] == 1
    assert line["right"] == 1
    assert line["prompt"].endswith("\n1 and 1")
    assert len(line["scores"]) == 3
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [outcome["shots"] for outcome in results["outcomes"]] == [0, 1]
    assert results["outcomes"][1]["metrics"] == found.outcomes[1].metrics
    assert (tmp_path / "out" / "shots.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="already holds an evaluation"):
        folder.check_new(tmp_path / "out")


def test_texts_add_up(subject: Subject, tmp_path: Path) -> None:
    pages = ["It rains . " * 30, " The sun @-@ warmed stone . \n" * 12]
    files = []
    for place, page in enumerate(pages):
        files.append(tmp_path / f"{place}.txt")
        files[-1].write_text(page, encoding="utf-8")
    seen: list[float] = []
    found = evaluate_texts(
        subject, files, config=TextConfig(stride=16), observer=lambda _, done: seen.append(done)
    )
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)
    nats = sum(text.perplexity.nats for text in found)
    assert total(found).nats == pytest.approx(nats)
    assert total(found).bytes == sum(map(len, pages))
    plain = evaluate_texts(subject, files, config=TextConfig(stride=16, detokenizer="wikitext"))
    # Fewer tokens are predicted; the bytes and words that count stay the data set's.
    assert total(plain).tokens < total(found).tokens
    assert total(plain).bytes == total(found).bytes
    assert total(plain).words == total(found).words
