"""Small models with random weights, as people have them: what `gptkernels.accelerate` is tested and
measured on. Those of transformers need transformers; the others are written as nanoGPT and minGPT
write them, or are PyTorch's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model; its MLP is four times as wide."""

    layers: int = 2
    heads: int = 4
    width: int = 64
    tokens: int = 64
    vocabulary: int = 101
    dropout: float = 0.0


class NanoNorm(nn.Module):
    """nanoGPT's LayerNorm, whose bias may be None."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> its shape."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoAttention(nn.Module):
    """nanoGPT's CausalSelfAttention; minGPT's is that without flash."""

    def __init__(self, size: Size, bias: bool, flash: bool) -> None:
        super().__init__()
        C, p = size.width, size.dropout
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
        self.attn_dropout, self.resid_dropout = nn.Dropout(p), nn.Dropout(p)
        self.n_head, self.n_embd, self.dropout, self.flash = size.heads, C, p, flash
        if not flash:
            seen = torch.ones(size.tokens, size.tokens).tril()
            self.mask: Tensor
            self.register_buffer("mask", seen[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> its shape."""
        B, T, C = x.size()
        q, k, v = (
            y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for y in self.c_attn(x).split(self.n_embd, dim=2)
        )
        if self.flash:
            p = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.mask[:, :, :T, :T] == 0, -math.inf)
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class NanoMLP(nn.Module):
    """nanoGPT's MLP."""

    def __init__(self, size: Size, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(size.width, 4 * size.width, bias=bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * size.width, size.width, bias=bias)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> its shape."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class NanoBlock(nn.Module):
    """nanoGPT's Block."""

    def __init__(self, size: Size, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = NanoNorm(size.width, bias), NanoNorm(size.width, bias)
        self.attn, self.mlp = NanoAttention(size, bias, flash=True), NanoMLP(size, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> its shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NewGELU(nn.Module):
    """minGPT's."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> its shape."""
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class MinBlock(nn.Module):
    """minGPT's Block, whose MLP is a function of modules."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        C = size.width
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = NanoAttention(size, bias=True, flash=False)
        parts = {"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)}
        self.mlp = nn.ModuleDict({**parts, "act": NewGELU(), "dropout": nn.Dropout(size.dropout)})

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> its shape."""
        x = x + self.attn(self.ln_1(x))
        m = self.mlp
        return x + m["dropout"](m["c_proj"](m["act"](m["c_fc"](self.ln_2(x)))))


class Written(nn.Module):
    """Tokens to logits through blocks that somebody wrote."""

    def __init__(self, size: Size, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.wte = nn.Embedding(size.vocabulary, size.width)
        self.wpe = nn.Embedding(size.tokens, size.width)
        self.h, self.ln_f = nn.ModuleList(blocks), nn.LayerNorm(size.width)
        self.lm_head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


class TorchBlocks(nn.Module):
    """nn.TransformerEncoder, causal."""

    def __init__(self, size: Size, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, size.dropout, "gelu", batch_first=True,
            norm_first=norm_first,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> its shape."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.encoder(x, mask, is_causal=True)


def _nanogpt(size: Size, bias: bool = True) -> nn.Module:
    return Written(size, [NanoBlock(size, bias) for _ in range(size.layers)])


def _mingpt(size: Size) -> nn.Module:
    return Written(size, [MinBlock(size) for _ in range(size.layers)])


def _torch(size: Size, norm_first: bool) -> nn.Module:
    return Written(size, [TorchBlocks(size, norm_first)])


def _of_transformers(model: str, config: str, **named: Any) -> Callable[[Size], nn.Module]:
    def make(size: Size) -> nn.Module:
        import transformers

        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        wanted = {key: value(size) if callable(value) else value for key, value in named.items()}
        made = getattr(transformers, config)(vocab_size=size.vocabulary, **special, **wanted)
        network: nn.Module = getattr(transformers, model)(made)
        return network

    return make


_N = {
    "n_layer": lambda s: s.layers, "n_head": lambda s: s.heads, "n_embd": lambda s: s.width,
    "n_positions": lambda s: s.tokens, "resid_pdrop": lambda s: s.dropout,
    "embd_pdrop": lambda s: s.dropout, "attn_pdrop": lambda s: s.dropout,
}  # fmt: skip
_LONG = {
    "num_hidden_layers": lambda s: s.layers, "num_attention_heads": lambda s: s.heads,
    "hidden_size": lambda s: s.width, "max_position_embeddings": lambda s: s.tokens,
}  # fmt: skip

# Those that have a generate, and logits of each token.
LANGUAGE_MODELS: dict[str, Callable[[Size], nn.Module]] = {
    "GPT-2": _of_transformers("GPT2LMHeadModel", "GPT2Config", **_N),
    "OpenAI-GPT": _of_transformers("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **_N),
    "GPT-Neo": _of_transformers(
        "GPTNeoForCausalLM", "GPTNeoConfig", num_layers=lambda s: s.layers,
        attention_types=lambda s: [[["global", "local"], s.layers // 2]],
        num_heads=lambda s: s.heads, hidden_size=lambda s: s.width,
        window_size=lambda s: s.tokens // 8, max_position_embeddings=lambda s: s.tokens,
        attention_dropout=lambda s: s.dropout, resid_dropout=lambda s: s.dropout,
        embed_dropout=lambda s: s.dropout,
    ),
    "GPT-NeoX": _of_transformers(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", intermediate_size=lambda s: 4 * s.width,
        attention_dropout=lambda s: s.dropout, hidden_dropout=lambda s: s.dropout, **_LONG,
    ),
    "GPT-BigCode": _of_transformers("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **_N),
    "OPT": _of_transformers(
        "OPTForCausalLM", "OPTConfig", ffn_dim=lambda s: 4 * s.width,
        word_embed_proj_dim=lambda s: s.width, dropout=lambda s: s.dropout,
        attention_dropout=lambda s: s.dropout, **_LONG,
    ),
    "GPT-J": _of_transformers(
        "GPTJForCausalLM", "GPTJConfig", rotary_dim=lambda s: s.width // s.heads // 2, **_N
    ),
}  # fmt: skip
# GPT-2's other heads.
HEADS: dict[str, Callable[[Size], nn.Module]] = {
    "GPT-2, two heads": _of_transformers("GPT2DoubleHeadsModel", "GPT2Config", num_labels=1, **_N),
    "GPT-2, classes": _of_transformers("GPT2ForSequenceClassification", "GPT2Config", **_N),
    "GPT-2, answers": _of_transformers("GPT2ForQuestionAnswering", "GPT2Config", **_N),
}
OTHERS: dict[str, Callable[[Size], nn.Module]] = {
    "nanoGPT": _nanogpt,
    "nanoGPT without biases": lambda size: _nanogpt(size, bias=False),
    "minGPT": _mingpt,
    "nn.TransformerEncoder": lambda size: _torch(size, norm_first=False),
    "nn.TransformerEncoder, norm first": lambda size: _torch(size, norm_first=True),
}


def logits(output: Any) -> Tensor:
    """The first tensor of what a model returned."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output["logits"] if "logits" in output else output["start_logits"]
    return found
