"""Training runs: resumed bit for bit, recomputation, averages, samples, shards, logs, losses."""

from __future__ import annotations

import dataclasses
import math
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import SHORT, TINY, Interrupted, assert_same_bits, interrupt_at, read_log, unclocked

from gptkernels import GPT
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.training import checkpoint, data
from gptkernels.gpt.training.config import learning_rate
from gptkernels.gpt.training.diverged import DivergedError
from gptkernels.gpt.training.learner import parameter_groups
from gptkernels.gpt.training.train import TrainResult, resume, train
from gptkernels.nn.cross_entropy import call_cross_entropy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
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


def test_float16_skips_steps_whose_gradients_overflow(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too large a scale at first, and one that soon grows again: in a skipped step weights and
    average stay, the scale is halved, and a resumed run skips the same steps."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**22, growth_interval=3)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    config = dataclasses.replace(
        SHORT, dtype="float16", ema=0.5, accumulation=1, validation_batches=1,
        log_interval=1, validation_interval=1, checkpoint_interval=3,
    )  # fmt: skip
    whole = train([text], tmp_path / "whole", model=TINY, config=config)
    start = {**whole.records[0], "skipped_steps": 0, "loss_scale": 2.0**22}
    for before, after in pairwise([start, *whole.records[1:]]):
        skipped = after["gradient_norm"] is None
        assert after["skipped_steps"] == before["skipped_steps"] + skipped
        for name in ("validation_loss", "ema_validation_loss"):
            assert (after[name] == before[name]) == skipped
        grows = after["loss_scale"] / before["loss_scale"]
        assert grows == 0.5 if skipped else grows in (1, 2)
    norms = [record["gradient_norm"] for record in whole.records[1:]]
    assert norms[:3] == [None] * 3
    good = next(i for i, norm in enumerate(norms) if norm is not None)
    assert None in norms[good:]
    # Of float32 are the weights and what optimises them.
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    with pytest.raises(Interrupted):
        train([text], tmp_path / "part", model=TINY, config=config, observer=interrupt_at(5))
    saved = checkpoint.load(tmp_path / "part" / "checkpoint.pt")["scaler"]
    assert (saved["scale"], saved["skipped_steps"]) == (2.0**19, 3)
    resumed = resume(tmp_path / "part")
    assert unclocked(read_log(tmp_path / "part")) == unclocked(whole.records)
    assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())


def test_float16_steps_are_those_of_a_written_out_loop(text: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, dtype="float16", steps=4)
    trained = train([text], tmp_path / "out", model=TINY, config=config).model
    torch.manual_seed(config.seed)
    model = GPT(TINY).train().set_impl(config.impl)
    tokens, _ = data.read([text], ByteTokenizer(), "uint16", 256)
    training, _ = data.split(tokens, config.validation_fraction, TINY.block_size)
    batches = data.Batches(training, TINY.block_size, config.batch_size, config.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), betas=(config.beta1, config.beta2), fused=True
    )
    for step in range(config.steps):
        for _ in range(config.accumulation):
            x, y = next(batches)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(x, y) / config.accumulation
            (loss * 65536).backward()
        for parameter in model.parameters():
            parameter.grad /= 65536
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(trained.state_dict(), model.state_dict())


def test_float16_whose_steps_are_all_skipped_is_a_divergence(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**-10)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)

    def broken(*given: Any) -> Tensor:
        loss = call_cross_entropy(*given)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr("gptkernels.gpt.model.call_cross_entropy", broken)
    config = dataclasses.replace(SHORT, dtype="float16", log_interval=1)
    with pytest.raises(DivergedError, match=r"by step 5, loss scale is 3\.05\S+: no checkpoint"):
        train([text], tmp_path / "out", model=TINY, config=config)


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
    # Without one, none is left that would pass for the average of the weights beside it.
    resume(tmp_path / "run", steps=7, ema=0.0)
    assert not (tmp_path / "run" / "model-ema").exists()


def test_samples_are_logged_and_move_no_random_number(text: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, sample_interval=4, sample_prompt="It", sample_tokens=20)
    sampled = train([text], tmp_path / "sampled", model=TINY, config=config)
    plain = train([text], tmp_path / "plain", model=TINY, config=SHORT)
    assert_same_bits(sampled.model.state_dict(), plain.model.state_dict())
    samples = [record for record in sampled.records if "sample" in record]
    assert [record["step"] for record in samples] == [4, 8, 12]
    assert all(record["sample"].startswith("It") for record in samples)
    # 22 tokens of a context of 16: samples slide.
    prompt = torch.tensor([list(b"It")])
    continued = sampled.model.generate(prompt, 20, seed=config.seed, slots=1)
    assert samples[-1]["sample"] == ByteTokenizer().decode(continued[0].tolist())
    empty = dataclasses.replace(config, sample_prompt="")
    with pytest.raises(ValueError, match=r"sample_prompt is '', which .* turns into no token"):
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
        assert options == {"fullgraph": True}
        compiled.append(real(model, backend="aot_eager", **options))
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
    out, _ = finished
    for file in ("checkpoint.pt", "log.jsonl"):
        (tmp_path / file).write_bytes((out / file).read_bytes())
    before = checkpoint.load(tmp_path / "checkpoint.pt")["seconds"]
    more = resume(tmp_path, steps=14)
    assert [r["step"] for r in more.records] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert more.seconds > before
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
