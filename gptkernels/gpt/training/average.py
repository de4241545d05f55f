"""An exponential moving average of a model's weights: steadier than the weights themselves.

    average = decay * average + (1 - decay) * weight        after every step, in the weights' dtype

Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Average:
    """The average of every parameter of `model`; it begins at the present value."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = list(model.parameters())
        self._names = [name for name, _ in model.named_parameters()]
        self._averages = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights by one step."""
        torch._foreach_lerp_(self._averages, [w.detach() for w in self._weights], 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """In this context the model's weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the parameters' names."""
        return dict(zip(self._names, self._averages, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict()`."""
        for name, average in self.state_dict().items():
            average.copy_(state[name])

    def _swap(self) -> None:
        for i, weight in enumerate(self._weights):
            weight.data, self._averages[i] = self._averages[i], weight.data
