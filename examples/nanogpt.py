"""nanoGPT's training, with three lines more: import, accelerate, and print of what was done.

    python examples/nanogpt.py TEXT

Its blocks are in benchmarks/families.py, as nanoGPT writes them; run this in the checkout.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import gptkernels
from benchmarks.families import OTHERS, Size

tokens = torch.tensor(list(Path(sys.argv[1]).read_bytes()))
torch.manual_seed(0)
size = Size(layers=4, heads=4, width=128, tokens=64, vocabulary=256, dropout=0.1)
model = OTHERS["nanoGPT"](size)
report = gptkernels.accelerate(model)
print(report)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(100):
    starts = torch.randint(len(tokens) - size.tokens - 1, (12,))
    x = torch.stack([tokens[s : s + size.tokens] for s in starts])
    y = torch.stack([tokens[s + 1 : s + 1 + size.tokens] for s in starts])
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")
