"""The depthwise convolution in Triton: forward, which with the flipped kernel is the gradient of the input too.

A program computes a tile of output pixels and channels, several columns of it at once. It goes down the rows of the
kernel; within one, each column of the input is loaded once and meets every output column in its reach, each weight is
loaded once, and the sums stay in registers: for k columns of kernel and n of output, n * k products take n + 2k loads.

Nothing is copied into another layout. The lanes of a warp lie along channels where these are side by side in memory
(channels-last), along the width where pixels are (contiguous); the kernels call the axis that a tile covers *length*
(height or width), and the axis on which columns are counted *width* (width or height). Other strides work, too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import slope
from ..dispatch import processors
from ..fused_activations import activated, slope_at
from ..operand_rules import compute_dtype
from .operands import Operands

PROGRAMS_PER_PROCESSOR = 4
"""Programs are halved until each multiprocessor has so many: one warp in place of four, and a shorter tile."""


class Map(NamedTuple):
    """A feature map as the kernels read it: its strides along batch, channels, length and width."""

    pointer: Tensor
    batch: int
    channel: int
    length: int
    width: int


@triton.jit
def _tile(map, batch, channels, length):
    """Return the addresses of a tile at column 0: (BLOCK_L, BLOCK_C)."""
    pointer = map.pointer + batch * map.batch
    return pointer + (length.to(tl.int64) * map.length)[:, None] + (channels.to(tl.int64) * map.channel)[None, :]


@triton.jit
def _convolve_kernel(
    x, weight_ptr, bias_ptr, grad, y, channels, length, width, rows,
    KERNEL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Convolve one tile with `rows` by KERNEL taps; given `grad`, multiply it by the slope in place of activating."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    columns, lengths = tl.cdiv(width, COLUMNS), tl.cdiv(length, BLOCK_L)
    program = tl.program_id(0)
    first = (program % columns * COLUMNS).to(tl.int64)
    a = program // columns % lengths * BLOCK_L + tl.arange(0, BLOCK_L)
    program = program // (columns * lengths)
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    batch = (program // blocks).to(tl.int64)
    there = c < channels

    sums = ()
    for _ in tl.static_range(COLUMNS):
        sums = sums + (tl.zeros([BLOCK_L, BLOCK_C], dtype),)  # noqa: RUF005  (Triton knows no unpacking here)
    tile = _tile(x, batch, c, a - rows // 2) + (first - KERNEL // 2) * x.width
    weight_ptr += c[None, :]
    for i in range(0, rows):
        row = a + (i - rows // 2)
        mask = ((row >= 0) & (row < length))[:, None] & there[None, :]
        weights = ()
        here = tile
        for column in tl.static_range(KERNEL + COLUMNS - 1):
            if column < KERNEL:
                weights = weights + (tl.load(weight_ptr, mask=there[None, :], other=0.0),)  # noqa: RUF005
                weight_ptr += channels
            at = first + (column - KERNEL // 2)
            value = tl.load(here, mask=mask & ((at >= 0) & (at < width)), other=0.0).to(dtype)
            here += x.width
            updated = ()
            for k in tl.static_range(COLUMNS):
                if (column >= k) & (column < k + KERNEL):
                    updated = updated + (sums[k] + value * weights[column - k],)  # noqa: RUF005
                else:
                    updated = updated + (sums[k],)  # noqa: RUF005
            sums = updated
        tile += x.length

    bias = tl.zeros([1, BLOCK_C], dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=there, other=0.0).to(dtype)[None, :]
    mask = (a < length)[:, None] & there[None, :]
    out = _tile(y, batch, c, a)
    for k in tl.static_range(COLUMNS):
        value = sums[k] + bias
        inside = mask & (first + k < width)
        if grad is not None:
            pull = tl.load(_tile(grad, batch, c, a) + (first + k) * grad.width, mask=inside, other=0.0)
            value = pull.to(dtype) * slope_at(value, ACTIVATION)
        else:
            value = activated(value, ACTIVATION)
        tl.store(out + (first + k) * y.width, value.to(y.pointer.dtype.element_ty), mask=inside)


class Layout(NamedTuple):
    """How the kernels see a map: which of its axes is the length, and what a program covers."""

    along_channels: bool
    """Whether the lanes of a warp lie along channels."""
    columns: int
    block_length: int
    block_channels: int
    num_warps: int

    def map(self, x: Tensor) -> Map:
        """Read a feature map (B, C, H, W)."""
        batch, channel, height, width = x.stride()
        return Map(x, batch, channel, *((height, width) if self.along_channels else (width, height)))

    def sizes(self, x: Tensor) -> tuple[int, int]:
        """Return the length and the width of a map."""
        return (x.shape[2], x.shape[3]) if self.along_channels else (x.shape[3], x.shape[2])

    def taps(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn a weight (C, 1, kh, kw) to (taps along the length, taps along the width, C)."""
        return weight[:, 0].permute(*((1, 2, 0) if self.along_channels else (2, 1, 0))).to(dtype).contiguous()


def layout_of(x: Tensor, weight: Tensor) -> Layout:
    """Choose how a map is covered, by what lies side by side and by how much fits into registers.

    On Hopper a thread has 4 neighbouring channels and 16 columns of each, or where lanes lie along the width, whose
    shifted rows cannot be read 4 pixels at a time, 1 pixel and 32 rows. Of all instructions of the inner loop 60 to
    80 % are then multiply-adds for 7 to 31 taps, or 48 to 69 %, and nothing spills. Wider kernels, and float64, leave
    room for half as many columns.
    """
    along_channels = x.stride(1) == 1 or x.stride(3) != 1
    batch, channels, height, width = x.shape
    length, across, taps = (height, width, weight.shape[3]) if along_channels else (width, height, weight.shape[2])
    wide = x.dtype == torch.float64 or taps > 31
    columns = min((16 if along_channels else 32) // (2 if wide else 1), triton.next_power_of_2(across))
    each = (2 if x.dtype == torch.float64 else 4) if along_channels else 1
    lanes = min(32, triton.next_power_of_2(channels if along_channels else length))
    if along_channels and 0 < channels % 32 <= 16:
        lanes = min(lanes, 16)
    for num_warps in (4, 2, 1):
        rest = max(1, 32 * num_warps * each // lanes)
        rest = min(rest, triton.next_power_of_2(length if along_channels else channels))
        block_length, block_channels = (rest, lanes) if along_channels else (lanes, rest)
        layout = Layout(along_channels, columns, block_length, block_channels, num_warps)
        if batch * _tiles(layout, x) >= PROGRAMS_PER_PROCESSOR * processors(x.device):
            break
    return layout


def _tiles(layout: Layout, x: Tensor) -> int:
    """Count the programs that cover one image."""
    length, width = layout.sizes(x)
    blocks = triton.cdiv(length, layout.block_length) * triton.cdiv(x.shape[1], layout.block_channels)
    return blocks * triton.cdiv(width, layout.columns)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, activation: str | None = None,
    grad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Write the convolution of `x` to `out`, activated; or given `grad`, the gradient of what was activated."""
    layout = layout_of(x, weight)
    taps = layout.taps(weight, compute_dtype(x))
    length, width = layout.sizes(x)
    with torch.cuda.device_of(x):
        _convolve_kernel[(len(x) * _tiles(layout, x),)](
            *(layout.map(x), taps, None if bias is None else bias.contiguous()),
            *(None if grad is None else layout.map(grad), layout.map(out), x.shape[1], length, width, len(taps)),
            KERNEL=taps.shape[1], COLUMNS=layout.columns, BLOCK_L=layout.block_length, BLOCK_C=layout.block_channels,
            ACTIVATION=activation, num_warps=layout.num_warps,
        )  # fmt: skip
    return out


def forward(x: Operands, activation: str | None) -> Tensor:
    """Convolve; see `Operands`."""
    return convolve(x.x, x.reach(), x.bias, torch.empty_like(x.x), activation=activation)


def backward(
    x: Operands, y: Tensor | None, grad_y: Tensor, activation: str | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiate; see `Operands`."""
    from . import fused_backward

    if activation is None:
        grad = grad_y
    elif y is None:
        grad = convolve(x.x, x.reach(), x.bias, torch.empty_like(x.x), activation=activation, grad=grad_y)
    else:
        grad = grad_y * slope(y, activation)
    return fused_backward.backward(x, grad, wanted)
