"""One row of truth per public block: how to build it, and what it promises. The property tests come from here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from claritycore import blocks, nets

Shape = tuple[int, ...]


def same(shape: Shape) -> Shape:
    return shape


def upsampled(scale: int, channels: int | None = None) -> Callable[[Shape], Shape]:
    return lambda shape: (shape[0], channels or shape[1], scale * shape[2], scale * shape[3])


@dataclass(frozen=True)
class Contract:
    """What a block promises.

    Args:
        build: makes the block for a number of channels.
        out_shape: output shape from input shape.
        channels: numbers of channels it is tried with; one that it was not built for must raise.
        any_channels: it takes whatever channels come.
        pixels: how many a map must have for every parameter to matter: in a scan over one, nothing decays.
        tile_safe: an output pixel depends on input pixels within `receptive_radius` alone.
    """

    build: Callable[[int], nn.Module]
    out_shape: Callable[[Shape], Shape] = same
    channels: tuple[int, ...] = (1, 4)
    any_channels: bool = False
    pixels: int = 1
    tile_safe: bool = True

    def make(self, channels: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """Build the block with every parameter off its initial value, so that no zero hides a path."""
        torch.manual_seed(seed)
        block = self.build(channels)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return block.to(dtype)


CONTRACTS: dict[str, Contract] = {
    "LayerNorm2d": Contract(blocks.LayerNorm2d, channels=(2, 4)),
    "RMSNorm2d": Contract(blocks.RMSNorm2d),
    "ResidualDenseBlock": Contract(lambda c: blocks.ResidualDenseBlock(c, growth_channels=2)),
    "RRDB": Contract(lambda c: blocks.RRDB(c, growth_channels=2)),
    "PixelShuffleUp": Contract(lambda c: blocks.PixelShuffleUp(c, 3, scale_factor=3), upsampled(3, 3)),
    "BicubicUp": Contract(lambda c: blocks.BicubicUp(2), upsampled(2), any_channels=True),
    "SelectiveScan2d": Contract(lambda c: blocks.SelectiveScan2d(c, d_state=4), tile_safe=False, pixels=2),
    "SSMGlobalMixer": Contract(lambda c: blocks.SSMGlobalMixer(c, d_state=4, gate=0.5), tile_safe=False, pixels=2),
}

# The nets at sizes small enough to try every property, for each scale.
NETS: dict[str, Callable[..., nn.Module]] = {
    "RRDBNet": lambda **fields: small_rrdbnet("pixelshuffle", **fields),
    "RRDBNet nearest+conv": lambda **fields: small_rrdbnet("nearest+conv", **fields),
}


def small_rrdbnet(upsampler: str, **fields) -> nets.RRDBNet:
    config = nets.RRDBNetConfig(**{"num_feat": 6, "num_block": 1, "num_grow_ch": 2, "upsampler": upsampler, **fields})
    return nets.RRDBNet(config)
