"""The epilogue in plain torch: the gain goes into the small operands first, and three passes are left of six."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import SLOPES, Operands


def forward(x: Operands, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Activate; see `Operands`."""
    y = before(x.wide(), gain)
    if SLOPES[activation] != 1:
        F.leaky_relu_(y, SLOPES[activation])
    if clamp is not None:
        y.clamp_(-clamp, clamp)
    return torch.empty_like(x.x).copy_(y) if y.stride() != torch.empty_like(x.x).stride() else y.to(x.x.dtype)


def backward(
    x: Operands, grad: Tensor, activation: str, gain: float, clamp: float | None, wanted: Sequence[bool]
) -> dict[str, Tensor]:
    """Differentiate; see `Operands`."""
    wide = x.wide()
    inner = grad.to(x.dtype) * slope_of(wide, activation, gain, clamp)
    return gradients_of(wide, inner, wanted)


def slope_of(wide: Operands, activation: str, gain: float, clamp: float | None) -> Tensor | float:
    """Differentiate activation, gain and clamp: a map, or where the slope is the same everywhere a number."""
    if SLOPES[activation] == 1 and clamp is None:
        return gain
    return _slope(before(wide, gain), activation, gain, clamp)


def _slope(z: Tensor, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Differentiate activation, gain and clamp where `z` is gain times what is activated."""
    at = torch.full_like(z, gain * SLOPES[activation]).masked_fill(z > 0, gain)
    if clamp is not None:
        at = torch.where(F.leaky_relu(z, SLOPES[activation]).abs() <= clamp, at, 0)
    return at


def gradients_of(wide: Operands, inner: Tensor, wanted: Sequence[bool]) -> dict[str, Tensor]:
    """Bring the gradient of what is activated to the operands that want one."""
    x, _, noise, strength, demodulation = wide
    need = dict(zip(Operands._fields, wanted, strict=True))
    gradients: dict[str, Tensor] = {}
    if need["x"]:
        gradients["x"] = inner if demodulation is None else inner * demodulation
    if need["bias"]:
        gradients["bias"] = inner.sum((0, 2, 3))
    if noise is not None and strength is not None:
        if need["noise"]:
            pull = (inner * strength).sum(1, keepdim=True)
            gradients["noise"] = pull if noise.shape[0] == inner.shape[0] else pull.sum(0, keepdim=True)
        if need["strength"]:
            one = strength.numel() == 1
            gradients["strength"] = (inner.sum(1, True) * noise).sum() if one else (inner * noise).sum((0, 2, 3))
    if need["demodulation"]:
        gradients["demodulation"] = (inner * x).sum((2, 3))
    return gradients


def before(wide: Operands, gain: float) -> Tensor:
    """Return gain times what is activated, in memory of its own."""
    x, bias, noise, strength, demodulation = wide
    scale = torch.full((), gain, dtype=x.dtype, device=x.device) if demodulation is None else demodulation * gain
    z = x * scale if bias is None else torch.addcmul(bias * gain, x, scale)
    if noise is not None and strength is not None:
        z.addcmul_(noise, strength * gain)
    return z
