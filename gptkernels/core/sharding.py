"""Calls with DTensors, whose parts lie on the ranks of a device mesh.

A `Shards` names the dimensions of a function's tensors by letters, and says along which letters its
work falls into parts that need nothing of each other. `by_shards` runs the function on each rank's
own part. Where a mesh dimension cuts such a letter,

- a tensor that has the letter is Shard there, and one that lacks it is Replicate;
- a result that has the letter is Shard, and one that lacks it is a sum over it, so Partial;
- so is the gradient of a tensor that lacks the letter.

No rank moves anything: other placements are refused. A dimension that is broadcast, of size 1 where
others have more, lacks its letter. torch.distributed.tensor is imported for the first DTensor.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_ROWS = string.ascii_lowercase  # the letters of "*"
_BROADCAST = "."


class Shards(NamedTuple):
    """The letters of a function's tensors.

    inputs: argument -> the letters of its dimensions, aligned at the last. "*" is any number of
        dimensions: as many as the first of the tensors has in its place. Behind "?" each may be
        broadcast.
    outputs: the same for the results, in order. A result without dimensions has no letters.
    over: the letters that a mesh may cut, into parts that may be empty.
    evenly: those of them, heads, that it cuts into parts of one size: so a part of the query heads
        has the key heads that it reads, unless there is one key head, which is broadcast.
    """

    inputs: Mapping[str, str]
    outputs: Sequence[str]
    over: str
    evenly: str = ""

    @classmethod
    def of(cls, inputs: str, outputs: str, over: str, evenly: str = "") -> Shards:
        """Reads words: "x:*C weight:C", "*C", "*"."""
        named = dict(word.split(":") for word in inputs.split())
        return cls(named, outputs.split(), over, evenly)

    def rows(self, dim: int) -> Shards:
        """The same where the first tensor has so many dimensions: without "*"."""
        rows = _ROWS[: dim + 1 - len(next(iter(self.inputs.values())))]
        named = {name: letters.replace("*", rows) for name, letters in self.inputs.items()}
        outputs = [letters.replace("*", rows) for letters in self.outputs]
        return Shards(named, outputs, self.over.replace("*", rows), self.evenly)


def distributed(*tensors: Any) -> bool:
    """Whether one of them is a DTensor. Its class would have to be imported."""
    return any(isinstance(x, Tensor) and hasattr(x, "device_mesh") for x in tensors)


def by_shards(function: Callable[..., Any], shards: Shards, arguments: Mapping[str, Any]) -> Any:
    """Returns function(**arguments), a DTensor or a tuple of them, of which each rank computes its
    own parts.

    Raises TypeError where a tensor is no DTensor, ValueError where placements or meshes do not fit,
    and NotImplementedError for dropout, whose mask counts positions in the whole tensor.
    """
    name = function.__name__
    if arguments.get("dropout_p"):
        raise NotImplementedError(
            f"{name} has no dropout on DTensors, since the mask counts positions in the whole "
            f"tensor: got dropout_p = {arguments['dropout_p']}"
        )
    arguments = {key: value for key, value in arguments.items() if key != "unknown"}
    given = {key: arguments[key] for key in shards.inputs if arguments.get(key) is not None}
    for key, value in arguments.items():
        if key not in given and isinstance(value, Tensor):
            raise NotImplementedError(f"{name} does not take {key} together with DTensors")
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    mesh = _mesh(name, tensors)
    cut = _Cut.of(name, shards.rows(next(iter(tensors.values())).dim()), mesh, tensors)
    local = {key: cut.own(key, value) for key, value in given.items()}
    found = function(**arguments | local)
    if isinstance(found, tuple):
        return tuple(map(cut.whole, found, cut.shards.outputs))
    return cut.whole(found, cut.shards.outputs[0])


def _mesh(name: str, tensors: Mapping[str, Any]) -> DeviceMesh:
    """The mesh on which all of the tensors are."""
    first = next(key for key, value in tensors.items() if distributed(value))
    mesh = tensors[first].device_mesh
    for key, value in tensors.items():
        if not distributed(value):
            raise TypeError(
                f"{key} must be a DTensor, as {first} is, got {type(value).__name__}: "
                f"torch.distributed.tensor.distribute_tensor makes what {name} takes"
            )
        if value.device_mesh != mesh:
            raise ValueError(
                f"{key} must be on the device mesh of {first}, {mesh}, got {value.device_mesh}"
            )
    return mesh


def _letters(
    name: str, shards: Shards, tensors: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, int]]:
    """The letters of each tensor, with a dot for a dimension that is broadcast, and their sizes."""
    letters: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for key, tensor in tensors.items():
        spelt = shards.inputs[key].removeprefix("?")
        if tensor.dim() > len(spelt):
            raise ValueError(f"{key} must have shape {tuple(spelt)}, got {tuple(tensor.shape)}")
        letters[key] = spelt[len(spelt) - tensor.dim() :]
        for letter, size in zip(letters[key], tensor.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 0))
    for key, tensor in tensors.items():
        found = ""
        for place, (letter, size) in enumerate(zip(letters[key], tensor.shape, strict=True)):
            broadcast = size == 1 < sizes[letter]
            allowed = letter in shards.evenly or (broadcast and shards.inputs[key][0] == "?")
            if size != sizes[letter] and not allowed:
                raise ValueError(
                    f"{key} must have the size {sizes[letter]} in dimension {place}, as another "
                    f"argument of {name} has, got {tuple(tensor.shape)}"
                )
            found += _BROADCAST if broadcast else letter
        letters[key] = found
    return letters, sizes


@dataclass(frozen=True)
class _Cut:
    """Along which letter each dimension of the mesh cuts a call; None: every rank has the same."""

    shards: Shards
    mesh: DeviceMesh
    letters: Mapping[str, str]  # of each tensor
    sizes: Mapping[str, int]
    along: Sequence[str | None]

    @classmethod
    def of(cls, name: str, shards: Shards, mesh: DeviceMesh, tensors: Mapping[str, Any]) -> _Cut:
        from torch.distributed.tensor import Shard

        letters, sizes = _letters(name, shards, tensors)
        along: list[str | None] = []
        for places in zip(*(tensor.placements for tensor in tensors.values()), strict=True):
            cuts = (
                letters[key][place.dim]
                for key, place in zip(tensors, places, strict=True)
                if isinstance(place, Shard)
            )
            along.append(next(cuts, None))
        cut = cls(shards, mesh, letters, sizes, along)
        fits = all(cut._fits(key, tensor) for key, tensor in tensors.items())
        if not fits or not {letter for letter in along if letter} <= set(shards.over):
            raise ValueError(cut._wanted(name, tensors))
        return cut

    def _fits(self, key: str, tensor: DTensor) -> bool:
        """Whether the tensor is cut as the call is."""
        letters = self.letters[key]
        if tuple(tensor.placements) != self.places(letters):
            return False
        parts = dict.fromkeys(self.shards.evenly, 1)
        for letter, ranks in zip(self.along, self.mesh.shape, strict=True):
            if letter in parts:
                parts[letter] *= ranks
        return all(
            size % parts.get(letter, 1) == 0
            for letter, size in zip(letters, tensor.shape, strict=True)
        )

    def _wanted(self, name: str, tensors: Mapping[str, Any]) -> str:
        ways = []
        for letter in self.shards.over:
            places = (
                f"{key} Shard({letters.index(letter)})" if letter in letters else f"{key} Replicate"
                for key, letters in self.letters.items()
            )
            ways.append(", ".join(places))
        even = f", into parts of one size of {self.shards.evenly}" if self.shards.evenly else ""
        came = ", ".join(
            f"{key} {tuple(tensor.shape)} {tensor.placements}" for key, tensor in tensors.items()
        )
        return (
            f"{name} takes DTensors that are Replicate, or on a dimension of the mesh "
            f"{'; or '.join(ways)}{even}; got {came}"
        )

    def places(self, letters: str, lacking: Placement | None = None) -> tuple[Placement, ...]:
        """The placements of a tensor with these letters. `lacking`: where the mesh cuts a letter
        that it lacks; Replicate unless given."""
        from torch.distributed.tensor import Replicate, Shard

        return tuple(
            Replicate()
            if letter is None
            else Shard(letters.index(letter))
            if letter in letters
            else lacking or Replicate()
            for letter in self.along
        )

    def own(self, key: str, value: Any) -> Tensor:
        """This rank's part of an argument: of a DTensor, or of numbers that every rank has."""
        from torch.distributed.tensor import Partial, distribute_tensor

        if isinstance(value, Tensor):
            sums = self.places(self.letters[key], lacking=Partial())
            return value.to_local(grad_placements=sums)  # type: ignore[attr-defined]
        numbers = torch.tensor([float(number) for number in value], device=self.mesh.device_type)
        places = self.places(self.shards.inputs[key][-1:])
        return distribute_tensor(numbers, self.mesh, places, src_data_rank=None).to_local()

    def whole(self, own: Tensor, letters: str) -> DTensor:
        """The result of which each rank has its part."""
        from torch.distributed.tensor import DTensor, Partial

        letters = letters if own.dim() else ""
        shape = torch.Size(self.sizes[letter] for letter in letters)
        stride = tuple(math.prod(shape[place:]) for place in range(1, len(shape) + 1))
        places = self.places(letters, lacking=Partial())
        return DTensor.from_local(
            own.contiguous(), self.mesh, places, run_check=False, shape=shape, stride=stride
        )
