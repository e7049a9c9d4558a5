"""What mixes the channels of each pixel and its neighbours: gated feed-forward blocks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .channel_attention import mean_of_map
from .checks import check_feature_map, check_odd, check_positive
from .norm import LayerNorm2d
from .precision import at_least_float32


class GatedFFN(nn.Module):
    r"""Feed-forward network with a gate that sees the neighbours: the GDFN of Restormer, without norm and residual.

    :math:`[a, b] = W_d *_{dw} (W_{in} x)`, then :math:`y = W_{out} (\mathrm{gelu}(a) \odot b)`: to twice the hidden
    channels, a depthwise 3x3 convolution, and the half that the GELU (the exact one) lets through, back to C.
    Parameters have the names and shapes of Restormer's `FeedForward`.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        expansion: there are ``int(expansion * C)`` hidden channels.
        bias: whether the three convolutions have one.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, ``expansion`` leaves no hidden channel, or the input has another number of
            channels.

    Source:
        Restormer (arXiv:2111.09881), section 3.2.

    >>> GatedFFN(8)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True
    receptive_radius = 1
    tile_multiple = 1

    def __init__(self, channels: int, *, expansion: float = 2.66, bias: bool = False) -> None:
        super().__init__()
        check_positive(channels=channels)
        if not 1 <= expansion * channels < float("inf"):
            raise ValueError(f"expansion must leave at least 1 channel, got {expansion} of {channels} channels")
        hidden = int(channels * expansion)
        self.channels = channels
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        passed, gate = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(passed) * gate)


class ConvGate(nn.Module):
    r"""Gated convolution: features of each neighbourhood, times a gate between 0 and 1 that follows from it too.

    :math:`y = (W_v * x + b_v) \odot \sigma(W_g * x + b_g)`. It starts by passing its input on: :math:`W_v` is twice
    the identity and the gate 1/2 everywhere, where it is most ready to learn. So it can stand before or after
    anything, attention for one, that is already trained.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        kernel_size: odd size of both kernels.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, ``kernel_size`` is even, or the input has another number of channels.

    Source:
        Gated Convolution (arXiv:1806.03589), section 3.1; the linear unit of Dauphin et al. (arXiv:1612.08083),
        section 2. The first values are ours.

    >>> ConvGate(8)(torch.ones(1, 8, 2, 2)).allclose(torch.ones(1, 8, 2, 2))
    True
    """

    tile_safe = True
    tile_multiple = 1

    def __init__(self, channels: int, *, kernel_size: int = 3) -> None:
        super().__init__()
        check_positive(channels=channels)
        check_odd(kernel_size=kernel_size)
        self.channels = channels
        self.receptive_radius = kernel_size // 2
        self.conv = nn.Conv2d(channels, 2 * channels, kernel_size, padding=kernel_size // 2)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        value, gate = self.conv(x).chunk(2, dim=1)
        return value * torch.sigmoid(gate)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.conv.parameters():
            parameter.zero_()
        centre = self.conv.weight[: self.channels, :, self.receptive_radius, self.receptive_radius]
        centre.fill_diagonal_(2)


class NAFBlock(nn.Module):
    r"""The block of NAFNet: a depthwise convolution and a feed-forward part, with products in place of activations.

    .. math::
        u = g(W_2 *_{dw} (W_1 \, \mathrm{LN}(x))), \quad y = x + \beta \odot W_3 (u \odot (W_s \, \bar u)), \quad
        z = y + \gamma \odot W_5 \, g(W_4 \, \mathrm{LN}(y))

    with the gate :math:`g([a, b]) = a \odot b` and :math:`\bar u` the mean of u over the map (simplified channel
    attention). :math:`\beta` and :math:`\gamma` start at 0, so that a fresh block is the identity. Parameters have the
    names and shapes of NAFNet's `NAFBlock`.

    Means of the whole map make it not `tile_safe`, and images of another size than those trained on come out worse.
    With `window_size`, :math:`\bar u` is the mean over the window around each pixel, as far as that lies in the map:
    the parameters are the same, nets trained without it gain from windows of 1.5 times the side of their training
    crops (the second source), and the block is `tile_safe`. Group norms in place of the layer norms LN, which
    `norm_groups` asks for, take statistics of the whole map.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        dw_expand: channels of the depthwise convolution, in multiples of ``C``.
        ffn_expand: channels of the feed-forward part, in multiples of ``C``.
        window_size: odd side of the window of the means; None takes the whole map.
        norm_groups: groups of the norms; None normalises the channels of each pixel.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, the channels of a part are odd or ``window_size`` even, ``channels`` is no
            multiple of ``norm_groups``, or the input has another number of channels.

    Source:
        NAFNet (arXiv:2204.04676), section 3; windows: TLC (arXiv:2112.04491).

    >>> x = torch.randn(1, 8, 5, 7)
    >>> NAFBlock(8)(x).equal(x)
    True
    """

    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        *,
        dw_expand: int = 2,
        ffn_expand: int = 2,
        window_size: int | None = None,
        norm_groups: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, dw_expand=dw_expand, ffn_expand=ffn_expand)
        wide, hidden = channels * dw_expand, channels * ffn_expand
        for name, width in (("dw_expand", wide), ("ffn_expand", hidden)):
            if width % 2:
                raise ValueError(f"channels * {name} must be even, got {width}")
        self.channels = channels
        self.tile_safe = window_size is not None and norm_groups is None
        self.receptive_radius = 1 + (window_size or 1) // 2
        self.norm1 = _norm(channels, norm_groups)
        self.conv1 = nn.Conv2d(channels, wide, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.sca = nn.Sequential(_Mean(window_size), nn.Conv2d(wide // 2, wide // 2, 1))
        self.conv3 = nn.Conv2d(wide // 2, channels, 1)
        self.norm2 = _norm(channels, norm_groups)
        self.conv4 = nn.Conv2d(channels, hidden, 1)
        self.conv5 = nn.Conv2d(hidden // 2, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        u = _product_of_halves(self.conv2(self.conv1(self.norm1(x))))
        y = x + self.beta.to(x.dtype) * self.conv3(u * self.sca(u))
        u = _product_of_halves(self.conv4(self.norm2(y)))
        return y + self.gamma.to(x.dtype) * self.conv5(u)

    def extra_repr(self) -> str:
        return f"{self.channels}"


class _Mean(nn.Module):
    """Mean over the map, or over the window around each pixel."""

    def __init__(self, window_size: int | None) -> None:
        super().__init__()
        if window_size is not None:
            check_odd(window_size=window_size)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        if self.window_size is None:
            return mean_of_map(x)
        # Rows, then columns: 2 k sums a pixel. On a CPU those of maps that hold plane after plane are 4 times as slow.
        mean, reach = at_least_float32(x), self.window_size // 2
        if x.device.type == "cpu":
            mean = mean.contiguous(memory_format=torch.channels_last)
        mean = F.avg_pool2d(mean, (self.window_size, 1), stride=1, padding=(reach, 0), count_include_pad=False)
        mean = F.avg_pool2d(mean, (1, self.window_size), stride=1, padding=(0, reach), count_include_pad=False)
        return mean.to(x.dtype)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}"


def _norm(channels: int, groups: int | None) -> LayerNorm2d | nn.GroupNorm:
    if groups is None:
        return LayerNorm2d(channels)
    check_positive(norm_groups=groups)
    if channels % groups:
        raise ValueError(f"channels must be a multiple of norm_groups = {groups}, got {channels}")
    return nn.GroupNorm(groups, channels)


def _product_of_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return a * b
