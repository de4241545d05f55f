"""GPTConfig: the shape of a GPT decoder, checked once, when it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from gptkernels.core.checks import check_count, check_number, check_probability
from gptkernels.core.names import check_name
from gptkernels.nn.layers import head_width

# name: (n_layer, n_head, n_embd)
# Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, table 2.
_GPT2 = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
# Brown et al., "Language Models are Few-Shot Learners", 2020, table 2.1. Two of its rows do not
# multiply out: 1.3B's 24 heads of 128 do not fit its width of 2,048, which holds 16; and 13B's
# width of 5,140 is not a multiple of 128, as 5,120 is.
_GPT3 = {
    "gpt3-125M": (12, 12, 768),
    "gpt3-350M": (24, 16, 1024),
    "gpt3-760M": (24, 16, 1536),
    "gpt3-1.3B": (24, 16, 2048),
    "gpt3-2.7B": (32, 32, 2560),
    "gpt3-6.7B": (32, 32, 4096),
    "gpt3-13B": (40, 40, 5120),
    "gpt3-175B": (96, 96, 12288),
}
NAMES = ("mini", "gpt1", *_GPT2, *_GPT3)
"""What `GPTConfig.named` takes."""

# "Alternating dense and locally banded sparse attention patterns", the paper says, and gives no
# width. This is GPT-Neo's, the best known model of the kind.
_GPT3_WINDOW = 256


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a `gptkernels.GPT`; the defaults are GPT-2's smallest model.

    Fields:
        vocab_size: Number of token ids, V.
        block_size: Longest context, in tokens.
        n_layer: Number of blocks.
        n_head: Attention heads H of a block, which must divide `n_embd`.
        n_embd: Width C of the model. The width of a head, C / H, is at most 512.
        n_inner: Width F of the MLP, in place of 4 C.
        approximate: GELU by "tanh" (GPT-2's) or "none" (exact, by erf).
        layer_norm_eps: Number that every LayerNorm adds to the variance.
        dropout: Probability of dropout of the embedding, in attention and of what each branch
            adds, in training only.
        bias: Whether linear layers and LayerNorms have biases.
        norm: Where a LayerNorm stands: "pre" (GPT-2, GPT-3), before each branch, and one at the
            end; "post" (GPT-1), after each residual add.
        window: Tokens that each token sees in odd blocks, itself included (GPT-3's banded
            attention), in place of all. In even blocks, the first among them, it sees all.

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
    norm: str = "pre"
    window: int | None = None

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
        check_probability("dropout", self.dropout)
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias must be True or False, got {self.bias!r}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {self.norm!r}")
        if self.window is not None:
            check_count("window", self.window)

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.n_embd // self.n_head

    @property
    def d_inner(self) -> int:
        """Width F of the MLP, with n_inner=None resolved."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def window_of(self, block: int) -> tuple[int, int] | None:
        """The window of the attention in a block, counted from 0, as `gptkernels.attention` takes
        it; None where each token sees all before it."""
        return None if self.window is None or block % 2 == 0 else (self.window - 1, 0)

    @classmethod
    def named(cls, name: str) -> GPTConfig:
        """The configuration of a published model, dropout 0, or "mini", a small one of bytes
        (834,304 parameters), which `gptkernels train` takes on a CPU.

        "gpt1" (116,534,784 parameters); "gpt2" (124,439,808), "gpt2-medium" (354,823,168),
        "gpt2-large" (774,030,080), "gpt2-xl" (1,557,611,200); "gpt3-125M", "gpt3-350M",
        "gpt3-760M", "gpt3-1.3B", "gpt3-2.7B", "gpt3-6.7B", "gpt3-13B" or "gpt3-175B", whose odd
        blocks see 256 tokens: the paper names no width. ValueError for any other name.

        Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, and
        the two papers named in this file.
        """
        check_name("config name", name, NAMES)
        if name == "mini":
            # Two cores train it in some minutes. A longer context learns more slowly in these.
            return cls(vocab_size=256, block_size=64, n_layer=4, n_head=4, n_embd=128)
        if name == "gpt1":
            return cls(vocab_size=40478, block_size=512, norm="post")
        if name in _GPT2:
            n_layer, n_head, n_embd = _GPT2[name]
            return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        n_layer, n_head, n_embd = _GPT3[name]
        shape = cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        return dataclasses.replace(shape, block_size=2048, window=_GPT3_WINDOW)
