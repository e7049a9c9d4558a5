"""Burt and Adelson's pyramid: halving a map, doubling it again, and what is low and high between the two.

Shifted sums instead of convolutions: these are exact in float32 on every device, need no padding mode whose gradient
is summed in no fixed order, and take any size, a single pixel included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .padding import cropped


def halve(image: Tensor) -> Tensor:
    """Take every second pixel of the image smoothed by 1, 4, 6, 4, 1 sixteenths, its edge pixels repeated.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, ceil(H / 2), ceil(W / 2))``.

    >>> halve(torch.ones(1, 1, 5, 8)).shape
    torch.Size([1, 1, 3, 4])
    """
    for dim in (2, 3):
        size = image.shape[dim]
        first, last = image.narrow(dim, 0, 1), image.narrow(dim, size - 1, 1)
        padded = torch.cat([first, first, image, last, last], dim)
        a, b, c, d, e = (_every_second(padded, dim, start, (size + 1) // 2) for start in range(5))
        image = (a + e).add_(b + d, alpha=4).add_(c, alpha=6).mul_(1 / 16)
    return image


def double(image: Tensor, height: int, width: int) -> Tensor:
    """Put the pixels back to where `halve` took them from, and smooth ones between them.

    Shape:
        ``(B, C, ceil(H / 2), ceil(W / 2))`` -> ``(B, C, H, W)``.

    >>> double(torch.tensor([[[[0.0, 8.0]]]]), 1, 4)
    tensor([[[[1., 4., 7., 8.]]]])
    """
    for dim, size in ((3, width), (2, height)):  # putting columns between columns takes longest: while rows are few
        count = image.shape[dim]
        padded = torch.cat([image.narrow(dim, 0, 1), image, image.narrow(dim, count - 1, 1)], dim)
        before, after = padded.narrow(dim, 0, count), padded.narrow(dim, 2, count)
        pixels = [(before + after).add_(image, alpha=6).mul_(1 / 8), (image + after).mul_(1 / 2)]
        image = torch.stack(pixels, dim + 1).flatten(dim, dim + 1)
        image = cropped(image, *((size, image.shape[3]) if dim == 2 else (image.shape[2], size)))
    return image


def _every_second(image: Tensor, dim: int, start: int, count: int) -> Tensor:
    end = start + 2 * count - 1
    return image[:, :, start:end:2] if dim == 2 else image[..., start:end:2]


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
