"""Blocks that act on frequencies: one mixes the spectrum, one finds edges."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.depthwise_conv2d import depthwise_conv2d
from .checks import check_choice, check_feature_map, check_odd, check_positive
from .frequency_bands import laid_out
from .padding import pad_same
from .precision import at_least_float32, without_autocast

SOFTEST = 1e-3
"""Added, squared, to the square of a gradient's length, so that the length itself has a gradient at zero."""


class SpectralMix2d(nn.Module):
    r"""Mix the channels of every frequency, real and imaginary parts alike, and add what comes of it to the map.

    :math:`y = x + F^{-1}\big(W_2 \, \mathrm{relu}(W_1 [\Re F x, \Im F x])\big)`, two 1x1 convolutions between a Fourier
    transform and its inverse: each output pixel sees the whole map. :math:`W_2` starts at zero, so that
    a fresh block is the identity.

    Nothing depends on the size: there is no bias, which would be a spike at the first pixel, and no norm over the
    spectrum, so a map repeated in rows and columns comes out as the repeated output. How the transform is scaled does
    not matter either: what stands between it and its inverse scales as its input does. Arithmetic is float32 for
    half-precision maps, also under autocast. It is not `tile_safe`.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        expansion: there are 2 C times this many channels between the convolutions.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, or the input has another number of channels.

    Source:
        DeepRFT (arXiv:2111.11745), section 3, without biases; one convolution and a batch norm instead: LaMa
        (arXiv:2109.07161), section 2.1, after Fast Fourier Convolution (NeurIPS 2020).

    >>> x = torch.randn(1, 8, 5, 7)
    >>> SpectralMix2d(8)(x).equal(x)
    True
    """

    tile_safe = False
    receptive_radius = 0
    tile_multiple = 1

    def __init__(self, channels: int, *, expansion: int = 1) -> None:
        super().__init__()
        check_positive(channels=channels, expansion=expansion)
        self.channels = channels
        self.conv1 = nn.Conv2d(2 * channels, 2 * channels * expansion, 1, bias=False)
        self.conv2 = nn.Conv2d(2 * channels * expansion, 2 * channels, 1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        if x.numel() == 0:
            return x.clone()  # of which there is no transform
        wide = at_least_float32(x)
        first, second = (conv.weight.to(wide.dtype) for conv in (self.conv1, self.conv2))
        spectrum = torch.fft.rfft2(wide)
        with without_autocast(x):
            hidden = F.relu(F.conv2d(torch.cat([spectrum.real, spectrum.imag], dim=1), first))
            real, imaginary = F.conv2d(hidden, second).chunk(2, dim=1)
        return laid_out(wide + _real_map(real, imaginary, x.shape[3]), x)


def _real_map(real: Tensor, imaginary: Tensor, width: int) -> Tensor:
    """Invert `rfft2`, of a half spectrum that no real map need have: the map nearest to it.

    Once the columns are inverted, real maps have real values at the zero and at the highest frequency of the rows;
    what else stands there some transforms pass over and others do not, so it is taken out.
    """
    columns = torch.fft.ifft(torch.complex(real, imaginary), dim=2)
    frequency = torch.arange(columns.shape[3], device=columns.device)
    inner = ((frequency > 0) & (2 * frequency < width)).to(real.dtype)
    return torch.fft.irfft(torch.complex(columns.real, columns.imag * inner), n=width, dim=3)


class HighPass(nn.Module):
    r"""Find edges and texture, channel by channel: what conditions a branch or a router. Flat regions give zero.

    - ``"sobel"``: the length of the gradient, :math:`\sqrt{g_y^2 + g_x^2 + \epsilon^2} - \epsilon` with Sobel's kernels
      over 8 (a ramp of slope 1 gives 1) and :math:`\epsilon` = 0.001; it is the same for an image and its negative
    - ``"laplacian"``: four times the pixel less its four neighbours
    - ``"learned"``: a kernel for each channel less its mean, so that its sum is always zero; it starts as the pixel
      less the mean of its neighbourhood

    The border is repeated. Half precision is computed in float32. Not invertible: `FreqSplit2d` is.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        kind: "sobel", "laplacian" or "learned".
        kernel_size: odd size of the learned kernel; 3 for the others.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, ``kind`` is another word, ``kernel_size`` is even, 1, or not 3 where nothing is
            learned, or the input has another number of channels.

    Source:
        Gonzalez and Woods, Digital Image Processing, section 10.2; high-pass features for routing: MoCE-IR
        (arXiv:2411.18466).

    >>> HighPass(1, kind="laplacian")(torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]]))
    tensor([[[[ 0., -1.,  1.,  0.]]]])
    """

    tile_safe = True
    tile_multiple = 1

    def __init__(
        self, channels: int, *, kind: Literal["sobel", "laplacian", "learned"] = "sobel", kernel_size: int = 3
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        check_choice("kind", kind, ("sobel", "laplacian", "learned"))
        check_odd(kernel_size=kernel_size)
        if kernel_size < 3 or (kind != "learned" and kernel_size != 3):
            wanted = "at least 3" if kind == "learned" else f"3 for kind {kind!r}"
            raise ValueError(f"kernel_size must be {wanted}, got {kernel_size}")
        self.channels, self.kind, self.receptive_radius = channels, kind, kernel_size // 2
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size)) if kind == "learned" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.weight is not None:
            self.weight.zero_()
            self.weight[..., self.receptive_radius, self.receptive_radius] = 1

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        reach = self.receptive_radius
        padded = pad_same(at_least_float32(x), (reach, reach), "replicate")
        if self.weight is None:
            return laid_out(_slope(padded) if self.kind == "sobel" else _laplacian(padded), x)
        weight = at_least_float32(self.weight)
        weight = (weight - weight.mean((2, 3), keepdim=True)).to(padded.dtype)
        with without_autocast(x):
            y = depthwise_conv2d(padded, weight)
        return laid_out(y[..., reach:-reach, reach:-reach], x)

    def extra_repr(self) -> str:
        return f"{self.channels}, kind={self.kind!r}"


def _slope(padded: Tensor) -> Tensor:
    """The length of Sobel's gradient: differences come first, so that flat regions are zero to the last bit."""
    down = padded[..., 2:, :] - padded[..., :-2, :]
    across = padded[..., 2:] - padded[..., :-2]
    down = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 8
    across = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 8
    return torch.sqrt(down.square() + across.square() + SOFTEST**2) - SOFTEST


def _laplacian(padded: Tensor) -> Tensor:
    """Four differences to the neighbours."""
    middle = padded[..., 1:-1, 1:-1]
    above, below = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
    left, right = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    return (middle - above) + (middle - below) + (middle - left) + (middle - right)
