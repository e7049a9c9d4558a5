"""The epilogue in plain torch: the gain goes into the small operands first, and backward takes torch's own steps."""

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
    return gradients_of(wide, pulled(wide, grad.to(x.dtype), activation, gain, clamp), wanted)


def slope_of(wide: Operands, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Differentiate activation, gain and clamp."""
    return pulled(wide, torch.ones_like(wide.x), activation, gain, clamp)


def pulled(wide: Operands, grad: Tensor, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Bring the gradient of the output to what is activated.

    By torch's own steps backward: a comparison and a choice take ten times as long on a CPU.
    """
    if SLOPES[activation] == 1 and clamp is None:
        return grad * gain
    z, slope = before(wide, gain), SLOPES[activation]
    inner = torch.ops.aten.leaky_relu_backward(grad, z, slope, False).mul_(gain)
    if clamp is None:
        return inner
    # Hardtanh is flat at its bounds, where a clamp is not yet.
    beyond = torch.nextafter(torch.tensor(clamp, dtype=z.dtype), torch.tensor(torch.inf, dtype=z.dtype)).item()
    return torch.ops.aten.hardtanh_backward(inner, F.leaky_relu_(z, slope), -beyond, beyond)


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
    z = x * scale
    if bias is not None:
        z.add_(bias * gain)  # which torch.addcmul spreads four times as slowly
    if noise is not None and strength is not None:
        z.addcmul_(noise, strength * gain)
    return z
