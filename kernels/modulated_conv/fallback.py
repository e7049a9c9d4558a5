"""The epilogue in plain torch: on a CPU a part of the map at a time, whose passes stay in a core's cache."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import SLOPES, Operands

CACHED = 2**18
"""Numbers of the map in a part: they and what is made of them lie in a cache of a megabyte."""


class Part(NamedTuple):
    """Samples, channels and rows of a map."""

    samples: slice
    channels: slice
    rows: slice

    def places(self, x: Operands) -> dict[str, Any]:
        """Where the part lies in each operand."""
        samples, channels, rows = self
        every = slice(None)
        return {
            "x": (samples, channels, rows),
            "bias": channels,
            "noise": (every if x.noise is not None and len(x.noise) == 1 else samples, every, rows),
            "strength": channels if x.strength is not None and x.strength.numel() > 1 else ...,
            "demodulation": (samples, channels),
        }

    def of(self, x: Operands) -> Operands:
        """The operands of this part."""
        places, small = self.places(x), list(x._asdict().items())[1:]
        return Operands(x.x[places["x"]], *(None if v is None else v[places[name]] for name, v in small))


def forward(x: Operands, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Activate; see `Operands`."""
    y = torch.empty_like(x.x)
    for part in _parts(x.x):
        target = y[part]
        z = before(part.of(x).wide(), gain, out=target if y.dtype == x.dtype else None)
        if SLOPES[activation] != 1:
            F.leaky_relu_(z, SLOPES[activation])
        if clamp is not None:
            z.clamp_(-clamp, clamp)
        if z is not target:
            target.copy_(z)
    return y


def backward(
    x: Operands, grad: Tensor, activation: str, gain: float, clamp: float | None, wanted: Sequence[bool]
) -> dict[str, Tensor]:
    """Differentiate; see `Operands`."""
    named = [(name, v) for (name, v), needed in zip(x._asdict().items(), wanted, strict=True) if needed]
    totals = {name: torch.zeros_like(v, dtype=x.dtype) for name, v in named if v is not None}
    for part in _parts(x.x):
        some, places = part.of(x).wide(), part.places(x)
        inner = pulled(some, grad[part].to(x.dtype), activation, gain, clamp)
        for name, gradient in gradients_of(some, inner, wanted).items():
            place = totals[name][places[name]]
            place += gradient.reshape(place.shape)
    return totals


def _parts(x: Tensor) -> Iterator[Part]:
    """Cut a map of a CPU along its outermost axes; on other devices, where each step costs a launch, not at all."""
    batch, channels, height, width = x.shape
    every, rows_first = slice(None), x.stride(1) < x.stride(2)
    if not x.is_cpu or x.numel() <= CACHED:
        yield Part(every, every, every)
        return
    together = max(1, CACHED * batch // x.numel())
    lines, numbers = (height, channels * width) if rows_first else (channels, height * width)
    step = lines if together > 1 else max(1, CACHED // numbers)
    for sample in range(0, batch, together):
        for line in range(0, lines, step):
            some = slice(line, line + step)
            yield Part(slice(sample, sample + together), every if rows_first else some, some if rows_first else every)


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


def before(wide: Operands, gain: float, out: Tensor | None = None) -> Tensor:
    """Return gain times what is activated, in memory of its own or in `out`."""
    x, bias, noise, strength, demodulation = wide
    scale = torch.full((), gain, dtype=x.dtype, device=x.device) if demodulation is None else demodulation * gain
    z = torch.mul(x, scale, out=out)
    if bias is not None:
        z.add_(bias * gain)  # which torch.addcmul spreads four times as slowly
    if noise is not None and strength is not None:
        z.addcmul_(noise, strength * gain)
    return z
