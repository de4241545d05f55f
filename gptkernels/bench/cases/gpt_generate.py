"""Speed of `gptkernels.GPT.generate`: random prompts continued, the likeliest token each time.

The baseline generates as nanoGPT does: the plain twin reads the whole text again for each token.
Beside it stands transformers' generate, with its own cache and with a static one, whose steps it
compiles. A call must do at least this, L layers and C width:

    bytes         the weights once for each new token, but of the position table; keys and values
                  of each token before it, 2 L C
    operations    2 for each weight of a block and token, and of the head and new token; 4 L C for
                  each pair of a token and one that it sees
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptkernels.bench.case import FORWARD, Call, Case
from gptkernels.bench.cases import gpt
from gptkernels.bench.cases.dtypes import narrow_on_a_gpu
from gptkernels.bench.cases.gpt import TRANSFORMERS, Weights
from gptkernels.bench.peers import packages

# A CPU takes minutes for more texts by the baseline.
_MOST_TEXTS_ON_CPU = 16


@dataclass(frozen=True)
class Shape:
    """A model, how many texts it continues, the tokens of each prompt and behind it."""

    model: gpt.Model
    batch: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.model.name} B{self.batch} prompt {self.prompt} new {self.new}"

    @property
    def work(self) -> tuple[int, int]:
        """Numbers that any implementation must read, and operations that it must do."""
        config = self.model.config
        in_all = sum(parameter.numel() for parameter in self.model.empty.parameters())
        weights = in_all - config.block_size * config.n_embd
        head = config.vocab_size * config.n_embd
        layers = config.n_layer * config.n_embd
        read = self.prompt + self.new - 1  # tokens that go through the blocks
        cached = sum(range(self.prompt, read))
        products = 2 * (weights - head) * read + 2 * head * self.new
        seen = read * (read + 1) // 2
        return (
            weights * self.new + self.batch * 2 * layers * cached,
            self.batch * (products + 4 * layers * seen),
        )


def shapes(device_type: str, level: str) -> Sequence[Shape]:
    """GPT-2's smallest model, one text first, then more; on a CPU a small model in brief."""
    on_gpu = device_type == "cuda"
    if level == "quick" and not on_gpu:
        return (Shape(gpt.SMALLEST, 1, 32, 16),)
    batches = {"quick": (1,), "default": (1, 8), "full": (1, 8, 64)}[level]
    prompt, new = (128, 64) if on_gpu else (32, 16)
    return tuple(Shape(gpt.GPT2_124M, batch, prompt, new) for batch in batches)


dtypes = narrow_on_a_gpu


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Iterator[Case]:
    """The one case of a shape."""
    gpt.forget_graphs()
    texts = Texts(shape, dtype, device)
    peers = {}
    if packages.is_installed(TRANSFORMERS):
        peers[TRANSFORMERS] = texts.theirs
        peers[f"{TRANSFORMERS}, static cache, torch.compile"] = texts.theirs_static
    yield texts.case("gpt_generate", impls, texts.plain, peers, tokens=shape.batch * shape.new)


class Texts:
    """What continues the same prompts with the same weights, by each candidate. Each call returns
    the prompts with the new tokens behind them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        config = shape.model.config
        self.weights = Weights(config, dtype, device)
        self.prompts = gpt.random_tokens(config, shape.batch, shape.prompt, device=device)

    def case(
        self,
        op: str,
        impls: Sequence[str],
        plain: Callable[[], Call],
        peers: Mapping[str, Callable[[], Call]],
        tokens: int,
    ) -> Case:
        """These candidates, and ours."""
        shape, config = self.shape, self.shape.model.config
        numbers, flops = shape.work
        ours, skipped = gpt.ours(self.ours, self.dtype, self.device, impls)
        return Case(
            op=op,
            shape=str(shape),
            dtype=self.dtype,
            direction=FORWARD,
            plain=plain,
            ours=ours,
            peers=peers,
            bytes_moved=numbers * self.dtype.itemsize,
            # A step reads what the step before it has read.
            working_set=numbers * self.dtype.itemsize // shape.new,
            flops=flops,
            sizes={
                "layers": config.n_layer,
                "C": config.n_embd,
                "B": shape.batch,
                "prompt": shape.prompt,
                "new": shape.new,
            },
            series=shape.model.name,
            tokens=tokens,
            skipped=skipped,
        )

    def plain(self) -> Call:
        """The plain twin, without a cache. NotImplementedError for many texts on a CPU."""
        if self.device.type == "cpu" and self.shape.batch > _MOST_TEXTS_ON_CPU:
            raise NotImplementedError(
                "it reads the whole texts again for each token, "
                f"which takes a CPU too long for {self.shape.batch} of them"
            )
        return self.without_cache(self.likeliest_of_plain())

    def likeliest_of_plain(self) -> Callable[[Tensor], Tensor]:
        """Texts (B, T) to the likeliest next tokens (B, 1), by the plain twin."""
        model = self.weights.plain().eval()

        def likeliest(texts: Tensor) -> Tensor:
            # As in nanoGPT, the head sees the last token alone.
            last: Tensor = model.transformer(texts)[:, -1:]
            return model.lm_head(last).argmax(-1)

        return likeliest

    def without_cache(self, likeliest: Callable[[Tensor], Tensor]) -> Call:
        """`likeliest` gives the next token of each text."""

        @torch.no_grad()
        def call() -> Tensor:
            texts = self.prompts
            for _ in range(self.shape.new):
                texts = torch.cat((texts, likeliest(texts)), dim=1)
            return texts

        return call

    def ours(self, impl: str) -> Call:
        """By `generate`, all texts at a time."""
        model, shape = self.weights.ours(impl).eval(), self.shape
        # Without a seed it would draw one.
        return lambda: model.generate(
            self.prompts, shape.new, temperature=0.0, slots=shape.batch, seed=0
        )

    def theirs(self) -> Call:
        """By transformers' generate."""
        return self._by(self.weights.transformers)

    def theirs_static(self) -> Call:
        """By the same with a static cache; the steps behind the prompt are compiled."""
        model = self.weights.transformers
        from transformers import CompileConfig

        how: Any = CompileConfig(dynamic=False)
        how._compile_all_devices = True  # a CPU is left out otherwise
        return self._by(model, cache_implementation="static", compile_config=how)

    def _by(self, model: Any, **options: Any) -> Call:
        # Nothing ends a text early.
        model.generation_config.eos_token_id = None
        given = {"attention_mask": torch.ones_like(self.prompts), "pad_token_id": 0}
        wanted = {"max_new_tokens": self.shape.new, "do_sample": False}
        return functools.partial(model.generate, self.prompts, **given, **wanted, **options)
