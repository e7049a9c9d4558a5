"""What a net and its parts tell each other along one pass, besides the map."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..blocks import FreqFuse, NoiseField
from ..blocks.tiling import tiling_of
from .output import Aux


@dataclass
class Context:
    """What one pass knows and gathers; a net with conditions of its own derives from it.

    Args:
        scale: by which this pass enlarges the image.
        aux: losses and statistics that the parts of the net leave.

    >>> Context(2, Aux()).aux.total()
    tensor(0.)
    """

    scale: int
    aux: Aux


class Conditioned(nn.Module):
    """Base of the parts of a net that are told the `Context`: ``forward(x, context) -> x``.

    `path` is the name of the part within its net, under which it leaves what it has for `Context.aux`.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    >>> class Brightness(Conditioned):
    ...     def forward(self, x, context):
    ...         context.aux.statistics[self.path] = x.mean()
    ...         return x
    >>> context = Context(1, Aux())
    >>> _ = Stage(Brightness())(torch.ones(1, 1, 2, 2), context)
    >>> context.aux.statistics
    {'': tensor(1.)}
    """

    path: str = ""

    def forward(self, x: Tensor, context: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not override forward(x, context)")


class Stage(Conditioned):
    """Blocks one after the other, plain ones as they are and `Conditioned` ones with the context of the pass.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        blocks: modules from a map to a map of the same shape.

    >>> Stage(nn.GELU(), nn.Conv2d(3, 3, 3, padding=1)).receptive_radius
    1
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(*blocks)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        for block in self.blocks:
            x = block(x, context) if isinstance(block, Conditioned) else block(x)
        return x


def noise_of(seed: int | NoiseField | None, *, has_noise: bool = True) -> NoiseField | None:
    """What a net adds where it is asked for noise: a seed names that of a whole image.

    Raises:
        ValueError: if there is a seed for a net that has no noise.

    >>> noise_of(7)
    NoiseField(seed=7, layer=0, samples=None, offset=(0, 0))
    """
    if seed is not None and not has_noise:
        raise ValueError("noise_seed must be None for a net without noise")
    return seed if seed is None or isinstance(seed, NoiseField) else NoiseField(seed)


def opened(fuse: FreqFuse) -> FreqFuse:
    """Start both weights at 1, where `FreqFuse` starts them at 0.

    The head of the net is zero at the start: behind a second zero the branches would learn nothing for long.

    >>> opened(FreqFuse(2)).low_weight.data
    tensor([1., 1.])
    """
    nn.init.ones_(fuse.low_weight)
    nn.init.ones_(fuse.high_weight)
    return fuse
