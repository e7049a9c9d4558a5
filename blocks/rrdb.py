"""The dense residual blocks of ESRGAN."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_feature_map, check_positive
from .initialisation import fill

RESIDUAL_SCALE = 0.2
NEGATIVE_SLOPE = 0.2


class ResidualDenseBlock(nn.Module):
    r"""Five 3x3 convolutions, each reading all that came before it; the last joins the input, scaled by 0.2.

    :math:`x_i = \mathrm{lrelu}(W_i * [x, x_1, \dots, x_{i-1}])` for i = 1 to 4, then
    :math:`y = x + 0.2 \, W_5 * [x, x_1, \dots, x_4]`. No normalisation.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    Args:
        channels: number of channels ``C``.
        growth_channels: channels that each of the first four convolutions adds.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if an argument is < 1, or the input has another number of channels.

    Source:
        ESRGAN (arXiv:1809.00219), section 3.1; weights start at 0.1 of Kaiming's, as section 3.1 and its appendix
        advise for deep nets without normalisation.

    >>> ResidualDenseBlock(8, growth_channels=4)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True
    receptive_radius = 5
    tile_multiple = 1

    def __init__(self, channels: int, *, growth_channels: int = 32) -> None:
        super().__init__()
        check_positive(channels=channels, growth_channels=growth_channels)
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, growth_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels + growth_channels, growth_channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels + 2 * growth_channels, growth_channels, 3, padding=1)
        self.conv4 = nn.Conv2d(channels + 3 * growth_channels, growth_channels, 3, padding=1)
        self.conv5 = nn.Conv2d(channels + 4 * growth_channels, channels, 3, padding=1)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        dense = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            dense = torch.cat([dense, F.leaky_relu(conv(dense), NEGATIVE_SLOPE)], dim=1)
        return x + RESIDUAL_SCALE * self.conv5(dense)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim == 4:
                fill(parameter, nn.init.kaiming_normal_)
                parameter.mul_(0.1)
            else:
                parameter.zero_()


class RRDB(nn.Module):
    r"""Residual in residual: three dense blocks in a row, their sum scaled by 0.2 and added to the input.

    :math:`y = x + 0.2 \, \mathrm{RDB}_3(\mathrm{RDB}_2(\mathrm{RDB}_1(x)))`.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    Args:
        channels: number of channels ``C``.
        growth_channels: growth of each dense block.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if an argument is < 1, or the input has another number of channels.

    Source:
        ESRGAN (arXiv:1809.00219), section 3.1, figure 4.

    >>> RRDB(8, growth_channels=4)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True
    receptive_radius = 3 * ResidualDenseBlock.receptive_radius
    tile_multiple = 1

    def __init__(self, channels: int, *, growth_channels: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.rdb1 = ResidualDenseBlock(channels, growth_channels=growth_channels)
        self.rdb2 = ResidualDenseBlock(channels, growth_channels=growth_channels)
        self.rdb3 = ResidualDenseBlock(channels, growth_channels=growth_channels)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        return x + RESIDUAL_SCALE * self.rdb3(self.rdb2(self.rdb1(x)))
