"""scripts/flash_attn_tests.py, on a checkout of a few tests that are made up."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from harness import ROOT, command

TESTS = """
import pytest, torch
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.bert_padding import pad_input
from flash_attn.ops.layer_norm import dropout_add_layer_norm_subset
from flash_attn.ops.triton.layer_norm import layer_norm_fn, layer_norm_ref

assert torch.cuda.get_device_capability("cuda") == (8, 0)
# What the first call loads takes longer than a case may.
q = torch.ones(1, 2, 1, 8)
layer_norm_fn(flash_attn_func(q, q, q), q[0, 0, 0], None)


@pytest.mark.parametrize("d", [8, 16])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(3, 4), (5, 6), (7, 8)])
def test_right(seqlen_q, seqlen_k, d):
    q = torch.randn(1, seqlen_q, 2, d, device="cuda")
    k = torch.randn(1, seqlen_k, 2, d, device="cuda")
    assert flash_attn_func(q, k, k).shape == q.shape
    module = torch.nn.LayerNorm(d, device="cuda").to("cuda")
    found = layer_norm_fn(q, module.weight, module.bias)
    assert (found - layer_norm_ref(q, module.weight, module.bias)).abs().max() < 1e-5


def test_refused():
    q = torch.randn(1, 1, 2, 8)
    flash_attn_with_kvcache(q, q, q, rotary_cos=q)


@pytest.mark.parametrize("d", [1, 2])
def test_missing(d):
    dropout_add_layer_norm_subset(d)


def test_skipped():
    pytest.skip()


def test_wrong():
    assert 1 + 1 == 3


def test_lacking_in_torch():
    raise NotImplementedError("prod is not implemented")


@pytest.mark.parametrize("d", [1, 1, 1])
def test_large(d):
    while True:
        torch.ones(99)
"""
REFERENCES = """
import nothing_that_is_installed

def layer_norm_ref(x, weight, bias, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

def rms_norm_ref():
    pass
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    files = {"tests/test_flash_attn.py": TESTS, "flash_attn/ops/triton/layer_norm.py": REFERENCES}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_outcome_is_counted(checkout: Path) -> None:
    script = ROOT / "scripts" / "flash_attn_tests.py"
    options = ("--source", checkout, "--cases", "14", "--seconds", "0.3")
    result = command(sys.executable, script, *options, timeout=120)
    assert result.returncode == 1, result.stderr
    rows = dict(re.findall(r"^\| `?(\w+)`? \| ([\d |]+) \|$", result.stdout, re.M))
    # available; passed, refused, failed, skipped, too large
    assert {name: [int(n) for n in row.split("|")] for name, row in rows.items()} == {
        "test_right": [6, 5, 0, 0, 0, 0],  # 14 cases, as many of each test as there are
        "test_refused": [1, 0, 1, 0, 0, 0],
        "test_missing": [2, 0, 2, 0, 0, 0],
        "test_skipped": [1, 0, 0, 0, 1, 0],
        "test_wrong": [1, 0, 0, 1, 0, 0],
        "test_lacking_in_torch": [1, 0, 0, 1, 0, 0],
        "test_large": [3, 0, 0, 0, 0, 3],
        "all": [15, 5, 3, 2, 1, 3],
    }
    assert "refused: dropout_add_layer_norm_subset: 2" in result.stdout
    assert "refused: rotary_cos: 1" in result.stdout
    assert "::test_wrong: AssertionError: assert (1 + 1) == 3" in result.stdout
    assert not [*checkout.rglob("__pycache__")]
