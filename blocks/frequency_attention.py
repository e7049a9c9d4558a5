"""Low and high frequencies that attend to each other."""

import math

import torch
from torch import Tensor, nn

from ..kernels import window_attention
from .checks import check_feature_map, check_heads, check_shift
from .frequency import FreqBands
from .frequency_bands import laid_out
from .frequency_fusion import check_bands, two_maps
from .norm import LayerNorm2d
from .position_bias import PositionBias, position_bias
from .window_attention import Pair, pair


class FrequencyCrossAttention(nn.Module):
    r"""Let low frequencies attend to the high ones of their window, and high frequencies to the low ones.

    .. math::
        L' = L + P_l \, \big(\sigma(G_l \hat L) \odot \mathrm{attend}(Q_l \hat L, KV_l \hat H)\big), \qquad
        H' = H + P_h \, \big(\sigma(G_h \hat H) \odot \mathrm{attend}(Q_h \hat H, KV_h \hat L)\big)

    with :math:`\hat L, \hat H` normalised over the channels of each pixel, the attention of `WindowAttention2d` with
    queries from one map and keys and values from the other, and a light gate: one number for each pixel and head, by
    which a flat region leaves texture alone, and texture structure. :math:`P_l, P_h` start at zero, so that a fresh
    block is the identity. Both sides see the bands as they came.

    Shape:
        - bands: `FreqBands`, or two maps ``(B, C, H, W)``, low and high
        - returns: `FreqBands` without a pyramid, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        num_heads: number of heads; it divides C.
        window_size: height and width of windows, or one number for both.
        shift: where windows begin, from 0 to `window_size` - 1.
        bias: by offset, as in `WindowAttention2d`.

    Raises:
        TypeError: if the bands are no two floating-point maps.
        ValueError: if ``num_heads`` does not divide ``channels``, a number is < 1, ``shift`` is not less than
            ``window_size``, ``bias`` is another word, the bands have another number of channels or are not alike.

    Source:
        Attention of windows: Swin Transformer (arXiv:2103.14030), section 3.2; gates of heads: Gated Attention
        (arXiv:2505.06708), section 2; across frequencies: ours.

    >>> x = torch.randn(1, 8, 5, 7)
    >>> FrequencyCrossAttention(8, 2)((x, -x)).low.equal(x)
    True
    """

    tile_safe = True

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window_size: Pair = 8,
        shift: Pair = 0,
        bias: PositionBias | None = "table",
    ) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        self.channels, self.num_heads = channels, num_heads
        self.window_size, self.shift = pair("window_size", window_size), pair("shift", shift, least=0)
        check_shift(self.shift, self.window_size)
        self.norm_low, self.norm_high = LayerNorm2d(channels), LayerNorm2d(channels)
        self.to_low = _Crossing(channels, num_heads, self.window_size, self.shift, bias)
        self.to_high = _Crossing(channels, num_heads, self.window_size, self.shift, bias)
        self.receptive_radius = max(self.window_size) - 1
        self.tile_multiple = math.lcm(*self.window_size)

    def forward(self, bands: FreqBands | tuple[Tensor, Tensor]) -> FreqBands:
        low, high = two_maps(bands, self)
        check_feature_map(low, self.channels, self)
        check_bands((low, high), low.shape, self)
        # Every part computes with the channels last: to and fro once, and not at all for maps that have them.
        last = [band.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for band in (low, high)]
        low_pixels, high_pixels = (
            norm(band).permute(0, 2, 3, 1) for norm, band in zip((self.norm_low, self.norm_high), last, strict=True)
        )
        from_high = self.to_low(low_pixels, high_pixels).permute(0, 3, 1, 2)
        from_low = self.to_high(high_pixels, low_pixels).permute(0, 3, 1, 2)
        return FreqBands(laid_out(low + from_high, low), laid_out(high + from_low, high))

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.num_heads}, window_size={self.window_size}, shift={self.shift}"


class _Crossing(nn.Module):
    """One direction: pixels (B, H, W, C) of one map learn of those of another."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: tuple[int, int],
        shift: tuple[int, int],
        bias: PositionBias | None,
    ) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shift = num_heads, window_size, shift
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.gate = nn.Linear(channels, num_heads)
        self.proj = nn.Linear(channels, channels)
        self.position_bias = position_bias(bias, num_heads, window_size)
        for parameter in self.proj.parameters():
            nn.init.zeros_(parameter)

    def forward(self, pixels: Tensor, others: Tensor) -> Tensor:
        attended = window_attention(
            self.q(pixels),
            None if self.position_bias is None else self.position_bias(),
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=self.shift,
            kv=self.kv(others),
        )
        gates = torch.sigmoid(self.gate(pixels))
        gated = attended.unflatten(3, (self.num_heads, -1)) * gates[..., None]
        return self.proj(gated.flatten(3))
