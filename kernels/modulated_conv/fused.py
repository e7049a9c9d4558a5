"""The epilogue in Triton, forward and backward: each map is read once, and written once.

A program covers a tile of pixels and channels of one sample; the lanes of a warp lie along whichever of the two is side
by side in memory. Backward computes what was activated once more from `x`, and sums over pixels within the tile:
sums of tiles lie beside each other and are added by torch, in the same order at each call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import fallback
from .operands import SLOPES, Operands

TILE = 1024
"""Pixels and channels of a tile: eight for each lane."""

MOST_CHANNELS = 64

STEPS = 8
"""Tiles down the pixels that one program of backward sums up, where channels are side by side."""


class Map(NamedTuple):
    """A map as the kernels read it: its strides along batch, channels and pixels."""

    pointer: Tensor
    batch: int
    channel: int
    pixel: int


class Small(NamedTuple):
    """The operands that are small, contiguous: pointers, and strides that are 0 where one serves all."""

    bias: Tensor | None
    noise: Tensor | None
    strength: Tensor | None
    demodulation: Tensor | None
    noise_batch: int
    strength_channel: int


@triton.jit
def _address(map, batch, c, p):
    start = map.pointer + batch.to(tl.int64) * map.batch
    return start + (p.to(tl.int64) * map.pixel)[:, None] + (c.to(tl.int64) * map.channel)[None, :]


@triton.jit
def _place(channels, pixels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the batch, the block of pixels and the channels of a program."""
    program = tl.program_id(0)
    blocks = tl.cdiv(pixels, BLOCK_P)
    block = program % blocks
    program = program // blocks
    across = tl.cdiv(channels, BLOCK_C)
    return program // across, block, program % across * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _channel_terms(small, batch, c, channels, dtype: tl.constexpr):
    """Load what each channel has: demodulation, strength and bias."""
    there = c < channels
    scale = tl.full(c.shape, 1.0, dtype)
    strength = tl.zeros(c.shape, dtype)
    bias = tl.zeros(c.shape, dtype)
    if small.demodulation is not None:
        scale = tl.load(small.demodulation + batch * channels + c, mask=there, other=0.0).to(dtype)
    if small.strength is not None:
        strength = tl.load(small.strength + c * small.strength_channel, mask=there, other=0.0).to(dtype)
    if small.bias is not None:
        bias = tl.load(small.bias + c, mask=there, other=0.0).to(dtype)
    return scale[None, :], strength[None, :], bias[None, :]


@triton.jit
def _noise_of(small, batch, p, pixels, dtype: tl.constexpr):
    if small.noise is not None:
        start = small.noise + batch.to(tl.int64) * small.noise_batch
        return tl.load(start + p, mask=p < pixels, other=0.0).to(dtype)[:, None]
    else:
        return tl.zeros(p.shape, dtype)[:, None]


@triton.jit
def _forward_kernel(
    x, y, small, channels, pixels, 
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, BOUND: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    batch, block, c = _place(channels, pixels, BLOCK_P, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]
    scale, strength, bias = _channel_terms(small, batch, c, channels, dtype)
    z = tl.load(_address(x, batch, c, p), mask=mask, other=0.0).to(dtype) * scale
    z += strength * _noise_of(small, batch, p, pixels, dtype) + bias
    z = tl.where(z > 0, z, z * SLOPE) * GAIN
    if BOUND is not None:
        z = tl.where(z > BOUND, BOUND, tl.where(z < -BOUND, -BOUND, z))  # which keeps NaN
    tl.store(_address(y, batch, c, p), z.to(y.pointer.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x, grad, grad_x, sums, small, channels, pixels, apart, steps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, BOUND: tl.constexpr,
    SUMS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, if any, and sums over pixels of what is activated: alone, times noise, times x."""
    batch, block, c = _place(channels, tl.cdiv(pixels, steps), BLOCK_P, BLOCK_C)
    scale, strength, bias = _channel_terms(small, batch, c, channels, dtype)
    alone = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    by_noise = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    by_x = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    for step in range(0, steps):
        p = (block * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < pixels)[:, None] & (c < channels)[None, :]
        value = tl.load(_address(x, batch, c, p), mask=mask, other=0.0).to(dtype)
        noise = _noise_of(small, batch, p, pixels, dtype)
        z = (value * scale + strength * noise + bias) * GAIN
        z = tl.where(z > 0, z, z * SLOPE)
        pull = tl.load(_address(grad, batch, c, p), mask=mask, other=0.0).to(dtype) * GAIN
        pull = tl.where(z > 0, pull, pull * SLOPE)
        if BOUND is not None:
            pull = tl.where(tl.abs(z) <= BOUND, pull, 0.0)
        if grad_x is not None:
            out = _address(grad_x, batch, c, p)
            tl.store(out, (pull * scale).to(grad_x.pointer.dtype.element_ty), mask=mask)
        alone += pull
        by_noise += pull * noise
        by_x += pull * value
    if SUMS:
        blocks = tl.cdiv(tl.cdiv(pixels, steps), BLOCK_P)
        at = sums + ((batch * blocks + block) * channels + c).to(tl.int64)
        tl.store(at, tl.sum(alone, axis=0), mask=c < channels)
        tl.store(at + apart, tl.sum(by_noise, axis=0), mask=c < channels)
        tl.store(at + 2 * apart, tl.sum(by_x, axis=0), mask=c < channels)


def _pixel_stride(x: Tensor) -> int | None:
    """Return how far neighbouring pixels are apart, row after row; None where rows do not follow each other."""
    height, width = x.shape[2:]
    if width == 1:
        return x.stride(2)
    return x.stride(3) if height == 1 or x.stride(2) == width * x.stride(3) else None


def _readable(x: Tensor) -> Tensor:
    return x.contiguous() if _pixel_stride(x) is None else x


def _map(x: Tensor) -> Map:
    return Map(x, x.stride(0), x.stride(1), _pixel_stride(x) or 0)


def _small(x: Operands) -> Small:
    bias, noise, strength, demodulation = (None if v is None else v.contiguous() for v in x[1:])
    by_batch = noise is not None and noise.shape[0] == x.x.shape[0]
    by_channel = strength is not None and strength.numel() == x.x.shape[1]
    pixels = x.x.shape[2] * x.x.shape[3]
    return Small(bias, noise, strength, demodulation, pixels if by_batch else 0, int(by_channel))


def _tile(x: Tensor) -> tuple[int, int]:
    """Return how many pixels and channels a tile has."""
    pixels = triton.next_power_of_2(x.shape[2] * x.shape[3])
    if x.stride(1) == 1 and _pixel_stride(x) != 1:
        channels = min(MOST_CHANNELS, triton.next_power_of_2(x.shape[1]))
        return min(pixels, TILE // channels), channels
    return min(pixels, TILE), 1


def _triton(x: Operands) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def forward(x: Operands, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Activate; see `Operands`."""
    y = torch.empty_like(x.x)
    source, target = _readable(x.x), _readable(y)
    batch, channels, height, width = source.shape
    block_p, block_c = _tile(source)
    grid = batch * triton.cdiv(height * width, block_p) * triton.cdiv(channels, block_c)
    with torch.cuda.device_of(y):
        _forward_kernel[(grid,)](
            *(_map(source), _map(target), _small(x), channels, height * width),
            BLOCK_P=block_p, BLOCK_C=block_c, SLOPE=SLOPES[activation], GAIN=gain, BOUND=clamp, dtype=_triton(x),
            num_warps=4,
        )  # fmt: skip
    return y if target is y else y.copy_(target)


def backward(
    x: Operands, grad: Tensor, activation: str, gain: float, clamp: float | None, wanted: Sequence[bool]
) -> dict[str, Tensor]:
    """Differentiate; see `Operands`. The gradient of the noise, which few nets want, is computed by torch."""
    need = dict(zip(Operands._fields, wanted, strict=True))
    source, pull = _readable(x.x), _readable(grad)
    batch, channels, height, width = source.shape
    block_p, block_c = _tile(source)
    steps = STEPS if block_c > 1 else 1
    blocks = triton.cdiv(triton.cdiv(height * width, steps), block_p)
    grad_x = torch.empty_like(source) if need["x"] else None
    summed = any(need[name] for name in ("bias", "strength", "demodulation"))
    sums = torch.empty((3, batch, blocks, channels) if summed else (0,), dtype=x.dtype, device=source.device)
    with torch.cuda.device_of(source):
        _backward_kernel[(batch * blocks * triton.cdiv(channels, block_c),)](
            *(_map(source), _map(pull), None if grad_x is None else _map(grad_x), sums, _small(x)),
            *(channels, height * width, batch * blocks * channels, steps),
            BLOCK_P=block_p, BLOCK_C=block_c, SLOPE=SLOPES[activation], GAIN=gain, BOUND=clamp, SUMS=summed,
            dtype=_triton(x), num_warps=4,
        )  # fmt: skip
    gradients = {} if grad_x is None else {"x": grad_x}
    if summed:
        alone, by_noise, by_x = (each.sum(1) for each in sums)
        every = {"bias": alone.sum(0), "strength": by_noise.sum(0), "demodulation": by_x}
        if x.strength is not None and x.strength.numel() != channels:
            every["strength"] = by_noise.sum()
        gradients |= {name: value for name, value in every.items() if need[name]}
    if need["noise"]:
        gradients |= fallback.backward(x, grad, activation, gain, clamp, [name == "noise" for name in need])
    return gradients
