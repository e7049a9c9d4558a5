"""How noisy, blurred and blocky an image is, by formulas that nobody trained."""

import math

import torch
from torch import Tensor

from .padding import take
from .precision import at_least_float32

# Of a normal variable: the median of its magnitude, in standard deviations.
NORMAL_MEDIAN = 0.6744897501960817
JPEG_BLOCK = 8
# What is added before a logarithm or a root: a tenth of a level of 8 bits, and a hundredth.
FAINTEST, FAINTEST_DIFFERENCE = 0.1 / 255, 0.01 / 255


def immerkaer_sigma(image: Tensor) -> Tensor:
    r"""Estimate the standard deviation of white noise from what is left after two second differences.

    .. math:: \hat \sigma = \sqrt{\pi / 2} \; \frac{1}{6} \; \mathrm{mean} \, |x * N|, \qquad
        N = \begin{bmatrix} 1 & -2 & 1 \\ -2 & 4 & -2 \\ 1 & -2 & 1 \end{bmatrix}

    over all channels and the pixels that have neighbours. Smooth images do not disturb it. Real texture does: of images
    with little noise it reads too much.

    Shape:
        ``(B, C, H, W)`` -> ``(B,)``, float32 at least.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if it is not ``(B, C, H, W)``.

    Source:
        Immerkaer, Fast Noise Variance Estimation, Computer Vision and Image Understanding 64 (1996).

    >>> noise = 0.1 * torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    >>> round(immerkaer_sigma(noise).item(), 3)
    0.1
    """
    x = _with_neighbours(_checked(image))
    for dim in (2, 3):
        x = _differences(_differences(x, dim), dim)
    return math.sqrt(math.pi / 2) / 6 * x.abs().mean((1, 2, 3))


def haar_sigma(image: Tensor) -> Tensor:
    r"""Estimate the standard deviation of white noise from the diagonal details of a Haar transform.

    :math:`\hat \sigma = \mathrm{median} \, |HH| / 0.6745` with :math:`HH = (x_{00} - x_{01} - x_{10} + x_{11}) / 2` of
    all whole 2x2 cells and channels. A median looks past few edges; of images with texture all over it still reads too
    much, and of those that 8 bits leave no noise in, zero.

    Shape:
        ``(B, C, H, W)`` -> ``(B,)``, float32 at least.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if it is not ``(B, C, H, W)``.

    Source:
        Donoho and Johnstone, Ideal Spatial Adaptation by Wavelet Shrinkage, Biometrika 81 (1994), section 2.4.

    >>> noise = 0.1 * torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    >>> round(haar_sigma(noise).item(), 3)
    0.1
    """
    x = _with_neighbours(_checked(image))
    details = _differences(_differences(x, 2), 3)[:, :, ::2, ::2].abs().flatten(1) / 2
    # The lower of two middle ones, as torch.median, which ONNX does not have.
    middle = details.sort(dim=1).values.narrow(1, (details.shape[1] - 1) // 2, 1)
    return middle[:, 0] / NORMAL_MEDIAN


def edge_width(image: Tensor) -> Tensor:
    r"""Estimate the blur: the standard deviation, in pixels, of the Gaussian that made the edges as wide as they are.

    :math:`\hat \sigma^2 = \frac12 \sum (D x)^2 / \sum (D^2 x)^2` with first and second differences D along rows and
    columns, which is exact for a step that a Gaussian blurred, of any contrast and direction, once it is a few pixels
    wide. Noise and texture are sharp: they make it read less.

    Shape:
        ``(B, C, H, W)`` -> ``(B,)``, float32 at least.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if it is not ``(B, C, H, W)``.

    Source:
        The ratio follows from the integrals of a Gaussian and of its derivative.

    >>> step = torch.special.ndtr(torch.arange(-20.0, 21.0) / 3).expand(1, 1, 5, 41)
    >>> round(edge_width(step).item(), 1)
    3.0
    """
    x = _with_neighbours(_checked(image))
    first, second = x.new_zeros(()), x.new_zeros(())
    for dim in (2, 3):
        differences = _differences(x, dim)
        first = first + differences.square().mean((1, 2, 3))
        second = second + _differences(differences, dim).square().mean((1, 2, 3))
    # Not the root of the ratio: its slope has no end where nothing differs.
    return (
        0.5 * ((first + FAINTEST_DIFFERENCE**2).log() - (second + FAINTEST_DIFFERENCE**2).log() - math.log(2))
    ).exp()


def blockiness(image: Tensor) -> Tensor:
    """Measure the steps between JPEG's blocks: the mean difference across their borders over that inside of them.

    It is near 1 for an image that never was a JPEG, and for one that is not larger than a block; the grid of the blocks
    begins at the corner of the image.

    Shape:
        ``(B, C, H, W)`` -> ``(B,)``, float32 at least.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if it is not ``(B, C, H, W)``.

    Source:
        Wang, Bovik and Evans, Blind Measurement of Blocking Artifacts in Images, ICIP (2000), in pixels.

    >>> blocks = torch.randn(1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    >>> blockiness(blocks).item() > 100
    True
    """
    x = _checked(image)
    across, within = x.new_zeros(()), x.new_zeros(())
    for dim in (2, 3):
        steps = _differences(_with_neighbours(x), dim).abs().mean((1, 5 - dim))
        on_border = (torch.arange(steps.shape[1], device=x.device) + 1) % JPEG_BLOCK == 0
        borders = on_border.to(x.dtype)
        inside = (steps * (1 - borders)).sum(1) / (1 - borders).sum()
        crossing = (steps * borders).sum(1) / borders.sum().clamp(min=1)
        across = across + torch.where(on_border.any(), crossing, inside)
        within = within + inside
    return (across + FAINTEST) / (within + FAINTEST)


def fixed_features(image: Tensor) -> Tensor:
    """Logarithms of what the formulas say, (B, 4): noise by both, edge width, blockiness.

    >>> fixed_features(torch.zeros(1, 3, 5, 7))[0, 3]
    tensor(0.)
    """
    noises = [(sigma + FAINTEST).log() for sigma in (immerkaer_sigma(image), haar_sigma(image))]
    return torch.stack([*noises, edge_width(image).log(), blockiness(image).log()], dim=1)


def _checked(image: Tensor) -> Tensor:
    """Bring images into float32 at least; raise unless they are images in [0, 1], (B, C, H, W)."""
    if not image.is_floating_point():
        raise TypeError(f"image must be floating-point, in [0, 1], got {image.dtype}")
    if image.ndim != 4 or 0 in image.shape[1:]:
        raise ValueError(f"image must be (B, C, H, W) with C, H, W >= 1, got shape {tuple(image.shape)}")
    return at_least_float32(image)


def _differences(x: Tensor, dim: int) -> Tensor:
    """Differences of neighbours along an axis."""
    return x.narrow(dim, 1, x.shape[dim] - 1) - x.narrow(dim, 0, x.shape[dim] - 1)


def _with_neighbours(x: Tensor) -> Tensor:
    """Mirror maps of one or two pixels to three, which second differences need."""
    for dim in (2, 3):
        size = x.shape[dim]
        if size < 3:
            # Pixel 0 stays the first: x0 x0 x0, or x0 x1 x0.
            x = take(x, dim, torch.arange(3, device=x.device) % size)
    return x
