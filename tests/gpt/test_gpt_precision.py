"""Logits in full precision, whatever autocast says."""

from __future__ import annotations

import pytest
import torch
from models import shaken

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.precision import autocast, full_logits


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 600])  # the CPU kernel's, and more than it takes
@torch.inference_mode()
def test_the_head_is_computed_in_the_dtype_of_its_weight(narrow: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    model = shaken(GPT(GPTConfig(50, 8, 1, 2, 16)))
    hidden = torch.randn(rows, 16).to(narrow)
    expected = hidden.double() @ model.lm_head.weight.double().T
    with autocast(hidden.device, narrow):
        for given in (hidden, hidden.float()):
            logits = full_logits(model, given)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
        own = full_logits(model.to(narrow), hidden)
    assert own.dtype == torch.float32
    assert torch.equal(own, model.logits(hidden).float())
