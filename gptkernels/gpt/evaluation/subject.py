"""The model that is evaluated, with its tokenizer, and by what it is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptkernels.core.device import choose_device
from gptkernels.gpt.evaluation.config import RunConfig
from gptkernels.gpt.evaluation.likelihood import Scorer
from gptkernels.gpt.loading import load
from gptkernels.gpt.model import GPT
from gptkernels.gpt.precision import DTYPES
from gptkernels.gpt.tokenizer import Tokenizer

_BATCH = 8


@dataclass(frozen=True)
class Subject:
    """A model and its tokenizer, where and as `run` says."""

    model: GPT
    tokenizer: Tokenizer
    run: RunConfig

    @classmethod
    def load(
        cls, path: str | Path, *, tokenizer: str | None = None, run: RunConfig | None = None
    ) -> Subject:
        """The model at `path`, a Hugging Face folder, one that `train` wrote, its checkpoint.pt or
        a nanoGPT checkpoint, with the tokenizer of this name or else its own.

        Raises FileNotFoundError and ValueError, in one sentence, for what is no such model, and
        RuntimeError for a device that is not there.
        """
        run = run or RunConfig()
        device = choose_device(run.device)
        model, own = load(Path(path), tokenizer)
        model.set_impl(run.impl).to(device)
        return cls(model.eval(), own, run)

    @property
    def length(self) -> int:
        """Tokens of the model's context."""
        return self.model.config.block_size

    def scorer(self) -> Scorer:
        """What computes its log-probabilities; its counts begin at 0."""
        return Scorer(
            self.model,
            vocab_size=self.tokenizer.vocab_size,
            batch_size=self.run.batch_size or _BATCH,
            dtype=DTYPES[self.run.dtype],
        )
