"""LoRA on an accelerated GPT-2: what the adapters wrap runs as peft wants it, the rest is fused.

    python examples/lora_gpt2.py TEXT

A small GPT-2 of random weights learns the bytes of TEXT. Needs transformers and peft.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import gptkernels

tokens = torch.tensor(list(Path(sys.argv[1]).read_bytes()))
config = GPT2Config(vocab_size=256, n_layer=2, n_head=4, n_embd=128, n_positions=128)
config.bos_token_id = config.eos_token_id = None
lora = LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)

torch.manual_seed(0)
model = get_peft_model(GPT2LMHeadModel(config), lora)
print(gptkernels.accelerate(model))
model.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
for step in range(100):
    starts = torch.randint(len(tokens) - 64, (8,))
    batch = torch.stack([tokens[start : start + 64] for start in starts])
    loss = model(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, 49, 99):
        print(f"step {step + 1}: loss {loss.item():.3f}")
model.save_pretrained("adapter")
