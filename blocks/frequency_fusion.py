"""Bands of frequencies put to use: processed apart, weighted, and added to the map that they come from."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_choice, check_feature_map, check_positive
from .frequency import FreqBands, FreqSplit2d
from .precision import at_least_float32
from .tiling import side_by_side, tiling_of


class FreqFuse(nn.Module):
    r"""Add low and high frequencies to a map, each with a weight of its own for every channel.

    :math:`y = x + w_l \, g_l \odot L + w_h \, g_h \odot H` with :math:`w_h = g_{max} \tanh(a)`: however long it trains,
    texture is never amplified by more than :math:`1 + g_{max}`. Weights start at zero, so that a fresh block is the
    identity. With the gate "conv", :math:`[g_l, g_h] = \sigma(W * [L, H])` decides for every pixel and channel, by a
    depthwise 3x3 and a 1x1 convolution; without one both are 1. A module as the gate gets the bands, and what it
    returns takes their place: with `FrequencyCrossAttention` they attend to each other first.

    Shape:
        - x: ``(B, C, H, W)``
        - bands: `FreqBands`, or two maps ``(B, C, H, W)``, low and high
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        gate: "conv", a module that takes `FreqBands` and returns them, or None.
        max_gain: the bound :math:`g_{max}` of the weight of the high frequencies.

    Raises:
        TypeError: if an input is not floating point, the bands are no two maps, or ``gate`` is none of those.
        ValueError: if ``channels`` < 1, ``gate`` is another word, ``max_gain`` is not above 0, or an input has another
            number of channels or size.

    Source:
        The weights are ours; gated convolutions: arXiv:1806.03589, section 3.1.

    >>> x = torch.randn(1, 8, 5, 7)
    >>> FreqFuse(8)(x, FreqSplit2d(8)(x)).equal(x)
    True
    """

    def __init__(
        self, channels: int, *, gate: Literal["conv"] | nn.Module | None = "conv", max_gain: float = 0.5
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        if isinstance(gate, str):
            check_choice("gate", gate, ("conv",))
        elif gate is not None and not callable(gate):
            raise TypeError(f"gate must be 'conv', a module or None, got {gate!r}")
        if not 0 < max_gain < math.inf:
            raise ValueError(f"max_gain must be above 0 and finite, got {max_gain}")
        self.channels, self.max_gain = channels, max_gain
        self.gate = _BandGate(channels) if gate == "conv" else gate
        self.low_weight = nn.Parameter(torch.zeros(channels))
        self.high_weight = nn.Parameter(torch.zeros(channels))
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(self.gate)

    def forward(self, x: Tensor, bands: FreqBands | tuple[Tensor, Tensor]) -> Tensor:
        check_feature_map(x, self.channels, self)
        check_bands(bands, x.shape, self)
        low, high = bands[:2] if self.gate is None else self.gate(bands)[:2]
        low_gain = self.low_weight[:, None, None]
        high_gain = self.max_gain * torch.tanh(at_least_float32(self.high_weight))[:, None, None]
        return x + (low_gain.to(x.dtype) * low + high_gain.to(x.dtype) * high).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, max_gain={self.max_gain}"


class FreqSep(nn.Module):
    r"""Split a map by frequency, send each half down a path of its own, and fuse them onto the map.

    :math:`[L, H] = \mathrm{split}(x)`, then :math:`y = \mathrm{fuse}(x, S(L), T(H))`: structure and texture stay apart
    until the end, so that what is made up for texture does not bend structure. A fresh block is the identity, whatever
    the paths, because `FreqFuse` starts closed.

    Shape:
        - x: ``(B, C, H, W)``
        - condition: whatever the split takes besides the map
        - texture_condition: whatever the texture path takes besides the high frequencies
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        split: a `FreqSplit2d` or what takes its place; by default of kind "fft".
        structure: S, on maps: large kernels, a selective scan, ...; None passes the low frequencies on.
        texture: T, on maps: experts, small kernels, ...; None passes the high frequencies on.
        fuse: takes the map and both paths; by default a `FreqFuse` with a convolution as its gate.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, the input has another number of channels, or a path changes its shape.

    Source:
        Two branches by frequency: SFHformer (ECCV 2024), section 3; the rest is ours.

    >>> from claritycore.blocks import ConvGate, PLKBlock
    >>> x = torch.randn(1, 8, 5, 7)
    >>> FreqSep(8, structure=PLKBlock(8), texture=ConvGate(8))(x).equal(x)
    True
    """

    def __init__(
        self,
        channels: int,
        *,
        split: nn.Module | None = None,
        structure: nn.Module | None = None,
        texture: nn.Module | None = None,
        fuse: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.channels = channels
        self.split = FreqSplit2d(channels) if split is None else split
        self.structure, self.texture = structure, texture
        self.fuse = FreqFuse(channels) if fuse is None else fuse
        paths = side_by_side(structure, texture)
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(self.split, paths, self.fuse)

    def forward(self, x: Tensor, condition: Tensor | None = None, texture_condition: Any = None) -> Tensor:
        check_feature_map(x, self.channels, self)
        low, high = self.split(x)[:2] if condition is None else self.split(x, condition)[:2]
        low = low if self.structure is None else self.structure(low)
        if self.texture is not None:
            high = self.texture(high) if texture_condition is None else self.texture(high, texture_condition)
        check_bands((low, high), x.shape, self)
        return self.fuse(x, FreqBands(low, high))


class _BandGate(nn.Module):
    """A gate between 0 and 1 for every pixel and channel of both bands, which starts at 1/2."""

    tile_safe = True
    receptive_radius = 1
    tile_multiple = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, bands: FreqBands | tuple[Tensor, Tensor]) -> FreqBands:
        low, high = bands[:2]
        gates = torch.sigmoid(self.conv(self.dwconv(torch.cat([low, high], dim=1))))
        low_gate, high_gate = gates.to(low.dtype).chunk(2, dim=1)
        return FreqBands(low_gate * low, high_gate * high)


def check_bands(bands: FreqBands | tuple[Tensor, Tensor], shape: torch.Size, block: nn.Module) -> None:
    """Raise unless low and high frequencies are maps of that shape."""
    for name, band in zip(("low", "high"), two_maps(bands, block), strict=True):
        if not band.is_floating_point():
            raise TypeError(f"{type(block).__name__} takes floating-point bands, got {name} in {band.dtype}")
        if band.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(band.shape)}")


def two_maps(bands: FreqBands | tuple[Tensor, Tensor], block: nn.Module) -> tuple[Tensor, Tensor]:
    """Low and high frequencies; raise unless both are there."""
    if not isinstance(bands, tuple | list) or not 2 <= len(bands) <= 3:
        got = f"{type(bands).__name__} of {len(bands)}" if isinstance(bands, tuple | list) else type(bands).__name__
        raise TypeError(f"{type(block).__name__} takes FreqBands, or low and high, got {got}")
    low, high = bands[:2]
    return low, high
