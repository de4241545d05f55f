"""Products keep a NaN in its row, on CPUs with AMX too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from harness import BF16, FP16, FP32, name_of

from benchmarks import child_environment
from gptkernels.core import products


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=name_of)
@pytest.mark.parametrize("inner", [31, 32, 33, 64, 100])
def test_a_nan_stays_in_its_row(inner: int, dtype: torch.dtype) -> None:
    """17 rows or more, and rows that end within an AMX tile, are what oneDNN gets wrong."""
    a, b = torch.randn(40, inner).to(dtype), torch.randn(inner, 24).to(dtype)
    bad = a.clone()
    bad[20, 3] = torch.nan
    for product in (products.mm, lambda x, y: products.linear(x, y.t(), None)):
        clean, dirty = product(a, b), product(bad, b)
        assert dirty[20].isnan().all()
        others = torch.arange(40) != 20
        assert torch.equal(clean[others], dirty[others])
    torch.testing.assert_close(
        products.mm(a, b).double(), a.double() @ b.double(), rtol=0, atol=0.5
    )


def test_nothing_is_padded_where_onednn_may_not_use_amx() -> None:
    """A padded product adds up in another order than PyTorch's own."""
    code = "import torch; from gptkernels.core import products; print(products._AMX)"
    environment = child_environment(ONEDNN_MAX_CPU_ISA="AVX512_CORE")
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"


def test_they_compile_whole() -> None:
    a, b = torch.randn(40, 33).bfloat16(), torch.randn(33, 24).bfloat16()
    compiled = torch.compile(products.mm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), products.mm(a, b))
