"""The command `generate`: what it reads, what it prints, and when."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT
from models import sharpened

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from test_cli import assert_refused

from gptkernels import GPT, GPTConfig
from gptkernels.cli.prompts import Printer
from gptkernels.gpt.generation.engine import Engine, Event, Request
from gptkernels.gpt.tokenizer import ByteTokenizer

GREEDY = ("--temperature", "0", "--max-new-tokens", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny byte-level model in Hugging Face's layout, of printable tokens for the most part."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=32, n_layer=1, n_head=2, n_embd=16))
    sharpened(model, 8.0)
    with torch.no_grad():
        model.transformer.wte.weight[:32] = 0
        model.transformer.wte.weight[127:] = 0
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, tokenizer="bytes")
    return folder


def program(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "gptkernels", "generate", str(folder), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def objects(result: Any) -> list[dict[str, Any]]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_generate_is_greedy_and_repeatable(call: Any, folder: Path) -> None:
    options = ["--prompt", "The ", "--max-new-tokens", "8", "--device", "cpu"]
    greedy = [call("generate", folder, *options, "--temperature", "0") for _ in range(2)]
    assert greedy[0].code == 0
    assert greedy[0].out.startswith("The ")
    assert greedy[0].out == greedy[1].out
    sampled = [call("generate", folder, *options, "--seed", "7", "--top-k", "9") for _ in range(2)]
    assert sampled[0].out == sampled[1].out


def test_several_prompts_and_samples_are_printed_in_their_order(call: Any, folder: Path) -> None:
    """Those that end early too, as text and as JSON, and each as it is alone."""
    prompts = [f"prompt {i}" * (1 + i % 3) for i in range(10)]
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    options = ("--samples", "2", "--seed", "5", "--stop", "e", "--stop", "q", "--device", "cpu")
    options += ("--max-new-tokens", "9")
    rows = objects(call("generate", folder, *flags, *options, "--json", "--logprobs"))
    assert [(row["request"], row["sample"]) for row in rows] == [
        (i, sample) for i in range(10) for sample in range(2)
    ]
    decode = ByteTokenizer().decode
    for row in rows:
        assert row["prompt"] == prompts[row["request"]]
        assert row["seed"] == 5
        whole = decode(row["tokens"])
        assert row["finish_reason"] == ("stop" if "e" in whole or "q" in whole else "length")
        assert row["text"] == whole.split("e")[0].split("q")[0]
        assert len(row["logprobs"]) == len(row["tokens"])
        assert all(logprob <= 0 for logprob in row["logprobs"])
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    text = call("generate", folder, *flags, *options)
    assert text.code == 0
    assert text.out == "---\n".join(f"{row['prompt']}{row['text']}\n" for row in rows)
    alone = objects(call("generate", folder, "--prompt", prompts[7], *options, "--json"))
    for one, row in zip(alone, rows[14:16], strict=True):
        assert one == {name: row[name] for name in one if name != "request"} | {"request": 0}


@pytest.mark.parametrize("as_json", [True, False])
def test_results_wait_for_their_turn(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    printer = Printer(ByteTokenizer(), as_json, False)
    for number in (0, 1):
        printer.expect(number, "a", Request([97], 2, samples=2, seed=0))
    for key in ((1, 1), (0, 1), (1, 0)):
        printer.take(Event(*key, 98, -1.0, f"text {key}", "length"))
    assert capsys.readouterr().out == ""
    printer.take(Event(0, 0, 98, -1.0, "text", None))
    assert capsys.readouterr().out == ("" if as_json else "atext")
    printer.take(Event(0, 0, 98, -1.0, " (0, 0)", "length"))
    out = capsys.readouterr().out
    if as_json:
        texts = [json.loads(line)["text"] for line in out.splitlines()]
    else:
        texts = [line.removeprefix("a") for line in ("atext" + out).splitlines()[::2]]
    assert texts == ["text (0, 0)", "text (0, 1)", "text (1, 0)", "text (1, 1)"]


def test_a_seed_that_was_drawn_is_told(call: Any, folder: Path) -> None:
    options = ("--prompt", "x", "--json", "--device", "cpu", "--max-new-tokens", "30")
    one, other = (objects(call("generate", folder, *options))[0] for _ in range(2))
    assert one["seed"] != other["seed"]
    again = objects(call("generate", folder, *options, "--seed", str(one["seed"])))[0]
    assert again == one


def test_lines_of_standard_input(folder: Path) -> None:
    """Each is answered when it has come, and not only once the input ends."""
    running = program(folder, *GREEDY, "--json", stdin=subprocess.PIPE)
    assert running.stdin is not None
    assert running.stdout is not None
    try:
        rows = []
        for line in ("one", "two \u2603", "three\r"):
            running.stdin.write(f"{line}\n".encode())
            running.stdin.flush()
            rows.append(json.loads(running.stdout.readline()))
        running.stdin.write(b"no end of line")
        running.stdin.close()
        running.stdin = None
        rows += [json.loads(line) for line in running.stdout]
        assert [row["prompt"] for row in rows] == ["one", "two \u2603", "three", "no end of line"]
        assert [row["request"] for row in rows] == [0, 1, 2, 3]
        assert running.wait(60) == 0
    finally:
        running.kill()
        running.communicate()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes bytes the standard input of this process."""

    def give(content: bytes) -> None:
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        monkeypatch.setattr(sys, "stdin", os.fdopen(reading))

    return give


def test_text_streams(
    call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is certain of a text is there long before its end."""
    seen = []
    step = Engine.step

    def spy(self: Engine) -> Any:
        seen.append(capsys.readouterr().out)
        return step(self)

    monkeypatch.setattr(Engine, "step", spy)
    last = call("generate", folder, "--prompt", "One ", *GREEDY, "--max-new-tokens", "40")
    assert seen[0] == ""
    assert seen[1].startswith("One ")
    assert len(seen) == 40
    assert sum(map(bool, seen)) > 20
    assert last.out.endswith("\n")


def test_a_line_that_is_refused_ends_the_rest(call: Any, folder: Path, given: Any) -> None:
    given(b"good\n\nnever read\n")
    result = call("generate", folder, *GREEDY, "--json")
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["good"]
    assert_refused(result, "prompt 1 is empty; it must hold at least one token")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--samples", "0"], "samples"),
        (["--max-new-tokens", "-4"], "max_new_tokens"),
        (["--stop", ""], "stop"),
    ],
)
def test_options_are_checked_before_any_line(
    call: Any, folder: Path, given: Any, options: list[str], name: str
) -> None:
    given(b"")
    assert_refused(call("generate", folder, *options), f"{name} must")


def test_the_capacity_depends_on_no_prompt(
    call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it a GPU's products would round otherwise."""
    seen = set()
    step = Engine.step

    def spy(self: Engine) -> Any:
        seen.add(self._cache.max_tokens)
        return step(self)

    monkeypatch.setattr(Engine, "step", spy)
    assert call("generate", folder, "--prompt", "One", *GREEDY).code == 0
    assert seen == {32}


def test_what_standard_input_may_hold(
    call: Any, folder: Path, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(b"")
    result = call("generate", folder, *GREEDY)
    assert (result.code, result.out, result.err) == (0, "", "")
    for content in (b"\xef\xbb\xbfone\ntwo\n", b"\xef\xbb\xbfone"):  # a byte order mark
        given(content)
        assert objects(call("generate", folder, *GREEDY, "--json"))[0]["prompt"] == "one"
    given(b"\xff\n")
    assert_refused(call("generate", folder, *GREEDY), "encodable as UTF-8")
    monkeypatch.setattr(sys, "stdin", None)
    assert_refused(call("generate", folder, *GREEDY), "--prompt", "standard input")


def test_a_draft_changes_nothing(call: Any, folder: Path) -> None:
    prompts = ("--prompt", "abcabc", "--prompt", "Hello", *GREEDY)
    wanted = call("generate", folder, *prompts, "--slots", "1")
    for draft in ("lookup", folder):
        found = call("generate", folder, *prompts, "--draft", draft)
        assert (found.code, found.out) == (0, wanted.out)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--prompt", ""], "prompt"),
        (["--prompt", "x" * 40], "prompt 0 must fit into block_size=32"),
        (["--prompt", "y", "--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "x", "--min-p", "2"], "min_p"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty"),
        (["--prompt", "x", "--samples", "0"], "samples"),
        (["--prompt", "x", "--slots", "0"], "slots"),
        (["--prompt", "x", "--slots", "8", "--draft", "lookup"], "a draft takes slots=1, got 8"),
        (["--prompt", "x", "--draft", "lookup", "--draft-tokens", "9"], "draft_tokens"),
        (["--prompt", "x", "--draft", "no-such-folder"], "draft: no-such-folder does not exist"),
        (["--prompt", "x", "--stop", ""], "stop"),
        (["--prompt", "x", "--logprobs"], "--json"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-p", "2"], "top_p"),
        (["--prompt", "x", "--top-k", "0"], "top_k"),
        (["--prompt", "x", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["--prompt", "x", "--impl", "cuda"], "impl"),
        (["--prompt", "x", "--tokenizer", "gpt2"], "tokenizer"),
    ],
)
def test_generate_refuses(call: Any, folder: Path, options: list[str], word: str) -> None:
    result = call("generate", folder, "--device", "cpu", "--max-new-tokens", "4", *options)
    assert_refused(result, word)
    assert result.out == ""


def test_slots_are_refused_before_the_model_is_read(call: Any) -> None:
    for more in (["--slots", "3"], ["--slots", "8", "--draft", "lookup"]):
        assert_refused(call("generate", "nowhere", "--prompt", "x", *more), "slots")


def test_any_character_is_printed_on_any_terminal(folder: Path) -> None:
    running = program(
        folder, "--prompt", "snow \u2603", "--max-new-tokens", "0", "--device", "cpu",
        env={"PYTHONUTF8": "1", "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    out, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (0, b"")
    assert out.rstrip() == b"snow ?"


def test_generate_never_leaves_the_tokenizers_vocabulary(call: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = GPT(GPTConfig(vocab_size=5000, block_size=32, n_layer=1, n_head=2, n_embd=16))
    model.save_pretrained(tmp_path, tokenizer="bytes")
    result = call("generate", tmp_path, "--prompt", "x", "--max-new-tokens", "31")
    assert result.code == 0, result.err


def test_generate_from_a_nanogpt_checkpoint(call: Any, tmp_path: Path, folder: Path) -> None:
    model = GPT.from_pretrained(folder)
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")
    arguments = {name: getattr(model.config, name) for name in names}
    content = {"model": model.state_dict(), "model_args": arguments, "iter_num": 1}
    torch.save(content, tmp_path / "ckpt.pt")
    options = ("--prompt", "The ", "--max-new-tokens", "8", "--temperature", "0")
    named = call("generate", tmp_path / "ckpt.pt", *options, "--tokenizer", "bytes")
    assert named.code == 0
    # The characters of meta.pkl, in another order, give other ids and another text.
    characters = [chr(255 - i) for i in range(256)]
    itos, stoi = dict(enumerate(characters)), {x: i for i, x in enumerate(characters)}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": itos, "stoi": stoi}))
    own = objects(call("generate", tmp_path / "ckpt.pt", *options, "--json"))[0]
    assert own["text"] == "".join(itos[i] for i in own["tokens"])
    tokens = torch.tensor([[stoi[x] for x in "The "]])
    assert own["tokens"] == model.generate(tokens, 8, temperature=0)[0, 4:].tolist()


def test_generate_uses_the_folders_own_tokenizer(call: Any, tmp_path: Path, folder: Path) -> None:
    """Not one that has as many ids: here all 256 bytes, in another order."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    model = GPT.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {text: i for i, text in enumerate(alphabet)}
    (tmp_path / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    own = objects(call("generate", tmp_path, "--prompt", "The", *GREEDY, "--json"))[0]
    tokens = torch.tensor([[ids[x] for x in "The"]])
    assert own["tokens"] == model.generate(tokens, 8, temperature=0)[0, 3:].tolist()
    decode = tokenizers.decoders.ByteLevel().decode
    assert own["text"] == decode([alphabet[i] for i in own["tokens"]])


def test_generate_guesses_no_tokenizer(call: Any, tmp_path: Path, folder: Path) -> None:
    GPT.from_pretrained(folder).save_pretrained(tmp_path)
    refused = call("generate", tmp_path, "--prompt", "x")
    assert_refused(refused, "name it with --tokenizer (perhaps bytes)")
    assert call("generate", tmp_path, "--prompt", "x", "--tokenizer", "bytes").code == 0


def test_generate_refuses_what_is_no_model(call: Any, tmp_path: Path, folder: Path) -> None:
    assert_refused(call("generate", tmp_path / "absent", "--prompt", "x"), "absent")
    (tmp_path / "empty").mkdir()
    assert_refused(call("generate", tmp_path / "empty", "--prompt", "x"), "empty")
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    assert_refused(call("generate", tmp_path / "noise.pt", "--prompt", "x"), "noise.pt")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert_refused(call("generate", folder, "--prompt", "x"), "model.safetensors")
