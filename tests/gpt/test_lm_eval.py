"""A GPT in EleutherAI's lm-eval gives the results of lm-eval's own model `hf` for its folder."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import runpy
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import ROOT, command
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shaken

from gptkernels import GPT, GPTConfig
from gptkernels.cli.installed import EXTRAS
from gptkernels.gpt.evaluation.perplexity import Perplexity, perplexity
from gptkernels.gpt.generation.generate import stream
from gptkernels.gpt.generation.request import Event, Request
from gptkernels.gpt.generation.sampling import Sampling

# Read when the packages below are imported: nothing here is fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
for needed in ("safetensors", "tokenizers", "transformers", "lm_eval"):
    pytest.importorskip(needed, reason=f"needs the package {needed}")

import lm_eval.evaluator  # noqa: E402
import lm_eval.tasks  # noqa: E402
import tokenizers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from gptkernels.gpt.evaluation import harness  # noqa: E402
from gptkernels.lm_eval import HarnessModel  # noqa: E402

END = "<|endoftext|>"
FIRST, LAST = "<s>", "</s>"  # of other tokenizers
CONTEXT = 32
CYCLE = "the cat sat on a mat and saw that old dog run far away from its own red house"


def words(count: int, first: int = 0) -> str:
    """So many of the cycle's."""
    return " ".join(itertools.islice(itertools.cycle(CYCLE.split()), first, first + count))


def choices(count: int) -> list[str]:
    """What follows the first `count` words, and other things; one begins another."""
    return [words(1, count), words(3, count), "cat", "far own"][: 2 + count % 3]


# Contexts and texts are short, longer than the model reads, and a few times as long. Some contexts
# are empty, end with spaces or are spaces alone, some continuations are what greedy generation
# writes, and a text holds the end of text itself.
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "documents": [
            {"question": words(count) + " " * (i % 3), "choices": choices(count), "gold": i % 2}
            for i, count in enumerate((3, 60, 9, 5, 20, 4, 7, 28, 6))
        ],
    },
    "pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [
            {"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
        "documents": [
            {"page": page}
            for page in (words(5), words(200, 3), words(33), "the", words(70, 9), f"{END}the end")
        ],
    },
    "starts": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["own", "t on"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "documents": [
            {"text": words(count, count), "answer": "the"} for count in (4, 50, 1, 12, 8, 3)
        ],
    },
    "last": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        "documents": [
            *({"text": words(count), "answer": " " + words(1, count)} for count in (2, 3, 9, 60)),
            *({"text": "", "answer": answer} for answer in (words(2), words(3, 7), f"{END}the")),
        ],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a tiny GPT-2 that has begun to learn the words' order, and its
    tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, FIRST, LAST],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    pairs.train_from_iterator([words(60)], trainer)
    pairs.save(str(folder / "tokenizer.json"))
    tokens = torch.tensor(pairs.encode(words(400)).ids)

    torch.manual_seed(0)
    shape = {"vocab_size": pairs.get_vocab_size(), "block_size": CONTEXT, "dropout": 0.0}
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        batch = tokens[torch.randint(len(tokens) - CONTEXT, (8, 1)) + torch.arange(CONTEXT + 1)]
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the documents and the YAML of each task; JSON is YAML."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(entry) + "\n" for entry in task["documents"]))
        data = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        of_data = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        described = {key: value for key, value in task.items() if key != "documents"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **of_data, **described}))
    return folder


def test_special_tokens_around_a_text_are_those_of_hf(folder: Path, tmp_path: Path) -> None:
    """Of a tokenizer that begins each text with a token."""
    begun = shutil.copytree(folder, tmp_path / "begun")
    pairs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, pairs.token_to_id(END))]
    )
    pairs.save(str(begun / "tokenizer.json"))
    ours, theirs = HarnessModel(str(begun)), get_model("hf")(pretrained=str(begun), device="cpu")
    for text, special in itertools.product((words(3), f"{END}the", ""), (None, True, False)):
        assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)


@pytest.mark.parametrize(("bos", "before"), [(FIRST, FIRST), (None, LAST)])
def test_the_token_before_a_text_is_that_of_hf(
    bos: str | None, before: str, folder: Path, tmp_path: Path
) -> None:
    """The one that begins a text, where there is one, or else the one that ends it."""
    named = shutil.copytree(folder, tmp_path / "named")
    (named / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": LAST}))
    ours = HarnessModel(str(named))
    theirs = get_model("hf")(pretrained=str(named), device="cpu", logits_cache=False)
    assert ours.tok_encode(before) == [ours.prefix_token_id] == [theirs.prefix_token_id]
    assert ours.tok_encode(LAST) == [ours.eot_token_id] == [theirs.eot_token_id]
    assert HarnessModel(str(named), prefix_token_id=5).prefix_token_id == 5
    for kind, texts in (
        ("loglikelihood", ("", " the cat")),
        ("loglikelihood_rolling", (words(9),)),
    ):
        (mine,), (other,) = (
            getattr(model, kind)(asked(kind, texts), disable_tqdm=True) for model in (ours, theirs)
        )
        assert mine == pytest.approx(other, rel=1e-4)


Evaluate = Callable[..., dict[str, Any]]
Results = dict[str, Any]


@pytest.fixture(scope="module")
def evaluate(tasks: Path) -> Evaluate:
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)

    def run(model: str, folder: Path, **arguments: Any) -> Results:
        with pytest.MonkeyPatch.context() as patch:
            # It asks programs of the machine, for two seconds.
            patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
            return lm_eval.evaluator.simple_evaluate(
                model,
                model_args={"pretrained": str(folder), **arguments},
                tasks=list(TASKS),
                task_manager=manager,
                device="cpu",
                batch_size=4,
                bootstrap_iters=0,
            )

    return run


@pytest.fixture(scope="module")
def ours(evaluate: Evaluate, folder: Path) -> Results:
    return evaluate("gptkernels", folder)


@pytest.fixture(scope="module")
def theirs(evaluate: Evaluate, folder: Path) -> Results:
    # Its cache of logits reads the wrong places where a continuation is the end of another one.
    return evaluate("hf", folder, logits_cache=False)


def answers(results: Results, task: str) -> list[Any]:
    """What the model answered to each document."""
    return [sample["resps"] for sample in results["samples"][task]]


@pytest.mark.parametrize("task", TASKS)
def test_metrics_are_those_of_hf(task: str, ours: Results, theirs: Results) -> None:
    mine, other = ours["results"][task], theirs["results"][task]
    assert mine.keys() == other.keys()
    for entry in TASKS[task]["metric_list"]:
        name = f"{entry['metric']},none"
        assert mine[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.parametrize("task", ["choices", "last"])
def test_log_likelihoods_and_greedy_flags_are_those_of_hf(
    task: str, ours: Results, theirs: Results
) -> None:
    flags = []
    for mine, other in zip(answers(ours, task), answers(theirs, task), strict=True):
        for [[total, greedy]], [[wanted, flag]] in zip(mine, other, strict=True):
            assert total == pytest.approx(wanted, rel=1e-4)
            assert greedy is flag
            flags.append(flag)
    assert set(flags) == {True, False}


def test_generated_texts_are_those_of_hf(ours: Results, theirs: Results) -> None:
    print(answers(theirs, "starts"))
    assert answers(ours, "starts") == answers(theirs, "starts")


def test_bits_per_byte_and_word_perplexity_are_those_of_the_command(
    folder: Path, evaluate: Evaluate, ours: Results
) -> None:
    """As the package's own perplexity computes them where windows do not overlap."""
    model = HarnessModel(str(folder))
    found = [
        perplexity(
            model._scorer, model._subject.tokenizer, document["page"], block_size=CONTEXT,
            stride=CONTEXT,
        )
        for document in TASKS["pages"]["documents"]
    ]  # fmt: skip
    whole = functools.reduce(Perplexity.__add__, found)
    results = ours["results"]["pages"]
    assert whole.bits_per_byte == pytest.approx(results["bits_per_byte,none"], rel=1e-4)
    assert whole.per_word == pytest.approx(results["word_perplexity,none"], rel=1e-4)


@pytest.fixture(scope="module")
def model(folder: Path) -> HarnessModel:
    return HarnessModel(str(folder), batch_size=4)


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


TEXTS = st.sampled_from(["", "the ", words(4), words(4, 1), words(40)])
ENDINGS = st.sampled_from([" mat", " mat and", "s", words(6), words(3)])


@given(pairs=st.lists(st.tuples(TEXTS, ENDINGS), min_size=1, max_size=12))
@settings(max_examples=10)
def test_an_answer_depends_on_its_request_alone(
    pairs: list[tuple[str, str]], model: HarnessModel
) -> None:
    together = model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    for pair, (total, greedy) in zip(pairs, together, strict=True):
        ((alone, flag),) = model.loglikelihood(asked("loglikelihood", pair), disable_tqdm=True)
        assert total == pytest.approx(alone, rel=1e-4)
        assert greedy is flag


def test_a_shared_context_is_computed_once(folder: Path) -> None:
    model = HarnessModel(str(folder))
    pairs = [(words(4, first), ending) for ending in (" a", " b", " c") for first in range(5)]
    model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert model._scorer.counts.prefixes == 5


def test_the_longest_come_first(folder: Path) -> None:
    order: list[tuple[str, str]] = []
    model = HarnessModel(str(folder), batch_size=1)
    model.set_cache_hook(
        SimpleNamespace(add_partial=lambda kind, texts, answer: order.append(texts))
    )
    pairs = [(words(count), " cat") for count in (3, 7, 1, 5)]
    model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert order == [pairs[1], pairs[3], pairs[0], pairs[2]]


def test_answers_are_kept_in_the_cache(folder: Path, tmp_path: Path) -> None:
    model = HarnessModel(str(folder))
    settings = {"until": ["cat"], "max_gen_toks": 4}
    requests = {
        "loglikelihood": asked("loglikelihood", ("the", " cat"), ("the cat", " sat")),
        "loglikelihood_rolling": asked("loglikelihood_rolling", (words(50),), (words(2),)),
        "generate_until": asked("generate_until", ("the", settings), (words(9), settings)),
    }
    cache = CachingLM(model, str(tmp_path / "cache.db"))
    kept: dict[str, Any] = {}
    for kind, some in requests.items():
        kept[kind] = getattr(model, kind)(some, disable_tqdm=True)
        assert len(cache.dbdict) == 2 * len(kept)  # each was kept while it was computed
    before = dataclasses.replace(model._scorer.counts)
    for kind, some in requests.items():
        assert getattr(cache, kind)(some) == kept[kind]
    assert model._scorer.counts == before
    cache.dbdict.close()


def written(model: HarnessModel, text: str, **settings: Any) -> str:
    (found,) = model.generate_until(asked("generate_until", (text, settings)), disable_tqdm=True)
    return found


def test_generation_settings_are_honoured(model: HarnessModel) -> None:
    greedy = written(model, "the cat", max_gen_toks=8)

    def sampled(**settings: Any) -> set[str]:
        torch.manual_seed(0)
        return {written(model, "the cat", max_gen_toks=8, **settings) for _ in range(4)}

    assert len(sampled(temperature=2.0)) == 4  # drawn anew each time
    assert sampled(temperature=2.0) == sampled(temperature=2.0) != sampled(temperature=3.0)
    assert sampled(do_sample=True) == sampled(do_sample=True, temperature=1.0) != {greedy}
    assert sampled(temperature=2.0, do_sample=False) == {greedy}
    assert sampled(temperature=2.0, top_p=1e-6) == {greedy}
    assert sampled(temperature=2.0, top_k=1) == {greedy}
    assert greedy.startswith(written(model, "the cat", max_new_tokens=2))
    assert written(model, "the cat", max_gen_toks=8, until=["", greedy[2:]]) == greedy[:2]
    # What is complete first counts, not what begins first, in a single token too.
    first = model._subject.tokenizer.decode(model.tok_encode(greedy)[:1])
    assert len(first) == 4
    assert written(model, "the cat", max_gen_toks=8, until=[first, first[1:3]]) == first[:1]
    assert written(model, "the cat", max_gen_toks=8, num_beams=1) == greedy


def test_samples_are_drawn_from_all_tokens_unless_a_task_says_otherwise(
    model: HarnessModel,
) -> None:
    settings = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 4}
    assert model._continued("the", settings).sampling == Sampling(temperature=0.7)
    assert model._continued("the", settings | {"top_k": 50}).sampling == Sampling(0.7, top_k=50)


@pytest.mark.parametrize("text", [words(40), "the cat", ""])
def test_a_prompt_is_the_end_of_its_text(
    text: str, model: HarnessModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[Request] = []

    def watched(network: GPT, requests: list[Request], **options: Any) -> Iterator[Event]:
        asked_for.extend(requests)
        return stream(network, requests, **options)

    monkeypatch.setattr(harness, "stream", watched)
    written(model, text, max_gen_toks=20)
    (request,) = asked_for
    assert request.tokens == tuple(model.tok_encode(text)[20 - CONTEXT :] or [model.eot_token_id])
    assert (request.eos, request.sampling) == (model.eot_token_id, Sampling(temperature=0.0))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_beams": 4, "seed": 1}, r"do_sample, temperature, top_k, .*, got num_beams, seed$"),
        ({"max_gen_toks": CONTEXT}, r"max_gen_toks must be less than the 32 tokens .*, got 32$"),
        ({}, r"max_gen_toks must be less than the 32 tokens .*, got 256$"),
        ({"max_gen_toks": 4, "do_sample": True, "top_p": 0.0}, r"^top_p must lie above 0"),
    ],
)
def test_other_generation_settings_are_refused(
    settings: dict[str, Any], error: str, model: HarnessModel
) -> None:
    with pytest.raises(ValueError, match=error):
        written(model, "the", **settings)


@pytest.mark.parametrize("ending", [words(60), ""])
def test_a_continuation_that_cannot_be_scored_is_refused(ending: str, model: HarnessModel) -> None:
    with pytest.raises(ValueError, match=r"^a continuation must have 1 to 32 tokens, got \d+$"):
        model.loglikelihood(asked("loglikelihood", ("the", ending)), disable_tqdm=True)


def test_a_model_by_what_it_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = asked("loglikelihood", (words(9), " cat"), (words(9), " run"))
    exact = HarnessModel(str(folder), impl="torch", device="cpu", batch_size="2")
    assert {layer.impl for layer in exact._subject.model.modules() if hasattr(layer, "impl")} == {
        "torch"
    }
    assert (exact.batch_size, exact.device, exact.max_length) == (2, torch.device("cpu"), CONTEXT)
    narrow = HarnessModel(str(folder), dtype="bfloat16")
    rounded = [total for total, _ in narrow.loglikelihood(pairs, disable_tqdm=True)]
    totals = [total for total, _ in exact.loglikelihood(pairs, disable_tqdm=True)]
    assert rounded == pytest.approx(totals, rel=0.05)
    assert rounded != totals

    def watched(*arguments: Any, **options: Any) -> Iterator[Event]:
        for event in stream(*arguments, **options):
            assert torch.is_autocast_enabled(narrow.device.type)
            yield event

    monkeypatch.setattr(harness, "stream", watched)
    assert written(narrow, "the", max_gen_toks=3)


def test_a_model_that_cannot_be_had_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"^batch_size must be an int, got 'auto'$"):
        HarnessModel(str(folder), batch_size="auto")
    with pytest.raises(ValueError, match=r"^device must be auto, cpu, cuda or cuda:N, got 'mps'$"):
        HarnessModel(str(folder), device="mps")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist$"):
        HarnessModel(str(folder / "nowhere"))


def test_a_tokenizer_without_an_end_of_text_needs_a_prefix(tmp_path: Path) -> None:
    # Some ids are the model's alone; they are likely, and never count.
    shape = GPTConfig(vocab_size=264, block_size=8, n_layer=1, n_head=1, n_embd=8, dropout=0.0)
    network = shaken(GPT(shape))
    with torch.no_grad():
        network.transformer.wte.weight[256:] *= 5
    network.save_pretrained(tmp_path, tokenizer="bytes")
    whole = asked("loglikelihood_rolling", (" abc",))
    empty = asked("loglikelihood", ("", " abc"), (" ", "abc"))
    bare = HarnessModel(str(tmp_path), impl="torch")
    assert bare.eot_token_id is None
    for ask in (lambda: bare.loglikelihood_rolling(whole), lambda: bare.loglikelihood(empty)):
        with pytest.raises(ValueError, match=r"name one with prefix_token_id=ID$"):
            ask()
    named = HarnessModel(str(tmp_path), impl="torch", prefix_token_id=10)
    with torch.no_grad():
        logits = network.eval()(torch.tensor([[10, *b" ab"]]))[0, :, :256]
    wanted = logits.log_softmax(1)[range(4), list(b" abc")].sum().item()
    assert named.loglikelihood_rolling(whole, disable_tqdm=True) == [pytest.approx(wanted)]
    for total, _ in named.loglikelihood(empty, disable_tqdm=True):
        assert total == pytest.approx(wanted)
    written(named, "ab", max_gen_toks=6)  # whose tokenizer refuses an id past its own


def test_progress_is_shown_unless_it_is_not_wanted(
    model: HarnessModel, capsys: pytest.CaptureFixture[str]
) -> None:
    likelihoods = asked("loglikelihood", ("the", " a"))
    texts = asked("loglikelihood_rolling", ("a",))
    starts = asked("generate_until", ("the", {"max_gen_toks": 1}))
    for hidden in (True, False):
        model.loglikelihood(likelihoods, disable_tqdm=hidden)
        model.loglikelihood_rolling(texts, disable_tqdm=hidden)
        model.generate_until(starts, disable_tqdm=hidden)
        shown = capsys.readouterr().err
        assert (shown == "") is hidden
    assert shown.count("Running loglikelihood requests: 100%") == 2
    assert shown.count("Running generate_until requests: 100%") == 1


def test_the_command_is_that_of_lm_eval(
    folder: Path, tasks: Path, ours: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It sets this, and reads each of its own 10,000 tasks first.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    line = f"""lm_eval --model gptkernels --model_args pretrained={folder},dtype=float32
        --tasks pages,choices --include_path {tasks} --output_path {tmp_path}/found.json"""
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.warns(RuntimeWarning, match="found in sys.modules"):  # it is imported above
        runpy.run_module("gptkernels.lm_eval", run_name="__main__")
    (file,) = tmp_path.glob("found_*.json")
    results = json.loads(file.read_text())["results"]
    for task in ("pages", "choices"):
        for entry in TASKS[task]["metric_list"]:
            name = f"{entry['metric']},none"
            assert results[task][name] == pytest.approx(ours["results"][task][name])


def test_lm_eval_finds_the_model_by_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    entry = importlib.metadata.EntryPoint(name, value, "lm_eval.models")
    assert entry.load() is get_model("gptkernels") is HarnessModel
    # lm-eval takes a registered class for that of an entry point by this.
    assert value == f"{HarnessModel.__module__}:{HarnessModel.__name__}"


def test_without_lm_eval_its_model_says_what_is_missing() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; import gptkernels, gptkernels.lm_eval"
    done = command(sys.executable, "-c", code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: the model gptkernels of lm-eval needs the package lm-eval: "
        "pip install 'gptkernels[lm-eval]'"
    )
    assert "lm-eval" in EXTRAS
