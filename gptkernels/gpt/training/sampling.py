"""A text that a model continues while it is trained, to see what it has learned so far."""

from __future__ import annotations

from collections.abc import Callable

from gptkernels.gpt.generation.generate import stream
from gptkernels.gpt.generation.request import Request
from gptkernels.gpt.model import GPT
from gptkernels.gpt.tokenizer import Tokenizer
from gptkernels.gpt.training.config import TrainConfig


class Sampler:
    """Continues `config.sample_prompt`, or nothing where `config.sample_interval` is 0.

    Raises ValueError for a prompt that the tokenizer turns into no token.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, block_size: int) -> None:
        self._tokenizer = tokenizer
        if not config.sample_interval:  # a vocabulary of characters may lack those of the default
            return
        prompt = tokenizer.encode(config.sample_prompt)[-block_size:]
        if not prompt:
            raise ValueError(
                f"sample_prompt is {config.sample_prompt!r}, which the tokenizer "
                f"{config.tokenizer!r} turns into no token; at least one is wanted"
            )
        # With a seed of its own, sampling draws nothing from PyTorch's generators.
        self._request = Request(
            tuple(prompt), config.sample_tokens, eos=tokenizer.eos, seed=config.seed
        )

    def sample(self, model: GPT, check: Callable[[], None]) -> str:
        """The prompt and what `model` adds to it. Calls `check` before each token: what that raises
        ends it, and leaves nothing changed."""
        tokens = list(self._request.tokens)
        events = stream(model, [self._request], slots=1, vocab_size=self._tokenizer.vocab_size)
        for event in events:
            check()
            if event.token is not None:
                tokens.append(event.token)
        return self._tokenizer.decode(tokens)
