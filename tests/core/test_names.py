"""A name that is not known gets all that are, and the nearest."""

from __future__ import annotations

import pytest
import torch

from gptkernels import GPTConfig, attention, bench
from gptkernels.core.names import check_name, nearest
from gptkernels.gpt.config import NAMES
from gptkernels.truth import verify


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt2-small", "gpt2"),
        ("gpt2-lage", "gpt2-large"),
        ("gpt3", "gpt3-125M"),
        ("gpt-2", "gpt2"),
        ("llama", None),
    ],
)
def test_nearest_of_names_that_begin_alike(name: str, found: str | None) -> None:
    assert nearest(name, NAMES) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("atention", "attention"),
        ("mlp", "gelu_mlp"),
        ("varlen", "attention_varlen"),
        ("LAYER_NORM", "layer_norm"),
        ("softmax", None),
        ("a", None),
        ("", None),
    ],
)
def test_nearest(name: str, found: str | None) -> None:
    assert nearest(name, verify.OPS) == found


def test_what_is_known_is_returned() -> None:
    assert check_name("fruit", "fig", ["fig", "plum"]) == "fig"
    with pytest.raises(ValueError) as error:
        check_name("fruit", "plumb", ["fig", "plum"], " or a tree")
    assert str(error.value) == (
        "fruit must be one of fig, plum or a tree, got 'plumb'; did you mean 'plum'?"
    )
    with pytest.raises(ValueError, match=r"got None$"):
        check_name("fruit", None, ["fig"])  # type: ignore[arg-type]


def test_names_of_this_package() -> None:
    """Each kind of name, mistyped."""
    q = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        attention(q, q, q, impl="trtion")
    with pytest.raises(ValueError, match="did you mean 'gpt2-large'"):
        GPTConfig.named("gpt2-lage")
    with pytest.raises(ValueError, match="did you mean 'gelu_mlp'"):
        verify.run(ops=["mlp"])
    with pytest.raises(ValueError, match="did you mean 'gpt_training'"):
        bench.steps(["gpt_train"], "cpu", "quick")
