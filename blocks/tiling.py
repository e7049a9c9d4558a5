"""What a block says of tiles, and what follows for blocks that are put together."""

import math
from typing import NamedTuple

from torch import nn

# Torch's own modules that see one pixel at a time, whatever they are set to.
POINTWISE = (nn.Identity, nn.GELU, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Dropout)


class Tiling(NamedTuple):
    """How far a block sees, and where its grid lies.

    Args:
        tile_safe: whether it sees so far only, and takes no statistics of the whole map.
        receptive_radius: pixels that it reads around each, in pixels of its input.
        tile_multiple: tiles that begin at its multiples have the grid of the whole map.

    >>> tiling_of(nn.Conv2d(3, 3, 5), nn.GELU())
    Tiling(tile_safe=True, receptive_radius=2, tile_multiple=1)
    """

    tile_safe: bool
    receptive_radius: int
    tile_multiple: int

    def times(self, stride: int) -> "Tiling":
        """The same in pixels of a map that is larger by `stride`.

        >>> Tiling(True, 3, 2).times(4)
        Tiling(tile_safe=True, receptive_radius=12, tile_multiple=8)
        """
        return Tiling(self.tile_safe, stride * self.receptive_radius, stride * self.tile_multiple)


def side_by_side(*parts: nn.Module | Tiling | None) -> Tiling:
    """Put together what parts say that read the same map.

    >>> side_by_side(nn.Conv2d(3, 3, 5), None)
    Tiling(tile_safe=True, receptive_radius=2, tile_multiple=1)
    """
    return tiling_of(*parts)._replace(receptive_radius=max(_own(part).receptive_radius for part in parts))


def tiling_of(*parts: nn.Module | Tiling | None) -> Tiling:
    """Put together what parts say that follow one another; None is one that does nothing.

    A module of someone else's that says nothing, and is none of torch's that say it by what they are, is not safe.
    """
    every = [_own(part) for part in parts]
    return Tiling(
        all(own.tile_safe for own in every),
        sum(own.receptive_radius for own in every),
        math.lcm(*(own.tile_multiple for own in every)),
    )


def _own(part: nn.Module | Tiling | None) -> Tiling:
    if isinstance(part, Tiling):
        return part
    if part is None or isinstance(part, POINTWISE):
        return Tiling(True, 0, 1)
    if hasattr(part, "tile_safe"):
        radius, multiple = getattr(part, "receptive_radius", 0), getattr(part, "tile_multiple", 1)
        return Tiling(part.tile_safe, radius, multiple)  # pyright: ignore[reportArgumentType]
    if isinstance(part, nn.Sequential):
        return tiling_of(*part)
    if isinstance(part, nn.Conv2d) and set(part.stride) == {1}:
        spans = (d * (k - 1) for d, k in zip(part.dilation, part.kernel_size, strict=True))
        return Tiling(True, (max(spans) + 1) // 2, 1)
    return Tiling(False, 0, 1)
