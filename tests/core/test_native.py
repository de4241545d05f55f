"""The list of a launcher's fields: Python's must agree with the compiled module's."""

import pytest
import torch

from gptkernels.core import native

INPUTS = {"x": torch.ones(3, 8)}
SIZES = {"rows": 3, "cols": 8, "stride": 8}

pytestmark = pytest.mark.skipif(
    not native.EMULATED or native.unavailable("cpu") is not None, reason="needs the emulator"
)


def sums(**fields: int) -> torch.Tensor:
    partial = torch.empty(1, 8)
    native.call(
        "gelu_mlp_column_sums", partial, inputs=INPUTS, outputs={"partial": partial}, **fields
    )
    return partial


def test_fields_go_by_position() -> None:
    assert native.module().fields["gelu_mlp_column_sums"] == ("x", "partial", "dtype", *SIZES)
    assert torch.equal(sums(dtype=0, **SIZES), torch.full((1, 8), 3.0))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(dtype=0, cols=8, rows=3, stride=8),
            "field 3 of .*column_sums must be rows, got cols",
        ),
        (dict(dtype=0, rows=3, cols=8), "field 5 of .* must be stride, got nothing more"),
        (dict(dtype=0, **SIZES, build=1), "field 6 of .* must be nothing more, got build"),
    ],
)
def test_another_order_is_refused(
    fields: dict[str, int], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_AGREED", set())
    ending = "the call has another order, or the module is older than gptkernels"
    with pytest.raises(TypeError, match=f"^{sentence}: {ending}$"):
        sums(**fields)


def test_a_value_that_does_not_fit_is_named() -> None:
    with pytest.raises(TypeError, match=f"^gelu_mlp_column_sums cannot take {2**70} as stride$"):
        sums(dtype=0, rows=3, cols=8, stride=2**70)
