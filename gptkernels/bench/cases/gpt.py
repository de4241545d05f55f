"""What the cases of whole models share: the models, and random weights that all candidates have.

Each candidate is a model of its own, made when its turn comes: gptkernels.GPT, its plain twin of
nanoGPT's form, and transformers' GPT-2 where that is installed.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptkernels.bench.case import Call, untimeable
from gptkernels.bench.peers import packages
from gptkernels.core.choice import automatic
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.truth.plain_gpt import PlainGPT

TWIN, TRANSFORMERS = "nanoGPT-shaped", "transformers"
# Added to all parameters. Fresh weights have biases of 0, and repeat the last token of a text.
_NOISE = 0.05

_Model = TypeVar("_Model", GPT, PlainGPT)


@dataclass(frozen=True)
class Model:
    """A configuration and its name."""

    name: str
    config: GPTConfig

    @functools.cached_property
    def empty(self) -> GPT:
        """The model without weights, to count its parameters."""
        with torch.device("meta"):
            return GPT(self.config)


# Two layers of SMALL: torch.compile takes half as long.
SMALLEST = Model(
    "GPT 4M", GPTConfig(vocab_size=512, block_size=256, n_layer=2, n_head=6, n_embd=384)
)
SMALL = Model("GPT 7M", GPTConfig(vocab_size=512, block_size=256, n_layer=4, n_head=6, n_embd=384))
GPT2_124M = Model("GPT-2 124M", GPTConfig.named("gpt2"))
GPT2_350M = Model("GPT-2 350M", GPTConfig.named("gpt2-medium"))
GPT2_774M = Model("GPT-2 774M", GPTConfig.named("gpt2-large"))


class Weights:
    """Random weights of a configuration, and models that have them: all share their memory."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device

    @functools.cached_property
    def state(self) -> dict[str, Tensor]:
        """The weights by their names, the same ones each time."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            model = GPT(self.config)
            for parameter in model.parameters():
                parameter.add_(_NOISE * torch.randn_like(parameter))
        model.to(self.device, self.dtype)
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def ours(self, impl: str) -> GPT:
        """A gptkernels.GPT."""
        return self._put_into(GPT).set_impl(impl)

    def plain(self) -> PlainGPT:
        """Its twin in plain PyTorch."""
        return self._put_into(PlainGPT)

    @functools.cached_property
    def transformers(self) -> Any:
        """A transformers.GPT2LMHeadModel. ImportError where transformers does not import."""
        package = packages.load(TRANSFORMERS)
        with tempfile.TemporaryDirectory() as folder, _no_progress_bars():
            self.ours("torch").save_pretrained(folder)
            model: Any = package.GPT2LMHeadModel.from_pretrained(
                folder, dtype=self.dtype, attn_implementation="sdpa"
            )
        model.loss_type = "ForCausalLM"  # the default, which it warns about, and breaks graphs by
        return model.to(self.device)

    def _put_into(self, kind: type[_Model]) -> _Model:
        with torch.device("meta"):
            model = kind(self.config)
        model.load_state_dict(self.state, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model


def ours(
    make: Callable[[str], Call], dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> tuple[dict[str, Callable[[], Call]], dict[str, str]]:
    """Of `make`, a function of an implementation: what makes the calls of "auto", which users get,
    and of each of `impls` that "auto" does not take here; and why some of `impls` cannot run."""
    makers: dict[str, Callable[[], Call]] = {"auto": functools.partial(make, "auto")}
    skipped = {}
    for impl in impls:
        reason = untimeable(impl, device, dtype)
        if reason is not None:
            skipped[impl] = reason
        elif impl != automatic(device.type):
            makers[impl] = functools.partial(make, impl)
    return makers, skipped


def random_tokens(config: GPTConfig, *sizes: int, device: torch.device) -> Tensor:
    """Tokens (B, T) int64, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, sizes, generator=generator).to(device)


def compiled(function: Callable[..., Any], *, whole: bool = True) -> Callable[..., Any]:
    """The function under torch.compile for sizes that stay the same; `whole`: as one graph, or an
    error says why not."""
    return torch.compile(function, dynamic=False, fullgraph=whole)


def forget_graphs() -> None:
    """Drops what torch.compile made for the cases before: of one function it keeps eight graphs,
    and runs later ones uncompiled."""
    torch.compiler.reset()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
