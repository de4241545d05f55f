"""Bad input of `attention` raises an error of one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DEVICE
from op_inputs import attention_inputs as inputs

from gptkernels import attention


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "sentence"),
        [
            (dict(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
            (dict(q=torch.zeros(2, 5, 16)), ValueError, r"q must have shape \(B, Tq, H, D\), got"),
            (dict(k=torch.zeros(5)), ValueError, r"k must have shape \(B, Tk, Hk, D\), got \(5,\)"),
            (dict(q=torch.zeros(2, 5, 4, 16).int()), TypeError, "q must be float32, .* got int32"),
            (dict(v=torch.zeros(2, 7, 2, 16).cfloat()), TypeError, "v must .* got complex64"),
            (dict(k=torch.zeros(2, 7, 2, 16).half()), TypeError, "k must have the dtype of q"),
            (
                dict(v=torch.zeros(2, 7, 2, 16, device="meta")),
                ValueError,
                "v must be on the device of q",
            ),
            (dict(k=torch.zeros(3, 7, 2, 16)), ValueError, r"k must have shape \(2, 7, 2, 16\)"),
            (dict(k=torch.zeros(2, 7, 2, 8)), ValueError, r"k must have shape \(2, 7, 2, 16\)"),
            (dict(v=torch.zeros(2, 6, 2, 16)), ValueError, r"v must have shape \(2, 7, 2, 16\)"),
            (
                {n: torch.zeros(2, 5, 4, 513) for n in "qkv"},
                ValueError,
                "q must have a head width between 1 and 512, got 513",
            ),
            (
                dict(v=torch.zeros(2, 7, 2, 513)),
                ValueError,
                "v must have a head width between 1 and 512, got 513",
            ),
            (
                {n: torch.zeros(2, 5, 4, 257) for n in "qkv"} | dict(impl="cuda"),
                NotImplementedError,
                "a head width of more than 256: only impl=.torch.* and .auto. take it, got impl=",
            ),
            (dict(q=torch.zeros(2, 5, 3, 16)), ValueError, "the heads of q must be a multiple"),
            (
                dict(q=torch.zeros(2, 5, 16, 4).transpose(2, 3)),
                ValueError,
                "q must have a unit stride",
            ),
            (dict(window=(-2, 0)), ValueError, "window must be at least 0 on either side, or -1"),
            (dict(window=(1, 2, 3)), ValueError, r"window must be a pair \(left, right\)"),
            (dict(window=5), ValueError, r"window must be a pair \(left, right\) .* got 5"),
            (dict(window=(1.5, 0)), ValueError, r"window must be a pair .* of integers"),
            (dict(softcap=-1.0), ValueError, "softcap must be positive, or 0 for none, got -1.0"),
            (dict(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite, got nan"),
            (dict(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1, got 1.5"),
            (dict(alibi_slopes=[1.0]), ValueError, r"alibi_slopes must have shape \(4,\)"),
            (dict(alibi_slopes=torch.ones(4, 2)), ValueError, r"alibi_slopes must have .*\(2, 4\)"),
            (dict(sinks=torch.ones(2)), ValueError, r"sinks must have shape \(4,\)"),
            (dict(sinks=torch.ones(4).int()), TypeError, "sinks must be float32, .* got int32"),
            (dict(sinks=[0.5] * 4), TypeError, "sinks must be a torch.Tensor, got list"),
            (dict(key_lengths=[1, 2]), TypeError, "key_lengths must be a torch.Tensor, got list"),
            (dict(key_lengths=torch.ones(2).long()), TypeError, "key_lengths must be int32"),
            (dict(key_lengths=torch.ones(3).int()), ValueError, r"key_lengths must have shape"),
            (
                dict(key_lengths=torch.tensor([8, 1]).int()),
                ValueError,
                "key_lengths must lie between 0 and Tk = 7, got 8",
            ),
            (
                dict(key_lengths=torch.tensor([2, -1]).int()),
                ValueError,
                "key_lengths must lie between 0 and Tk = 7, got -1",
            ),
            (dict(attn_mask=[True]), TypeError, "attn_mask must be a torch.Tensor, got list"),
            (
                dict(attn_mask=torch.ones(5, 7).int()),
                TypeError,
                "attn_mask .* must be float32, .* got int32",
            ),
            (
                dict(attn_mask=torch.ones(4, 7)),
                ValueError,
                r"attn_mask must broadcast to \(B, H, Tq, Tk\) = \(2, 4, 5, 7\), got \(4, 7\)",
            ),
            (dict(attn_mask=torch.ones(1, 1, 1, 5, 7)), ValueError, "attn_mask must broadcast"),
            (
                dict(attn_mask=torch.ones(5, 7), impl="triton"),
                NotImplementedError,
                "attn_mask: only impl=.torch., .cpu. and .auto. take it, got impl=.triton.",
            ),
            (dict(causal="no"), TypeError, "causal must be a bool, got 'no'"),
            (dict(deterministic="no"), TypeError, "deterministic must be a bool, got 'no'"),
            (dict(window=(True, 0)), ValueError, "window must be a pair .* of integers"),
            (dict(softmax_scale="x"), TypeError, "softmax_scale must be a number, got 'x'"),
            (dict(softcap=[1]), TypeError, r"softcap must be a number, got \[1\]"),
            (dict(dropout_p="a"), TypeError, "dropout_p must be a number, got 'a'"),
            (dict(alibi_slopes=0.5), TypeError, "alibi_slopes must be a tensor or floats, got 0.5"),
            (
                dict(alibi_slopes=[[0.1], [0.2]]),
                TypeError,
                "alibi_slopes must be a tensor or floats, got ",
            ),
            (dict(impl="fast"), ValueError, "impl must be one of auto, .* got 'fast'"),
        ],
        ids=str,
    )
    def test_one_clear_sentence(
        self, change: dict[str, Any], error: type[Exception], sentence: str
    ) -> None:
        arguments = dict(
            q=torch.zeros(2, 5, 4, 16), k=torch.zeros(2, 7, 2, 16), v=torch.zeros(2, 7, 2, 16)
        )
        with pytest.raises(error, match=sentence) as caught:
            attention(**(arguments | change))
        assert "\n" not in str(caught.value)

    def test_auto_with_a_mask_falls_back(self) -> None:
        tensors = inputs(1, 5)
        mask = torch.ones(5, 5, dtype=torch.bool, device=DEVICE).tril()
        found = attention(**tensors, causal=False, attn_mask=mask)
        torch.testing.assert_close(found, attention(**tensors))
