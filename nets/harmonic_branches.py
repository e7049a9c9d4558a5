"""The branches of HARMONIC: structure from low frequencies, texture from high ones, and where they are fused."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import (
    FreqBands,
    FreqFuse,
    FreqSplit2d,
    HighPass,
    ModulatedNoiseConv2d,
    MoE2d,
    MSGDown,
    MSGUp,
    NoiseField,
    OverlapPatchEmbed,
    RouteResult,
)
from ..blocks.padding import cropped
from ..blocks.precision import at_least_float32
from ..blocks.tiling import Tiling, tiling_of
from .busyness import busyness
from .stage import Conditioned, Context, Stage, opened

TEXTURE = 3
"""The place of the expert for texture: denoise, deblur and artifacts come before it."""


@dataclass
class HARMONICContext(Context):
    """What a pass knows besides.

    Args:
        noise: of texture; None for noise that is drawn in training, and for none in eval.
        low: maps of the branch of low frequencies, the finest first.
        high: maps of the branch of high frequencies, the finest first.
        coarse: what the branch of low frequencies adds to the image, at half its size.
        busyness: of the high frequencies (B, 1, H, W), in the size of the image.
        edges: of them likewise.
        style: what modulates the convolutions of texture.
    """

    noise: NoiseField | None = None
    low: tuple[Tensor, ...] = ()
    high: tuple[Tensor, ...] = ()
    coarse: Tensor | None = None
    busyness: Tensor | None = None
    edges: Tensor | None = None
    style: Tensor | None = None

    def noise_of(self, layer: int, scale: int = 1) -> NoiseField | None:
        """The noise of one layer, whose map is larger than the image by `scale`."""
        if self.noise is None:
            return None
        top, left = self.noise.offset
        return NoiseField(self.noise.seed, self.noise.layer + layer, self.noise.samples, (scale * top, scale * left))


class LowBranch(nn.Module):
    r"""Structure: an encoder of the low frequencies from half the size on, and what it would add to the image there.

    :math:`L_0 = W * x`, :math:`L_{i + 1} = S_i(\mathrm{MSGDown}(L_i))`, then :math:`L_0 + \mathrm{MSGUp}(L_1)` in the
    place of L_0, and :math:`W_c * L_1`, which starts at zero.

    Shape:
        - low: ``(B, in_channels, H, W)``
        - returns: maps of half the sides each, the first ``(B, widths[0], H, W)``, and what is added,
          ``(B, out_channels, H / 2, W / 2)``

    Args:
        in_channels: of the low frequencies of an image.
        out_channels: of what is added.
        widths: channels of the two finest maps.
        downs: the ways from each map to the next, the finest first.
        stages: of every map but the first, a module each.
        up: the way from the second map to the first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        widths: tuple[int, int],
        downs: Sequence[MSGDown],
        stages: Sequence[nn.Module],
        up: MSGUp,
    ) -> None:
        super().__init__()
        self.embed = OverlapPatchEmbed(in_channels, widths[0])
        self.downs, self.stages, self.up = nn.ModuleList(downs), nn.ModuleList(stages), up
        self.to_image = nn.Conv2d(widths[1], out_channels, 3, padding=1)
        for parameter in self.to_image.parameters():
            nn.init.zeros_(parameter)
        levels = [tiling_of(way, tiling_of(stage).times(2)) for way, stage in zip(self.downs, stages, strict=True)]
        coarse = [own.times(2**level) for level, own in enumerate(levels)]
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(
            self.embed, *coarse, tiling_of(self.up).times(2)
        )

    def forward(self, low: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        maps = [self.embed(low)]
        for down, stage in zip(self.downs, self.stages, strict=True):
            maps.append(stage(down(maps[-1])))
        maps[0] = maps[0] + self.up(maps[1])
        return tuple(maps), self.to_image(maps[1])


class HighBranch(nn.Module):
    r"""Texture: high frequencies beside their edges, blocks at full size, and the ways down to the coarser decoders.

    :math:`H_0 = T(W * [x, e])` with the edges e of x, :math:`H_{i + 1} = \mathrm{MSGDown}(H_i)`. Blocks learn of the
    edges, and with ``style="edges"`` of their means over the map, which modulate them.

    Shape:
        - high: ``(B, in_channels, H, W)``
        - returns: maps of half the sides each, the first ``(B, width, H, W)``

    Args:
        in_channels: of the high frequencies of an image.
        width: channels of the finest map.
        edges: from the high frequencies to as many maps of edges.
        texture: blocks at full size.
        downs: the ways from each map to the next, the finest first.
        style: "edges", the means of their magnitudes, or "constant", which tiles have in common.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        edges: HighPass,
        texture: Stage,
        downs: Sequence[MSGDown],
        style: Literal["edges", "constant"],
    ) -> None:
        super().__init__()
        self.style = style
        self.edges, self.texture = edges, texture
        self.embed = OverlapPatchEmbed(2 * in_channels, width)
        self.downs = nn.ModuleList(downs)
        ways = [tiling_of(way).times(2**level) for level, way in enumerate(self.downs)]
        own = tiling_of(self.edges, self.embed, self.texture, *ways)
        self.tile_safe = own.tile_safe and style == "constant"
        self.receptive_radius, self.tile_multiple = own.receptive_radius, own.tile_multiple

    def forward(self, high: Tensor, context: HARMONICContext) -> tuple[Tensor, ...]:
        edges = self.edges(high)
        magnitudes = at_least_float32(edges).abs().mean((2, 3))
        context.edges, context.busyness = edges, busyness(high)
        context.style = magnitudes if self.style == "edges" else torch.ones_like(magnitudes[:, :1])
        maps = [self.texture(self.embed(torch.cat([high, edges], dim=1)), context)]
        for down in self.downs:
            maps.append(down(maps[-1]))
        return tuple(maps)


class TextureBlock(Conditioned):
    r"""Experts, then a modulated convolution with noise, which the share of the texture expert lets through.

    :math:`y = M(x, e)`, then :math:`z = y + W \, \mathrm{ModNoiseConv}(y, v; s p_3 n)` with edges e, style v, noise n,
    the probability :math:`p_3` that the router gives the expert for texture, and the score s of its gate, 0 for what is
    easy; both are 1 where there is no router.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        channels: of the map.
        experts: M: a `MoE2d` whose router takes busyness and edges, or one module, whose result is added to x.
        noise: the convolution; None for none.
        layer: which of the net's noises this is.
    """

    def __init__(
        self, channels: int, experts: nn.Module, *, noise: ModulatedNoiseConv2d | None, layer: int = 0
    ) -> None:
        super().__init__()
        self.experts, self.noise, self.layer = experts, noise, layer
        self.project = None if noise is None else nn.Conv2d(channels, channels, 1)
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(experts, noise)

    def forward(self, x: Tensor, context: HARMONICContext) -> Tensor:
        gate = None
        if isinstance(self.experts, MoE2d):
            x, route = self.experts(x, [context.busyness, context.edges])
            context.aux.add_route(self.path, route)
            gate = _share_of_texture(route, self.experts, x)
        else:
            x = x + self.experts(x)
        if self.noise is None or self.project is None:
            return x
        return x + self.project(self.noise(x, context.style, context.noise_of(self.layer), gate))


class BandFusion(Conditioned):
    """Add the maps of both branches to a decoder's, or that of the low frequencies alone.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        level: of the decoder, 0 for the finest.
        fuse: takes the decoder's map and `FreqBands`, as `FreqFuse` does, or the map of low frequencies instead.
        both: whether there are high frequencies.
    """

    def __init__(self, level: int, fuse: nn.Module, *, both: bool) -> None:
        super().__init__()
        self.level, self.fuse, self.both = level, fuse, both
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(fuse)

    def forward(self, x: Tensor, context: HARMONICContext) -> Tensor:
        low = context.low[self.level]
        return self.fuse(x, FreqBands(low, context.high[self.level]) if self.both else low)


class FrequencyResidual(nn.Module):
    r"""Add a correction to an image by its frequencies: low ones as they are, high ones within bounds.

    .. math::
        y = x + w_l L + w_h H, \qquad L = G c + \mathrm{up}(l), \qquad H = t - G t, \quad t = m \tanh(c / m)

    with a low-pass G, what the branch of low frequencies adds l, and :math:`|w_h| \le g_{max}` as in `FreqFuse`, whose
    weights start at 1 and at 0.76 :math:`g_{max}`. Whatever the weights, high frequencies change :math:`G y` by at most
    0.53 :math:`g_{max} m` in any pixel, where G is a Gaussian.

    Shape:
        - x, correction: ``(B, C, H, W)``
        - coarse: l at full size, ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        channels: of the image.
        split: G: its low frequencies.
        max_gain: the bound of w_h.
        limit: m, the largest magnitude of t.
    """

    def __init__(self, channels: int, *, split: FreqSplit2d, max_gain: float, limit: float) -> None:
        super().__init__()
        if not 0 < limit < math.inf:
            raise ValueError(f"limit must be above 0 and finite, got {limit}")
        self.split, self.limit = split, limit
        self.fuse = opened(FreqFuse(channels, gate=None, max_gain=max_gain))

    def forward(self, x: Tensor, correction: Tensor, coarse: Tensor) -> Tensor:
        wide = at_least_float32(correction)
        low = self.split(wide).low + at_least_float32(coarse)
        high = self.split(self.limit * torch.tanh(wide / self.limit)).high
        return self.fuse(x, FreqBands(low, high))

    def tiling(self, scale: int) -> Tiling:
        """In pixels of an image that is smaller by `scale`."""
        own = tiling_of(self.split)
        return own._replace(receptive_radius=math.ceil(own.receptive_radius / scale))

    def extra_repr(self) -> str:
        return f"limit={self.limit}"


def resized(x: Tensor, factor: int, height: int, width: int) -> Tensor:
    """Enlarge a map bilinearly, and keep its first rows and columns.

    >>> resized(torch.ones(1, 2, 3, 4), 2, 5, 7).shape
    torch.Size([1, 2, 5, 7])
    """
    if factor > 1:
        size = [factor * side for side in x.shape[2:]]
        x = F.interpolate(at_least_float32(x), size, mode="bilinear", align_corners=False).to(x.dtype)
    return cropped(x, height, width)


def _share_of_texture(route: RouteResult, experts: MoE2d, x: Tensor) -> Tensor:
    """How probable the router finds the expert for texture, at each pixel: (B, 1, H, W), 0 at easy ones."""
    share = route.share(TEXTURE)[:, None]
    if experts.level == "window":
        share = share.repeat_interleave(experts.window_size, 2).repeat_interleave(experts.window_size, 3)
    return cropped(share, x.shape[2], x.shape[3])
