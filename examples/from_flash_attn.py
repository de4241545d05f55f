"""A small language model whose attention was written for flash-attn, moved over by one import.

    python examples/from_flash_attn.py TEXT

The import was `from flash_attn import flash_attn_qkvpacked_func, flash_attn_with_kvcache`. Who
wants flash-attn where it is, and this package elsewhere, writes

    try:
        from flash_attn import flash_attn_qkvpacked_func, flash_attn_with_kvcache
    except ImportError:
        from gptkernels.flash_attn_interface import ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.flash_attn_interface import flash_attn_qkvpacked_func, flash_attn_with_kvcache

WIDTH, HEADS, TOKENS = 64, 4, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """Causal attention with a residual sum, and a cache for generation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Tensor | None, held: int) -> Tensor:
        """x (B, T, WIDTH); the cache (2, B, TOKENS, HEADS, D) holds that many keys and values."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1))
        if cache is None:
            y = flash_attn_qkvpacked_func(qkv, causal=True, alibi_slopes=SLOPES)
        else:  # the new keys and values are written into the cache, in place
            y = flash_attn_with_kvcache(
                qkv[:, :, 0], cache[0], cache[1], qkv[:, :, 1], qkv[:, :, 2], cache_seqlens=held,
                causal=True, alibi_slopes=SLOPES,
            )  # fmt: skip
        return x + self.out(y.flatten(-2))


class Model(nn.Module):
    """Two blocks between an embedding and a head; ALiBi tells positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, caches: list[Tensor] | None = None, held: int = 0) -> Tensor:
        """Logits (B, T, 256) of tokens (B, T)."""
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, caches and caches[number], held)
        return self.head(x)


SLOPES = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625], device=DEVICE)
text = torch.tensor(list(Path(sys.argv[1]).read_bytes()), device=DEVICE)
torch.manual_seed(0)
model = Model().to(DEVICE)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(60):
    starts = torch.randint(len(text) - TOKENS - 1, (16,))
    batch = torch.stack([text[start : start + TOKENS + 1] for start in starts])
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")

with torch.no_grad():
    caches = [torch.zeros(2, 1, TOKENS, HEADS, WIDTH // HEADS, device=DEVICE) for _ in range(2)]
    tokens = text[None, :8]
    logits = model(tokens, caches, 0)
    while tokens.shape[1] < TOKENS:
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
        logits = model(tokens[:, -1:], caches, tokens.shape[1] - 1)
    whole = model(tokens)[:, -1]
    print("generated:", bytes(tokens[0].tolist()).decode(errors="replace"))
    print(f"with the cache and without: {(logits[:, -1] - whole).abs().max().item():.1e} apart")
