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
from gptkernels.gpt.evaluation import asking, folder
from gptkernels.gpt.evaluation.config import RunConfig, TaskConfig
from gptkernels.gpt.evaluation.evaluate import Evaluation, evaluate
from gptkernels.gpt.evaluation.subject import Subject
from gptkernels.gpt.evaluation.task import Task
from gptkernels.gpt.evaluation.template import Template
from gptkernels.gpt.generation.beam import beam_search
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
    shown = [row | {"text": f"shown {row['text']}"} for row in ROWS]
    for name, rows in (("train", shown), ("test", ROWS[:12])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


@torch.inference_mode()
def likelihood(model: GPT, given: str, text: str) -> float:
    """log p(text | given), of whole rows: the definition."""
    tokens = torch.tensor([BYTES.encode(given + text)])
    chances = model(tokens[:, :-1])[0].double().log_softmax(1)
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


def test_a_long_answer_leaves_less_of_the_unconditional_text(subject: Subject, data: Path) -> None:
    labels = {"a": "no", "b": "b" * 60, "c": "yes"}
    task = dataclasses.replace(CHOICE, labels=labels, unconditional="Well, then: So")
    config = TaskConfig(normalise="unconditional", examples=1)
    (outcome,) = evaluate(subject, task, data=data, config=config).outcomes
    (answer,) = outcome.answers
    assert len(answer.prompt.tokens) == 4  # of 64, beside an answer of 61 whose last is not read
    prompt = BYTES.decode(answer.prompt.tokens)
    for score, text in zip(answer.scores, (" no", " " + "b" * 60, " yes"), strict=True):
        truth = likelihood(subject.model, prompt, text) - likelihood(subject.model, ": So", text)
        close([score], [truth])


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


def test_accuracy_chance_majority_and_interval(subject: Subject, data: Path) -> None:
    rows = [*ROWS[:10], ROWS[1], ROWS[4]]  # six of the twelve are "b"
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(subject, CHOICE, data=data)
    (outcome,) = found.outcomes
    right = [
        answer.place == "abc".index(row["right"])
        for answer, row in zip(outcome.answers, rows, strict=True)
    ]
    assert outcome.metrics == {"accuracy": sum(right) / 12}
    assert found.chance == pytest.approx(1 / 3)
    assert found.majority == pytest.approx(5 / 12)
    low, high = outcome.intervals["accuracy"]
    assert 0 <= low <= sum(right) / 12 <= high <= 1


def test_examples_in_prompts_are_of_the_training_part(subject: Subject, data: Path) -> None:
    (outcome,) = evaluate(subject, CHOICE, data=data, config=TaskConfig(shots="2")).outcomes
    for answer in outcome.answers:
        *solved, asked = answer.prompt.text.split("\n")
        assert all(line.startswith("shown ") for line in solved)
        assert not asked.startswith("shown ")
    # One file for both parts: an example is not drawn for itself.
    both = dataclasses.replace(CHOICE, files=dict.fromkeys(("train", "test"), "test.jsonl"))
    (outcome,) = evaluate(subject, both, data=data, config=TaskConfig(shots="3")).outcomes
    for answer in outcome.answers:
        *solved, asked = answer.prompt.text.split("\n")
        assert not any(line.startswith(f"{asked} ") for line in solved)
    with pytest.raises(ValueError, match="12 shots are asked for, but the task choice has 11"):
        evaluate(subject, both, data=data, config=TaskConfig(shots="12"))


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


class Own(ByteTokenizer):
    """Bytes, but for some characters, whose ids are others."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [self.ids.get(character, ord(character)) for character in text]


def test_the_last_word(subject: Subject, data: Path) -> None:
    task = Task("last", "last-word", "lines", {"test": "test.txt"}, Template("{text}"))
    # " xy" is what the model writes behind "tobe".
    start = torch.tensor([BYTES.encode("tobe")])
    written = subject.model.generate(start, 3, temperature=0)[0, 4:].tolist()
    own = dataclasses.replace(subject, tokenizer=Own(dict(zip(" xy", written, strict=True))))
    (data / "test.txt").write_text("tobe xy\ntobe xz\ntobe zy\n", encoding="utf-8")
    found = evaluate(own, task, data=data)
    (outcome,) = found.outcomes
    assert [answer.greedy for answer in outcome.answers] == [True, False, False]
    assert outcome.metrics["accuracy"] == pytest.approx(1 / 3)
    assert found.chance is None
    with torch.inference_mode():
        rows = torch.tensor(
            [own.tokenizer.encode(text) for text in ("tobe xy", "tobe xz", "tobe zy")]
        )
        chances = subject.model(rows[:, :-1]).double().log_softmax(2)
    truth = chances[:, 3:].gather(2, rows[:, 4:, None]).sum((1, 2)).tolist()
    close([answer.scores[0] for answer in outcome.answers], truth)
    assert outcome.metrics["perplexity"] == pytest.approx(math.exp(-sum(truth) / 3), rel=1e-4)
    low, high = outcome.intervals["perplexity"]
    assert low < outcome.metrics["perplexity"] < high


def test_a_last_word_of_no_likelihood_is_no_number(subject: Subject, data: Path) -> None:
    task = Task("last", "last-word", "lines", {"test": "test.txt"}, Template("{text}"))
    (data / "test.txt").write_text("a " + "z" * 60, encoding="utf-8")
    with torch.no_grad():
        subject.model.transformer.ln_f.weight.mul_(1000)
    found = evaluate(subject, task, data=data)
    assert found.outcomes[0].metrics["perplexity"] == math.inf
    folder.write_task(data / "out", found, subject.run, "mine")
    results = json.loads((data / "out" / "results.json").read_text())
    assert results["outcomes"][0]["metrics"] == {"accuracy": 0.0, "perplexity": None}


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


FREE = Task(
    "free", "generation", "jsonl", FILES, Template("{text} ="), references=("right",),
    metrics=("exact", "f1", "bleu"), max_new_tokens=5, separator="\n", stop=("\n", ";"),
)  # fmt: skip


def test_free_answers(subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sacrebleu")
    searched: list[dict[str, object]] = []

    def search(model: GPT, tokens: Sequence[int], most: int, **how: object) -> object:
        searched.append({"tokens": tuple(tokens), "max_new_tokens": most, **how})
        return beam_search(model, tokens, most, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(asking, "beam_search", search)
    config = TaskConfig(shots="1", examples=3, beam_width=3, length_penalty=0.0)
    run = RunConfig(device="cpu")
    found = evaluate(dataclasses.replace(subject, run=run), FREE, data=data, config=config)
    (outcome,) = found.outcomes
    assert set(outcome.metrics) == set(outcome.intervals) == {"exact", "f1", "bleu"}
    assert searched[0] == {
        "tokens": outcome.answers[0].prompt.tokens, "max_new_tokens": 5, "width": 3, "alpha": 0.0,
        "eos": None, "stop": ("\n", ";"), "tokenizer": BYTES, "vocab_size": 256,
    }  # fmt: skip
    searched.clear()
    evaluate(subject, FREE, data=data, config=TaskConfig(examples=1))
    assert (searched[0]["width"], searched[0]["alpha"]) == (4, 0.6)  # Brown et al. 2020, 2.4
    narrow = evaluate(subject, FREE, data=data, config=dataclasses.replace(config, beam_width=1))
    greedy = narrow.outcomes[0].answers
    tokens = subject.model.generate(torch.tensor([greedy[0].prompt.tokens]), 5, temperature=0)
    text = BYTES.decode(tokens[0, -5:].tolist()).partition("\n")[0].partition(";")[0]
    assert greedy[0].text == text.strip()
    folder.write_task(data / "out", narrow, subject.run, "mine")
    results = json.loads((data / "out" / "results.json").read_text())
    assert results["bleu_signature"].startswith("nrefs:1|case:mixed")
    line = json.loads((data / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert line["answer"] == greedy[0].text
    assert line["references"] == [f" {ROWS[line['example']]['right']}"]


@pytest.mark.parametrize(
    ("task", "config", "run", "wrong"),
    [
        (
            CHOICE,
            {"beam_width": 2},
            {},
            "beam_width: task choice is of kind choice, not generation",
        ),
        (CHOICE, {"length_penalty": 0.6}, {}, "length_penalty: task choice is of kind choice"),
        (CHOICE, {"random_answers": True}, {}, "random_answers: a prompt without solved examples"),
        (FREE, {}, {"batch_size": 4}, "batch_size: the free answers of task free are searched"),
        (FREE, {"normalise": "none"}, {}, "normalise: task free is of kind generation"),
    ],
)
def test_settings_that_would_change_nothing(
    subject: Subject,
    data: Path,
    task: Task,
    config: dict[str, object],
    run: dict[str, object],
    wrong: str,
) -> None:
    asked = dataclasses.replace(subject, run=RunConfig(device="cpu", **run))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=wrong):
        evaluate(asked, task, data=data, config=TaskConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "config", "wrong"),
    [
        (CHOICE, {"split": "validation"}, "task choice has no validation part"),
        (CHOICE, {"shots": "31"}, "example 0: 31 shots are asked for"),
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
