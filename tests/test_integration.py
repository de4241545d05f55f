"""The whole model on real text: training beside a plain-PyTorch twin.

Both start from the same weights and see the same batches of tinyshakespeare, in fp32 and without
dropout. Nothing but rounding separates them, and over 100 steps rounding grows: the losses must
stay within 1e-3.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from gptkernels.examples.plain_gpt import PlainGPT
from torch import Tensor, nn

from gptkernels import GPT, GPTConfig
from gptkernels.gpt import data
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.gpt.train import parameter_groups, train
from gptkernels.gpt.train_config import TrainConfig, learning_rate

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
    given = os.environ.get("GPTKERNELS_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    text = folder / "tinyshakespeare.txt"
    if not text.is_file():
        pytest.skip(f"{text} does not exist: set GPTKERNELS_DATA to a folder that holds it")
    return text


def train_plainly(model: nn.Module, tokens: Tensor) -> list[float]:
    """The loop of `train`, written out for a plain model."""
    batches = data.Batches(tokens, MODEL.block_size, CONFIG.batch_size, CONFIG.seed)
    groups = parameter_groups(model, CONFIG.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(CONFIG.beta1, CONFIG.beta2))
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(CONFIG, step)
        loss = model(*next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_on_shakespeare_beside_a_plain_twin(shakespeare: Path, tmp_path: Path) -> None:
    torch.manual_seed(CONFIG.seed)  # as `train` does: the same initial weights
    initial = GPT(MODEL).state_dict()
    twin = PlainGPT(MODEL)
    twin.load_state_dict(initial)
    tokens, _ = data.split(
        data.tokenize(data.read_text([shakespeare]), ByteTokenizer()),
        CONFIG.validation_fraction,
        MODEL.block_size,
    )
    wanted = train_plainly(twin, tokens)

    result = train([shakespeare], tmp_path / "out", model=MODEL, config=CONFIG)
    losses = [record["loss"] for record in result.records[1:]]
    assert len(losses) == STEPS
    assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 1e-3
    # Both learned: from log(256) = 5.5 to less than the text's letter frequencies give, 3.3.
    assert losses[0] > 5.4
    assert sum(losses[-10:]) / 10 < 3.2


def test_the_comparison_notices_one_lost_gradient(shakespeare: Path) -> None:
    """1e-3 tells a model whose first MLP bias gets no gradient from one where it does."""
    tokens = data.tokenize(shakespeare.read_text()[:100_000], ByteTokenizer())
    torch.manual_seed(CONFIG.seed)
    initial = GPT(MODEL).state_dict()
    curves = []
    for lost in (False, True):
        model = GPT(MODEL)
        model.load_state_dict(initial)
        if lost:
            model.transformer.h[0].mlp.c_fc.bias.register_hook(torch.zeros_like)
        curves.append(train_plainly(model, tokens))
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) > 1e-3
