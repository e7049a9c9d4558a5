"""Padding feature maps and images to a stride, so that any height and width may come."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.memory_format import is_channels_last

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def pad_to_multiple(image: Tensor, multiple: int, *, surround: int = 0) -> Tensor:
    """Pad below and on the right until H and W are multiples: by reflection, by the far edge once that runs out.

    With `surround`, by so many pixels more on every side, which mirror the same image.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H', W')``, the smallest multiples >= H and W; memory format kept.

    >>> pad_to_multiple(torch.tensor([[[[1.0, 2.0, 3.0]]]]), 2)
    tensor([[[[1., 2., 3., 2.],
              [1., 2., 3., 2.]]]])
    """
    height, width = image.shape[2:]
    if not torch.compiler.is_compiling():
        below, right = (surround + -size % multiple for size in (height, width))
        border = (surround, right, surround, below)
        if any(border) and _fits(image, border):
            return F.pad(image, border, mode="reflect")
    for dim in (2, 3):
        size = image.shape[dim]
        # In an exported program the size may be any: a branch on it would fix whether it is a multiple.
        if surround or (multiple > 1 and (torch.compiler.is_compiling() or size % multiple)):
            end = (size + multiple - 1) // multiple * multiple + surround
            index = torch.arange(-surround, end, device=image.device)
            image = take(image, dim, mirrored(index, size))
    return image


def mirrored(index: Tensor, size: int) -> Tensor:
    """Numbers of rows, or columns, of which some lie outside the `size` that there are: by reflection, then the edge.

    >>> mirrored(torch.arange(-3, 5), 2)
    tensor([1, 1, 1, 0, 1, 0, 0, 0])
    """
    return torch.where(index < size, index.abs(), 2 * (size - 1) - index).clamp(0, size - 1)


def take(image: Tensor, dim: int, index: Tensor) -> Tensor:
    """Rows (`dim` 2) or columns (`dim` 3) of a map by number, as `index_select` takes them, memory format kept.

    >>> take(torch.tensor([[[[1.0, 2.0, 3.0]]]]), 3, torch.tensor([2, 0]))
    tensor([[[[3., 1.]]]])
    """
    if is_channels_last(image):
        return image.permute(0, 2, 3, 1).index_select(dim - 1, index).permute(0, 3, 1, 2)
    return image.index_select(dim, index)


def cropped(image: Tensor, height: int, width: int) -> Tensor:
    """Keep the first rows and columns.

    >>> cropped(torch.zeros(1, 2, 6, 8), 5, 7).shape
    torch.Size([1, 2, 5, 7])
    """
    if not torch.compiler.is_compiling():
        return image[..., :height, :width]
    # In an exported program the size may be any: a slice, which may be all there is, would fix whether it is.
    for dim, size in ((2, height), (3, width)):
        image = take(image, dim, torch.arange(size, device=image.device))
    return image


def pad_same(x: Tensor, radius: tuple[int, int], mode: PaddingMode) -> Tensor:
    """Pad above and below, left and right, by as many pixels as a kernel of that radius needs, whatever the size.

    Reflection takes the far edge once it runs out of pixels; circular padding goes round as often as it must.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H + 2 radius[0], W + 2 radius[1])``.

    >>> pad_same(torch.tensor([[[[1.0, 2.0, 3.0]]]]), (0, 2), "reflect")
    tensor([[[[3., 2., 1., 2., 3., 2., 1.]]]])
    """
    border = (radius[1], radius[1], radius[0], radius[0])
    if mode == "zeros":
        return F.pad(x, border)
    if mode == "replicate" and x.is_cpu:  # several times as fast; on a GPU its gradient does not repeat bit for bit
        return F.pad(x, border, mode="replicate")
    if mode == "reflect" and _fits(x, border):
        return F.pad(x, border, mode="reflect")
    for dim, reach in zip((2, 3), radius, strict=True):
        if reach == 0:
            continue
        size = x.shape[dim]
        index = torch.arange(-reach, size + reach, device=x.device)
        if mode == "circular":
            index = index.remainder(size)
        x = take(x, dim, mirrored(index, size) if mode == "reflect" else index.clamp(0, size - 1))
    return x


def _fits(x: Tensor, border: tuple[int, int, int, int]) -> bool:
    """Whether torch's own reflection serves, which takes a fraction of the time of gathering.

    It wants as many pixels as it mirrors; on a GPU its gradient does not repeat bit for bit; a program that is compiled
    or exported would be fixed to sizes that fit.
    """
    left, right, above, below = border
    fits = x.is_cpu and not torch.compiler.is_compiling()
    return fits and max(above, below) < x.shape[2] and max(left, right) < x.shape[3]
