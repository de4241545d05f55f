"""The whole model on real text: training beside a plain-PyTorch twin.

Both start from the same weights and see the same batches of tinyshakespeare, in fp32 and without
dropout. Nothing but rounding separates them, and over 100 steps rounding grows: the losses must
stay within 1e-3.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import DATA

from examples.shakespeare import plain_twin, read, write
from gptkernels import GPT, GPTConfig
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.training import data
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.plain import differences, initial_weights, train_plainly
from gptkernels.gpt.training.train import train

STEPS = 100
MODEL = GPTConfig(vocab_size=256, block_size=64, n_layer=3, n_head=4, n_embd=96)
CONFIG = TrainConfig(
    steps=STEPS,
    batch_size=8,
    learning_rate=2e-3,
    warmup_steps=10,
    validation_interval=STEPS,
    validation_batches=4,
    checkpoint_interval=STEPS,
    log_interval=1,
    device="cpu",
    impl="torch",
)


@pytest.fixture(scope="module")
def shakespeare() -> Path:
    text = DATA / "tinyshakespeare.txt"
    if not text.is_file():
        pytest.skip(f"{text} does not exist: set GPTKERNELS_DATA to a folder that holds it")
    return text


def losses(curve: list[dict[str, float]]) -> list[float]:
    return [record["loss"] for record in curve if "loss" in record]


def test_training_on_shakespeare_beside_a_plain_twin(shakespeare: Path, tmp_path: Path) -> None:
    twin, text = plain_twin(MODEL, CONFIG), read(shakespeare, MODEL, CONFIG)
    heard: list[tuple[dict[str, float], float]] = []
    plain = train_plainly(
        twin, *text, MODEL.block_size, CONFIG, observer=lambda *given: heard.append(given)
    )
    assert heard == [(record, record["step"] / STEPS) for record in plain]

    ours = train([shakespeare], tmp_path / "out", model=MODEL, config=CONFIG).records
    assert len(losses(ours)) == STEPS
    for pairs in differences(ours, plain).values():
        assert max(gap for _, gap in pairs) < 1e-3
    # Both learned: from log(256) = 5.5 to less than the text's letter frequencies give, 3.3.
    assert losses(ours)[0] > 5.4
    assert sum(losses(ours)[-10:]) / 10 < 3.2

    largest = write(tmp_path, ours, plain)["largest_difference"]
    kept = json.loads((tmp_path / "curves.json").read_text())
    assert losses(kept["gptkernels"]) == losses(ours)
    assert kept["plain"] == plain
    assert largest == kept["largest_difference"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_notices_one_lost_gradient(shakespeare: Path) -> None:
    """1e-3 tells a model whose first MLP bias gets no gradient from one where it does."""
    tokens = data.tokenize(shakespeare.read_text()[:100_000], ByteTokenizer())
    initial = initial_weights(MODEL, CONFIG.seed)
    curves = []
    for lost in (False, True):
        model = GPT(MODEL)
        model.load_state_dict(initial)
        if lost:
            model.transformer.h[0].mlp.c_fc.bias.register_hook(torch.zeros_like)
        curves.append(train_plainly(model, tokens, tokens[:1000], MODEL.block_size, CONFIG))
    assert max(gap for _, gap in differences(*curves)["loss"]) > 1e-3
