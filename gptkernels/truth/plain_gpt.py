"""A GPT-1, GPT-2 or GPT-3 in plain PyTorch. gptkernels.GPT replaces it and is compared with it.

It needs only PyTorch. Its parameters have the same names as those of gptkernels.GPT, so
`load_state_dict` copies weights from one to the other. Then logits, loss and gradients agree up to
rounding:

    model = gptkernels.GPT(config)
    plain = PlainGPT(model.config)
    plain.load_state_dict(model.state_dict())

`python -m gptkernels.truth.plain_gpt` does that with a small random model, in two dtypes, and
prints the errors of both against fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainConfig:
    """The shape of a PlainGPT. A gptkernels.GPTConfig works as well. n_inner=None means
    4 * n_embd."""

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


class Attention(nn.Module):
    """Causal self-attention between two linear layers. If `window` is not None, a token sees itself
    and the window - 1 tokens before it."""

    def __init__(self, config: Any, window: int | None = None) -> None:
        super().__init__()
        self.n_head, self.dropout, self.window = config.n_head, config.dropout, window
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, T, C) to (B, T, C)."""
        q, k, v = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        if self.window is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            before = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=x.device).tril()
            band = before & ~before.tril(-self.window)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=band, dropout_p=dropout)
        return self.c_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Linear, GELU, linear. The width of the GELU is n_inner."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.approximate = config.approximate
        self.c_fc = nn.Linear(config.n_embd, inner, bias=config.bias)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, T, C) to (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    """One transformer block. With norm "pre" (GPT-2) it computes x + attention(norm(x)), then
    x + mlp(norm(x)); with "post" (GPT-1) norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.attn = Attention(config, config.window if index % 2 else None)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout, self.norm = config.dropout, config.norm

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, T, C) to (B, T, C)."""
        if self.norm == "post":
            x = self.ln_1(x + F.dropout(self.attn(x), self.dropout, self.training))
            return self.ln_2(x + F.dropout(self.mlp(x), self.dropout, self.training))
        x = x + F.dropout(self.attn(self.ln_1(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Everything but the head: the embeddings, the blocks and the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        if config.norm == "pre":
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.dropout, self.norm = config.dropout, config.norm

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (B, T) to (B, T, C)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = block(x)
        return self.ln_f(x) if self.norm == "pre" else x


class PlainGPT(nn.Module):
    """Maps tokens (B, T) int64 to logits (B, T, V); with targets (B, T), to the mean loss in fp32
    or fp64."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.transformer = Decoder(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # as in GPT-2; GPT-1 does not scale c_proj by the depth
                scaled = name.endswith("c_proj.weight") and config.norm == "pre"
                layers = 2 * config.n_layer if scaled else 1
                nn.init.normal_(parameter, std=0.02 / layers**0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Returns the logits, or with targets the mean loss."""
        logits = self.lm_head(self.transformer(tokens))
        if targets is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _show_errors() -> None:
    import gptkernels

    config = gptkernels.GPTConfig(vocab_size=256, block_size=256, n_layer=4, n_head=4, n_embd=256)
    torch.manual_seed(0)
    tokens = torch.randint(config.vocab_size, (4, config.block_size + 1))
    print("errors against fp64: of the loss, and of each parameter's gradient, relative in norm")
    for dtype in (torch.float32, torch.bfloat16):
        models = {"gptkernels.GPT": gptkernels.GPT(config), "plain PyTorch": PlainGPT(config)}
        weights = {k: v.to(dtype) for k, v in models["gptkernels.GPT"].state_dict().items()}
        found = {}
        for name, model in {**models, "fp64": PlainGPT(config)}.items():
            model.load_state_dict(weights)
            model.to(torch.float64 if name == "fp64" else dtype)
            loss = model(tokens[:, :-1], tokens[:, 1:])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            found[name] = (loss.item(), [x.double() for x in gradients])
        true_loss, true = found.pop("fp64")
        for name, (loss, of_model) in found.items():
            pairs = zip(of_model, true, strict=True)
            errors = torch.stack([(x - t).norm() / t.norm() for x, t in pairs])
            title = f"{str(dtype).removeprefix('torch.'):<9} {name:<15}"
            print(
                f"{title} loss {abs(loss - true_loss):.1e}   "
                f"gradients: median {errors.median():.1e}, worst {errors.max():.1e}"
            )


if __name__ == "__main__":
    _show_errors()
