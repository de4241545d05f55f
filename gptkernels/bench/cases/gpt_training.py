"""Speed of a training step of gptkernels.GPT: the loss and all gradients, without an optimizer,
which would be the same for all candidates.

The baseline is the plain twin of nanoGPT's form, eager. On a GPU 16 bits are those of autocast,
over weights in fp32; on a CPU the weights have them too. Operations are those of
`gptkernels.gpt.training.throughput`, without the half of attention that causality hides. The loss
and the gradients of the small models are checked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptkernels.bench.case import BOTH, Call, Case
from gptkernels.bench.cases import gpt
from gptkernels.bench.cases.dtypes import narrow_on_a_gpu
from gptkernels.bench.cases.gpt import TRANSFORMERS, TWIN, Weights
from gptkernels.bench.peers import packages
from gptkernels.gpt.training.throughput import flops_per_token
from gptkernels.truth import parity
from gptkernels.truth.yardstick import FullSums

# Inside a graph of Inductor's "auto" takes impl="torch".
COMPILED = "torch.compile of ours"
_IGNORED = -100
_Step = tuple[Tensor, Sequence[Tensor]]  # the loss and the gradients


@dataclass(frozen=True)
class Shape:
    """A model, and the tokens of a step."""

    model: gpt.Model
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.model.name} B{self.batch} T{self.tokens}"


def shapes(device_type: str, level: str) -> Sequence[Shape]:
    """GPT-2's smallest model first; in full larger ones on a GPU. A CPU has a small model too, in
    brief the smallest alone."""
    if device_type == "cuda":
        first = Shape(gpt.GPT2_124M, 8, 1024)
        larger = (Shape(gpt.GPT2_350M, 8, 1024), Shape(gpt.GPT2_774M, 8, 1024))
        return (first, *larger) if level == "full" else (first,)
    if level == "quick":
        return (Shape(gpt.SMALLEST, 4, 256),)
    return (Shape(gpt.GPT2_124M, 1, 1024), Shape(gpt.SMALL, 4, 256))


dtypes = narrow_on_a_gpu


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Iterator[Case]:
    """The one case of a shape."""
    gpt.forget_graphs()
    config, steps = shape.model.config, _Steps(shape, dtype, device)
    count = shape.batch * shape.tokens
    flops = flops_per_token(shape.model.empty, config.n_layer, config.n_embd, shape.tokens)
    flops -= 6 * config.n_layer * config.n_embd * shape.tokens  # what the causal mask hides
    ours, skipped = gpt.ours(steps.ours, dtype, device, impls)
    yield Case(
        op="gpt_training",
        shape=str(shape),
        dtype=dtype,
        direction=BOTH,
        plain=steps.plain,
        ours={**ours, COMPILED: steps.ours_compiled},
        peers=steps.peers(),
        flops=int(flops * count),
        sizes={
            "layers": config.n_layer,
            "C": config.n_embd,
            "T": shape.tokens,
            "B": shape.batch,
        },
        series=shape.model.name,
        tokens=count,
        skipped=skipped,
        # The truth of a large model takes minutes.
        check=steps.check if shape.model in (gpt.SMALLEST, gpt.SMALL) else None,
    )


class _Steps:
    """A step of each candidate, on the same weights and tokens."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        config = shape.model.config
        self._dtype, self._device = dtype, device
        self._under_autocast = device.type == "cuda" and dtype != torch.float32
        held = torch.float32 if self._under_autocast else dtype
        self._weights = Weights(config, held, device)
        self._tokens = gpt.random_tokens(config, shape.batch, shape.tokens, device=device)
        # What transformers makes of labels=tokens: nothing follows the last token.
        self._targets = self._tokens.roll(-1, dims=1)
        self._targets[:, -1] = _IGNORED

    def plain(self) -> Call:
        model = self._weights.plain()
        return self._step(model, model)

    def ours(self, impl: str) -> Call:
        model = self._weights.ours(impl)
        return self._step(model, model)

    def ours_compiled(self) -> Call:
        model = self._weights.ours("torch")
        return self._step(model, gpt.compiled(model))

    def peers(self) -> dict[str, Callable[[], Call]]:
        found = {f"{TWIN}, torch.compile": self._plain_compiled}
        if packages.is_installed(TRANSFORMERS):
            found[TRANSFORMERS] = self._theirs
            found[f"{TRANSFORMERS}, torch.compile"] = self._theirs_compiled
        return found

    def check(self, found: _Step) -> tuple[float, float]:
        """The error and the limit of the loss or of all gradients together, whichever is nearer to
        its limit. The largest error of each small gradient alone would be luck."""
        measured = [
            parity.compare(mine.to(self._dtype), plain, truth, k=k)
            for mine, plain, truth, k in zip(
                _pooled(found), *self._expected, (parity.K_FORWARD, parity.K_GRADIENT), strict=True
            )
        ]
        worst = max(measured, key=lambda m: m.error / m.limit)
        return worst.error, worst.limit

    def _plain_compiled(self) -> Call:
        model = self._weights.plain()
        return self._step(model, gpt.compiled(model))

    def _theirs(self) -> Call:
        model = self._weights.transformers.train()
        return self._their_step(model, model)

    def _theirs_compiled(self) -> Call:
        model = self._weights.transformers.train()
        return self._their_step(model, gpt.compiled(model, whole=False))

    def _step(self, model: nn.Module, forward: Callable[..., Tensor]) -> Call:
        """`forward` is the model, or the model compiled."""
        parameters = list(model.parameters())
        loss = functools.partial(forward, self._tokens, self._targets)
        return lambda: self._differentiated(loss, parameters)

    def _their_step(self, model: nn.Module, forward: Callable[..., Any]) -> Call:
        """The same of transformers' model. The weights in its blocks lie transposed, and their
        gradients."""
        named = dict(model.named_parameters())
        parameters = list(named.values())
        transposed = [".h." in name and x.dim() == 2 for name, x in named.items()]

        def loss() -> Tensor:
            found: Tensor = forward(self._tokens, labels=self._tokens, use_cache=False).loss
            return found

        def call() -> _Step:
            found, gradients = self._differentiated(loss, parameters)
            pairs = zip(gradients, transposed, strict=True)
            return found, [x.t() if turned else x for x, turned in pairs]

        return call

    def _differentiated(self, loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> _Step:
        narrow = torch.autocast(self._device.type, self._dtype) if self._under_autocast else None
        with narrow or contextlib.nullcontext():
            found = loss()
        return found.detach(), torch.autograd.grad(found, parameters)

    @functools.cached_property
    def _expected(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of the plain twin in the dtype, and in fp64."""
        with FullSums():
            plain = [x.to(self._dtype) for x in _pooled(self.plain()())]
        twin = self._weights.plain().double()
        return plain, _pooled(self._step(twin, twin)())


def _pooled(found: _Step) -> tuple[Tensor, Tensor]:
    loss, gradients = found
    return loss, torch.cat([gradient.flatten() for gradient in gradients])
