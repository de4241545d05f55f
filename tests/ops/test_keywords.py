"""Keywords that a function or a layer does not have: it names its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import gptkernels
from gptkernels.gpt.generation import generate
from gptkernels.ops.attention import elsewhere
from gptkernels.ops.gelu_mlp import op as gelu_mlp
from gptkernels.ops.layer_norm import op as layer_norm
from gptkernels.ops.linear_cross_entropy import op as linear_cross_entropy

Q, X, W = torch.zeros(1, 2, 2, 8), torch.zeros(2, 8), torch.zeros(8)
LENGTHS, CLASSES = torch.tensor([2], dtype=torch.int32), torch.tensor([0, 1])
ENDS = torch.tensor([0, 2], dtype=torch.int32)
SMALL = gptkernels.GPT(gptkernels.GPTConfig(8, 4, n_layer=1, n_head=1, n_embd=8))

# Each function, the sentences that it has, and arguments that it takes.
FUNCTIONS: dict[Callable[..., Any], tuple[Mapping[str, str], tuple[Any, ...]]] = {
    gptkernels.attention: (elsewhere.ATTENTION, (Q, Q, Q)),
    gptkernels.attention_varlen: (elsewhere.VARLEN, (Q[0], Q[0], Q[0], ENDS, ENDS, 2, 2)),
    gptkernels.attention_decode: (elsewhere.DECODE, (Q, Q, Q, LENGTHS)),
    gptkernels.layer_norm: (layer_norm._ELSEWHERE, (X, W)),
    gptkernels.gelu_mlp: (gelu_mlp._ELSEWHERE, (X, X, None, X.T.contiguous(), None)),
    gptkernels.linear_cross_entropy: (linear_cross_entropy._ELSEWHERE, (X, X, CLASSES)),
    gptkernels.GPT.generate: (generate._ELSEWHERE, (SMALL, CLASSES[None], 1)),
}
_RENAMED = re.compile(r"it is called (\w+) here")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_keyword_of_another_package_is_answered(function: Callable[..., Any]) -> None:
    said, given = FUNCTIONS[function]
    own = inspect.signature(function).parameters
    assert all(p.kind is not p.VAR_KEYWORD for p in own.values())  # as help and editors show it
    function(*given)
    for keyword, sentence in said.items():
        assert keyword not in own
        renamed = _RENAMED.match(sentence)
        assert renamed is None or renamed[1] in own
        message = f"{function.__name__}() has no argument {keyword}: {sentence}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            function(*given, **{keyword: None})


@pytest.mark.parametrize(
    ("function", "keyword", "nearest"),
    [
        (gptkernels.attention, "windw", "window"),
        (gptkernels.attention_varlen, "determinstic", "deterministic"),
        (gptkernels.attention_decode, "num_split", "num_splits"),
        (gptkernels.layer_norm, "residul", "residual"),
        (gptkernels.gelu_mlp, "aproximate", "approximate"),
        (gptkernels.linear_cross_entropy, "zloss", "z_loss"),
        (gptkernels.GPT.generate, "topp", "top_p"),
    ],
)
def test_a_keyword_that_is_mistyped(
    function: Callable[..., Any], keyword: str, nearest: str
) -> None:
    _, given = FUNCTIONS[function]
    unexpected = rf"^{function.__name__}\(\) got an unexpected keyword argument"
    with pytest.raises(TypeError, match=f"{unexpected} '{keyword}'; did you mean '{nearest}'\\?$"):
        function(*given, **{keyword: None})
    with pytest.raises(TypeError, match=f"{unexpected} 'qwertz'$"):
        function(*given, qwertz=None)
