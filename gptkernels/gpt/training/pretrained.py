"""A model that training goes on from: its weights in fp32, its shape, its own tokenizer.

weights     as they were; a head of its own stays one
dropout     none, unless it is asked for
positions   all, or the first `block_size`
tokenizer   the model's; a name is for a model beside which nothing says it
rates       what `continuing_rate` (recipes.py) chooses, where none is asked for
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from gptkernels.gpt.loading import fitting, load_network
from gptkernels.gpt.model import GPT
from gptkernels.gpt.tokenizer import Tokenizer, holds, load_tokenizer, name_of
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.recipes import continuing_rate, parameters
from gptkernels.gpt.training.vocabulary import OWN

_POSITIONS = "transformer.wpe.weight"


@dataclass(frozen=True)
class Pretrained:
    """A model to train further, on the CPU; training changes its weights in place."""

    path: Path
    model: GPT
    tokenizer: Tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: str = "auto",
        *,
        dropout: float = 0.0,
        block_size: int | None = None,
    ) -> Pretrained:
        """The model at `path`: a Hugging Face GPT-2 or OpenAI-GPT folder, a folder that `train`
        wrote, its checkpoint.pt, or a nanoGPT checkpoint.

        tokenizer: its name, where nothing beside the model says it, else "auto". dropout: in
        training. block_size: the longest context from now on, in tokens; None: the model's.

        Raises FileNotFoundError or ValueError for a model that cannot be read, one whose tokenizer
        is unknown or another than was named, and a dropout or block_size out of range; ImportError
        where a package is missing.
        """
        network, own = load_network(Path(path), "init")
        name = None if tokenizer == "auto" else tokenizer
        found = own() or (None if name is None else load_tokenizer(name))
        found = fitting(Path(path), network, found, name)
        begun = cls(Path(path), _reshaped(network, dropout, block_size), found)
        begun._check_same(tokenizer)
        return begun

    def settled(self, config: TrainConfig) -> TrainConfig:
        """`config` with the model's tokenizer, and with a learning rate where it has none.

        Raises ValueError where it names another tokenizer.
        """
        self._check_same(config.tokenizer)
        kept = name_of(self.tokenizer) or OWN
        rate = config.learning_rate
        if rate is None:
            rate = continuing_rate(parameters(self.model))
        return dataclasses.replace(config, tokenizer=kept, learning_rate=rate)

    def _check_same(self, name: str) -> None:
        """Raise ValueError where the tokenizer called `name` is not the model's."""
        if name in ("auto", name_of(self.tokenizer) or OWN):
            return
        if not holds(self.tokenizer, load_tokenizer(name)):
            raise ValueError(
                f"tokenizer is {name!r}, but {self.path} has another one, which it keeps: leave it "
                "out"
            )


def _reshaped(model: GPT, dropout: float, block_size: int | None) -> GPT:
    """A copy of `model` in fp32 with another dropout and fewer positions."""
    room = model.config.block_size
    length = room if block_size is None else block_size
    if length > room:
        raise ValueError(
            f"block_size is {length}, but the model to go on from has {room} positions, at "
            "most that is wanted"
        )
    config = dataclasses.replace(model.config, dropout=dropout, block_size=length)
    with torch.device("meta"):  # shapes alone: random weights would be drawn in vain
        network = GPT(config)
    state = model.state_dict()
    state[_POSITIONS] = state[_POSITIONS][: config.block_size]
    # A copy: what was loaded may be mapped from a file.
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    network.load_state_dict(copies, assign=True)
    if model.lm_head.weight is model.transformer.wte.weight:
        network.tie_head()
    return network
