"""What every form of the epilogue and of the modulated convolution takes: operands, activations, the rules."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..operand_rules import check_tensors, compute_dtype, like

Activation = Literal["lrelu", "relu", "linear"]

GAINS: dict[str, float] = {"lrelu": 2**0.5, "relu": 2**0.5, "linear": 1.0}
"""What keeps the variance of a normal map, by activation."""

SLOPES: dict[str, float] = {"lrelu": 0.2, "relu": 0.0, "linear": 1.0}


class Operands(NamedTuple):
    """The tensors of one epilogue.

    The forms of this folder exchange freely: each takes `Operands`, the activation, the gain and the bound forward and
    returns `y` as `torch.empty_like(x)` lays it out; and backward takes the same, the gradient of `y` and which of the
    gradients are wanted, and returns these as a mapping by name, in whatever strides.
    """

    x: Tensor
    bias: Tensor | None
    noise: Tensor | None
    strength: Tensor | None
    demodulation: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic."""
        return compute_dtype(self.x)

    def wide(self) -> "Operands":
        """Bring every operand to the dtype of arithmetic, and into a shape that spreads over the map."""
        bias, strength, demodulation = (
            None if v is None else v.to(self.dtype) for v in (self.bias, self.strength, self.demodulation)
        )
        return Operands(
            self.x.to(self.dtype),
            None if bias is None else bias[:, None, None],
            None if self.noise is None else self.noise.to(self.dtype),
            None if strength is None else strength.reshape(-1, 1, 1),
            None if demodulation is None else demodulation[:, :, None, None],
        )

    def like(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Give each gradient that is there the shape, the strides and the dtype of its operand."""
        named = self._asdict().items()
        return [like(gradients[name].reshape(v.shape), v) for name, v in named if name in gradients and v is not None]


def check_epilogue(x: Operands, activation: str, gain: float | None, clamp: float | None) -> None:
    """Raise unless the operands fit together."""
    check_tensors({name: v for name, v in x._asdict().items() if v is not None or name == "x"}, "x")
    if activation not in GAINS:
        raise ValueError(f"activation must be one of {', '.join(GAINS)}, got {activation!r}")
    if gain is not None and not gain > 0:
        raise ValueError(f"gain must be above 0, got {gain}")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp must be above 0, got {clamp}")
    if x.x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W), got shape {tuple(x.x.shape)}")
    batch, channels, height, width = x.x.shape
    if x.bias is not None and x.bias.shape != (channels,):
        raise ValueError(f"bias must be (C,) = ({channels},), got shape {tuple(x.bias.shape)}")
    if x.demodulation is not None and x.demodulation.shape != (batch, channels):
        rule = f"(B, C) = ({batch}, {channels})"
        raise ValueError(f"demodulation must be {rule}, got shape {tuple(x.demodulation.shape)}")
    if (x.noise is None) != (x.strength is None):
        missing = "noise" if x.noise is None else "strength"
        raise ValueError(f"noise and strength must be given together, got no {missing}")
    if x.noise is not None and x.noise.shape not in ((batch, 1, height, width), (1, 1, height, width)):
        rule = f"(B, 1, H, W) = ({batch}, 1, {height}, {width}), or with 1 for B"
        raise ValueError(f"noise must be {rule}, got shape {tuple(x.noise.shape)}")
    if x.strength is not None and tuple(x.strength.shape) not in ((), (1,), (channels,)):
        rule = f"(), (1,) or (C,) = ({channels},)"
        raise ValueError(f"strength must be {rule}, got shape {tuple(x.strength.shape)}")


def check_modulation(x: Tensor, weight: Tensor, style: Tensor, eps: float) -> None:
    """Raise unless map, weight and style fit together."""
    check_tensors({"x": x, "weight": weight, "style": style}, "x")
    if x.ndim != 4 or 0 in x.shape[2:]:
        raise ValueError(f"x must be (B, C, H, W) with H, W >= 1, got shape {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    if weight.ndim == 4 and weight.shape[1] != channels:
        rule = f"(O, I, k, k) with I = {channels}"
        raise ValueError(f"weight must be {rule}, got shape {tuple(weight.shape)}")
    check_style(weight, style, eps)
    if weight.shape[2] % 2 == 0:
        raise ValueError(f"weight must be (O, I, k, k) with an odd k, got shape {tuple(weight.shape)}")
    if style.shape[0] != batch:
        raise ValueError(f"style must be (B, I) = ({batch}, {channels}), got shape {tuple(style.shape)}")


def check_style(weight: Tensor, style: Tensor, eps: float) -> None:
    """Raise unless a style modulates a weight."""
    check_tensors({"weight": weight, "style": style}, "weight")
    shape = weight.shape
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise ValueError(f"weight must be (O, I, k, k), none of them 0, got shape {tuple(shape)}")
    if style.ndim != 2 or style.shape[1] != shape[1]:
        raise ValueError(f"style must be (B, I) with I = {shape[1]}, got shape {tuple(style.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
