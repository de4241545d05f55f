"""GPT-1's fine-tuning in plain PyTorch, from a model's weights: one sequence at a time, so that
nothing is padded, and in the weights' dtype. Radford et al., "Improving Language Understanding by
Generative Pre-Training", 2018, sections 3.1 to 3.3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels import GPTConfig
from gptkernels.gpt.finetuning.batches import Encoded
from gptkernels.gpt.finetuning.task import Task

Weights = Mapping[str, Tensor]


def hidden_states(weights: Weights, config: GPTConfig, tokens: Sequence[int]) -> Tensor:
    """(T, C). `weights` are the body's, by its names."""
    body = {name.removeprefix("transformer."): weight for name, weight in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ body[f"{name}.weight"].t() + body[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        normed = (x - mean) / (variance + config.layer_norm_eps).sqrt()
        return normed * body[f"{name}.weight"] + body[f"{name}.bias"]

    def attention(name: str, x: Tensor) -> Tensor:
        heads = linear(f"{name}.c_attn", x).view(len(x), 3, config.n_head, config.head_dim)
        q, k, v = heads.permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / math.sqrt(config.head_dim)
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        return linear(f"{name}.c_proj", mixed.transpose(0, 1).flatten(1))

    def mlp(name: str, x: Tensor) -> Tensor:
        return linear(
            f"{name}.c_proj", F.gelu(linear(f"{name}.c_fc", x), approximate=config.approximate)
        )

    x = body["wte.weight"][list(tokens)] + body["wpe.weight"][: len(tokens)]
    for i in range(config.n_layer):
        if config.norm == "post":
            x = norm(f"h.{i}.ln_1", x + attention(f"h.{i}.attn", x))
            x = norm(f"h.{i}.ln_2", x + mlp(f"h.{i}.mlp", x))
        else:
            x = x + attention(f"h.{i}.attn", norm(f"h.{i}.ln_1", x))
            x = x + mlp(f"h.{i}.mlp", norm(f"h.{i}.ln_2", x))
    return x if config.norm == "post" else norm("ln_f", x)


def scores(weights: Weights, config: GPTConfig, task: Task, example: Encoded) -> Tensor:
    """Of one example: (classes,), (choices,), or a number's (1,). `weights` are a TaskModel's."""
    last = [hidden_states(body_of(weights), config, row)[-1] for row in example.rows]
    if task.transformation == "similarity":
        one, other = last
        last = [one + other]
    return torch.cat([weights["head.weight"] @ h + weights["head.bias"] for h in last])


def losses(
    weights: Weights,
    config: GPTConfig,
    task: Task,
    scale: tuple[float, float],
    examples: Sequence[Encoded],
) -> tuple[Tensor, Tensor]:
    """L2 and L1 of the examples."""
    of_task, of_tokens = [], []
    for example in examples:
        found = scores(weights, config, task, example)
        if task.range is None:
            of_task.append(found.logsumexp(0) - found[int(example.target)])
        else:
            of_task.append((found[0] - (example.target - scale[0]) / scale[1]) ** 2)
        for row in example.rows:
            h = hidden_states(body_of(weights), config, row)
            logits = h[:-1] @ weights["body.lm_head.weight"].t()
            of_tokens.append(F.cross_entropy(logits, torch.tensor(row[1:]), reduction="none"))
    return torch.stack(of_task).mean(), torch.cat(of_tokens).mean()


def body_of(weights: Weights) -> dict[str, Tensor]:
    """The weights of a TaskModel's body, by the body's names."""
    return {name.removeprefix("body."): weight for name, weight in weights.items()}
