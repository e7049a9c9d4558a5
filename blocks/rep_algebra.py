"""The algebra of fusing: convolutions and batch norms in sequence, composed to one convolution in float64."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

Size = tuple[int, int]


class Affine(NamedTuple):
    """One convolution: a kernel (O, I / groups, kh, kw) and a bias (O,), float64, on the CPU or on meta."""

    weight: Tensor
    bias: Tensor

    def scaled(self, factor: Tensor) -> "Affine":
        """Multiply each output channel."""
        return Affine(self.weight * factor[:, None, None, None], self.bias * factor)

    def plus(self, bias: Tensor) -> "Affine":
        return Affine(self.weight, self.bias + bias)

    def normalised(self, norm: nn.Module | None) -> "Affine":
        """Follow by a batch norm in eval mode, or by nothing.

        Raises:
            TypeError: if it is another norm: its factors follow the data, and nothing can be fused.
        """
        if norm is None:
            return self
        if not isinstance(norm, _BatchNorm) or norm.running_var is None or norm.running_mean is None:
            raise TypeError(f"only a batch norm with running statistics can be fused, got {norm}")
        factor = (double(norm.running_var) + norm.eps).rsqrt() * double(norm.weight)
        return self.plus(-double(norm.running_mean)).scaled(factor).plus(double(norm.bias))

    def followed_by(self, then: "Affine", groups: int) -> "Affine":
        """Follow by another convolution; kernels compose by full convolution, group for group."""
        by_group = then.weight.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)  # (O / g, g * M, kh, kw)
        weight = F.conv_transpose2d(by_group, self.weight, groups=groups)  # (O / g, g * I, ...)
        weight = weight.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
        read = then.weight.sum((2, 3)).unflatten(0, (groups, -1)) @ self.bias.view(groups, -1, 1)
        return Affine(weight, then.bias + read.flatten())


def double(x: Tensor) -> Tensor:
    """Widen on the CPU, because not every device has float64; meta stays meta."""
    return x.detach().to("meta" if x.is_meta else "cpu", torch.float64)


def affine_of(conv: nn.Conv2d) -> Affine:
    """Read a convolution; a dilated kernel is spread out to the dense one it stands for."""
    weight = spread(double(conv.weight), conv.dilation)
    return Affine(weight, weight.new_zeros(len(weight)) if conv.bias is None else double(conv.bias))


def spread(weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """Put zeros between the taps of a dilated kernel, which makes it dense."""
    rows, columns = ((size - 1) * d + 1 for size, d in zip(weight.shape[2:], dilation, strict=True))
    dense = weight.new_zeros(*weight.shape[:2], rows, columns)
    dense[..., :: dilation[0], :: dilation[1]] = weight
    return dense


def centred(weight: Tensor, size: Size) -> Tensor:
    """Pad a kernel with zeros to a larger odd size around the same centre."""
    rows, columns = ((to - now) // 2 for to, now in zip(size, weight.shape[2:], strict=True))
    return F.pad(weight, (columns, columns, rows, rows))


def delta(channels: int, groups: int) -> Tensor:
    """The 1x1 kernel (C, C / groups, 1, 1) that passes every channel on."""
    return torch.eye(channels // groups, dtype=torch.float64).repeat(groups, 1)[:, :, None, None]


@torch.no_grad()
def neutralise(norm: nn.BatchNorm2d, bias: Tensor | None = None) -> None:
    """Make a batch norm in eval mode add a bias, 0 by default, and do nothing else.

    The variance is 1 - eps, so that the factor differs from 1 by less than half a unit in the last place of a weight.
    """
    for tensor, value in ((norm.weight, 1), (norm.running_mean, 0), (norm.running_var, 1 - norm.eps), (norm.bias, 0)):
        if tensor is not None:
            tensor.fill_(value)
    if bias is not None:
        norm.bias.copy_(bias)
