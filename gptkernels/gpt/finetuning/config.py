"""How to fine-tune: FinetuneConfig, whose defaults are the paper's, and the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from gptkernels.gpt.options import DEVICE, IMPL, check_choice, check_option, check_options, option
from gptkernels.gpt.precision import DTYPES


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune. Raises ValueError for a value out of range, TypeError for a wrong type.

    The defaults are those of Radford et al., "Improving Language Understanding by Generative
    Pre-Training", 2018, section 4.1.
    """

    epochs: int = option(3, "Times that each training example is seen.", least=1)
    batch_size: int = option(32, "Examples whose gradients make one step.", least=1)
    learning_rate: float = option(6.25e-5, "Highest learning rate, reached after the warm-up.")
    warmup_fraction: float = option(
        0.002,
        "Share of the steps in which the learning rate rises linearly, before it falls to 0.",
        least=0,
    )
    lm_coefficient: float = option(
        0.5, "Weight λ of the auxiliary language-model loss. With 0 it is left out.", least=0
    )
    dropout: float = option(0.1, "Probability of dropout in the pre-trained model.", least=0)
    head_dropout: float = option(
        0.1, "Probability of dropout of what the linear head reads.", least=0
    )
    weight_decay: float = option(0.01, "Weight decay of AdamW, of matrices only.", least=0)
    clip: float = option(
        1.0, "Largest norm of all gradients together. With 0 nothing is clipped.", least=0
    )
    transfer: str = option(
        "all",
        "Blocks taken from the pre-trained model, with its embeddings: all, or a number, where the "
        "others begin at random. With none nothing is taken.",
    )
    freeze_body: bool = option(
        False, "Whether to train the new tokens' embeddings and the linear head alone."
    )
    train_examples: int | None = option(
        None, "Examples to train on, drawn by the seed.", least=1, unset="all"
    )
    validation_fraction: float = option(
        0.05, "Share of the training part that is held out, where a task has no validation part."
    )
    seed: int = option(
        1337, "Seed of the new parameters, dropout and the order of examples.", least=0
    )
    dtype: str = option(
        "float32",
        "Dtype of the computation: float32, or bfloat16 under autocast. Weights stay float32.",
    )
    device: str = option("auto", DEVICE)
    impl: str = option("auto", IMPL)
    log_interval: int = option(10, "Steps between two lines of the log.", least=1)

    def __post_init__(self) -> None:
        check_options(self)
        check_option(self, "seed", self.seed < 2**63, "less than 2**63")
        check_option(self, "learning_rate", self.learning_rate > 0, "more than 0")
        check_option(self, "warmup_fraction", self.warmup_fraction <= 1, "at most 1")
        for name in ("dropout", "head_dropout"):
            check_option(self, name, getattr(self, name) < 1, "less than 1")
        share = self.validation_fraction
        check_option(self, "validation_fraction", 0 < share < 1, "between 0 and 1")
        count = self.transfer.isascii() and self.transfer.isdigit()
        right = count or self.transfer in ("all", "none")
        check_option(self, "transfer", right, "all, none or a number of blocks")
        # Blocks that begin at random would stay so.
        right = not self.freeze_body or self.transfer == "all"
        check_option(self, "transfer", right, "all, where freeze_body is set,")
        # float16 needs a scaled loss, which these short runs do without.
        check_choice(self, "dtype", [name for name in DTYPES if name != "float16"])


def learning_rate(config: FinetuneConfig, step: int, steps: int) -> float:
    """Linear warm-up to `learning_rate`, then a linear fall to 0 at `steps`; `step` counts from 0.

    Section 4.1: "a linear learning rate decay schedule with warmup over 0.2% of training".
    """
    warmup = config.warmup_fraction * steps
    if step < warmup:
        return config.learning_rate * min(1.0, (step + 1) / warmup)
    return config.learning_rate * (steps - step) / (steps - warmup)
