"""The blur and the Haar transform in Triton, forward and as adjoints.

Programs cover tiles of columns and channels; the lanes of a warp lie along whichever of the two is side by side in
memory. A program of the blur goes down the rows: along a row it sums shifted loads, which come from the first cache,
and each sum is added at once to all rows of output that see it. These partial sums stay in registers and move up by one
with each row. So the map is read once from memory, but for the rows and columns around tiles, and both bands are
written once.

The adjoint of a mirror at distance is the mirror itself, except that a pixel on the border is no mirror image: with
these weighted twice on the way in and by half on the way out, the same kernel computes gradients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import processors
from . import fallback
from .operands import arithmetic, empty_map, radius_of, taps_of

PROGRAMS_PER_PROCESSOR = 8
"""Programs of the blur are cut shorter until each multiprocessor has so many."""

MOST_ROWS, LEAST_ROWS = 64, 16
"""Rows of output for each program of the blur."""

LANES = 128
"""Columns and channels of a tile of the blur; with channels side by side, and partial sums for few rows, 4 times as
many, which a thread loads together."""

FEW_ROWS = 9

PIXELS = 512
"""Columns and channels of a tile of the Haar transform."""


class Map(NamedTuple):
    """A feature map as the kernels read it: its strides along batch, channels, height and width."""

    pointer: Tensor
    batch: int
    channel: int
    height: int
    width: int


@triton.jit
def _row(map, batch, c, y):
    """Return the addresses of column 0 of a row, for some channels: (1, BLOCK_C)."""
    start = map.pointer + batch.to(tl.int64) * map.batch + y.to(tl.int64) * map.height
    return start + (c.to(tl.int64) * map.channel)[None, :]


@triton.jit
def _pixels(map, batch, c, y, w, mask, dtype: tl.constexpr):
    """Load some columns of a row: (BLOCK_W, BLOCK_C)."""
    return tl.load(_row(map, batch, c, y) + (w * map.width)[:, None], mask=mask, other=0.0).to(dtype)


@triton.jit
def _store(map, batch, c, y, w, value, mask):
    address = _row(map, batch, c, y) + (w * map.width)[:, None]
    tl.store(address, value.to(map.pointer.dtype.element_ty), mask=mask)


@triton.jit
def _mirror(i, size):
    i = tl.where(i < size, tl.abs(i), 2 * (size - 1) - i)
    return tl.maximum(tl.minimum(i, size - 1), 0)


@triton.jit
def _border(i, size, WEIGHT: tl.constexpr, dtype: tl.constexpr):
    """Return the weight of a pixel: WEIGHT on the border, 1 elsewhere."""
    return tl.where((i == 0) | (i == size - 1), WEIGHT, 1.0).to(dtype)


@triton.jit
def _blur_kernel(
    x, low, high, taps_ptr, taps_stride, channels, height, width, rows,
    RADIUS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """Split `x` into `low` and `high`; or bring their gradients, given in their places, to that of `x`."""
    dtype: tl.constexpr = taps_ptr.dtype.element_ty
    columns, chunks = tl.cdiv(width, BLOCK_W), tl.cdiv(height, rows)
    program = tl.program_id(0)
    w = program % columns * BLOCK_W + tl.arange(0, BLOCK_W)
    program = program // columns
    first = program % chunks * rows
    program = program // chunks
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    batch = program // blocks
    there = (c < channels)[None, :]  # columns and rows are mirrored: no more is needed to read inside the map
    mask = (w < width)[:, None] & there

    taps = ()
    sums = ()
    for i in tl.static_range(RADIUS + 1):  # sums of tuples, since Triton cannot unpack them
        taps = taps + (tl.load(taps_ptr + c[None, :] * taps_stride + i, mask=there, other=0.0),)  # noqa: RUF005
    for _ in tl.static_range(2 * RADIUS + 1):
        sums = sums + (tl.zeros([BLOCK_W, BLOCK_C], dtype),)  # noqa: RUF005
    last = tl.minimum(first + rows, height)
    for below in range(first - RADIUS, last + RADIUS):
        y = _mirror(below, height)
        along = tl.zeros([BLOCK_W, BLOCK_C], dtype)
        for i in tl.static_range(2 * RADIUS + 1):
            column = _mirror(w + (i - RADIUS), width)
            if ADJOINT:
                value = _pixels(low, batch, c, y, column, there, dtype)
                value -= _pixels(high, batch, c, y, column, there, dtype)
                value = value * _border(column, width, 2.0, dtype)[:, None]
            else:
                value = _pixels(x, batch, c, y, column, there, dtype)
            along += value * taps[i - RADIUS if i > RADIUS else RADIUS - i]
        if ADJOINT:
            along = along * _border(y, height, 2.0, dtype)
        moved = ()
        for i in tl.static_range(2 * RADIUS):
            moved = moved + (sums[i + 1] + along * taps[i - RADIUS if i > RADIUS else RADIUS - i],)  # noqa: RUF005
        sums = moved + (along * taps[RADIUS],)  # noqa: RUF005

        y = below - RADIUS  # the row of output that is complete
        inside = mask & (y >= first)
        y = tl.maximum(y, 0)
        blurred = sums[0]
        if ADJOINT:
            blurred = blurred * _border(w, width, 0.5, dtype)[:, None] * _border(y, height, 0.5, dtype)
            past = _pixels(high, batch, c, y, w, inside, dtype)
            _store(x, batch, c, y, w, blurred + past, inside)
        else:
            value = _pixels(x, batch, c, y, w, inside, dtype)
            _store(low, batch, c, y, w, blurred, inside)
            _store(high, batch, c, y, w, (value - blurred), inside)


@triton.jit
def _haar_tile(channels, height, width, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the batch, the row, columns and channels of a program's tile of a band."""
    program = tl.program_id(0)
    columns = tl.cdiv(width, BLOCK_W)
    w = program % columns * BLOCK_W + tl.arange(0, BLOCK_W)
    program = program // columns
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // blocks
    return program // height, program % height, w, c, (w < width)[:, None] & (c < channels)[None, :]


@triton.jit
def _pairs(map, batch, c, y, w):
    """Return the addresses of the pixels 2w and 2w + 1 of a row: (BLOCK_W, BLOCK_C, 2)."""
    columns = 2 * w[:, None, None] + tl.arange(0, 2)[None, None, :]
    return _row(map, batch, c, y)[:, :, None] + columns * map.width


@triton.jit
def _haar_split_kernel(
    x, ll, lh, hl, hh, channels, height, width,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, REPEAT: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    rows, columns = (height + 1) // 2, (width + 1) // 2
    batch, y, w, c, mask = _haar_tile(channels, rows, columns, BLOCK_W, BLOCK_C)
    right = (2 * w[:, None, None] + tl.arange(0, 2)[None, None, :] < width) & mask[:, :, None]
    below = 2 * y + 1 < height
    a, b = tl.split(tl.load(_pairs(x, batch, c, 2 * y, w), mask=right, other=0.0).to(dtype))
    under = tl.load(_pairs(x, batch, c, 2 * y + below.to(tl.int32), w), mask=right & (below | REPEAT), other=0.0)
    c_, d = tl.split(under.to(dtype))
    if REPEAT:
        beyond = (2 * w + 1 >= width)[:, None]
        b, d = tl.where(beyond, a, b), tl.where(beyond, c_, d)
    _store(ll, batch, c, y, w, (0.5 * (a + b + c_ + d)), mask)
    _store(lh, batch, c, y, w, (0.5 * (a + b - c_ - d)), mask)
    _store(hl, batch, c, y, w, (0.5 * (a - b + c_ - d)), mask)
    _store(hh, batch, c, y, w, (0.5 * (a - b - c_ + d)), mask)


@triton.jit
def _haar_merge_kernel(
    x, ll, lh, hl, hh, channels, height, width,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    rows, columns = (height + 1) // 2, (width + 1) // 2
    batch, y, w, c, mask = _haar_tile(channels, rows, columns, BLOCK_W, BLOCK_C)
    s = _pixels(ll, batch, c, y, w, mask, dtype)
    v = _pixels(lh, batch, c, y, w, mask, dtype)
    h = _pixels(hl, batch, c, y, w, mask, dtype)
    d = _pixels(hh, batch, c, y, w, mask, dtype)
    above = tl.join(0.5 * (s + v + h + d), 0.5 * (s + v - h - d))
    under = tl.join(0.5 * (s - v + h - d), 0.5 * (s - v - h + d))
    below = 2 * y + 1 < height
    if FOLD:
        # A pixel beyond the border was the one before it: of the band along an odd side only sums are left.
        if not below:
            above += under
        alone = ((2 * w + 1 >= width)[:, None] & mask)[:, :, None]
        above = tl.where(alone, tl.sum(above, axis=2)[:, :, None], above)
        under = tl.where(alone, tl.sum(under, axis=2)[:, :, None], under)
    right = (2 * w[:, None, None] + tl.arange(0, 2)[None, None, :] < width) & mask[:, :, None]
    out = x.pointer.dtype.element_ty
    tl.store(_pairs(x, batch, c, 2 * y, w), above.to(out), mask=right)
    tl.store(_pairs(x, batch, c, 2 * y + 1, w), under.to(out), mask=right & below)


def _map(x: Tensor) -> Map:
    return Map(x, *x.stride())


def _tile(x: Tensor, width: int, pixels: int) -> tuple[int, int]:
    """Return how many columns and channels a tile of `pixels` has, lanes along those that are side by side."""
    channels, columns = (triton.next_power_of_2(size) for size in (x.shape[1], width))
    if x.stride(1) == 1 and x.stride(3) != 1:
        block_channels = min(channels, pixels)
        return min(columns, pixels // block_channels), block_channels
    block_width = min(columns, pixels)
    return block_width, min(channels, pixels // block_width)


def _blurred(source: Tensor, x: Tensor, low: Tensor, high: Tensor, sigma: Sequence[float], adjoint: bool) -> None:
    batch, channels, height, width = source.shape
    radius = radius_of(sigma)
    taps = taps_of(sigma, arithmetic(source.dtype), source.device)[:, radius:].contiguous()
    together = source.stride(1) == 1 and source.stride(3) != 1 and 2 * radius + 1 <= FEW_ROWS
    block_width, block_channels = _tile(source, width, 4 * LANES if together else LANES)
    rows = MOST_ROWS
    across = batch * triton.cdiv(channels, block_channels) * triton.cdiv(width, block_width)
    while rows > LEAST_ROWS and across * triton.cdiv(height, rows) < PROGRAMS_PER_PROCESSOR * processors(x.device):
        rows //= 2
    with torch.cuda.device_of(x):
        _blur_kernel[(across * triton.cdiv(height, rows),)](
            *(_map(x), _map(low), _map(high), taps, len(taps[0]) if len(taps) > 1 else 0),
            *(channels, height, width, rows),
            RADIUS=radius, BLOCK_W=block_width, BLOCK_C=block_channels, ADJOINT=adjoint,
            num_warps=4,
        )  # fmt: skip


def blur_split(x: Tensor, sigma: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Blur; one deviation, or one for each channel."""
    low, high = torch.empty_like(x), torch.empty_like(x)
    _blurred(x, x, low, high, sigma, adjoint=False)
    return low, high


def blur_split_adjoint(low: Tensor, high: Tensor, sigma: Sequence[float]) -> Tensor:
    """Bring gradients of both bands to `x`."""
    if min(low.shape[2:]) <= radius_of(sigma):
        return fallback.blur_split_adjoint(low, high, sigma)  # the last pixel repeats: that is no mirror
    x = torch.empty_like(low)
    _blurred(low, x, low, high, sigma, adjoint=True)
    return x


def haar_split(x: Tensor, repeat: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Transform; beyond an odd border lie its own pixels, or zeros."""
    height, width = ((side + 1) // 2 for side in x.shape[2:])
    ll, lh, hl, hh = (empty_map(x, height, width) for _ in range(4))
    block_width, block_channels = _tile(x, width, PIXELS)
    with torch.cuda.device_of(x):
        _haar_split_kernel[(_haar_tiles(ll, block_width, block_channels),)](
            *(_map(x), _map(ll), _map(lh), _map(hl), _map(hh), *x.shape[1:]),
            BLOCK_W=block_width, BLOCK_C=block_channels, REPEAT=repeat, dtype=_triton(x.dtype), num_warps=4,
        )  # fmt: skip
    return ll, lh, hl, hh


def haar_merge(bands: Sequence[Tensor], size: Sequence[int], fold: bool) -> Tensor:
    """Transform back; pixels beyond an odd border are dropped, or with `fold` added to those they repeat."""
    x = empty_map(bands[0], *size)
    block_width, block_channels = _tile(x, bands[0].shape[3], PIXELS)
    with torch.cuda.device_of(x):
        _haar_merge_kernel[(_haar_tiles(bands[0], block_width, block_channels),)](
            *(_map(x), *map(_map, bands), *x.shape[1:]),
            BLOCK_W=block_width, BLOCK_C=block_channels, FOLD=fold, dtype=_triton(x.dtype), num_warps=4,
        )  # fmt: skip
    return x


def _haar_tiles(band: Tensor, block_width: int, block_channels: int) -> int:
    batch, channels, height, width = band.shape
    return batch * height * triton.cdiv(channels, block_channels) * triton.cdiv(width, block_width)


def _triton(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
