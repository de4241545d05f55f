"""A language model's head and its loss: `LinearCrossEntropy`, and the same of a head that a model
has already."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from gptkernels.core.checks import DTYPES, check_count
from gptkernels.nn import elsewhere
from gptkernels.nn.layers import FusedModule
from gptkernels.nn.plain import is_plain, remember
from gptkernels.ops.linear_cross_entropy.op import linear_cross_entropy

IGNORED = -100  # the target of a position that does not count, as in F.cross_entropy


@remember
class LinearCrossEntropy(FusedModule):
    """nn.Linear(d_model, classes) and nn.CrossEntropyLoss as one layer, without the logits in
    memory. The state_dict is nn.Linear's: weight (classes, d_model), and bias (classes,) if asked.

    The other arguments are those of `gptkernels.linear_cross_entropy`. To tie the weight to an
    embedding, assign it: `head.weight = embedding.weight`. Raises TypeError and ValueError for
    sizes that are not counts; a wrong option raises when the layer is called.
    """

    _elsewhere = elsewhere.LINEAR_CROSS_ENTROPY

    def __init__(
        self,
        d_model: int,
        classes: int,
        bias: bool = False,
        *,
        ignore_index: int = IGNORED,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        reduction: str = "mean",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("d_model", d_model)
        check_count("classes", classes)
        linear = nn.Linear(d_model, classes, bias, device, dtype)
        self.weight, self.bias = linear.weight, linear.bias
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.z_loss, self.softcap, self.reduction = z_loss, softcap, reduction

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """The loss of x (..., d_model) and targets (...) int64, fp32: a scalar, or (...) for
        reduction="none". Errors are those of `gptkernels.linear_cross_entropy`."""
        return linear_cross_entropy(
            x,
            self.weight,
            targets,
            bias=self.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The sizes, for print."""
        classes, d_model = self.weight.shape
        return f"{d_model}, {classes}, bias={self.bias is not None}, reduction={self.reduction!r}"


def call_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    impl: str,
    reduction: str = "mean",
) -> Tensor:
    """The cross-entropy of head(hidden), for hidden (..., C) and targets (...), its mean over those
    that are not -100 or its sum, a fp32 scalar: without logits where `head` is plainly an
    nn.Linear."""
    if is_plain(head, nn.Linear) and all(
        tensor.dtype in DTYPES and tensor.stride(-1) == 1 for tensor in (hidden, head.weight)
    ):
        return linear_cross_entropy(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            ignore_index=IGNORED,
            reduction=reduction,
            impl=impl,
        )
    logits = head(hidden)
    # At least fp32: in bf16 a sum of V exponentials loses the small ones.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )
