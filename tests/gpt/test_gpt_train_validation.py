"""Validation alone: the losses of a run's log again, of other texts as a whole, and no trace."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from training import SHORT, TINY, read_log

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.pretrained import Pretrained
from gptkernels.gpt.training.train import train
from gptkernels.gpt.training.validation import validate_model, validate_run


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_is_validated_as_it_was(text: Path, tmp_path: Path) -> None:
    out, held_out = tmp_path / "run", tmp_path / "end.txt"
    train([text], out, model=TINY, config=dataclasses.replace(SHORT, ema=0.5))
    written = {path: path.stat().st_mtime_ns for path in (out, *out.rglob("*"))}
    last = read_log(out)[-1]
    state = torch.random.get_rng_state()
    found = validate_run(out)
    assert (found.loss, found.ema_loss) == (last["validation_loss"], last["ema_validation_loss"])
    assert found.perplexity == math.exp(found.loss)
    assert (found.step, found.held_out) == (12, True)
    assert found.tokens == 2 * 4 * 16 < found.room
    whole = validate_run(out, [text], validation_batches=10_000)  # the same text by its name
    assert whole.held_out
    assert whole.tokens == whole.room == found.room
    # As a text of its own, the held-out end is validated on as a whole.
    ids = text.read_bytes()
    held_out.write_bytes(ids[len(ids) - round(len(ids) * 0.1) :])
    other = validate_run(out, [held_out], validation_batches=10_000)
    assert other.loss == whole.loss
    assert not other.held_out
    model = Pretrained.load(out)
    config = TrainConfig(batch_size=4, validation_batches=10_000, device="cpu", impl="torch")
    alone = validate_model(model, [held_out], config)
    assert (alone.loss, alone.tokens, alone.step) == (whole.loss, whole.tokens, None)
    assert torch.equal(state, torch.random.get_rng_state())
    assert written == {path: path.stat().st_mtime_ns for path in (out, *out.rglob("*"))}
    compiled = validate_run(out, impl="auto")
    assert compiled.loss == pytest.approx(found.loss, rel=1e-5)
    # What is refused.
    with pytest.raises(ValueError, match="tokenizer is 'gpt2', but the run to resume has 'bytes'"):
        validate_run(out, tokenizer="gpt2")
    held_out.write_text("short")
    with pytest.raises(ValueError, match="the text has 5 tokens, but one context of block_size=16"):
        validate_run(out, [held_out])
    text.write_text("another text " * 100)
    with pytest.raises(ValueError, match="is not the text that the run was trained on"):
        validate_run(out)
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        validate_run(tmp_path)
