"""Training: data, schedule, decay groups, accumulation, resume bit for bit, files, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gptkernels.examples.plain_gpt import PlainGPT
from torch import Tensor
from torch.nn import functional as F

from gptkernels import GPT, GPTConfig
from gptkernels.gpt import checkpoint, data
from gptkernels.gpt.throughput import flops_per_token, peak_flops
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.train import (
    DivergedError,
    TrainResult,
    parameter_groups,
    resume,
    train,
)
from gptkernels.gpt.train_config import TrainConfig, learning_rate
from gptkernels.parity import compare

TINY = GPTConfig(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
SHORT = TrainConfig(
    steps=12,
    batch_size=4,
    accumulation=2,
    warmup_steps=3,
    validation_interval=4,
    validation_batches=2,
    checkpoint_interval=6,
    log_interval=2,
    device="cpu",
    impl="torch",
)
# What a run measures with a clock, and therefore never repeats.
CLOCKED = ("seconds", "tokens_per_s", "mfu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It is a truth universally acknowledged, that a man in want.\n" * 60)
    return path


class Interrupted(Exception):
    """Stands for whatever kills a run."""


def interrupt_at(step: int) -> Any:
    def observer(record: dict[str, Any], done: float) -> None:
        if record["step"] == step:
            raise Interrupted

    return observer


def unclocked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in CLOCKED} for record in records]


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- schedule, groups, arithmetic ---------------------------------------------------------------


def test_schedule_warms_up_and_falls_by_half_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.2)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)  # half way down
    assert rates[35] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    # With a time limit the clock takes over where it is ahead of the steps.
    timed = dataclasses.replace(config, minutes=1.0)
    assert learning_rate(timed, 10, seconds=30.0) == pytest.approx(0.6)
    assert learning_rate(timed, 110, seconds=0.0) == pytest.approx(0.2)
    assert learning_rate(timed, 20, seconds=90.0) == pytest.approx(0.2)
    assert learning_rate(dataclasses.replace(config, warmup_steps=0), 0) == 1.0


def test_matrices_decay_biases_and_norms_do_not() -> None:
    model = GPT(TINY)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all("ln_" in names[p] or names[p].endswith("bias") for p in kept["params"])
    assert all(names[p].endswith("weight") and "ln_" not in names[p] for p in decayed["params"])
    everything = decayed["params"] + kept["params"]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


def test_weight_decay_shrinks_matrices_alone() -> None:
    model = GPT(TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_flops_per_token_counts_gpt2_as_the_formula_says() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.named("gpt2"))
    counted = 124_439_808 - 1024 * 768
    assert flops_per_token(model, 12, 768, 1024) == 6 * counted + 12 * 12 * 768 * 1024


def test_cpu_peak_is_measured_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None
    assert peak > 1e6
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA A100-SXM4-80GB", 311.9e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA H100 PCIe", 756.5e12, 51.2e12),
    ],
)
def test_gpu_peak_comes_from_the_data_sheet_or_is_unknown(
    monkeypatch: pytest.MonkeyPatch, name: str, bf16: float | None, fp32: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == pytest.approx(bf16)
    assert peak_flops(torch.device("cuda"), torch.float32) == pytest.approx(fp32)


def test_accumulation_equals_one_big_batch(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of 4 micro-batches of 2, held to the fp64 gradients of a batch of 8."""
    model = dataclasses.replace(TINY, dropout=0.0)
    config = dataclasses.replace(
        SHORT, steps=1, batch_size=2, accumulation=4, clip=0.0, learning_rate=1e-3, warmup_steps=0
    )
    accumulated: list[Tensor] = []

    def capture(parameters: Any, limit: float) -> Tensor:
        assert limit == math.inf
        accumulated.extend(p.grad.clone() for p in parameters)
        return torch.tensor(1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", capture)
    result = train([text], tmp_path / "a", model=model, config=config)
    torch.manual_seed(config.seed)
    initial = GPT(model).state_dict()
    tokens, _ = data.split(
        data.tokenize(data.read_text([text]), ByteTokenizer()), 0.1, model.block_size
    )
    x, y = next(data.Batches(tokens, model.block_size, 8, config.seed))

    def big_batch(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        plain = PlainGPT(model).to(dtype)
        plain.load_state_dict(initial)
        loss = F.cross_entropy(plain(x).flatten(0, 1), y.flatten())
        return loss.detach(), list(torch.autograd.grad(loss, list(plain.parameters())))

    (truth_loss, truth), (baseline_loss, baseline) = map(big_batch, (torch.float64, torch.float32))
    loss = torch.tensor(result.records[1]["loss"])
    assert compare(loss, baseline_loss, truth_loss, k=2.0).passed
    for triple in zip(accumulated, baseline, truth, strict=True):
        measurement = compare(*triple, k=3.0)
        assert measurement.passed, str(measurement)


def test_clipping_bounds_the_norm_and_logs_it_unclipped(text: Path, tmp_path: Path) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *args: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item())
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        config = dataclasses.replace(SHORT, steps=2, log_interval=1, clip=0.01)
        result = train([text], tmp_path / "out", model=TINY, config=config)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert all(record["gradient_norm"] > 0.1 for record in result.records[1:])


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    text: Path, tmp_path: Path, dtype: str
) -> None:
    config = dataclasses.replace(SHORT, dtype=dtype)
    whole = train([text], tmp_path / "whole", model=TINY, config=config)
    torch.rand(5)  # whatever the process drew in between must not matter
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train([text], broken, model=TINY, config=config, observer=interrupt_at(10))
    assert read_log(broken)[-1]["step"] == 10  # four steps past the checkpoint, to be done again
    torch.rand(17)
    resumed = resume(broken)
    assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())
    assert unclocked(read_log(tmp_path / "whole")) == unclocked(read_log(broken))
    a, b = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken"))
    assert torch.equal(a["random"]["cpu"], b["random"]["cpu"])
    assert torch.equal(a["sampler"]["generator"], b["sampler"]["generator"])
    for key in a["optimizer"]["state"]:
        assert_same_bits(a["optimizer"]["state"][key], b["optimizer"]["state"][key])
    assert a["best_validation_loss"] == b["best_validation_loss"] == whole.best_validation_loss


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_a_checkpoint_between_two_lines_of_the_log_keeps_their_mean(
    text: Path, tmp_path: Path, step: int
) -> None:
    config = dataclasses.replace(SHORT, log_interval=4, checkpoint_interval=step, ema=0.5)
    whole = train([text], tmp_path / "whole", model=TINY, config=config)
    with pytest.raises(Interrupted):
        train(
            [text],
            tmp_path / "part",
            model=TINY,
            config=config,
            observer=interrupt_at(4 if step < 4 else 8),
        )
    resumed = resume(tmp_path / "part")
    assert unclocked(read_log(tmp_path / "part")) == unclocked(whole.records)
    assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_recomputing_changes_no_bit(text: Path, tmp_path: Path, recompute: str, norm: str) -> None:
    model = dataclasses.replace(TINY, norm=norm)
    config = dataclasses.replace(SHORT, steps=4)
    kept = train([text], tmp_path / "kept", model=model, config=config)
    config = dataclasses.replace(config, recompute=recompute)
    again = train([text], tmp_path / "again", model=model, config=config)
    assert_same_bits(kept.model.state_dict(), again.model.state_dict())


def saved_bytes(model: GPT) -> int:
    """What autograd keeps of a forward pass, the parameters not counted."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(256, (4, 16))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(kept.values())


def test_recomputing_keeps_less() -> None:
    model = GPT(dataclasses.replace(TINY, dropout=0.0))
    everything, mlp, block = (
        saved_bytes(model.set_recompute(what)) for what in ("none", "mlp", "block")
    )
    preactivations = 2 * 4 * 16 * 4 * 32 * 4  # layers, B, T, F, bytes
    assert everything - mlp == preactivations
    assert block < mlp
    with pytest.raises(ValueError, match="recompute must be one of none, mlp, block, got 'all'"):
        model.set_recompute("all")


def test_an_average_of_the_weights_is_validated_and_saved(text: Path, tmp_path: Path) -> None:
    followed: dict[str, Tensor] = {}
    config = dataclasses.replace(SHORT, ema=0.75, steps=6, checkpoint_interval=1, log_interval=1)

    def observer(record: dict[str, Any], done: float) -> None:
        content = (
            checkpoint.load(tmp_path / "run" / "checkpoint.pt") if record["step"] > 1 else None
        )
        if content is not None:
            for name, average in followed.items():
                followed[name] = average.lerp(content["model"][name], 0.25)

    torch.manual_seed(config.seed)
    followed = {name: p.detach().clone() for name, p in GPT(TINY).named_parameters()}
    result = train([text], tmp_path / "run", model=TINY, config=config, observer=observer)
    averaged = GPT.from_pretrained(tmp_path / "run" / "model-ema")
    final = {name: p.detach() for name, p in result.model.named_parameters()}
    for name, average in averaged.named_parameters():
        torch.testing.assert_close(average.detach(), followed[name].lerp(final[name], 0.25))
    assert all("ema_validation_loss" in r for r in result.records if "validation_loss" in r)
    own = GPT.from_pretrained(tmp_path / "run" / "model")
    assert_same_bits(own.state_dict(), result.model.state_dict())


def test_samples_are_logged_and_move_no_random_number(text: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, sample_interval=4, sample_prompt="It", sample_tokens=9)
    sampled = train([text], tmp_path / "sampled", model=TINY, config=config)
    plain = train([text], tmp_path / "plain", model=TINY, config=SHORT)
    assert_same_bits(sampled.model.state_dict(), plain.model.state_dict())
    samples = [record for record in sampled.records if "sample" in record]
    assert [record["step"] for record in samples] == [4, 8, 12]
    assert all(record["sample"].startswith("It") for record in samples)
    empty = dataclasses.replace(config, sample_prompt="")
    with pytest.raises(ValueError, match=r"sample_prompt is '', of which .* leave no token"):
        train([text], tmp_path / "empty", model=TINY, config=empty)


def test_tensorboard_has_the_numbers_of_the_log(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(SHORT, tensorboard=True, sample_interval=12)
    with pytest.raises(Interrupted):
        train([text], tmp_path / "run", model=TINY, config=config, observer=interrupt_at(8))
    result = resume(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("loss", "validation_loss", "learning_rate"):
        logged = {r["step"]: r[name] for r in result.records if name in r}
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx(logged)


def test_without_tensorboard_it_is_one_sentence(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = dataclasses.replace(SHORT, tensorboard=True)
    with pytest.raises(ImportError, match="needs the package 'tensorboard': pip install"):
        train([text], tmp_path / "run", model=TINY, config=config)
    assert not (tmp_path / "run").exists()


def test_a_compiled_model_trains_and_is_saved_as_it_is(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    real = torch.compile

    def spy(model: Any, **options: Any) -> Any:
        compiled.append(real(model, backend="aot_eager", fullgraph=True, **options))
        return compiled[0]

    monkeypatch.setattr(torch, "compile", spy)
    plain_config = dataclasses.replace(SHORT, steps=2, validation_interval=2)
    plain = train([text], tmp_path / "plain", model=TINY, config=plain_config)
    config = dataclasses.replace(plain_config, compile=True)
    result = train([text], tmp_path / "run", model=TINY, config=config)
    assert compiled
    assert unclocked(result.records)[0]["validation_loss"] == pytest.approx(
        unclocked(plain.records)[0]["validation_loss"]
    )
    assert GPT.from_pretrained(tmp_path / "run" / "model").config == TINY


def test_token_shards_train_as_their_text_does(text: Path, tmp_path: Path) -> None:
    ids = text.read_bytes()
    shards = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path, part in zip(shards, (ids[:1000], ids[1000:]), strict=True):
        path.write_bytes(b"".join(i.to_bytes(2, "little") for i in part))
    of_text = train([text], tmp_path / "text", model=TINY, config=SHORT)
    of_shards = train(shards, tmp_path / "shards", model=TINY, config=SHORT)
    assert_same_bits(of_text.model.state_dict(), of_shards.model.state_dict())


def test_a_shard_that_goes_missing_is_one_sentence_and_keeps_the_checkpoint(
    text: Path, tmp_path: Path
) -> None:
    shard = tmp_path / "a.bin"
    shard.write_bytes(b"".join(i.to_bytes(2, "little") for i in text.read_bytes()))

    def observer(record: dict[str, Any], done: float) -> None:
        if record["step"] == 8:
            shard.unlink()

    with pytest.raises(FileNotFoundError, match=r"a\.bin does not exist"):
        train([shard], tmp_path / "run", model=TINY, config=SHORT, observer=observer)
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 6


def test_dropout_acts_in_training_and_not_in_validation(text: Path, tmp_path: Path) -> None:
    """The bitwise test above would pass with dropout that does nothing: it must do something."""

    def records(name: str, dropout: float, seed: int) -> list[dict[str, Any]]:
        config = dataclasses.replace(SHORT, steps=2, seed=seed)
        model = dataclasses.replace(TINY, dropout=dropout)
        return train([text], tmp_path / name, model=model, config=config).records

    with_dropout, without, reseeded = records("a", 0.2, 0), records("b", 0.0, 0), records("c", 0, 1)
    assert with_dropout[0]["validation_loss"] == without[0]["validation_loss"]
    assert len({run[-1]["loss"] for run in (with_dropout, without, reseeded)}) == 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 80)
    seen: list[float] = []
    result = train(
        [folder / "text.txt"],
        folder / "out",
        model=TINY,
        config=SHORT,
        observer=lambda record, done: seen.append(done),
    )
    assert seen == [record["step"] / SHORT.steps for record in result.records]
    return folder / "out", result


def test_a_run_writes_log_curve_checkpoint_and_weights(finished: tuple[Path, TrainResult]) -> None:
    out, result = finished
    records = read_log(out)
    assert records == result.records
    assert [record["step"] for record in records] == [0, 2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if "validation_loss" in r] == [0, 4, 8, 12]
    for record in records[1:]:
        assert record["tokens"] == record["step"] * 2 * 4 * 16
        assert record["learning_rate"] == learning_rate(SHORT, record["step"] - 1)
        assert record["tokens_per_s"] > 0
        assert record["mfu"] > 0
    assert records[-1]["validation_loss"] < records[0]["validation_loss"] - 0.1
    assert result.best_validation_loss == min(r.get("validation_loss", 9.0) for r in records)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert_same_bits(GPT.from_pretrained(out / "model").state_dict(), result.model.state_dict())
    assert not list(out.glob(".*"))  # no temporary file is left


def test_a_finished_run_can_be_prolonged(
    finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    out, result = finished
    for file in ("checkpoint.pt", "log.jsonl"):
        (tmp_path / file).write_bytes((out / file).read_bytes())
    more = resume(tmp_path, steps=14)
    assert [r["step"] for r in more.records] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert more.seconds > result.seconds
    again = resume(tmp_path)  # nothing left to do: the same weights
    assert_same_bits(again.model.state_dict(), more.model.state_dict())


def test_a_resumed_run_follows_the_settings_it_is_given(
    finished: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    (tmp_path / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes())
    (tmp_path / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes())
    seen: list[dict[str, Any]] = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *args: Any) -> Any:
        seen.extend(dict(group) for group in self.param_groups)
        assert {int(state["step"]) for state in self.state.values()} == {12 + len(seen) // 2 - 1}
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    changes = dict(beta1=0.5, beta2=0.7, weight_decay=0.3, learning_rate=1e-2, batch_size=3)
    result = resume(tmp_path, steps=14, accumulation=1, **changes)
    assert [group["weight_decay"] for group in seen] == [0.3, 0.0] * 2
    assert {group["betas"] for group in seen} == {(0.5, 0.7)}
    assert seen[-1]["lr"] == result.records[-1]["learning_rate"]
    assert result.records[-1]["tokens"] == 16 * (12 * 2 * 4 + 2 * 3)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["tokens"] == result.records[-1]["tokens"]


def test_half_a_line_in_the_log_of_a_killed_run_is_dropped(
    finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    out, _ = finished
    (tmp_path / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes())
    log = (out / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(log + '{"step": 14, "lo')
    resume(tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_time_limit_ends_the_run_with_all_its_files(text: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, steps=10**6, minutes=0.01)
    result = train([text], tmp_path / "out", model=TINY, config=config)
    last = result.records[-1]
    assert last["step"] < 10**6
    assert "validation_loss" in last
    assert checkpoint.load(tmp_path / "out" / "checkpoint.pt")["step"] == last["step"]
    assert (tmp_path / "out" / "loss.png").exists()


def test_divergence_stops_and_keeps_the_last_good_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = GPT.forward
    calls = 0

    def poisoned(self: GPT, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += self.training
        loss = forward(self, tokens, targets)
        return loss * math.nan if calls > 15 else loss  # in the eighth step, of two each

    monkeypatch.setattr(GPT, "forward", poisoned)
    out = tmp_path / "out"
    with pytest.raises(DivergedError, match=r"by step 8, loss is nan: .*is the last good state"):
        train([text], out, model=TINY, config=SHORT)
    content = checkpoint.load(out / "checkpoint.pt")
    assert content["step"] == 6
    assert all(torch.isfinite(value).all() for value in content["model"].values())
    assert read_log(out)[-1]["step"] == 6
    calls = 100
    with pytest.raises(DivergedError, match=r"no checkpoint was written yet"):
        train([text], tmp_path / "other", model=TINY, config=SHORT)


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_failure_in_the_middle_of_a_save_leaves_the_old_checkpoint(
    finished: tuple[Path, TrainResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    out, _ = finished
    path = tmp_path / "checkpoint.pt"
    content = checkpoint.load(out / "checkpoint.pt")
    checkpoint.save(path, content)
    before = path.read_bytes()

    def disk_full(*args: Any, **kwargs: Any) -> None:
        if failing == "write":
            args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    target = {"write": (torch, "save"), "fsync": (os, "fsync"), "rename": (os, "replace")}[failing]
    monkeypatch.setattr(*target, disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {**content, "step": 99})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_file_that_cannot_grow_is_told_as_the_system_tells_it(tmp_path: Path) -> None:
    """PyTorch itself raises a RuntimeError of its own then."""
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    path = tmp_path / "checkpoint.pt"
    content = {key: kind() for key, kind in checkpoint.KEYS.items()}
    checkpoint.save(path, content)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*checkpoint\.pt"):
            checkpoint.save(path, {**content, "model": {"weight": torch.zeros(1 << 18)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_truncated_and_foreign_checkpoints_are_refused_in_one_sentence(
    finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    out, _ = finished
    whole = (out / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.load(path)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
            resume(tmp_path)
    path.write_bytes(b"GIF89a" + bytes(500))
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        resume(tmp_path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="not a training checkpoint of this package"):
        resume(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "version": 1}, path)
    with pytest.raises(ValueError, match="has version 1, this package reads version 2"):
        resume(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "version": 2, "model": {}}, path)
    with pytest.raises(ValueError, match="lacks optimizer, step"):
        resume(tmp_path)


def test_a_damaged_or_contradictory_checkpoint_is_refused(
    finished: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    out, _ = finished
    path = tmp_path / "checkpoint.pt"
    damaged = bytearray((out / "checkpoint.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF  # in the middle of a tensor
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        resume(tmp_path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model_config", "n_embd"), 64),
        (("model_config", "n_layer"), 3),
        (("model_config", "n_head"), 5),
        (("model_config", "colour"), "red"),
        (("model_config",), {}),
        (("model_config",), None),
        (("train_config",), {}),
        (("train_config", "steps"), "many"),
        (("train_config", "colour"), "red"),
        (("model",), {}),
        (("model", "lm_head.weight"), 3),
        (("model", 3), torch.zeros(1)),
        (("optimizer",), {}),
        (("optimizer", "state"), {}),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
        (("optimizer", "state", 0, "step"), None),
        (("sampler",), {}),
        (("sampler", "generator"), torch.zeros(16, dtype=torch.uint8)),
        (("sampler", "generator"), torch.zeros(5056, dtype=torch.uint8)),
        (("random",), {}),
        (("random", "cpu"), torch.zeros(3)),
        (("step",), "x"),
        (("tokens",), None),
        (("files",), [3]),
        (("text",), 3),
    ],
)
def test_a_foreign_or_contradictory_checkpoint_is_refused_in_one_sentence(
    finished: tuple[Path, TrainResult], tmp_path: Path, keys: tuple[Any, ...], value: Any
) -> None:
    path = tmp_path / "checkpoint.pt"
    content = checkpoint.load(finished[0] / "checkpoint.pt")
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    checkpoint.save(path, content)
    with pytest.raises(
        ValueError, match=rf"^checkpoint: {path} .*{keys[0].split('_')[0]}"
    ) as refused:
        resume(tmp_path, steps=14)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        resume(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0, at least 1 is wanted"),
        ({"steps": 2.5}, TypeError, "steps is 2.5, int is wanted"),
        ({"batch_size": True}, TypeError, "batch_size is True, int is wanted"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate is 0.0, more than 0 is wanted"),
        ({"learning_rate": math.nan}, ValueError, "a finite number is wanted"),
        ({"min_learning_rate": 1.0}, ValueError, "at most learning_rate=0.001 is wanted"),
        ({"beta2": 1.0}, ValueError, r"beta2 is 1.0, in \[0, 1\) is wanted"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808, less than 2"),
        ({"validation_fraction": 1.0}, ValueError, "between 0 and 1 is wanted"),
        ({"minutes": 0}, ValueError, "minutes is 0, more than 0 is wanted"),
        ({"dtype": "float16"}, ValueError, "dtype is 'float16', float32 or bfloat16 is wanted"),
        ({"tokenizer": 3}, TypeError, "tokenizer is 3, str is wanted"),
    ],
)
def test_settings_out_of_range_are_refused(
    setting: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**setting)


def test_every_setting_has_a_help_text() -> None:
    assert all(option.metadata["help"] for option in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device": "tpu9"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu9'"),
        ({"device": "meta"}, "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cuda:97"}, "device is 'cuda:97', but this machine has"),
        ({"tokenizer": "words"}, "tokenizer name must be"),
        ({"impl": "magic"}, "impl"),
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder(
    text: Path, tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train([text], tmp_path / "out", model=TINY, config=dataclasses.replace(SHORT, **setting))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["matplotlib.figure", "safetensors"])
def test_a_missing_package_is_noticed_before_the_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install 'gptkernels"):
        train([text], tmp_path / "out", model=TINY, config=SHORT)
    assert not (tmp_path / "out").exists()


def test_vocabulary_too_small_and_missing_text_are_refused(text: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(TINY, vocab_size=255)
    with pytest.raises(ValueError, match=r"vocab_size is 255, but the tokenizer 'bytes' has 256"):
        train([text], tmp_path / "out", model=small, config=SHORT)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train([tmp_path / "no.txt"], tmp_path / "out", model=TINY, config=SHORT)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_checkpoint_is_not_overwritten(
    finished: tuple[Path, TrainResult], text: Path
) -> None:
    out, _ = finished
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        train([text], out, model=TINY, config=SHORT)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_another_text_and_late_changes(
    finished: tuple[Path, TrainResult], text: Path
) -> None:
    out, _ = finished
    with pytest.raises(ValueError, match="is not the text that the run to resume was trained on"):
        resume(out, files=[text])
    with pytest.raises(ValueError, match="seed is 5, but the run to resume has 1337"):
        resume(out, seed=5)
    with pytest.raises(TypeError, match="colour is not a setting of training"):
        resume(out, colour="red")
