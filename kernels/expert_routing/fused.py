"""The experts in Triton: forward, and what backward shares with it.

A program takes a block of the assignments of one expert, finds its tokens by their numbers where they lie, and goes
over the hidden layer in blocks, which never leave the registers. Which expert a program has it counts from the offsets,
so that the grid depends on shapes alone: there is a program for each block that could be needed, and those that are not
return at once. Each row is written, times its weight, where its assignment lies; a last pass adds up the rows of each
token in the order of its slots. Products of half precision go to tensor cores and are summed in float32; those of
float32 and float64 are exact.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused_activations import activated
from ..operand_rules import like
from .fused_route import group, route, route_backward
from .operands import Groups, Operands

__all__ = ["backward", "forward", "route", "route_backward"]

ROWS, HIDDEN = 64, 32
"""A block has so many assignments at most, and so many hidden channels."""

ROWS_BYTES, LAYER_BYTES = 16384, 8192
"""Blocks of assignments and of layers, with all their channels, take so much at most where they have more than 16. On
Hopper nothing spills then up to 256 channels in half precision, and 16 bytes in float32."""


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    slots: int
    experts: int
    channels: int
    hidden: int
    rows_block: int
    channels_block: int
    hidden_block: int
    experts_block: int


@triton.jit
def _block_of_assignments(order_ptr, offsets_ptr, S: tl.constexpr):
    """Return the expert of a program, or none of them, and assignments of it, and which of them there are."""
    e = tl.arange(0, S.experts_block)
    starts = tl.load(offsets_ptr + e, mask=e < S.experts, other=0)
    ends = tl.load(offsets_ptr + e + 1, mask=e < S.experts, other=0)
    blocks = (ends - starts + S.rows_block - 1) // S.rows_block
    until = tl.cumsum(blocks, axis=0)
    block = tl.program_id(0)
    expert = tl.sum((until <= block).to(tl.int32), axis=0)
    first = tl.sum(tl.where(e == expert, starts + (block - until + blocks) * S.rows_block, 0), axis=0)
    place = first + tl.arange(0, S.rows_block)
    there = place < tl.sum(tl.where(e == expert, ends, 0), axis=0)
    return expert.to(tl.int64), tl.load(order_ptr + place, mask=there, other=0), there


@triton.jit
def _rows_of(ptr, token, there, S: tl.constexpr):
    """Read the channels of some tokens: (rows, C)."""
    c = tl.arange(0, S.channels_block)[None, :]
    return tl.load(ptr + token[:, None] * S.channels + c, mask=there[:, None] & (c < S.channels), other=0.0)


@triton.jit
def _first_layer(w1_ptr, expert, h, S: tl.constexpr):
    """Read a block of the first layer: (hidden, C)."""
    c = tl.arange(0, S.channels_block)[None, :]
    at = w1_ptr + (expert * S.hidden + h)[:, None] * S.channels + c
    return tl.load(at, mask=(h < S.hidden)[:, None] & (c < S.channels), other=0.0)


@triton.jit
def _second_layer(w2_ptr, expert, h, S: tl.constexpr):
    """Read a block of the second layer: (C, hidden)."""
    c = tl.arange(0, S.channels_block)[:, None]
    at = w2_ptr + (expert * S.channels + c) * S.hidden + h[None, :]
    return tl.load(at, mask=(c < S.channels) & (h < S.hidden)[None, :], other=0.0)


@triton.jit
def _preactivation(x, w1, b1_ptr, expert, h, WIDE: tl.constexpr, S: tl.constexpr):
    """Return a block of what the activation takes: (rows, hidden)."""
    b1 = tl.load(b1_ptr + expert * S.hidden + h, mask=h < S.hidden, other=0.0).to(WIDE)
    return tl.dot(x, tl.trans(w1), input_precision="ieee", out_dtype=WIDE) + b1[None, :]


@triton.jit
def _store_rows(ptr, a, there, rows, S: tl.constexpr):
    c = tl.arange(0, S.channels_block)[None, :]
    tl.store(ptr + a[:, None] * S.channels + c, rows, mask=there[:, None] & (c < S.channels))


@triton.jit
def _experts_kernel(
    x_ptr, weights_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, order_ptr, offsets_ptr, rows_ptr,
    S: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = rows_ptr.dtype.element_ty
    R: tl.constexpr = S.rows_block
    C: tl.constexpr = S.channels_block
    expert, a, there = _block_of_assignments(order_ptr, offsets_ptr, S)
    if expert >= S.experts:
        return
    x = _rows_of(x_ptr, a // S.slots, there, S)
    c = tl.arange(0, S.channels_block)
    b2 = tl.load(b2_ptr + expert * S.channels + c, mask=c < S.channels, other=0.0).to(wide)
    sums = tl.zeros([R, C], wide) + b2[None, :]
    for start in range(0, S.hidden, S.hidden_block):
        h = start + tl.arange(0, S.hidden_block)
        z = _preactivation(x, _first_layer(w1_ptr, expert, h, S).to(x.dtype), b1_ptr, expert, h, wide, S)
        hidden = activated(z, ACTIVATION).to(x.dtype)
        w2 = _second_layer(w2_ptr, expert, h, S).to(x.dtype)
        sums += tl.dot(hidden, tl.trans(w2), input_precision="ieee", out_dtype=wide)
    gate = tl.load(weights_ptr + a, mask=there, other=0.0).to(wide)
    _store_rows(rows_ptr, a, there, gate[:, None] * sums, S)


@triton.jit
def _combine_kernel(rows_ptr, indices_ptr, y_ptr, tokens, S: tl.constexpr):
    """Add up the rows of each token; that of nobody was never written."""
    R: tl.constexpr = S.rows_block
    C: tl.constexpr = S.channels_block
    t = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    sums = tl.zeros([R, C], rows_ptr.dtype.element_ty)
    for slot in range(0, S.slots):
        a = t * S.slots + slot
        e = tl.load(indices_ptr + a, mask=t < tokens, other=-1)
        sums += _rows_of(rows_ptr, a, (e >= 0) & (e < S.experts), S)
        sums = tl.where(((e < -1) | (e >= S.experts))[:, None], float("nan"), sums)
    _store_rows(y_ptr, t, t < tokens, sums.to(y_ptr.dtype.element_ty), S)


class Launch(NamedTuple):
    """What every kernel of a call takes: contiguous operands, and what it is compiled for."""

    operands: Operands
    sizes: Sizes
    num_warps: int

    @property
    def blocks(self) -> int:
        """How many blocks there are at most, whatever was chosen."""
        return triton.cdiv(self.operands.indices.numel(), self.sizes.rows_block) + self.sizes.experts

    def combine(self, rows: Tensor) -> Tensor:
        """Add up the rows (T * k, C) of each token."""
        x = self.operands
        y = torch.empty_like(x.x)  # contiguous, as x is
        _combine_kernel[(triton.cdiv(len(y), self.sizes.rows_block),)](rows, x.indices, y, len(y), self.sizes)
        return y


def launch_of(x: Operands) -> Launch:
    """Choose what a program covers."""
    _, channels, slots, experts, hidden = x.sizes
    channels_block, hidden_block = (max(16, triton.next_power_of_2(size)) for size in (channels, hidden))
    channels_bytes = channels_block * x.x.element_size()
    rows_block = max(16, min(ROWS, ROWS_BYTES // channels_bytes))
    hidden_block = max(16, min(HIDDEN, LAYER_BYTES // channels_bytes, hidden_block))
    sizes = Sizes(
        *(slots, experts, channels, hidden),
        *(rows_block, channels_block, hidden_block, triton.next_power_of_2(experts)),
    )
    return Launch(Operands(*(v.contiguous() for v in x)), sizes, 4 if channels_bytes <= 128 else 8)


def forward(x: Operands, activation: str) -> tuple[Tensor, Groups]:
    """Compute the experts; see `Operands`."""
    launch = launch_of(x)
    tokens, weights, indices, *experts = launch.operands
    rows = tokens.new_empty(indices.numel(), tokens.shape[1], dtype=x.dtype)
    groups = group(indices, launch.sizes.experts)
    with torch.cuda.device_of(tokens):
        _experts_kernel[(launch.blocks,)](
            *(tokens, weights, *experts, *groups, rows, launch.sizes, activation), num_warps=launch.num_warps
        )
        y = launch.combine(rows)
    return like(y, x.x), groups


def backward(
    x: Operands, groups: Groups, grad_y: Tensor, activation: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiate; see `Operands`."""
    from . import fused_backward

    return fused_backward.backward(x, groups, grad_y, activation, wanted)
