"""Two paths side by side: one sees texture close by, by convolutions, the other structure far off, by attention."""

import torch
from torch import Tensor, nn

from ..blocks import (
    FreqSplit2d,
    GatedFFN,
    MSGDown,
    MSGUp,
    NAFBlock,
    OverlappingCrossAttention,
    PLKBlock,
    SwinBlock,
    WindowAttention2d,
)
from ..blocks.padding import cropped
from ..blocks.plk import Form
from ..blocks.tiling import side_by_side, tiling_of


class DualPath(nn.Module):
    r"""Send a map, or its bands, down a local and a context path, and add both to it by a 1x1 convolution.

    :math:`y = x + W [P_l(h), P_c(l)] + b`, where h and l are x itself unless they are given.

    Shape:
        all maps ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    Args:
        channels: number of channels ``C``.
        local: the local path, from a map to one of the same shape.
        context: the context path, likewise.

    Source:
        Convolution and attention in parallel: Conformer (arXiv:2105.03889), section 3, with a fusion by concatenation.

    >>> DualPath(8, local=nn.Conv2d(8, 8, 3, padding=1), context=nn.Identity())(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    def __init__(self, channels: int, *, local: nn.Module, context: nn.Module) -> None:
        super().__init__()
        self.local, self.context = local, context
        self.fuse = nn.Conv2d(2 * channels, channels, 1)
        self.tile_safe, self.receptive_radius, self.tile_multiple = side_by_side(local, context)

    def forward(self, x: Tensor, high: Tensor | None = None, low: Tensor | None = None) -> Tensor:
        local = self.local(x if high is None else high)
        context = self.context(x if low is None else low)
        return x + self.fuse(torch.cat([local, context], dim=1)).to(x.dtype)


class SplitEntry(nn.Module):
    r"""Split a map by frequency into the two paths of a block: high ones are local, low ones are context.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        split: from the map to its low and high frequencies, at full size.
        block: what they go to; the map itself passes by its paths.

    >>> block = DualPath(8, local=nn.Conv2d(8, 8, 3, padding=1), context=nn.Identity())
    >>> SplitEntry(FreqSplit2d(8, kind="haar"), block)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    def __init__(self, split: FreqSplit2d, block: DualPath) -> None:
        super().__init__()
        self.split, self.block = split, block
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(split, block)

    def forward(self, x: Tensor) -> Tensor:
        bands = self.split(x)
        return self.block(x, bands.high, bands.low)


class AtHalfSize(nn.Module):
    """Run blocks at half the size of a map: a strided convolution before them, pixel shuffle after them.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        channels: of the map, a multiple of 4.
        blocks: modules that keep the shape of a map.

    >>> AtHalfSize(8, nn.GELU())(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    def __init__(self, channels: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.down = MSGDown(channels, gated=False)
        self.blocks = nn.Sequential(*blocks)
        self.up = MSGUp(channels, gated=False)
        body = tiling_of(self.down, tiling_of(*blocks, self.up).times(2))
        # The pixel that a cell of the smaller map begins with is not the pixel that asks.
        self.tile_safe, self.receptive_radius, self.tile_multiple = body._replace(
            receptive_radius=body.receptive_radius + 1
        )

    def forward(self, x: Tensor) -> Tensor:
        return cropped(self.up(self.blocks(self.down(x))), x.shape[2], x.shape[3])


def local_path(
    channels: int, *, kernel_size: int, form: Form, norm_groups: int | None, mean_window: int | None
) -> nn.Sequential:
    """Make a large kernel and a gated convolution.

    Args:
        channels: of the map.
        kernel_size: odd, of the large kernel.
        form: of the large kernel, as `PLKBlock` takes it.
        norm_groups: of the group norms of both; None for layer norms.
        mean_window: odd side of the window of channel means; None for those of the map.

    >>> local_path(8, kernel_size=5, form="depthwise", norm_groups=4, mean_window=None)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """
    norm = "layer" if norm_groups is None else norm_groups
    return nn.Sequential(
        PLKBlock(channels, kernel_size=kernel_size, form=form, norm=norm),
        NAFBlock(channels, window_size=mean_window, norm_groups=norm_groups),
    )


def context_path(
    channels: int, num_heads: int, *, window_size: int, shifted: bool, mlp_ratio: float, overlap_ratio: float
) -> nn.Sequential:
    """Make a block of window attention and a gated network, and one of overlapping windows where they are to overlap.

    Args:
        channels: of the map.
        num_heads: of both attentions.
        window_size: side of the windows.
        shifted: whether they begin at half a window.
        mlp_ratio: hidden channels of the networks, in multiples of the map's.
        overlap_ratio: by how much larger the windows of keys are in the second block; 0 for none.

    >>> path = context_path(8, 2, window_size=4, shifted=True, mlp_ratio=2.0, overlap_ratio=0.5)
    >>> path(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """
    attentions: list[nn.Module] = [
        WindowAttention2d(channels, num_heads, window_size=window_size, shift=window_size // 2 if shifted else 0)
    ]
    if overlap_ratio:
        options = {"window_size": window_size, "overlap_ratio": overlap_ratio}
        attentions.append(OverlappingCrossAttention(channels, num_heads, **options))
    ffns = [GatedFFN(channels, expansion=mlp_ratio) for _ in attentions]
    return nn.Sequential(*(SwinBlock(channels, a, ffn=ffn) for a, ffn in zip(attentions, ffns, strict=True)))
