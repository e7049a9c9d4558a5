"""The blur in plain torch: two products with banded matrices, whose rows hold the taps and the mirror at the borders.

Nothing is padded, whatever the layout and however small the map, and the gradient is the transposed product. On one
core with AVX-512 (torch 2.13; 64 channels, 128 x 128, 9 taps) this takes 0.8 of the time of two convolutions of a
padded map, and with 31 taps 0.4; a map in the layout channels-last may take twice the time of convolutions.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory_format import in_format_of
from ..operand_rules import compute_dtype, like
from .operands import mirrored, radius_of, taps_of
from .reference import haar_merge_reference

__all__ = ["blur_split", "blur_split_adjoint", "haar_merge", "haar_split"]

BLOCK = 128
"""About so many rows of a matrix are a product of their own: a larger band has more zeros in it."""

haar_merge = haar_merge_reference


def haar_split(x: Tensor, repeat: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split; see `haar_split_reference`. Rows are added first, whole ones, and columns of half as many."""
    wide = x.to(compute_dtype(x))
    odd = x.shape[3] % 2, x.shape[2] % 2
    if any(odd):
        wide = F.pad(wide, (0, odd[0], 0, odd[1]), mode="replicate" if repeat else "constant")
    above, below = wide[:, :, ::2], wide[:, :, 1::2]
    sums, differences = above + below, above - below
    left, right = slice(None, None, 2), slice(1, None, 2)
    bands = (
        torch.add(sums[..., left], sums[..., right]),
        torch.add(differences[..., left], differences[..., right]),
        torch.sub(sums[..., left], sums[..., right]),
        torch.sub(differences[..., left], differences[..., right]),
    )
    ll, lh, hl, hh = (in_format_of(band.mul_(0.5).to(x.dtype), x) for band in bands)
    return ll, lh, hl, hh


def blur_split(x: Tensor, sigma: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Blur; one deviation, or one for each channel."""
    wide = x.to(compute_dtype(x))
    low = _by_deviation(wide, sigma, _blur)
    return like(low, x), like(wide - low, x)


def blur_split_adjoint(low: Tensor, high: Tensor, sigma: Sequence[float]) -> Tensor:
    """Bring gradients of both bands to `x`."""
    dtype = compute_dtype(low)
    pull = low.to(dtype) - high.to(dtype)
    return like(high.to(dtype) + _by_deviation(pull, sigma, _blur_adjoint), low)


def _by_deviation(x: Tensor, sigma: Sequence[float], blur: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Blur channels of one deviation together."""
    if len(set(sigma)) == 1:
        return blur(x, sigma[0])
    y = torch.empty_like(x)
    for value in set(sigma):
        channels = torch.tensor([c for c, s in enumerate(sigma) if s == value], device=x.device)
        y[:, channels] = blur(x[:, channels], value)
    return y


def _blur(x: Tensor, sigma: float, adjoint: bool = False) -> Tensor:
    x = in_format_of(x, x)
    if x.is_contiguous():
        return _along(_along(x, -2, sigma, adjoint), -1, sigma, adjoint)
    pixels = x.permute(0, 2, 3, 1)
    rows = _along(pixels.flatten(2), -2, sigma, adjoint).view(pixels.shape)
    return _along(rows, -2, sigma, adjoint).permute(0, 3, 1, 2)


def _blur_adjoint(x: Tensor, sigma: float) -> Tensor:
    return _blur(x, sigma, adjoint=True)


def _along(x: Tensor, axis: int, sigma: float, adjoint: bool) -> Tensor:
    """Multiply an axis, -1 or -2, by the matrix of the blur, or by its transpose."""
    size, radius = x.shape[axis], radius_of([sigma])
    taps = taps_of([sigma], x.dtype, x.device)[0]
    parts = max(1, round(size / BLOCK))
    y = torch.zeros_like(x) if parts > 1 else x
    step = -(-size // parts)
    for start in range(0, size, step):
        rows = start, min(start + step, size)
        columns = max(0, start - radius), min(rows[1] + radius, size)
        weight, target, source = _band(size, rows, columns, taps), rows, columns
        if adjoint:
            weight, target, source = weight.mT, columns, rows
        part = x.narrow(axis, source[0], source[1] - source[0])
        product = weight @ part if axis == -2 else part @ weight.mT
        if parts == 1:
            return product
        y.narrow(axis, target[0], target[1] - target[0]).add_(product)
    return y


def _band(size: int, rows: tuple[int, int], columns: tuple[int, int], taps: Tensor) -> Tensor:
    """Return a part of the matrix that blurs an axis of `size` pixels."""
    radius, device = len(taps) // 2, taps.device
    row = torch.arange(rows[1] - rows[0], device=device)[:, None]
    seen = rows[0] + row + torch.arange(2 * radius + 1, device=device)
    column = mirrored(size, radius, radius, device)[seen] - columns[0]
    band = taps.new_zeros(rows[1] - rows[0], columns[1] - columns[0])
    return band.index_put_((row.expand_as(column), column), taps.expand(column.shape), accumulate=True)
