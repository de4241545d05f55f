"""GPT-2, accelerated by one line, fine-tuned by transformers' Trainer.

    python examples/finetune_gpt2.py TEXT [FOLDER]

FOLDER: a Hugging Face folder with a GPT-2 and its tokenizer; without one, a small GPT-2 of random
weights learns the bytes of TEXT. Needs transformers and accelerate.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import gptkernels

text, folder = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
model: Any
if folder:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    ids = hf.AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"))["input_ids"]
else:
    config = hf.GPT2Config(vocab_size=256, n_layer=2, n_head=4, n_embd=128, n_positions=128)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model, ids = hf.GPT2LMHeadModel(config), list(text.read_bytes())

print(gptkernels.accelerate(model))

pieces = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
data = [{"input_ids": piece, "labels": piece} for piece in pieces[:512]]
arguments = hf.TrainingArguments(
    "finetuned", per_device_train_batch_size=8, num_train_epochs=1, logging_steps=10,
    learning_rate=1e-3, report_to=[], save_strategy="no",
)  # fmt: skip
trainer = hf.Trainer(model, arguments, train_dataset=data)
trainer.train()
trainer.save_model()
