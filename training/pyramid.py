"""Burt and Adelson's pyramid: halving a map, doubling it again, and what is low and high between the two.

Shifted sums instead of convolutions: these are exact in float32 on every device, need no padding mode whose gradient
is summed in no fixed order, and take any size, a single pixel included.
"""

import torch
from torch import Tensor

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
        image = torch.stack([(before + 6 * image + after) / 8, between], -1).flatten(-2)[..., :size].mT
    return image


def low_pass(image: Tensor, levels: int) -> Tensor:
    """Keep what is left of an image that is halved `levels` times and doubled again: structure, no texture.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    >>> low_pass(torch.ones(1, 1, 5, 7), 2).unique()
    tensor([1.])
    """
    if levels == 0:
        return image
    return double(low_pass(halve(image), levels - 1), *image.shape[2:])


def high_pass(image: Tensor, levels: int) -> Tensor:
    """Keep what `low_pass` takes away: edges and texture about zero.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    >>> high_pass(torch.ones(1, 1, 5, 7), 2).unique()
    tensor([0.])
    """
    return image - low_pass(image, levels)


def texture(image: Tensor, levels: int) -> Tensor:
    """Put what `high_pass` keeps on mid-grey, so that it looks like an image; with 0 levels it is the image itself.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    >>> texture(torch.ones(1, 1, 5, 7), 2).unique()
    tensor([0.5000])
    """
    return high_pass(image, levels) + 0.5 if levels else image


def check_high_pass(levels: int) -> None:
    """Raise ValueError unless `high_pass` is a number of halvings, or 0."""
    if type(levels) is not int or levels < 0:
        raise ValueError(f"high_pass must be an integer of at least 0, got {levels!r}")


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
