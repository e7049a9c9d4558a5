"""The ways to part a map into low and high frequencies that need no kernel of their own: DCT, pooling, pyramids."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.frequency_split import haar_split
from ..kernels.memory_format import in_format_of
from .padding import cropped
from .pyramid import double, halve

Parts = tuple[Tensor, Tensor, tuple[Tensor, ...]]
"""The low frequencies at full size, the high ones, and the bands of the pyramid."""


def dct_parts(x: Tensor, cutoff: Tensor | float) -> Parts:
    r"""Weight the orthonormal DCT-II of a map by a Gaussian: :math:`L = D_H^T (M \odot (D_H X D_W^T)) D_W`.

    Basis function k of n has k / n cycles per two pixels; the cutoff is in these, as (), (C,) or (B, C).
    """
    down, across = (dct_matrix(size, x) for size in x.shape[2:])
    rows, columns = (torch.arange(size, device=x.device).to(x.dtype) / size for size in x.shape[2:])
    cutoff = torch.as_tensor(cutoff, device=x.device).to(x.dtype)[..., None, None]
    mask = torch.exp(-0.5 * (rows[:, None] / cutoff).square()) * torch.exp(-0.5 * (columns / cutoff).square())
    low = down.mT @ (mask * (down @ x @ across.mT)) @ across
    return low, x - low, ()


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """Make the orthonormal DCT-II, (size, size), in the dtype and on the device of a tensor.

    >>> D = dct_matrix(4, torch.zeros(0))
    >>> torch.allclose(D @ D.mT, torch.eye(4), atol=1e-6)
    True
    """
    k = torch.arange(size, device=like.device)
    # Angles repeat every 4 n steps; brought down to one turn as whole numbers, they are exact in float32.
    steps = (2 * k + 1) * k[:, None] % (4 * k[-1] + 4)
    rows = torch.cos(steps.to(like.dtype) * math.pi / (2 * size))
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def haar_parts(x: Tensor) -> Parts:
    """Split by the orthonormal Haar wavelet: the low frequencies are what it rebuilds with all details zero."""
    bands, (height, width) = haar_split(x)
    low = cropped(F.interpolate(bands[0] / 2, scale_factor=2.0, mode="nearest"), height, width)
    return low, x - low, tuple(bands)


def avgpool_parts(x: Tensor) -> Parts:
    """Average 2x2 cells, those at the far border as far as they lie in the map, and interpolate between them."""
    pooled = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    low = enlarged(pooled, *x.shape[2:])
    high = x - low
    return low, high, (high, pooled)


def laplacian_parts(x: Tensor, levels: int) -> Parts:
    """Split by a Laplacian pyramid: the low frequencies are its coarsest map at full size."""
    images = [x]
    for _ in range(levels):
        images.append(halve(images[-1]))
    low, details = images[-1], []
    for finer, coarser in zip(images[-2::-1], images[:0:-1], strict=True):
        doubled = double(coarser, *finer.shape[2:])
        details.insert(0, finer - doubled)
        low = doubled if low is coarser else double(low, *finer.shape[2:])
    return low, details[0] if levels == 1 else x - low, (*details, images[-1])


def enlarged(x: Tensor, height: int, width: int) -> Tensor:
    """Twice the size by bilinear interpolation, and cropped: the same at every place, whatever the size."""
    return cropped(F.interpolate(x, scale_factor=2.0, mode="bilinear"), height, width)


def check_pyramid(bands: Sequence[Tensor], size: Sequence[int], count: int) -> None:
    """Raise unless there are so many bands, the first of that size and each further one of half the size."""
    if len(bands) != count:
        raise ValueError(f"bands must be {count}, got {len(bands)}")
    height, width = size
    for i, band in enumerate(bands):
        if tuple(band.shape[2:]) != (height, width):
            raise ValueError(f"band {i} must be {height} x {width}, got shape {tuple(band.shape)}")
        height, width = (height + 1) // 2, (width + 1) // 2


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """Bring a band to the dtype and the memory format of the map."""
    return in_format_of(y.to(x.dtype), x)
