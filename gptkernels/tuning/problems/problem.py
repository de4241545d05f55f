"""A call of an op, and the parts of it whose truth takes little."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.core import philox
from gptkernels.truth import baseline, parity, reference
from gptkernels.truth.yardstick import FullSums

Cut = Callable[[Tensor], Tensor]
SEED = 0  # of dropout's masks, set before every run
_FAR = 8.0  # times the limit of a part, which not all numbers are in


@dataclass(frozen=True)
class Part:
    """A part of a call that is a call of its own.

    inputs, options: of that call.
    cut: takes it out of an output of the whole, or of an output's gradient; None: outputs of the
        whole are no outputs of the part.
    cotangent: takes the gradient of its output out of that of the whole.
    gradients: name of an input -> what takes the part's gradient out of that of the whole.
    """

    inputs: dict[str, Any]
    options: dict[str, Any]
    cut: Cut | None
    cotangent: Cut
    gradients: dict[str, Cut]


@dataclass(frozen=True)
class Problem:
    """A call of an op.

    inputs: tensors by name; `differentiated` are those that a training call has gradients of.
    options: other arguments.
    dtype: what is computed in; inputs of another one are converted.
    autocast: whether it runs under autocast.
    """

    op: str
    inputs: dict[str, Any]
    options: dict[str, Any]
    differentiated: Sequence[str]
    dtype: torch.dtype
    parts: Sequence[Part]
    training: bool
    autocast: bool = False
    _expected: dict[int, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self.inputs[self.differentiated[0]].device
        return device

    def leaves(self) -> dict[str, Any]:
        """The inputs, with gradients where the call is one of training."""
        if not self.training:
            return dict(self.inputs)
        return {
            name: x.detach().requires_grad_() if name in self.differentiated else x
            for name, x in self.inputs.items()
        }

    def forward(self, leaves: Mapping[str, Any], impl: str = "auto") -> list[Tensor]:
        """The outputs of the op."""
        with self._context():
            return listed(getattr(gptkernels, self.op)(**leaves, **self.options, impl=impl))

    def backward(self, leaves: Mapping[str, Any], outputs: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of what is differentiated."""
        wanted = [leaves[name] for name in self.differentiated]
        pairs = [(y, c) for y, c in zip(outputs, self.cotangents(), strict=True) if y.requires_grad]
        return list(torch.autograd.grad([y for y, _ in pairs], wanted, [c for _, c in pairs]))

    def cotangents(self) -> list[Tensor]:
        """Gradients of the outputs: fixed random ones."""
        if -1 not in self._expected:
            with torch.no_grad():
                outputs = self.forward(self.inputs, impl="torch")
            self._expected[-1] = [_normal(y, seed) for seed, y in enumerate(outputs, 1)]
        found: list[Tensor] = self._expected[-1]
        return found

    def check(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[float, float]:
        """Error and limit of the tensor that is nearest to its limit or furthest beyond it: by the
        parity rule over all parts, and of whole tensors beside those of impl="torch"."""
        found = [
            (name, measured.error, measured.limit)
            for number, part in enumerate(self.parts)
            for name, measured in self._compared(number, part, outputs, gradients)
        ]
        limits: dict[str, float] = {}
        for name, _, limit in found:
            limits[name] = max(limit, limits.get(name, 0.0))
        far = self._far(outputs, gradients, limits)
        measured = ((e, limit) for _, e, limit in found)
        return far or max(measured, key=lambda pair: share(*pair), default=(0.0, 0.0))

    def _far(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], limits: Mapping[str, float]
    ) -> tuple[float, float] | None:
        """The difference of a tensor to that of impl="torch", and how far it may be, where it is
        further: half of the digits of its largest number, or some times the limit of its parts."""
        if -2 not in self._expected:
            with contextlib.suppress(torch.OutOfMemoryError):  # then the parts have to do
                self._expected[-2] = self._usual()
        given = max(c.abs().max().item() for c in self.cotangents())
        names = [*map(str, range(len(outputs))), *self.differentiated]
        for name, mine, usual in zip(
            names, (*outputs, *gradients), self._expected.get(-2, ()), strict=False
        ):
            difference, largest = _difference(mine.detach(), usual)
            eps = max(torch.finfo(dtype).eps for dtype in (usual.dtype, self.dtype))
            # Of one key the gradients are zero, and rounding is all that there is.
            most = max(eps**0.5 * largest, _FAR * limits.get(name, 0.0), 2 * eps * given)
            if not difference <= most:
                return difference, most
        return None

    def _usual(self) -> list[Tensor]:
        """Outputs and gradients of impl="torch"."""
        torch.manual_seed(SEED)
        leaves = self.leaves()
        with torch.set_grad_enabled(self.training):
            outputs = self.forward(leaves, impl="torch")
        gradients = self.backward(leaves, outputs) if self.training else []
        return [x.detach() for x in (*outputs, *gradients)]

    def _compared(
        self, number: int, part: Part, outputs: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[tuple[str, parity.Measurement]]:
        plain, truth = self._expected_of(number, part)
        found = []
        if part.cut is not None:
            found = [
                (str(place), parity.compare(part.cut(y), b, t, k=parity.K_FORWARD))
                for place, (y, b, t) in enumerate(zip(outputs, plain[0], truth[0], strict=True))
            ]
        if not self.training:
            return found
        by_name = dict(zip(self.differentiated, gradients, strict=True))
        for name, cut in part.gradients.items():
            # A gradient of a converted input has the digits of what was computed.
            mine = cut(by_name[name]).to(plain[1][name].dtype)
            measured = parity.compare(mine, plain[1][name], truth[1][name], k=parity.K_GRADIENT)
            found.append((name, measured))
        return found

    def _expected_of(self, number: int, part: Part) -> Any:
        if number not in self._expected:
            with FullSums():
                plain = self._computed(part, baseline, self.dtype)
            self._expected[number] = plain, self._computed(part, reference, torch.float64)
        return self._expected[number]

    def _computed(
        self, part: Part, module: Any, dtype: torch.dtype
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs and gradients of a part by plain PyTorch or by the formula."""
        inputs = {name: self._as(x, dtype) for name, x in part.inputs.items()}
        options = dict(part.options)
        if options.get("dropout_p", 0.0) > 0:
            torch.manual_seed(SEED)
            options["rng"] = philox.draw(self.device)
        wanted = list(part.gradients) if self.training else []
        for name in wanted:
            inputs[name] = inputs[name].detach().requires_grad_()
        outputs = listed(getattr(module, self.op)(**inputs, **options))
        if not wanted:
            return outputs, {}
        pairs = [
            (y, part.cotangent(c).to(y.dtype))
            for y, c in zip(outputs, self.cotangents(), strict=True)
            if y.requires_grad
        ]
        leaves = [inputs[name] for name in wanted]
        found = torch.autograd.grad([y for y, _ in pairs], leaves, [c for _, c in pairs])
        return [y.detach() for y in outputs], dict(zip(wanted, found, strict=True))

    def _as(self, x: Any, dtype: torch.dtype) -> Any:
        """An input as it is computed with: of LayerNorm's mixture each keeps its own dtype."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if self.op != "layer_norm":
            x = x.to(self.dtype)
        return x.double() if dtype == torch.float64 else x

    def _context(self) -> Any:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.narrow)

    @property
    def narrow(self) -> torch.dtype:
        """What autocast computes products in."""
        return torch.bfloat16 if self.dtype == torch.float32 else self.dtype


def listed(outputs: Any) -> list[Tensor]:
    """One output, or several, as a list."""
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def whole(x: Tensor) -> Tensor:
    """All of a tensor, as a cut."""
    return x


def drawing(device: str, seed: int = 0) -> Callable[..., Tensor]:
    """A function of sizes, a dtype and a scale that draws normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*sizes: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    return draw


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a fact's name."""
    found: torch.dtype = getattr(torch, name)
    return found


def share(error: float, limit: float) -> float:
    """An error's share of its limit; a NaN is the largest of all."""
    found = error / limit if limit else error
    return math.inf if math.isnan(found) else found


def _difference(mine: Tensor, usual: Tensor) -> tuple[float, float]:
    """The largest difference, infinite for what is not finite in one alone, and the largest
    number."""
    finite = usual.isfinite()
    if not finite.all():
        if not torch.equal(mine[~finite], usual[~finite]):
            return math.inf, 0.0
        mine, usual = mine[finite], usual[finite]
    if usual.numel() == 0:
        return 0.0, 0.0
    difference = (mine - usual).abs().max().item()
    return math.inf if math.isnan(difference) else difference, usual.abs().max().item()


def _normal(like: Tensor, seed: int) -> Tensor:
    if like.dim() == 0:  # a loss, whose gradient is 1
        return torch.ones_like(like)
    return drawing(like.device.type, seed)(*like.shape, dtype=like.dtype)
