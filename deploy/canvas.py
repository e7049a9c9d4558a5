"""The rectangles that an image is cut into, and the picture that grows from them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.memory_format import memory_format_of
from ..kernels.operand_rules import compute_dtype


class Box(NamedTuple):
    """A rectangle of pixels; the bottom row and the right column are the first outside."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    @property
    def area(self) -> int:
        return self.size[0] * self.size[1]

    def grown(self, by: int, within: "Box") -> "Box":
        top, left, bottom, right = self.top - by, self.left - by, self.bottom + by, self.right + by
        return Box(max(top, 0), max(left, 0), min(bottom, within.bottom), min(right, within.right))

    def seen_from(self, window: "Box") -> "Box":
        return Box(self.top - window.top, self.left - window.left, self.bottom - window.top, self.right - window.left)

    def of(self, image: Tensor, scale: int = 1) -> Tensor:
        top, left, bottom, right = (scale * side for side in self)
        return image[..., top:bottom, left:right]


class Canvas:
    """The restored image in the making: parts laid side by side, or faded into each other.

    Args:
        image: what is restored; the canvas is on its device, in its dtype and memory format.
        channels: of the restored image.
        scale: by how much both sides grow.
        feather: over how many input pixels neighbours fade into each other, the overlap of their windows; 0 crops.
    """

    def __init__(self, image: Tensor, channels: int, scale: int, feather: int) -> None:
        self.dtype, self.scale, self.feather = image.dtype, scale, feather
        height, width = scale * image.shape[-2], scale * image.shape[-1]
        with torch.inference_mode(False):  # the result is a tensor like any other
            self.sum = torch.empty(
                (len(image), channels, height, width),
                dtype=compute_dtype(image) if feather else image.dtype,
                device=image.device,
                memory_format=memory_format_of(image),
            )
            self.weight = self.sum.zero_().new_zeros(height, width) if feather else None

    def put(self, tile: Box, window: Box, restored: Tensor) -> None:
        """Lay down what the net made of a window around a tile."""
        if self.weight is None:
            tile.of(self.sum, self.scale).copy_(tile.seen_from(window).of(restored, self.scale))
            return
        height, width = (length // self.scale for length in self.sum.shape[-2:])
        rows = self._ramp(window.size[0], window.top > 0, window.bottom < height)
        columns = self._ramp(window.size[1], window.left > 0, window.right < width)
        weight = rows[:, None] * columns
        window.of(self.sum, self.scale).addcmul_(restored.to(self.sum), weight)
        window.of(self.weight, self.scale).add_(weight)

    def image(self) -> Tensor:
        return self.sum if self.weight is None else self.sum.div_(self.weight).to(self.dtype)

    def _ramp(self, length: int, before: bool, after: bool) -> Tensor:
        """Weights along a side of a window: 0 over the outer half of the overlap, then up to 1 over its length."""
        weight = self.sum.new_ones(length * self.scale)
        depth = torch.arange(len(weight), dtype=weight.dtype, device=weight.device) + 0.5
        rising = (depth / (self.scale * self.feather) - 0.5).clamp(0, 1)
        if before:
            weight = rising
        return weight.minimum(rising.flip(0)) if after else weight
