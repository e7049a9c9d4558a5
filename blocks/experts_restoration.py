"""Experts for what went wrong with an image: blur, noise, compression."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_odd, check_positive
from .experts import Expert, cut
from .safe_conv import SafeConv2d


class DeblurExpert(Expert):
    r"""Undo blur: a wide kernel whose output scales the map, :math:`y = W_o (x \odot W_a (k_2 *_{dw} k_1 *_{dw} x))`.

    The second depthwise kernel is dilated, so that few weights see far; that a blurred edge is sharpened by as much as
    there is blur is what the product is for.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        kernel_size: odd side of both kernels.
        dilation: of the second; the halo is ``(1 + dilation) * (kernel_size // 2)``.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``kernel_size`` is even, or the input has another number of channels.

    Source:
        The large-kernel attention of Visual Attention Network (arXiv:2202.09741), section 3.1, with smaller kernels.

    >>> DeblurExpert(8).halo
    6
    """

    def __init__(self, channels: int, *, kernel_size: int = 5, dilation: int = 2) -> None:
        super().__init__(channels)
        check_odd(kernel_size=kernel_size)
        check_positive(dilation=dilation)
        self.halo = (1 + dilation) * (kernel_size // 2)
        self.near = nn.Conv2d(channels, channels, kernel_size, groups=channels)
        self.far = SafeConv2d(channels, channels, kernel_size, groups=channels, dilation=dilation)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project_out = nn.Conv2d(channels, channels, 1)

    def valid(self, x: Tensor) -> Tensor:
        attention = self.attention(self.far(self.near(x)))
        return self.project_out(cut(x, cast(int, self.halo)) * attention)


class DenoiseExpert(Expert):
    r"""Smooth by as much as the place allows: each pixel becomes a mean of its neighbours, by weights of its own.

    :math:`y_i = W_o \big(\sum_{j \in N} a_{ij} x_{i + j} - x_i\big)` with :math:`a_i = \mathrm{softmax}(K * x)_i`, the
    weights of the k x k neighbours, from a 3x3 convolution. What is added to the map is the noise, taken away where
    :math:`W_o` is positive.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        kernel_size: odd side k of the neighbourhood, at least 3; half of it is the halo.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, ``kernel_size`` is even or < 3, or the input has another number of channels.

    Source:
        Kernel-predicting networks (arXiv:1712.02327), section 4, on features.

    >>> DenoiseExpert(8).halo
    2
    """

    def __init__(self, channels: int, *, kernel_size: int = 5) -> None:
        super().__init__(channels)
        check_odd(kernel_size=kernel_size)
        if kernel_size < 3:
            raise ValueError(f"kernel_size must be at least 3, got {kernel_size}")
        self.halo, self.kernel_size = kernel_size // 2, kernel_size
        self.to_weights = nn.Conv2d(channels, kernel_size**2, 3)
        self.project_out = nn.Conv2d(channels, channels, 1)

    def valid(self, x: Tensor) -> Tensor:
        halo = self.kernel_size // 2
        weights = self.to_weights(cut(x, halo - 1)).softmax(1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights = weights.to(x.dtype)
        height, width = x.shape[2] - 2 * halo, x.shape[3] - 2 * halo
        mean = -cut(x, halo)
        for number in range(self.kernel_size**2):
            row, column = divmod(number, self.kernel_size)
            mean = mean + weights[:, number, None] * x.narrow(2, row, height).narrow(3, column, width)
        return self.project_out(mean)


class ArtifactExpert(Expert):
    r"""Compression: depthwise kernels of growing dilation see across the blocks of 8 x 8 that JPEG leaves.

    :math:`y = W_o \, \mathrm{gelu}(k_3 *_{dw} k_2 *_{dw} k_1 *_{dw} \mathrm{gelu}(W_i x))` with 3x3 kernels of
    dilation 1, 2 and 4. The halo is 7: a pixel sees the whole of its block wherever it lies in it.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, or the input has another number of channels.

    Source:
        Dilated convolutions: arXiv:1511.07122, section 2; these sizes are ours.

    >>> ArtifactExpert(8).halo
    7
    """

    halo = 7
    dilations = (1, 2, 4)

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.across = nn.Sequential(
            *(SafeConv2d(channels, channels, 3, groups=channels, dilation=dilation) for dilation in self.dilations)
        )
        self.project_out = nn.Conv2d(channels, channels, 1)

    def valid(self, x: Tensor) -> Tensor:
        return self.project_out(F.gelu(self.across(F.gelu(self.project_in(x)))))
