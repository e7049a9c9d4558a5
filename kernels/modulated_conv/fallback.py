"""The epilogue in plain torch: the gain goes into the small operands first, and three passes are left of six."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import SLOPES, Operands


def forward(x: Operands, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Activate; see `Operands`."""
    y = F.leaky_relu_(before(x.wide(), gain), SLOPES[activation])
    if clamp is not None:
        y.clamp_(-clamp, clamp)
    return torch.empty_like(x.x).copy_(y) if y.stride() != torch.empty_like(x.x).stride() else y.to(x.x.dtype)


def backward(
    x: Operands, grad: Tensor, activation: str, gain: float, clamp: float | None, wanted: Sequence[bool]
) -> dict[str, Tensor]:
    """Differentiate; see `Operands`."""
    wide = x.wide()
    z = before(wide, gain)
    inner = grad.to(x.dtype) * slope(z, activation, gain, clamp)
    return gradients_of(wide, inner, wanted)


def slope(z: Tensor, activation: str, gain: float, clamp: float | None) -> Tensor:
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
            each = (inner * noise).sum((0, 2, 3))
            gradients["strength"] = each if strength.numel() == each.numel() else each.sum()
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
