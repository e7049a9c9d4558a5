"""Burt and Adelson's pyramid: halving a map, doubling it again, and what is low and high between the two.

Shifted sums instead of convolutions: these are exact in float32 on every device, need no padding mode whose gradient
is summed in no fixed order, and take any size, a single pixel included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .padding import cropped

BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def halve(image: Tensor) -> Tensor:
    """Take every second pixel of the image smoothed by the binomial kernel of 5 taps, its edge pixels repeated.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, ceil(H / 2), ceil(W / 2))``.

    >>> halve(torch.ones(1, 1, 5, 8)).shape
    torch.Size([1, 1, 3, 4])
    """
    for _ in range(2):  # one axis, and after the transposition the other
        reach = 2 * ((image.shape[-1] + 1) // 2) - 1
        first, last = image[..., :1], image[..., -1:]
        padded = torch.cat([first, first, image, last, last], -1)
        taps = [weight * padded[..., start : start + reach : 2] for start, weight in enumerate(BINOMIAL)]
        image = torch.stack(taps).sum(0).mT
    return image


def double(image: Tensor, height: int, width: int) -> Tensor:
    """Put the pixels back to where `halve` took them from, and smooth ones between them.

    Shape:
        ``(B, C, ceil(H / 2), ceil(W / 2))`` -> ``(B, C, H, W)``.

    >>> double(torch.tensor([[[[0.0, 8.0]]]]), 1, 4)
    tensor([[[[1., 4., 7., 8.]]]])
    """
    for size in (width, height):
        before = torch.cat([image[..., :1], image[..., :-1]], -1)
        after = torch.cat([image[..., 1:], image[..., -1:]], -1)
        between = (image + after) / 2
        pixels = torch.stack([(before + 6 * image + after) / 8, between], -1).flatten(-2)
        image = cropped(pixels, pixels.shape[2], size).mT
    return image


def laplacian_pyramid(image: Tensor, levels: int) -> list[Tensor]:
    """Split an image into what each halving loses, finest first, and what is left of it after the last.

    Shape:
        ``(B, C, H, W)`` -> ``levels`` + 1 of ``(B, C, ceil(H / 2^j), ceil(W / 2^j))``.

    >>> [band.shape[-1] for band in laplacian_pyramid(torch.rand(1, 3, 20, 20), 3)]
    [20, 10, 5, 3]
    """
    bands = []
    for _ in range(levels):
        coarse = halve(image)
        bands.append(image - double(coarse, *image.shape[2:]))
        image = coarse
    return [*bands, image]


def merge_laplacian_pyramid(bands: Sequence[Tensor]) -> Tensor:
    """Put together what `laplacian_pyramid` split: the coarsest map doubled, what was lost added, and so on.

    Shape:
        as `laplacian_pyramid` gives them -> ``(B, C, H, W)``.

    >>> x = torch.rand(1, 3, 21, 20)
    >>> torch.allclose(merge_laplacian_pyramid(laplacian_pyramid(x, 3)), x)
    True
    """
    image = bands[-1]
    for detail in reversed(bands[:-1]):
        image = detail + double(image, *detail.shape[2:])
    return image
