"""Bilinear samples of feature maps at places of their own, in the form that is fastest where it runs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import at_least_float32


def bilinear_samples(x: Tensor, places: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sample each group of channels at its places; what lies outside the map is its nearest edge.

    Shape:
        - x: ``(B, C, H, W)``
        - places: ``(B, 2, g, h, w)``, along a row of pixels and then along a column, in pixels, counted from a whole
          pixel: near it they are the most exact
        - rows, columns: those whole pixels ``(h, w)``, in the dtype of the places; they and the places broadcast
        - returns: ``(B, C, h, w)``, float32 for half-precision maps

    >>> x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    >>> bilinear_samples(x, torch.full((1, 2, 1, 1, 1), 0.5), torch.tensor(0.0), torch.tensor(0.0))
    tensor([[[[1.5000]]]])
    """
    # Eager gathers take two to three times as long. Compiled they are fused; exported they are operators that every
    # runtime has, and onnxruntime takes half to three quarters of the time of its GridSample.
    sample = _gathered if torch.compiler.is_compiling() else _grid_sampled
    return sample(x, places, rows, columns)


def _grid_sampled(x: Tensor, places: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    groups, (height, width) = places.shape[2], x.shape[2:]
    across, down = places.unbind(1)
    # Brought to where grid_sample has its corners: -1 and 1, half a pixel outside the middles of the outer pixels.
    columns = (2 * columns + 1) / width - 1
    rows = (2 * rows + 1) / height - 1
    grid = torch.stack([torch.add(columns, across, alpha=2 / width), torch.add(rows, down, alpha=2 / height)], dim=2)
    maps = at_least_float32(x).reshape(x.shape[0] * groups, x.shape[1] // groups, height, width)
    grid = grid.flatten(0, 1).movedim(1, -1)
    y = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return y.view(x.shape[0], x.shape[1], *y.shape[2:])


def _gathered(x: Tensor, places: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`_grid_sampled` in plain operators: the four pixels around each place, and what lies between them."""
    groups, (height, width) = places.shape[2], x.shape[2:]
    whole = places.floor()
    across, down = (places - whole)[:, :, :, None].unbind(1)  # exact, however wide the map
    left, top = whole.unbind(1)
    left, top = left + columns, top + rows
    # Clamped once more as whole numbers: NaN becomes the lowest there is.
    across_pixels = [(left + step).clamp(0, width - 1).long().clamp(min=0) for step in (0, 1)]
    down_pixels = [(top + step).clamp(0, height - 1).long().clamp(min=0) for step in (0, 1)]
    maps = x.reshape(x.shape[0], groups, x.shape[1] // groups, height * width)

    def at(row: Tensor, column: Tensor) -> Tensor:
        index = (row * width + column).flatten(2)[:, :, None].expand(-1, -1, maps.shape[2], -1)
        return at_least_float32(maps.gather(3, index).unflatten(3, row.shape[2:]))

    above, below = (torch.lerp(at(row, across_pixels[0]), at(row, across_pixels[1]), across) for row in down_pixels)
    return torch.lerp(above, below, down).flatten(1, 2)
