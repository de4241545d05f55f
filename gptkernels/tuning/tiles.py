"""The tiles that are tried with the Triton kernels: those of the launchers' tables for the op, the
head width and the kind of dtype, and the neighbours of the one that the launcher chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from gptkernels.core.triton_support import Tile
from gptkernels.ops.attention.options import AttentionOptions

# The tiles for a problem, by the launcher's keyword for them; the chosen one comes first.
Choices = Mapping[str, Sequence[Tile]]
# The smallest and the largest size of each part of a neighbour.
Bounds = tuple[Tile, Tile]

_ATTENTION: Bounds = (16, 16, 4, 2), (128, 128, 8, 4)
_PRODUCT: Bounds = (64, 64, 32, 4, 2), (256, 256, 128, 8, 5)


def attention(q: Tensor, options: AttentionOptions) -> tuple[Choices, Choices]:
    """Forward and backward. Needs Triton, as the other functions do."""
    from gptkernels.ops.attention.triton import dense

    forward, backward = dense.forward_tiles(q, options), dense.backward_tiles(q, options)
    return _with_neighbours(forward, _ATTENTION), _with_neighbours(backward, _ATTENTION)


def gelu_mlp(x: Tensor, w1: Tensor, dy: Tensor, w2: Tensor) -> tuple[Choices, Choices]:
    """Of the fused product, forward and backward."""
    from gptkernels.ops.gelu_mlp import triton as kernels

    forward, backward = kernels.forward_tiles(x, w1), kernels.backward_tiles(dy, w2)
    return _with_neighbours(forward, _PRODUCT), _with_neighbours(backward, _PRODUCT)


def linear_cross_entropy(x: Tensor, weight: Tensor) -> tuple[Choices, Choices]:
    """Of the logits' product, forward and backward."""
    from gptkernels.ops.linear_cross_entropy.triton import launch

    found = _with_neighbours(launch.tiles(x, weight), _PRODUCT)
    return found, found


def layer_norm(x: Tensor) -> tuple[Choices, Choices]:
    """Forward and backward."""
    from gptkernels.ops.layer_norm.triton import launch

    forward, backward = launch.forward_tiles(x), launch.backward_tiles(x)
    ((_, cols, _, stages), *_) = forward["tile"]
    # A program has whole rows, if its registers can hold one; else one row, in chunks of columns.
    # Stages make no difference.
    if cols >= x.shape[-1]:
        bounds = (1, cols, 2, stages), (16, cols, 16, stages)
    else:
        bounds = (1, cols // 4, 4, stages), (1, cols * 2, 16, stages)
    return _with_neighbours(forward, bounds), _with_neighbours(backward, bounds)


def ways(choices: Choices) -> Iterator[tuple[str, dict[str, Tile]]]:
    """The launcher's choice, then each other tile with the chosen ones of the other kernels: the
    name of the way, and the tiles by keyword."""
    chosen = {keyword: tiles[0] for keyword, tiles in choices.items()}
    yield _name(chosen), chosen
    for keyword, (_, *others) in choices.items():
        for tile in others:
            yield _name({keyword: tile}), {**chosen, keyword: tile}


def does_not_fit(error: Exception) -> bool:
    """Whether a launch of a Triton kernel raised this because the tile does not compile, or takes
    more than the GPU has."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # A pass of the compiler that fails raises a RuntimeError.
    return isinstance(error, CompilationError | OutOfResources | PTXASError) or (
        type(error) is RuntimeError and "PassManager::run failed" in str(error)
    )


def _name(tiles: Mapping[str, Tile]) -> str:
    """Such as "triton 128x64, 8 warps, 3 stages"; with the kernel where a launcher has several."""
    said = []
    for keyword, (*sizes, warps, stages) in tiles.items():
        kernel = keyword.removesuffix("tile").replace("_", " ")
        said.append(f"{kernel}{'x'.join(map(str, sizes))}, {warps} warps, {stages} stages")
    return f"triton {'; '.join(said)}"


def _with_neighbours(choices: Choices, bounds: Bounds) -> Choices:
    return {
        keyword: list(dict.fromkeys([*tiles, *_neighbours(tiles[0], *bounds)]))
        for keyword, tiles in choices.items()
    }


def _neighbours(tile: Tile, least: Tile, most: Tile) -> Iterator[Tile]:
    """Tiles with one change: a size or the warps halved or doubled, the rows and the warps
    together, one stage less or more."""
    warps = len(tile) - 2
    changes = [*((i,) for i in range(warps + 1)), (0, warps)]
    found = [
        tuple(change(size) if i in changed else size for i, size in enumerate(tile))
        for changed in changes
        for change in (lambda size: size // 2, lambda size: size * 2)
    ]
    found += [(*tile[:-1], tile[-1] + more) for more in (-1, 1)]
    for near in found:
        # What did not change may lie beyond the bounds: the launcher chose it.
        if all(a <= x <= b or x == y for x, y, a, b in zip(near, tile, least, most, strict=True)):
            yield near
