"""What a task's model computes, beside plain PyTorch in fp64 that goes through one unpadded
sequence at a time (plain_finetuning.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

import plain_finetuning as plain
import pytest
import torch
import torch.nn.functional as F
from finetune_cases import GPT1, GPT2, TRANSFORMATIONS, encoded, pretrained, task, task_model
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.finetuning.answers import answer
from gptkernels.gpt.finetuning.batches import Encoded, collate
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.fitting import Fit
from gptkernels.gpt.finetuning.task_model import TaskModel, standardisation, transferred

each_kind = pytest.mark.parametrize("kind", TRANSFORMATIONS)


def in_fp64(model: TaskModel) -> dict[str, Tensor]:
    return {name: weight.detach().double() for name, weight in model.state_dict().items()}


def batch_of(model: TaskModel, examples: list[Encoded]) -> Any:
    return collate(examples, model.task.range is not None)


def test_the_body_is_gpt1s_post_norm_decoder() -> None:
    """Section 4.1 of the paper: x = LN(x + attention(x)), x = LN(x + mlp(x)), and no last norm."""
    published = GPTConfig.named("gpt1")
    assert published.norm == "post"
    assert (published.n_layer, published.n_head, published.n_embd, published.d_inner) == (
        12, 12, 768, 3072,
    )  # fmt: skip
    body = transferred(pretrained(GPT1), "all", 0.0).eval()
    assert body.transformer.ln_f is None
    tokens = torch.randint(259, (2, 20))
    weights = {name: weight.double() for name, weight in body.state_dict().items()}
    truth = torch.stack([plain.hidden_states(weights, GPT1, row) for row in tokens.tolist()])
    torch.testing.assert_close(body.hidden_states(tokens), truth.float())
    # Each hidden state is a LayerNorm's output.
    norm = body.transformer.h[1].ln_2
    bare = (body.hidden_states(tokens) - norm.bias) / norm.weight
    torch.testing.assert_close(bare.mean(-1), torch.zeros(2, 20), atol=1e-4, rtol=0)


@each_kind
@pytest.mark.parametrize("shape", [GPT1, GPT2], ids=["gpt1", "gpt2"])
def test_scores_are_the_heads_of_the_state_at_extract(kind: str, shape: GPTConfig) -> None:
    """Equation 3, and figure 1: the head reads the final state of the extract token; a similarity's
    two are "added element-wise before being fed into the linear output layer"; each choice has one,
    "normalized via a softmax layer" over the choices of an example."""
    model, examples = task_model(kind, shape).eval(), encoded(kind, 7)
    scores, hidden = model(batch_of(model, examples))
    assert hidden.shape == (sum(len(e.rows) for e in examples), max(e.length for e in examples), 32)
    weights = in_fp64(model)
    answers = answer(model, examples, 3, torch.float32)
    for i, example in enumerate(examples):
        truth = plain.scores(weights, shape, model.task, example)
        found = scores[i].view(-1)
        torch.testing.assert_close(found[: len(truth)], truth.float())
        assert found[len(truth) :].eq(-torch.inf).all()  # choices that the example does not have
        if model.task.range is None:
            torch.testing.assert_close(
                torch.tensor(answers[i].probabilities), truth.softmax(0).float()
            )
            assert answers[i].value == truth.argmax()


@pytest.mark.parametrize("kind", ["similarity", "choice"])
def test_the_order_of_texts_is_that_of_no_similarity_and_of_each_choice(kind: str) -> None:
    model, examples = task_model(kind).eval(), encoded(kind, 4)
    turned = [dataclasses.replace(one, rows=one.rows[::-1]) for one in examples]
    before, after = (model(batch_of(model, part))[0] for part in (examples, turned))
    if kind == "similarity":
        torch.testing.assert_close(before, after)
        return
    for one, row, other in zip(examples, before, after, strict=True):
        torch.testing.assert_close(row[: len(one.rows)].flip(0), other[: len(one.rows)])


class Keeping(torch.optim.SGD):
    """Keeps the gradients that it is asked to step along."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.kept = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        super().step(closure)


@each_kind
@pytest.mark.parametrize(
    ("shape", "tied", "coefficient"),
    [(GPT1, True, 0.5), (GPT2, False, 2.0), (GPT1, False, 0.0)],
    ids=["gpt1", "gpt2-untied", "alone"],
)
def test_l3_is_l2_and_lambda_times_l1(
    kind: str, shape: GPTConfig, tied: bool, coefficient: float
) -> None:
    """Equations 4 and 5, their gradients too, with sequences of different lengths."""
    model, examples = task_model(kind, shape, tied=tied), encoded(kind, 6)
    numbers = [float(one.target or 0) for one in examples]
    model.scale = standardisation(numbers) if kind == "similarity" else (0.0, 1.0)
    config = FinetuneConfig(lm_coefficient=coefficient, clip=0.0)
    weights = in_fp64(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    keeping = Keeping(parameters)
    found = Fit(model, examples, examples, config)._step(keeping, examples, 0.0)

    leaves = [weights[name].requires_grad_() for name in names]
    if tied:
        weights["body.lm_head.weight"] = weights["body.transformer.wte.weight"]
    l2, l1 = plain.losses(weights, shape, model.task, model.scale, examples)
    l3 = l2 + coefficient * l1
    truth = torch.stack([l3, l2, l1 if coefficient else torch.zeros(())])
    torch.testing.assert_close(found[:3], truth.float())
    wanted = torch.autograd.grad(l3, leaves, allow_unused=True, materialize_grads=True)
    # Of each parameter beside its own largest gradient: some, as of keys' biases, are nearly 0.
    largest = max(gradient.abs().max() for gradient in wanted)
    for name, gradient, other in zip(names, keeping.kept, wanted, strict=True):
        size = other.abs().max().clamp_min(largest / 1000)
        error = (gradient - other).abs().max() / size
        assert error < 1e-3, name  # rounding's is far below, a wrong formula's far above
    norm = torch.stack([gradient.square().sum() for gradient in wanted]).sum().sqrt()
    torch.testing.assert_close(found[3], norm.float(), rtol=1e-4, atol=0.0)


@each_kind
@given(seed=st.integers(0, 2**31))
def test_padding_does_not_matter(kind: str, seed: int) -> None:
    """Scores of an example alone are those in a batch, and nothing depends on what pads it."""
    model, examples = task_model(kind).eval(), encoded(kind, 5, seed)
    batch = batch_of(model, examples)
    scores, hidden = model(batch)
    for one, row in zip(examples, scores, strict=True):
        alone, _ = model(batch_of(model, [one]))
        torch.testing.assert_close(alone.view(-1), row.view(-1)[: alone.numel()])
    tokens = batch.tokens.clone()
    for row, end in zip(tokens, batch.ends, strict=True):
        row[end + 1 :] = torch.randint(259, row[end + 1 :].shape)
    assume(not torch.equal(tokens, batch.tokens))  # not all of one length
    other_scores, other_hidden = model(dataclasses.replace(batch, tokens=tokens))
    assert torch.equal(scores, other_scores)
    assert torch.equal(model.lm_loss(hidden, batch), model.lm_loss(other_hidden, batch))


@each_kind
def test_nothing_but_the_head_and_three_embeddings_is_new(kind: str) -> None:
    """Section 3.1: "the only extra parameters we require during fine-tuning are Wy, and embeddings
    for delimiter tokens", besides the head's bias."""

    def count(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    before = GPT(GPT1)
    model = TaskModel(task(kind), transferred(before, "all", 0.1), 0.1)
    outputs = {"classification": 2, "entailment": 3}.get(kind, 1)
    width = GPT1.n_embd
    assert count(model) - count(before) == 3 * width + outputs * width + outputs
    assert model.head.weight.shape == (outputs, width)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [GPT1, GPT2], ids=["gpt1", "gpt2"])
@pytest.mark.parametrize("transfer", ["all", "0", "1", "2", "none"])
def test_what_is_transferred_and_what_begins_at_random(
    transfer: str, shape: GPTConfig, tied: bool
) -> None:
    """Section 5, figure 2 (left): the embeddings and the first blocks; the rest is fresh."""
    old = pretrained(shape, tied=tied)
    seed = torch.initial_seed()
    torch.manual_seed(seed)
    body = transferred(old, transfer, 0.25)
    torch.manual_seed(seed)
    fresh = GPT(body.config).state_dict()
    assert body.config == dataclasses.replace(shape, vocab_size=259, dropout=0.25)
    assert (body.lm_head.weight is body.transformer.wte.weight) == tied
    blocks = {"all": 2, "none": -1}.get(transfer) or int(transfer)
    before = old.state_dict()
    for name, tensor in body.state_dict().items():
        rows = len(before[name])
        _, kind, *inner = name.split(".")
        taken = blocks >= 0
        if kind == "h":
            taken = int(inner[0]) < blocks
        elif kind == "ln_f":
            taken = blocks == shape.n_layer
        assert torch.equal(tensor[:rows], (before if taken else fresh)[name][:rows]), name
        assert torch.equal(tensor[rows:], fresh[name][rows:]), name


def test_a_transferred_model_does_not_share_memory_with_the_pretrained_one() -> None:
    for tied in (True, False):
        old = pretrained(GPT2, tied=tied)
        before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
        body = transferred(old, "all", 0.0)
        with torch.no_grad():
            for parameter in body.parameters():
                parameter.add_(1)
        assert all(torch.equal(old.state_dict()[name], before[name]) for name in before)


def test_more_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match=r"transfer is 3, but the model has 2 blocks"):
        transferred(pretrained(), "3", 0.0)


def test_narrow_weights_are_widened() -> None:
    narrow = pretrained().to(torch.bfloat16)
    body = transferred(narrow, "all", 0.0)
    assert {parameter.dtype for parameter in body.parameters()} == {torch.float32}
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(body.state_dict()[name], narrow.state_dict()[name].float())


def test_the_heads_dropout_is_of_what_it_reads_and_of_training_alone() -> None:
    """Section 4.1: "we add dropout to the classifier with a rate of 0.1"."""
    assert FinetuneConfig().head_dropout == 0.1
    model, examples = task_model("entailment", dropout=0.5), encoded("entailment", 4)
    batch = batch_of(model, examples)
    model.eval()
    scores, hidden = model(batch)
    assert torch.equal(model(batch)[0], scores)
    features = hidden[torch.arange(4), batch.ends]
    torch.testing.assert_close(scores, model.head(features))
    model.train()
    seed = torch.initial_seed()
    torch.manual_seed(seed)
    dropped, same = model(batch)
    torch.manual_seed(seed)
    torch.testing.assert_close(dropped, model.head(F.dropout(features, 0.5)))
    assert torch.equal(hidden, same)
    assert not torch.equal(dropped, scores)


@each_kind
def test_answering_drops_nothing_and_draws_nothing(kind: str) -> None:
    model = task_model(kind, dropout=0.5)
    for module in model.body.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    examples = encoded(kind, 9)
    model.train()
    state = torch.get_rng_state()
    answers = answer(model, examples, 4, torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    model.train()
    assert answer(model, examples, 4, torch.float32) == answers
    alone = [one.value for one in answer(model, examples, 1, torch.float32)]
    torch.testing.assert_close(torch.tensor(alone), torch.tensor([one.value for one in answers]))


def test_a_number_is_learnt_standardised_and_answered_in_its_range() -> None:
    assert standardisation([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, 3.5**0.5))
    assert standardisation([2.0, 2.0]) == (2.0, 1.0)
    model = task_model("similarity")
    model.scale = (3.0, 0.5)
    scores = torch.tensor([-9.0, -1.0, 0.0, 1.5, 9.0])
    assert model.answers(scores).tolist() == [0.0, 2.5, 3.0, 3.75, 4.0]
    loss = model.task_loss(scores[1:3], torch.tensor([3.5, 3.0]))
    assert loss.item() == pytest.approx(((-1 - 1) ** 2 + 0) / 2)


@each_kind
def test_bfloat16_rounds_but_computes_the_same(kind: str) -> None:
    model, examples = task_model(kind).eval(), encoded(kind, 6)
    batch = batch_of(model, examples)
    scores, hidden = model(batch)
    narrow, narrow_hidden = model(batch, torch.bfloat16)
    assert narrow.dtype == torch.float32
    assert not torch.equal(hidden, narrow_hidden)
    finite = scores.isfinite()
    assert torch.equal(finite, narrow.isfinite())
    torch.testing.assert_close(narrow[finite], scores[finite], atol=0.1, rtol=0.1)


def test_the_auxiliary_losses_product_is_narrow_where_asked_for() -> None:
    """The widest product of a step: the hidden states are as they were, its logits are rounded."""
    model = task_model("entailment")
    batch = collate(encoded("entailment", 6), number=False)
    _, hidden = model(batch)
    wide, narrow = (model.lm_loss(hidden, batch, t) for t in (torch.float32, torch.bfloat16))
    assert wide != narrow
    assert narrow.item() == pytest.approx(wide.item(), rel=1e-2)
