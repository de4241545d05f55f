"""GPTConfig: the shape of a GPT decoder, checked once, when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptkernels.layers import head_width
from gptkernels.ops.checks import check_count, check_probability

# name: (n_layer, n_head, n_embd); 50,257 tokens of vocabulary and 1,024 of context throughout.
# Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, table 2.
_GPT2 = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a `gptkernels.GPT`; the defaults are GPT-2's smallest model.

    Fields:
        vocab_size: number of token ids, V.
        block_size: longest context in tokens.
        n_layer: number of blocks.
        n_head: attention heads H; must divide n_embd.
        n_embd: model width C; the head width C / H is at most 256.
        n_inner: width F of the MLP; None means 4 * n_embd.
        approximate: GELU, "tanh" (GPT-2's) or "none" (exact, by erf).
        layer_norm_eps: added to the variance in every LayerNorm.
        dropout: one probability for embedding, attention and residual dropout, in training only.
        bias: whether linear layers and LayerNorms have biases.

    Raises TypeError for a field of the wrong type and ValueError for one out of range.
    """

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None
    approximate: str = "tanh"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer"):
            check_count(name, getattr(self, name))
        head_width("n_embd", self.n_embd, self.n_head)
        if self.n_inner is not None:
            check_count("n_inner", self.n_inner)
        if self.approximate not in ("tanh", "none"):
            raise ValueError(f"approximate must be 'tanh' or 'none', got {self.approximate!r}")
        check_number("layer_norm_eps", self.layer_norm_eps)
        if not (0.0 < self.layer_norm_eps < math.inf):
            raise ValueError(
                f"layer_norm_eps must be positive and finite, got {self.layer_norm_eps}"
            )
        check_number("dropout", self.dropout)
        check_probability("dropout", self.dropout)
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias must be True or False, got {self.bias!r}")

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.n_embd // self.n_head

    @property
    def d_inner(self) -> int:
        """Width F of the MLP, with n_inner=None resolved."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @classmethod
    def named(cls, name: str) -> GPTConfig:
        """The configuration of a published model, dropout 0.

        "gpt2" (124,439,808 parameters), "gpt2-medium" (354,823,168), "gpt2-large" (774,030,080)
        or "gpt2-xl" (1,557,611,200). ValueError for any other name.
        """
        if name not in _GPT2:
            raise ValueError(f"config name must be one of {', '.join(_GPT2)}, got {name!r}")
        n_layer, n_head, n_embd = _GPT2[name]
        return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


def check_number(name: str, value: object) -> None:
    """An int or a float, and no bool. Raises TypeError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
