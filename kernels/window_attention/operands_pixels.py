"""Which pixels each window has, and which row of the table each pair of them: what the reference gathers."""

import torch
from torch import Tensor

from .operands import Axis


def pixels(axis: Axis, keys: bool = False) -> Tensor:
    """Return the pixels of each window along an axis, outside the map too: (windows, pixels)."""
    size, before = (axis.key_window, axis.origin + axis.margin) if keys else (axis.window, axis.origin)
    window = torch.arange(axis.windows)[:, None]
    among, residue = _divided(window, axis.dilation)
    return (among * axis.window - before + torch.arange(size)) * axis.dilation + residue


def inside(pixels: Tensor, axis: Axis) -> Tensor:
    """Return which pixels are in the map."""
    return (pixels >= 0) & (pixels < axis.length)


def offsets(rows: Axis, columns: Axis, device: torch.device) -> Tensor:
    """Return the row of the table for each query and key of a window."""
    down, across = (
        torch.arange(a.window, device=device)[:, None] - torch.arange(a.key_window, device=device) + a.key_window - 1
        for a in (rows, columns)
    )
    offsets = down[:, None, :, None] * (columns.window + columns.key_window - 1) + across[None, :, None, :]
    return offsets.flatten(2).flatten(0, 1)


def places(axis: Axis) -> Tensor:
    """Return the place of each pixel, when window follows window along an axis."""
    token, residue = _divided(torch.arange(axis.length), axis.dilation)
    among, place = _divided(token + axis.origin, axis.window)
    return (among * axis.dilation + residue) * axis.window + place


def _divided(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return quotient and remainder; the exporter to ONNX knows no remainder by a dynamic size."""
    return x // n, x - x // n * n
