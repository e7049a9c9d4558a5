"""The selective scan over images in plain torch: one scan of all directions, each a group of channels.

Each operand is gathered into the order of the scan once, and y and each gradient once into that of the pixels: whole
rows of channels at a time, which costs little beside the exponentials.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..selective_scan import fallback
from ..selective_scan.operands import Operands
from .operands import Operands2d, pixels_of_steps


def forward(x: Operands2d, directions: Sequence[int], softplus: bool, merge: bool) -> tuple[Tensor, Tensor]:
    """Scan; see `Operands2d` for what comes back."""
    steps = _Steps(x, directions)
    y, _, checkpoints = fallback.forward(steps.operands(), softplus, False, x.dtype)
    y = steps.put_back(y)
    return (y.sum(1) if merge else y).to(x.x.dtype), checkpoints


def backward(
    x: Operands2d, directions: Sequence[int], checkpoints: Tensor, grad_y: Tensor, softplus: bool, merge: bool
) -> Operands2d:
    """Differentiate; see `Operands2d`."""
    steps = _Steps(x, directions)
    no_last_state = torch.zeros_like(checkpoints[:, 0])
    found = fallback.backward(steps.operands(), checkpoints, steps.visit(grad_y), no_last_state, softplus, False)
    over_pixels = {"delta": found.delta, "B": found.B, "C": found.C}
    per_channel = {"A": found.A, "D": found.D, "delta_bias": found.delta_bias}
    gradients = {"x": steps.put_back(found.u).sum(1)}
    gradients |= {name: steps.put_back(value) for name, value in over_pixels.items()}
    gradients |= {name: v.unflatten(0, x.A.shape[:2]) for name, v in per_channel.items() if v is not None}
    return x.like(gradients)


class _Steps:
    """Moves tensors between pixel positions and the order of the scan, a row of channels at a time."""

    def __init__(self, x: Operands2d, directions: Sequence[int]) -> None:
        self.x, self.count = x, len(directions)
        self.batch, self.height, self.width, _ = x.x.shape
        self.length = self.height * self.width
        device = x.x.device
        pixels = pixels_of_steps(directions, self.height, self.width, device, x.order).expand(self.batch, -1, -1)
        images = torch.arange(self.batch, device=device)[:, None, None]
        groups = torch.arange(self.count, device=device)[:, None]
        steps = torch.zeros_like(pixels)  # where an order is no permutation, a pixel is never visited
        steps[images, groups, pixels] = torch.arange(self.length, device=device)
        # Which rows of (B, L) and of (B, K, L) to read for (B, L, K), and which of that for (B, K, L) again.
        self.shared = (images * self.length + pixels).transpose(1, 2).flatten()
        self.apart = ((images * self.count + groups) * self.length + pixels).transpose(1, 2).flatten()
        self.back = ((images * self.length + steps) * self.count + groups).flatten()

    def operands(self) -> Operands:
        """The operands of one scan of K groups of D channels."""
        x = self.x
        D, delta_bias = (None if v is None else v.flatten() for v in (x.D, x.delta_bias))
        # x in the dtype of the state: so its gradients, one for each direction, are added up before they are rounded.
        u, delta = self.visit(x.x.to(x.dtype)), self.visit(x.delta)
        B, C = (self.visit(v).unflatten(1, (self.count, -1)) for v in (x.B, x.C))
        return Operands(u, delta, x.A.flatten(0, 1), B, C, D, None, delta_bias, None)

    def visit(self, x: Tensor) -> Tensor:
        """(B, H, W, D) or (B, K, H, W, D) at pixel positions -> (B, K * D, L) in the order of the scan."""
        rows = x.flatten(0, -2).index_select(0, self.shared if x.ndim == 4 else self.apart)
        return rows.view(self.batch, self.length, self.count * x.shape[-1]).transpose(1, 2)

    def put_back(self, x: Tensor) -> Tensor:
        """(B, K * D, L) or (B, K, D, L) in the order of the scan -> (B, K, H, W, D) at pixel positions."""
        x = x if x.ndim == 4 else x.unflatten(1, (self.count, -1))
        rows = x.movedim(-1, 1).flatten(0, 2).index_select(0, self.back)
        return rows.view(self.batch, self.count, self.height, self.width, x.shape[2])
