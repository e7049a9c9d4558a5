"""The block of SPAN: three reparameterisable convolutions whose output gates itself."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_feature_map
from .rep_conv import RepConv2d

# What SPAN trains in place of each 3x3 convolution (its Conv3XC): doubled channels inside, and a 1x1 beside.
SPAN_BRANCHES = ("1x1-3x3-1x1*2", "1x1")


class SPAB(nn.Module):
    r"""Three convolutions whose sum with the input is gated by their own output, without any parameter for it.

    :math:`z = W_3 * \mathrm{silu}(W_2 * \mathrm{silu}(W_1 * x))`, then
    :math:`y = (z + x) \odot (\sigma(z) - \tfrac{1}{2})`: where the convolutions find nothing, nothing passes.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    Args:
        channels: number of channels ``C``.

    Returns:
        ``y``; with ``return_first`` also the activated output of the first convolution, which SPAN reads of its last
        block.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, or the input has another number of channels.

    Source:
        SPAN (arXiv:2311.12770), section 3.2.

    >>> SPAB(8)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True
    receptive_radius = 3
    tile_multiple = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv1 = RepConv2d(channels, branches=SPAN_BRANCHES)
        self.conv2 = RepConv2d(channels, branches=SPAN_BRANCHES)
        self.conv3 = RepConv2d(channels, branches=SPAN_BRANCHES)

    def forward(self, x: Tensor, *, return_first: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        check_feature_map(x, self.channels, self)
        first = F.silu(self.conv1(x))
        z = self.conv3(F.silu(self.conv2(first)))
        # The gate is sigmoid(z) - 1/2, written without the difference: z is small, and half precision would lose it.
        y = (z + x) * (0.5 * torch.tanh(0.5 * z))
        return (y, first) if return_first else y
