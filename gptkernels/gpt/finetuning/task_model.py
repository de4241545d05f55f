"""A GPT with a linear head on top: what is fine-tuned, saved, and asked.

    h = body(tokens)                      (R, T, C), R sequences (batches.py)
    f = h at <extract>                    (R, C);  of a similarity: f of both orders, added up
    scores = f @ W^T + b                  (B, classes); of a range (B,); of choices (B, choices)
    L2 = cross-entropy of the scores      of a range: the mean squared error, both standardised by
                                          the training part's mean and deviation
    L1 = cross-entropy of each next token, the new ones included, over all sequences
    L3 = L2 + λ L1

The only new parameters are W, b and the embeddings of <start>, <delimiter> and <extract>.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, section 3.2,
equations 3 to 5. The paper adds its losses up over the data; here each is a mean over the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.gpt.finetuning.batches import Batch
from gptkernels.gpt.finetuning.task import Task
from gptkernels.gpt.finetuning.transformations import NEW_TOKENS
from gptkernels.gpt.model import GPT
from gptkernels.gpt.precision import autocast

_INIT_STD = 0.02


class TaskModel(nn.Module):
    """`body`, whose last three tokens are the new ones, and a linear head for `task`.

    Args:
        task: what is asked.
        body: a GPT with V + 3 tokens, as `transferred` makes it.
        dropout: of what the head reads, in training.
        scale: mean and deviation of the training part's numbers, for a task with a range.
    """

    def __init__(
        self,
        task: Task,
        body: GPT,
        dropout: float = 0.0,
        scale: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.task, self.body = task, body
        self.head = nn.Linear(body.config.n_embd, task.outputs)
        nn.init.normal_(self.head.weight, std=_INIT_STD)
        nn.init.zeros_(self.head.bias)
        self.dropout, self.scale = dropout, scale

    def forward(self, batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Scores, fp32, (B, classes), (B,) or (B, choices), with -inf where an example has fewer
        choices than others; and the hidden states (R, T, C), computed in `dtype`."""
        with autocast(batch.tokens.device, dtype):
            hidden = self.body.hidden_states(batch.tokens)
        rows = torch.arange(len(batch.ends), device=hidden.device)
        features = hidden[rows, batch.ends].float()
        if self.task.transformation == "similarity":
            features = features.view(-1, 2, features.shape[-1]).sum(1)
        scores = self.head(F.dropout(features, self.dropout, self.training))
        if self.task.choice:
            scores = side_by_side(scores.squeeze(1), batch)
        elif self.task.range is not None:
            scores = scores.squeeze(1)
        return scores, hidden

    def task_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """L2 of scores and targets (B,): indices, or numbers of the task's range."""
        if self.task.range is None:
            return F.cross_entropy(scores, targets)
        mean, deviation = self.scale
        return F.mse_loss(scores, (targets - mean) / deviation)

    def lm_loss(self, hidden: Tensor, batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
        """L1 of the hidden states (R, T, C): the mean over all tokens that have a next one, fp32;
        the head's product is computed in `dtype`."""
        with autocast(hidden.device, dtype):
            return self.body.loss(hidden.flatten(0, 1)[batch.places], batch.following)

    def answers(self, scores: Tensor) -> Tensor:
        """What the scores say: indices (B,) int64, or numbers (B,) within the task's range."""
        if self.task.range is None:
            return scores.argmax(1)
        mean, deviation = self.scale
        return (scores * deviation + mean).clamp(*self.task.range)

    def freeze_body(self) -> None:
        """Train no parameter but the head's and the new tokens' embeddings."""
        self.body.requires_grad_(False)
        for weight in {self.body.transformer.wte.weight, self.body.lm_head.weight}:
            weight.requires_grad_(True)
            weight.register_hook(_of_new_tokens)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """AdamW's two groups: matrices decay; biases and norms do not, nor does an embedding of
        which some rows are frozen."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not all(parameter.requires_grad for parameter in self.body.parameters()):
            decayed = [self.head.weight]
        else:
            decayed = [parameter for parameter in parameters if parameter.dim() >= 2]
        chosen = set(map(id, decayed))
        others = [parameter for parameter in parameters if id(parameter) not in chosen]
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]


def transferred(pretrained: GPT, transfer: str, dropout: float) -> GPT:
    """A GPT of the same shape with three more tokens, in fp32.

    transfer: "all"; a number n, for the embeddings and the first n blocks, the others being random;
    or "none". dropout: of the new model.

    Raises ValueError for more blocks than there are. Section 5 of the paper, figure 2 (left).
    """
    old = pretrained.config
    config = dataclasses.replace(old, vocab_size=old.vocab_size + NEW_TOKENS, dropout=dropout)
    body = GPT(config)
    state = pretrained.state_dict()
    if pretrained.lm_head.weight is pretrained.transformer.wte.weight:
        state.pop("lm_head.weight")
    else:
        body.lm_head.weight = nn.Parameter(body.lm_head.weight.detach().clone())
    if transfer == "none":
        return body
    blocks = old.n_layer if transfer == "all" else int(transfer)
    if blocks > old.n_layer:
        raise ValueError(f"transfer is {blocks}, but the model has {old.n_layer} blocks")
    own = body.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if _is_of(name, blocks, old.n_layer):
                own[name][: len(tensor)].copy_(tensor)
    return body


def _is_of(name: str, blocks: int, all_blocks: int) -> bool:
    """Whether a parameter belongs to the embeddings, the head or the first blocks."""
    parts = name.split(".")
    if parts[1] == "h":
        return int(parts[2]) < blocks
    return parts[1] != "ln_f" or blocks == all_blocks


def _of_new_tokens(gradient: Tensor) -> Tensor:
    """Of an embedding's gradient, the part of the new tokens."""
    kept = torch.zeros_like(gradient)
    kept[-NEW_TOKENS:] = gradient[-NEW_TOKENS:]
    return kept


def side_by_side(scores: Tensor, batch: Batch) -> Tensor:
    """The scores (R,) of all choices, a row an example."""
    table = scores.new_full(batch.size, -torch.inf)
    return table.index_put((batch.owner, batch.choice), scores)


def standardisation(targets: Sequence[float]) -> tuple[float, float]:
    """Mean and deviation of numbers; the deviation of equal ones is 1."""
    numbers = torch.tensor(targets, dtype=torch.float64)
    deviation = numbers.std(correction=0).item()
    return numbers.mean().item(), deviation or 1.0
