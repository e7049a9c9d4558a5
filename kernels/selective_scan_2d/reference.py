"""The definition of the selective scan over images: visit the pixels in order, scan, put the results back, add up."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..operand_rules import compute_dtype
from ..selective_scan import selective_scan_reference
from .operands import DIRECTIONS, Direction, pixels_of_steps


def selective_scan_2d_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    directions: Sequence[Direction] = DIRECTIONS,
    merge: bool = True,
    order: Tensor | None = None,
) -> Tensor:
    """Compute `selective_scan_2d` by its formula; see there for the contract. Differentiable any number of times."""
    batch, height, width, channels = x.shape
    codes = [DIRECTIONS.index(direction) for direction in directions]
    pixels = pixels_of_steps(codes, height, width, x.device, order).expand(batch, -1, -1)
    outputs = []
    for k in range(len(codes)):
        y = cast(
            Tensor,
            selective_scan_reference(
                _visit(x, pixels[:, k]),
                _visit(delta[:, k], pixels[:, k]),
                A[k],
                _visit(B[:, k], pixels[:, k]),
                _visit(C[:, k], pixels[:, k]),
                None if D is None else D[k],
                delta_bias=None if delta_bias is None else delta_bias[k],
                delta_softplus=delta_softplus,
                out_dtype=compute_dtype(x),
            ),
        )
        outputs.append(_put_back(y, pixels[:, k]).view(batch, height, width, channels))
    y = torch.stack(outputs, dim=1)
    return (y.sum(1) if merge else y).to(x.dtype)


def _visit(x: Tensor, pixels: Tensor) -> Tensor:
    """(B, H, W, D) at pixel positions -> (B, D, L) in the order of the scan."""
    return x.flatten(1, 2).gather(1, pixels[..., None].expand(-1, -1, x.shape[-1])).transpose(1, 2)


def _put_back(y: Tensor, pixels: Tensor) -> Tensor:
    """(B, D, L) in the order of the scan -> (B, L, D) at pixel positions."""
    return y.transpose(1, 2).gather(1, pixels.argsort(1)[..., None].expand(-1, -1, y.shape[1]))
