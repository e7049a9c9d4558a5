"""The depthwise convolution in plain torch: convolutions that oneDNN is fast at, whatever is asked for.

Half precision is computed in float32, since oneDNN falls back to scalar loops for it on many processors. Ratios below
were measured on one core with AVX-512 (torch 2.13; 16 to 128 channels, maps of 32 to 256 pixels a side). FFTs would be
faster from 41 x 41 taps on (1.4 times, at 63 x 63 twice to three times), but spread a NaN, and rounding, over the whole
map; they are not used.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS, slope
from ..operand_rules import like
from ..processor import AVX2
from .operands import Operands

WIDE = 11 if AVX2 else 15
"""Kernels so wide take 32 to 50 times as long on contiguous maps as on channels-last ones, at any height (with AVX2 12
to 19 times). Copying there and back costs 0.05 to 0.4 of the convolution."""

LINE = 16
"""So many channels fill one line of the cache. With AVX2 it pays to cut every large map to these, channels-last ones
too: on Zen 3 1.2 to 1.8 times from 48 x 48 pixels on, and 1.5 to 1.8 times in the gradient of the weight."""

PIECE = 2**16 if AVX2 else 2**17
"""A contiguous map goes there and back in pieces of so many elements for each thread, which stay in cache: up to 1.4
times as fast as the whole at once."""

NARROW = 3
"""Up to this width oneDNN's own gradient of the weight costs what forward does; beyond, 7 to 17 times as much, from 15
on 40 to 70 times. A convolution of the map with the gradient of the output for a kernel costs 1.3 to 2 times forward
with large kernels, and less than oneDNN's own with small ones."""

TILE = 64
"""Such a kernel is cut to tiles of this side, which stay in cache: more is slower on large maps, less on small ones."""

GROUP = 2**16
"""Images smaller than so many elements share a convolution there."""


def forward(x: Operands, activation: str | None) -> Tensor:
    """Convolve; see `Operands`."""
    return like(ACTIVATIONS[activation](_preactivation(x)), x.x)


def backward(
    x: Operands, y: Tensor | None, grad_y: Tensor, activation: str | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiate; see `Operands`."""
    grad = grad_y.to(x.dtype)
    if activation is not None:
        grad = grad * slope(_preactivation(x) if y is None else y.to(x.dtype), activation)
    gradients: dict[str, Tensor] = {}
    weight = x.reach().to(x.dtype)
    if wanted[0]:
        gradients["x"] = _convolve(grad, weight.flip(2, 3))
    if wanted[1]:
        gradients["weight"] = x.weight_gradient(_correlate(x.x, grad, weight))
    if wanted[2]:
        gradients["bias"] = grad.sum((0, 2, 3))
    return x.like(gradients)


def _preactivation(x: Operands) -> Tensor:
    bias = None if x.bias is None else x.bias.to(x.dtype)
    return _convolve(x.x, x.reach().to(x.dtype), bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve in the dtype of the weight."""
    rows, columns = weight.shape[2:]
    padding = rows // 2, columns // 2
    if not _by_onednn(weight):
        x = x.contiguous()
    elif columns >= WIDE:
        x = x if x.is_contiguous() else x.contiguous(memory_format=torch.channels_last)
        pieces = list(_pieces(x))
        if x.is_contiguous() or (AVX2 and len(pieces) > len(x)):
            y = torch.empty_like(x, dtype=weight.dtype)
            for images, channels in pieces:
                part = _channels_last(x[images, channels]).to(weight.dtype)
                part_bias = None if bias is None else bias[channels]
                y[images, channels] = F.conv2d(part, weight[channels], part_bias, padding=padding, groups=part.shape[1])
            return y
    return F.conv2d(x.to(weight.dtype), weight, bias, padding=padding, groups=x.shape[1])


def _correlate(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Differentiate by the weight: convolve `x` with `grad` for a kernel, tile by tile."""
    channels, height, width = x.shape[1:]
    rows, columns = weight.shape[2:]
    # Of one channel, oneDNN's own (torch 2.13) writes past its memory where a kernel is far taller than the map.
    if x.is_cpu and ((columns <= NARROW and channels > 1) or not _by_onednn(weight)):
        options = [channels], (1, 1), (rows // 2, columns // 2), (1, 1), False, (0, 0), channels, (False, True, False)
        return torch.ops.aten.convolution_backward(grad, x.to(weight.dtype), weight, *options)[1]
    if AVX2 and channels > LINE:
        parts = zip(x.split(LINE, 1), grad.split(LINE, 1), weight.split(LINE), strict=True)
        return torch.cat([_correlate(*part) for part in parts])
    total = torch.zeros_like(weight)
    together = max(1, GROUP // (channels * height * width))
    for images, kernels in zip(x.split(together), grad.split(together), strict=True):
        # The images of a group are more channels of one.
        image, kernel = images.reshape(1, -1, height, width), kernels.reshape(-1, 1, height, width)
        pixels = _channels_last(image).to(weight.dtype).permute(0, 2, 3, 1)
        padded = F.pad(pixels, (0, 0, columns // 2, columns // 2, rows // 2, rows // 2)).permute(0, 3, 1, 2)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                tile = kernel[:, :, top : top + TILE, left : left + TILE]
                seen = padded[:, :, top : top + tile.shape[2] + rows - 1, left : left + tile.shape[3] + columns - 1]
                total += F.conv2d(seen, tile, groups=len(tile)).view(-1, *total.shape).sum(0)
    return total


def _by_onednn(weight: Tensor) -> bool:
    onednn = torch.backends.mkldnn
    return weight.is_cpu and weight.dtype == torch.float32 and onednn.is_available() and bool(onednn.enabled)


def _pieces(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a batch into pieces: several images, or channels of one in multiples of what a register holds."""
    batch, channels = x.shape[:2]
    image_size, size = x[0].numel(), PIECE * torch.get_num_threads()
    images = max(1, size // image_size)
    parts = -(-image_size // size)
    step = -(-channels // (parts * LINE)) * LINE
    for image in range(0, batch, images):
        for channel in range(0, channels, step):
            yield slice(image, image + images), slice(channel, channel + step)


def _channels_last(x: Tensor) -> Tensor:
    """Do as `contiguous(memory_format=torch.channels_last)`, up to 4 times as fast.

    Where channels are a multiple of a page apart they share few places in the cache. Torch copies matrices in blocks,
    which then is faster, though on one core alone.
    """
    apart = x.stride(1) * x.element_size()
    if not x.is_contiguous() or apart % 4096 or torch.get_num_threads() > 4:
        return x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    for pixels, channels in zip(y.permute(0, 2, 3, 1).flatten(1, 2), x.flatten(2), strict=True):
        pixels.copy_(channels.T)
    return y
