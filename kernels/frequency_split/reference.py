"""The definitions of the blur and of the Haar transform: one loop over taps, and four sums."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..memory_format import in_format_of
from ..operand_rules import compute_dtype, like
from .operands import mirrored, radius_of, taps_of


def blur_split_reference(x: Tensor, sigma: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Compute `blur_split` by its formula; one deviation, or one for each channel."""
    wide = x.to(compute_dtype(x))
    taps, radius = taps_of(sigma, wide.dtype, x.device), radius_of(sigma)
    low = wide
    for axis in (2, 3):
        size = x.shape[axis]
        padded = low.index_select(axis, mirrored(size, radius, radius, x.device))
        low = torch.zeros_like(wide)
        for i in range(2 * radius + 1):
            low = low + taps[:, i, None, None] * padded.narrow(axis, i, size)
    return like(low, x), like(wide - low, x)


def haar_split_reference(x: Tensor, repeat: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the bands of `haar_split` by their formulas; beyond an odd border lie its own pixels, or zeros."""
    wide = x.to(compute_dtype(x))
    first = [torch.arange(0, size, 2, device=x.device) for size in x.shape[2:]]
    rows, columns = ((index, (index + 1).clamp(max=n - 1)) for index, n in zip(first, x.shape[2:], strict=True))
    a, b, c, d = (wide.index_select(2, i).index_select(3, j) for i in rows for j in columns)
    if not repeat:
        below = (first[0] + 1 < x.shape[2])[:, None]
        right = first[1] + 1 < x.shape[3]
        b, c, d = b * right, c * below, d * below * right
    bands = (a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2
    ll, lh, hl, hh = (in_format_of(band.to(x.dtype), x) for band in bands)
    return ll, lh, hl, hh


def haar_merge_reference(bands: Sequence[Tensor], size: Sequence[int], fold: bool = False) -> Tensor:
    """Compute `haar_merge`; pixels beyond an odd border are dropped, or with `fold` added to those they repeat."""
    ll, lh, hl, hh = (band.to(compute_dtype(band)) for band in bands)
    a, b, c, d = (ll + lh + hl + hh) / 2, (ll + lh - hl - hh) / 2, (ll - lh + hl - hh) / 2, (ll - lh - hl + hh) / 2
    pixels = torch.stack((torch.stack((a, b), -1), torch.stack((c, d), -1)), 3)  # (B, C, H/2, 2, W/2, 2)
    x = pixels.flatten(4, 5).flatten(2, 3)
    for axis, length in ((2, size[0]), (3, size[1])):
        if fold and length % 2:
            beyond = x.narrow(axis, length, 1)
            x = torch.cat((x.narrow(axis, 0, length - 1), x.narrow(axis, length - 1, 1) + beyond), axis)
        x = x.narrow(axis, 0, length)
    return in_format_of(x.to(bands[0].dtype), bands[0])
