"""The blur in plain torch: two products with banded matrices, whose rows hold the taps and the mirror at the borders.

Nothing is padded, whatever the layout and however small the map, and the gradient is the transposed product. A matrix
is cut into blocks, so that little of what is multiplied is zero, and planes are taken a few at a time: what a product
leaves is still in the cache when the next one reads it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory_format import in_format_of, memory_format_of
from ..operand_rules import compute_dtype, like
from .operands import mirrored, taps_of
from .reference import haar_merge_reference

__all__ = ["blur_split", "blur_split_adjoint", "haar_merge", "haar_split"]

BLOCK, BLOCK_ACROSS = 48, 96
"""About so many rows of a matrix are a product of their own: more have more zeros in their band, fewer are products too
small to be fast. Of 64 channels, 127 x 129, on one core with AVX-512 (torch 2.13): 32 and 64 take 1.2 and 1.1 of the
time of 48, the whole matrix 1.5. The second is for rows of a map in channels-last, each a product of its own."""
PIXELS = 2**18
"""Planes are taken so many pixels at a time on each core, a megabyte of float32: all at once take 1.3 of the time."""
FEW = 8
"""A map of fewer channels in channels-last is rearranged, there and back, in less time than its thin products take."""

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


class Block(NamedTuple):
    """Some rows of a blur's matrix: which pixels they make, of which, and with what weights."""

    target: slice
    source: slice
    weight: Tensor


def blur_split(x: Tensor, sigma: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Blur; one deviation, or one for each channel."""
    low, high = torch.empty_like(x), torch.empty_like(x)
    if len(set(sigma)) > 1:
        for value, channels in _by_deviation(sigma, x.device):
            low[:, channels], high[:, channels] = blur_split(x[:, channels], [value])
        return low, high
    wide = _laid_out(x)
    low, high = torch.empty_like(wide), torch.empty_like(wide)
    blocks = _blocks_of(wide, sigma[0], adjoint=False)
    for seen, passed, left in _pieces(wide, low, high):
        _blur(seen, passed, *blocks)
        torch.sub(seen, passed, out=left)
    return like(low, x), like(high, x)


def blur_split_adjoint(low: Tensor, high: Tensor, sigma: Sequence[float]) -> Tensor:
    """Bring gradients of both bands to `x`."""
    if len(set(sigma)) > 1:
        y = torch.empty_like(low)
        for value, channels in _by_deviation(sigma, low.device):
            y[:, channels] = blur_split_adjoint(low[:, channels], high[:, channels], [value])
        return y
    passed, left = _laid_out(low), _laid_out(in_format_of(high, low))
    y = torch.empty_like(passed)
    blocks = _blocks_of(passed, sigma[0], adjoint=True)
    for of_low, of_high, of_x in _pieces(passed, left, y):
        _blur(of_low - of_high, of_x, *blocks)
        of_x.add_(of_high)
    return like(y, low)


def _by_deviation(sigma: Sequence[float], device: torch.device) -> Iterator[tuple[float, Tensor]]:
    """Number the channels of each deviation: they are blurred together."""
    for value in set(sigma):
        yield value, torch.tensor([c for c, s in enumerate(sigma) if s == value], device=device)


def _laid_out(x: Tensor) -> Tensor:
    wide = in_format_of(x.to(compute_dtype(x)), x)
    return wide.contiguous() if x.shape[1] < FEW else wide


def _pieces(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut maps of one layout alike: into some planes, (P, H, W), or in channels-last into images, (H, W, C)."""
    x = maps[0]
    if memory_format_of(x) is torch.channels_last:
        yield from zip(*(each.permute(0, 2, 3, 1) for each in maps), strict=True)
        return
    height, width = x.shape[2:]
    step = max(1, torch.get_num_threads() * PIXELS // (height * width)) if x.is_cpu else len(x) * x.shape[1]
    yield from zip(*(each.view(-1, height, width).split(step) for each in maps), strict=True)


def _blur(x: Tensor, out: Tensor, down: Sequence[Block], across: Sequence[Block], last: bool) -> None:
    """Blur a piece into another: planes along rows and then along columns, pixels with channels the other way round."""
    if not last:
        rows = torch.empty_like(x)
        for block in across:
            torch.mm(x.flatten(0, 1)[:, block.source], block.weight.mT, out=rows.flatten(0, 1)[:, block.target])
        for block in down:
            torch.bmm(block.weight.expand(len(x), -1, -1), rows[:, block.source], out=out[:, block.target])
        return
    for block in down:
        rows = (block.weight @ x[block.source].flatten(1)).view(-1, *x.shape[1:])
        for part in across:
            target = out[block.target, part.target]
            torch.bmm(part.weight.expand(len(rows), -1, -1), rows[:, part.source], out=target)


def _blocks_of(x: Tensor, sigma: float, adjoint: bool) -> tuple[list[Block], list[Block], bool]:
    """Cut the matrices of both axes for a map; and tell whether its channels lie side by side."""
    last = memory_format_of(x) is torch.channels_last
    taps = taps_of([sigma], x.dtype, x.device)[0]
    blocks = partial(_blocks, taps=taps, adjoint=adjoint)
    return blocks(x.shape[2], BLOCK), blocks(x.shape[3], BLOCK_ACROSS if last else BLOCK), last


def _blocks(size: int, about: int, taps: Tensor, adjoint: bool) -> list[Block]:
    """Cut the matrix that blurs an axis of `size` pixels, or its transpose, into about so many rows each.

    All blocks have as many rows: the last may make some pixels again.
    """
    radius, parts = len(taps) // 2, max(1, round(size / about))
    rows = -(-size // parts)
    columns = min(rows + 2 * radius, size)
    wider = min(columns + 2 * radius, size)
    starts = [min(part * rows, size - rows) for part in range(parts)]
    sources, outer = (
        [min(max(0, start - reach), size - width) for start in starts]
        for reach, width in ((radius, columns), (2 * radius, wider))
    )
    if adjoint:  # rows of the transpose are columns of the matrix, seen by as many pixels to each side
        bands = _bands(size, sources, columns, outer, wider, taps)
        inside = zip(bands, starts, outer, strict=True)
        weights = [band[:, start - first : start - first + rows].mT for band, start, first in inside]
    else:
        weights = list(_bands(size, starts, rows, sources, columns, taps))
    return [
        Block(slice(start, start + rows), slice(source, source + columns), weight)
        for start, source, weight in zip(starts, sources, weights, strict=True)
    ]


def _bands(size: int, starts: Sequence[int], rows: int, sources: Sequence[int], columns: int, taps: Tensor) -> Tensor:
    """Return parts of the matrix that blurs an axis of `size` pixels, which start at these rows and columns."""
    radius, device = len(taps) // 2, taps.device
    count = len(starts)
    row = torch.arange(rows, device=device)[:, None]
    first, source = torch.tensor([starts, sources], device=device)[:, :, None, None]
    seen = first + row + torch.arange(2 * radius + 1, device=device)
    column = mirrored(size, radius, radius, device)[seen] - source
    part = torch.arange(count, device=device)[:, None, None]
    bands = taps.new_zeros(count, rows, columns)
    places = part.expand_as(column), row.expand_as(column), column
    return bands.index_put_(places, taps.expand(column.shape), accumulate=True)
