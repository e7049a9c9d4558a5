"""What every form of the depthwise convolution takes: its operands, their rules and its reach."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..operand_rules import check_tensors, compute_dtype, like

SIGN_SUFFICES = ("relu", "leaky_relu")
"""The slope of these follows from the output, which the caller holds anyway. For the slope of the others backward
convolves once more: that costs a quarter of the time of a training step with a large kernel, and saves a map of memory
in every layer. On a GPU it moves no more bytes than reading a kept map would, and forward writes one map less."""


class Operands(NamedTuple):
    """The tensors of one convolution.

    The forms of this folder exchange freely, since each takes `Operands` and the activation forward and returns `y` as
    `torch.empty_like(x)` lays it out; and backward takes the same, `y` where its sign suffices, the gradient of `y` and
    which of the gradients are wanted, and returns them with None in the place of the others.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic."""
        return compute_dtype(self.x)

    def reach(self) -> Tensor:
        """Cut the rows and columns of the kernel that meet no pixel of so small a map: (C, 1, kh', kw')."""
        weight = self.weight
        for axis in (2, 3):
            length = max(1, 2 * self.x.shape[axis] - 1)
            if length < weight.shape[axis]:
                weight = weight.narrow(axis, (weight.shape[axis] - length) // 2, length)
        return weight

    def weight_gradient(self, reached: Tensor) -> Tensor:
        """Set the gradient of `reach()` among zeros, as large as the kernel: (C, 1, kh, kw)."""
        rows, columns = ((k - r) // 2 for k, r in zip(self.weight.shape[2:], reached.shape[-2:], strict=True))
        return F.pad(reached.view(self.reach().shape), (columns, columns, rows, rows))

    def like(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        """Give each gradient that is there the strides and the dtype of its operand, with a copy where it must be."""
        named = self._asdict().items()
        return tuple(like(gradients[name], value) if name in gradients else None for name, value in named)


def check_operands(x: Operands, activation: str | None) -> None:
    """Raise unless the operands fit together and the activation has a form here."""
    check_tensors({name: value for name, value in x._asdict().items() if value is not None or name != "bias"}, "x")
    if activation not in ACTIVATIONS:
        names = ", ".join(map(str, ACTIVATIONS))
        raise ValueError(f"activation must be one of {names}, got {activation!r}")
    if x.x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W), got shape {tuple(x.x.shape)}")
    channels, shape = x.x.shape[1], x.weight.shape
    if len(shape) != 4 or shape[:2] != (channels, 1) or shape[2] % 2 == 0 or shape[3] % 2 == 0:
        rule = f"(C, 1, kh, kw) with C = {channels} and odd kh and kw"
        raise ValueError(f"weight must be {rule}, got shape {tuple(shape)}")
    if x.bias is not None and x.bias.shape != (channels,):
        raise ValueError(f"bias must be (C,) = ({channels},), got shape {tuple(x.bias.shape)}")
