"""The blocks that window attention is used in: Swin's, and HAT's attention beside a convolution."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.memory_format import channels_last, in_format_of
from .channel_attention import ChannelAttention
from .checks import check_feature_map, check_positive
from .norm import LayerNorm2d
from .tiling import tiling_of


class SwinBlock(nn.Module):
    r"""Transformer block: attention, then a network of two layers for each pixel, each with norm and residual.

    :math:`y = x + s A(\mathrm{LN}(x))`, then :math:`z = y + s F(\mathrm{LN}(y))`; with `post_norm`
    :math:`y = x + s \mathrm{LN}(A(x))` and so on, as Swin V2 has it. The residual stream keeps the dtype of x, so that
    under autocast a float32 input stays float32 between the parts.

    Shape:
        - x: ``(B, C, H, W)``
        - logit_scale: whatever `attention` takes besides the map
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        attention: A, on maps ``(B, C, H, W)``: `WindowAttention2d` as a rule, `OverlappingCrossAttention`,
            `GridAttention`, `HybridAttention`, ...
        mlp_ratio: hidden channels of the network, in multiples of C.
        ffn: F in the place of that network, on maps: `GatedFFN`, ...
        post_norm: norms after A and F instead of before.
        residual_scale: s, finite: less than 1 steadies deep nets.

    Raises:
        TypeError: if ``attention`` is no module, or the input is not floating point.
        ValueError: if ``channels`` < 1, ``attention`` is for another number of channels, ``mlp_ratio`` leaves no hidden
            channel, ``residual_scale`` is not finite, or the input has another number of channels.

    Source:
        Swin Transformer (arXiv:2103.14030), section 3.1; Swin Transformer V2 (arXiv:2111.09883), section 3.2; the
        scale: EDSR (arXiv:1707.02921), section 3.3.

    >>> from claritycore.blocks import WindowAttention2d
    >>> SwinBlock(8, WindowAttention2d(8, 2, shift=4), mlp_ratio=2)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    def __init__(
        self,
        channels: int,
        attention: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        ffn: nn.Module | None = None,
        post_norm: bool = False,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        _check_attention(attention, channels)
        if not math.isfinite(residual_scale):
            raise ValueError(f"residual_scale must be finite, got {residual_scale}")
        self.channels, self.post_norm, self.residual_scale = channels, post_norm, residual_scale
        self.norm1 = LayerNorm2d(channels, eps=1e-5)
        self.attn = attention
        self.norm2 = LayerNorm2d(channels, eps=1e-5)
        self.mlp = _PixelMLP(channels, mlp_ratio) if ffn is None else ffn
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(self.attn, self.mlp)

    def forward(self, x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        check_feature_map(x, self.channels, self)
        # Every part computes with the channels last: to and fro once a block, and not at all for maps that have them.
        y = channels_last(x)
        if self.post_norm:
            y = self._added(y, self.norm1(_attended(self.attn, y, logit_scale)))
            y = self._added(y, self.norm2(self.mlp(y)))
        else:
            y = self._added(y, _attended(self.attn, self.norm1(y), logit_scale))
            y = self._added(y, self.mlp(self.norm2(y)))
        return in_format_of(y.to(x.dtype), x)

    def _added(self, x: Tensor, change: Tensor) -> Tensor:
        return x + change if self.residual_scale == 1 else x + self.residual_scale * change

    def extra_repr(self) -> str:
        scale = f", residual_scale={self.residual_scale}" if self.residual_scale != 1 else ""
        return f"{self.channels}{', post_norm=True' if self.post_norm else ''}{scale}"


class ConvAttention(nn.Module):
    r"""Attention with a convolution beside it, on the same input: what HAT's hybrid attention block adds up.

    :math:`y = A(x) + \alpha \, \mathrm{CA}(W_2 * \mathrm{gelu}(W_1 * x))` with 3x3 convolutions through C / r channels
    and `ChannelAttention`. HAT's block is ``SwinBlock(C, ConvAttention(C, WindowAttention2d(C, heads)), mlp_ratio=2)``.

    It is not `tile_safe`: channel attention takes means over the map.

    Shape:
        - x: ``(B, C, H, W)``
        - logit_scale: whatever `attention` takes besides the map
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        attention: A, on maps.
        compress: divisor ``r`` of the channels in between.
        reduction: divisor of the channels within channel attention.
        scale: :math:`\alpha`.

    Raises:
        TypeError: if ``attention`` is no module, or the input is not floating point.
        ValueError: if a number is < 1, ``attention`` is for another number of channels, or the input has another.

    Source:
        HAT (arXiv:2205.04437), section 3.2.

    >>> from claritycore.blocks import WindowAttention2d
    >>> ConvAttention(12, WindowAttention2d(12, 2))(torch.randn(1, 12, 5, 7)).shape
    torch.Size([1, 12, 5, 7])
    """

    tile_safe = False

    def __init__(
        self, channels: int, attention: nn.Module, *, compress: int = 3, reduction: int = 30, scale: float = 0.01
    ) -> None:
        super().__init__()
        check_positive(channels=channels, compress=compress, reduction=reduction)
        _check_attention(attention, channels)
        hidden = max(channels // compress, 1)
        self.channels, self.scale = channels, scale
        _, radius, self.tile_multiple = tiling_of(attention)
        self.receptive_radius = max(2, radius)
        self.attn = attention
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)
        self.channel_attention = ChannelAttention(channels, reduction=reduction)

    def forward(self, x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        check_feature_map(x, self.channels, self)
        conv = self.channel_attention(self.conv2(F.gelu(self.conv1(x))))
        return _attended(self.attn, x, logit_scale) + self.scale * conv

    def extra_repr(self) -> str:
        return f"{self.channels}, scale={self.scale}"


class _PixelMLP(nn.Module):
    """Two linear layers for each pixel, a GELU between them."""

    tile_safe = True
    receptive_radius = 0
    tile_multiple = 1

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        if not 1 <= ratio * channels < math.inf:
            raise ValueError(f"mlp_ratio must leave at least 1 channel, got {ratio} of {channels} channels")
        self.fc1 = nn.Linear(channels, int(ratio * channels))
        self.fc2 = nn.Linear(int(ratio * channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


def _check_attention(attention: nn.Module, channels: int) -> None:
    if not isinstance(attention, nn.Module):
        raise TypeError(f"attention must be a module such as WindowAttention2d({channels}, heads), got {attention!r}")
    own = getattr(attention, "channels", channels)
    if own != channels:
        raise ValueError(f"attention must be for {channels} channels, got one for {own}")


def _attended(attention: nn.Module, x: Tensor, logit_scale: Tensor | None) -> Tensor:
    return attention(x) if logit_scale is None else attention(x, logit_scale)
