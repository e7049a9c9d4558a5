"""What every form of the scan over images takes: its operands and their rules, and the ways through an image."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..operand_rules import check_device, check_tensors, compute_dtype, like
from ..selective_scan.operands import CHECKPOINT_STEPS, LARGEST_STATE

Direction = Literal["row", "column", "row_reversed", "column_reversed"]

DIRECTIONS: tuple[Direction, ...] = ("row", "column", "row_reversed", "column_reversed")
"""All directions, in the order of VMamba and MambaIR. The place of one is its code: bit 0 column, bit 1 reversed."""


class Operands2d(NamedTuple):
    """The tensors of one scan over images, and in the same places their gradients; `order` has none.

    The forms of this folder exchange freely, since each

    - takes `Operands2d`, the codes of the directions and two flags forward, and returns `y` and the checkpoints of the
      1-D scan (B, chunks + 1, K * D, N): its channels are those of one direction after the other;
    - takes the same, the checkpoints and the gradient of `y` backward, and returns `Operands2d`.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    order: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state and of all arithmetic."""
        return compute_dtype(self.x)

    def outputs(self, merge: bool) -> tuple[Tensor, Tensor]:
        """Allocate what forward returns: y and the checkpoints."""
        batch, height, width, _ = self.x.shape  # not len(x), which would fix the size when a call is traced
        count, channels, state = self.A.shape
        checkpoints = (height * width + CHECKPOINT_STEPS - 1) // CHECKPOINT_STEPS + 1
        return (
            self.x.new_empty(self.x.shape if merge else self.delta.shape),
            self.x.new_empty(batch, checkpoints, count * channels, state, dtype=self.dtype),
        )

    def like(self, gradients: Mapping[str, Tensor]) -> "Operands2d":
        """Give each gradient the strides and the dtype of its operand, with a copy where it must be."""
        fitted = {name: like(value, getattr(self, name)) for name, value in gradients.items()}
        return Operands2d._make(fitted.get(name) for name in self._fields)


def pixels_of_steps(
    directions: Sequence[int], height: int, width: int, device: torch.device, order: Tensor | None = None
) -> Tensor:
    """List the pixel that each step visits, by code of direction: (1, K, H * W), or (B, K, H * W) with an order."""
    row = torch.arange(height * width, device=device).view(1, -1) if order is None else order.long()
    ways = {0: row, 2: row.flip(1)}
    if order is None:
        ways[1] = row.view(1, height, width).transpose(1, 2).flatten(1)
        ways[3] = ways[1].flip(1)
    return torch.stack([ways[code] for code in directions], dim=1)


def check_operands(x: Operands2d, directions: Sequence[str]) -> None:
    """Raise unless the directions exist and the operands fit them and together."""
    _check_directions(directions, x.order)
    optional = ("D", "delta_bias", "order")
    check_tensors({k: v for k, v in x._asdict().items() if k not in optional or (v is not None and k != "order")}, "x")
    if x.order is not None:
        if x.order.is_floating_point() or x.order.is_complex() or x.order.dtype == torch.bool:
            raise TypeError(f"order must be integer, got {x.order.dtype}")
        check_device("order", x.order, "x", x.x)
    if x.x.ndim != 4:
        raise ValueError(f"x must be (B, H, W, D), got shape {tuple(x.x.shape)}")
    batch, height, width, channels = x.x.shape
    count = len(directions)
    if x.A.ndim != 3 or x.A.shape[:2] != (count, channels) or not 1 <= x.A.shape[2] <= LARGEST_STATE:
        rule = f"(K, D, N) with K = {count}, D = {channels} and N from 1 to {LARGEST_STATE}"
        raise ValueError(f"A must be {rule}, got shape {tuple(x.A.shape)}")
    state = x.A.shape[2]
    shapes = {
        "delta": ("(B, K, H, W, D)", (batch, count, height, width, channels)),
        "B": ("(B, K, H, W, N)", (batch, count, height, width, state)),
        "C": ("(B, K, H, W, N)", (batch, count, height, width, state)),
        "D": ("(K, D)", (count, channels)),
        "delta_bias": ("(K, D)", (count, channels)),
        "order": ("(B, H * W)", (batch, height * width)),
    }
    for name, (rule, shape) in shapes.items():
        value = getattr(x, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must be {rule} = {shape}, got shape {tuple(value.shape)}")


def _check_directions(directions: Sequence[str], order: Tensor | None) -> None:
    if isinstance(directions, str) or not directions:
        raise ValueError(f"directions must be a sequence of one or more names, got {directions!r}")
    allowed = DIRECTIONS if order is None else DIRECTIONS[::2]
    for direction in directions:
        if direction not in allowed:
            where = "" if order is None else " with an order, which has rows but no columns"
            raise ValueError(f"directions must be of {', '.join(allowed)}{where}, got {direction!r}")
