"""The depthwise convolution in Triton, backward.

The gradient of the input is forward with the flipped kernel. That of the weight correlates `x` with the gradient of the
output: a program of one warp takes a block of taps and of lanes, and walks over pixels. A window of `x` as large as the
block stays in registers: a step along the width loads one column of the window and one gradient, and adds a product to
each tap. Programs write their sums apart, and these are added up afterwards in a fixed order: no atomics, the same bits
each time. Length, width and lanes are those of `fused.py`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import processors
from .fused import Layout, _tile, convolve, layout_of
from .operands import Operands

TAPS, TAPS_IN_FLOAT64 = 64, 32
"""So many taps has a block at most, with as many numbers in its window; more would spill."""

COLUMNS = 18
"""So many of them along the width: a wider kernel is split evenly."""

PROGRAMS_PER_PROCESSOR = 16
"""Pixels are divided among programs until each multiprocessor has so many."""


@triton.jit
def _correlate_kernel(
    x, grad, sums_ptr, bias_sums_ptr, batches, channels, length, width, rows, columns, chunk,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add up, over `chunk` tiles of some image, the products that belong to ROWS by COLUMNS taps."""
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    left, top = program % across * COLUMNS, program // across % down * ROWS
    program = program // (across * down)
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    there = (c < channels)[None, :]
    part = (program // blocks).to(tl.int64)
    tiles = tl.cdiv(length, BLOCK_L)
    first = part * chunk

    sums = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        sums = sums + (tl.zeros([BLOCK_L, BLOCK_C], dtype),)  # noqa: RUF005  (Triton knows no unpacking here)
    bias_sum = tl.zeros([BLOCK_L, BLOCK_C], dtype)
    for tile in range(first, tl.minimum(first + chunk, batches * tiles)):
        a = (tile % tiles).to(tl.int32) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (a < length)[:, None] & there
        grad_tile = _tile(grad, tile // tiles, c, a)
        x_tile = _tile(x, tile // tiles, c, a + (top - rows // 2))
        row = a[:, None] + (top - rows // 2)
        ahead = left - columns // 2  # how far the first column of the window is ahead of the gradient's
        inside = ()
        window = ()
        x_row = x_tile
        for i in tl.static_range(ROWS):
            inside = inside + (there & (row + i >= 0) & (row + i < length),)  # noqa: RUF005
            for j in tl.static_range(COLUMNS - 1):
                seen = inside[i] & (ahead + j >= 0) & (ahead + j < width)
                older = tl.load(x_row + (ahead + j).to(tl.int64) * x.width, mask=seen, other=0.0)
                window = window + (older.to(dtype),)  # noqa: RUF005
            x_row += x.length
        for start in range(0, width, COLUMNS):
            for step in tl.static_range(COLUMNS):  # so often, because the window then is a new one
                at = start + step
                pull = tl.load(grad_tile + at.to(tl.int64) * grad.width, mask=mask & (at < width), other=0.0).to(dtype)
                bias_sum += pull
                at += ahead + COLUMNS - 1
                column = x_tile + at.to(tl.int64) * x.width
                known = (at >= 0) & (at < width)
                updated = ()
                moved = ()
                for i in tl.static_range(ROWS):
                    newest = tl.load(column, mask=inside[i] & known, other=0.0).to(dtype)
                    column += x.length
                    row_window = window[i * (COLUMNS - 1) : (i + 1) * (COLUMNS - 1)] + (newest,)  # noqa: RUF005
                    for j in tl.static_range(COLUMNS):
                        updated = updated + (sums[i * COLUMNS + j] + pull * row_window[j],)  # noqa: RUF005
                    moved = moved + row_window[1:]
                sums = updated
                window = moved

    sums_ptr += part * rows * columns * channels + c
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            inside = (c < channels) & (top + i < rows) & (left + j < columns)
            offset = ((top + i) * columns + left + j) * channels
            tl.store(sums_ptr + offset, tl.sum(sums[i * COLUMNS + j], axis=0), mask=inside)
    if (left == 0) & (top == 0):
        tl.store(bias_sums_ptr + part * channels + c, tl.sum(bias_sum, axis=0), mask=c < channels)


def _correlate(x: Tensor, grad: Tensor, weight: Tensor, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight, (C, 1, kh, kw), and of the bias."""
    batch, channels = x.shape[:2]
    (length, width), (rows, columns) = layout.sizes(x), layout.sizes(weight)
    block_columns = triton.cdiv(columns, triton.cdiv(columns, COLUMNS))
    block_rows = min(rows, (TAPS_IN_FLOAT64 if dtype == torch.float64 else TAPS) // block_columns)
    lanes = min(32, triton.next_power_of_2(channels if layout.along_channels else length))
    block_length, block_channels = (1, lanes) if layout.along_channels else (lanes, 1)
    tiles = batch * triton.cdiv(length, block_length)
    blocks = triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns) * triton.cdiv(channels, block_channels)
    chunk = triton.cdiv(tiles * blocks, max(blocks, PROGRAMS_PER_PROCESSOR * processors(x.device)))
    parts = triton.cdiv(tiles, chunk)
    sums = torch.empty(parts, rows, columns, channels, dtype=dtype, device=x.device)
    bias_sums = torch.empty(parts, channels, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        _correlate_kernel[(parts * blocks,)](
            *(layout.map(x), layout.map(grad), sums, bias_sums),
            *(batch, channels, length, width, rows, columns, chunk),
            ROWS=block_rows, COLUMNS=block_columns, BLOCK_L=block_length, BLOCK_C=block_channels, num_warps=1,
        )  # fmt: skip
    taps = sums.sum(0).permute(*((2, 0, 1) if layout.along_channels else (2, 1, 0)))
    return taps[:, None], bias_sums.sum(0)


def backward(x: Operands, grad: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Differentiate the convolution alone; see `Operands`."""
    gradients: dict[str, Tensor] = {}
    weight = x.reach()
    if wanted[0]:
        gradients["x"] = convolve(grad, weight.flip(2, 3), None, torch.empty_like(x.x))
    if wanted[1] or wanted[2]:
        taps, bias = _correlate(x.x, grad, weight, layout_of(x.x, weight), x.dtype)
        gradients |= {"weight": x.weight_gradient(taps)} if wanted[1] else {}
        gradients |= {"bias": bias} if wanted[2] else {}
    return x.like(gradients)
