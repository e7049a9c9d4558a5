"""Changing the resolution of feature maps and images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_feature_map, check_positive


class PixelShuffleUp(nn.Module):
    r"""Upsample by a convolution to ``s * s`` times the channels whose groups become the pixels of an s x s cell.

    :math:`y = \mathrm{PixelShuffle}_s(W * x + b)`. At initialisation (ICNR) the s * s kernels of an output channel
    are equal, so that the block is a convolution followed by nearest upsampling: no checkerboard to unlearn.

    Shape:
        ``(B, C_in, H, W)`` -> ``(B, C_out, s H, s W)``.

    Args:
        in_channels: number of channels ``C_in``.
        out_channels: number of channels ``C_out``; ``in_channels`` where it is not given.
        scale_factor: upsampling factor ``s``.
        kernel_size: odd size of the convolution's kernel, in input pixels.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``kernel_size`` is even, or the input has another number of channels.

    Source:
        Sub-pixel convolution (arXiv:1609.05158), section 3; ICNR (arXiv:1707.02937), section 4.

    >>> PixelShuffleUp(8, scale_factor=3)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 15, 21])
    """

    tile_safe = True
    tile_multiple = 1

    def __init__(
        self, in_channels: int, out_channels: int | None = None, *, scale_factor: int = 2, kernel_size: int = 3
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_positive(in_channels=in_channels, out_channels=out_channels, scale_factor=scale_factor)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.in_channels = in_channels
        self.scale_factor = scale_factor
        self.receptive_radius = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels * scale_factor**2, kernel_size, padding=kernel_size // 2)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.in_channels, self)
        return _pixel_shuffle(self.conv(x), self.scale_factor)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.conv.parameters():
            # PixelShuffle takes channel c * s * s + i as pixel i of output channel c: neighbours are made equal.
            parameter.copy_(parameter[:: self.scale_factor**2].repeat_interleave(self.scale_factor**2, dim=0))

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}"


class BicubicUp(nn.Module):
    r"""Upsample by Keys' cubic convolution with a = -0.75 and half-pixel centres; nothing is learned.

    The long skip of the super-resolution nets: what they add to it starts at zero. (MATLAB's bicubic has a = -0.5:
    that one is `claritycore.images.imresize`.)

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, s H, s W)``, any ``C``.

    Args:
        scale_factor: upsampling factor ``s``; 1 returns the input.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``scale_factor`` < 1, or the input has not four dimensions.

    Source:
        Keys, Cubic convolution interpolation for digital image processing, IEEE TASSP 29(6), 1981
        (doi:10.1109/TASSP.1981.1163711), section III.

    >>> BicubicUp(2)(torch.ones(1, 3, 2, 4)).shape
    torch.Size([1, 3, 4, 8])
    """

    tile_safe = True
    tile_multiple = 1

    def __init__(self, scale_factor: int = 2) -> None:
        super().__init__()
        check_positive(scale_factor=scale_factor)
        self.scale_factor = scale_factor
        self.receptive_radius = 0 if scale_factor == 1 else 2

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, None, self)
        if self.scale_factor == 1:
            return x
        return F.interpolate(x, scale_factor=float(self.scale_factor), mode="bicubic", align_corners=False)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}"


def _pixel_shuffle(x: Tensor, scale_factor: int) -> Tensor:
    # On a CPU F.pixel_shuffle walks a contiguous map element by element: copying the permuted view takes a quarter to
    # two thirds of the time. Compiled or exported, F.pixel_shuffle is the one that stays a single operator.
    if x.device.type != "cpu" or not x.is_contiguous() or torch.compiler.is_compiling():
        return F.pixel_shuffle(x, scale_factor)
    cells = x.unflatten(1, (-1, scale_factor, scale_factor))  # (B, C, s, s, H, W)
    return cells.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
