"""The linear branches that a `RepConv2d` is trained with, each of which knows the one convolution that it equals.

A branch takes a map that was padded once, before its first operation, so that it equals one convolution with its
composed kernel everywhere, the border included. Where padding with zeros later is the same, it pads by itself.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .initialisation import fill
from .rep_algebra import Affine, Size, affine_of, delta, double, neutralise
from .same_conv import SameConv2d

EDGES = {
    "sobel-x": ((1, 0, -1), (2, 0, -2), (1, 0, -1)),
    "sobel-y": ((1, 2, 1), (0, 0, 0), (-1, -2, -1)),
    "laplacian": ((0, 1, 0), (1, -4, 1), (0, 1, 0)),
}


class Common(NamedTuple):
    """What all branches of a block share.

    Args:
        stride: of the output.
        groups: groups of channels that do not see each other.
        zeros: the border is padded with zeros.
        norm: a batch norm follows each convolution.
        bias: a bias does; before a batch norm, wherever that comes, it would have no effect.
    """

    stride: int
    groups: int
    zeros: bool
    norm: bool
    bias: bool

    def norm_of(self, channels: int) -> nn.BatchNorm2d | None:
        return nn.BatchNorm2d(channels) if self.norm else None


class Branch(nn.Module):
    """A linear branch.

    Args:
        size: how many pixels, down and across, one output pixel of it sees.
        pads_itself: it takes the map as it is; else it takes one padded for its size.
    """

    size: Size
    pads_itself: bool

    def affine(self) -> Affine:
        """The one convolution that this branch is in eval mode."""
        raise NotImplementedError

    def last_factor(self) -> Iterable[nn.Parameter]:
        """The parameters that make the branch give zeros when they are zero, while the others can still learn."""
        raise NotImplementedError


class Chain(Branch):
    """Convolutions in sequence, of which the last has the stride."""

    def __init__(self, widths: Sequence[int], sizes: Sequence[Size], dilation: int, common: Common) -> None:
        super().__init__()
        rows, columns = (sum(size[axis] - 1 for size in sizes) * dilation + 1 for axis in (0, 1))
        self.size = rows, columns
        # A map padded in the middle of a chain would differ at the border from one that was padded before it.
        self.pads_itself = self.size == (1, 1) or (common.zeros and len(sizes) == 1)
        self.convs = nn.ModuleList()
        for number, size in enumerate(sizes):
            conv = SameConv2d(
                widths[number],
                widths[number + 1],
                size,
                stride=common.stride if number == len(sizes) - 1 else 1,
                padding=(rows // 2, columns // 2) if self.pads_itself else 0,
                dilation=dilation,
                groups=common.groups,
                bias=common.bias,
            )
            self.convs.append(conv)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:]) if common.norm else None

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in self._steps():
            x = conv(x) if norm is None else norm(conv(x))
        return x

    def affine(self) -> Affine:
        steps = [affine_of(conv).normalised(norm) for conv, norm in self._steps()]
        whole = steps[0]
        for step in steps[1:]:
            whole = whole.followed_by(step, self._steps()[0][0].groups)
        return whole

    def last_factor(self) -> Iterable[nn.Parameter]:
        conv, norm = self._steps()[-1]
        return (conv if norm is None else norm).parameters()

    def can_absorb(self, size: Size) -> bool:
        """Whether any kernel of this size fits in: one undilated convolution, amid 1x1 ones that are wide enough."""
        convs = [conv for conv, _ in self._steps()]
        spatial = self._spatial()
        wide = all(conv.out_channels >= self._carried(number)[0] for number, conv in enumerate(convs))
        pointwise = all(conv.kernel_size == (1, 1) for number, conv in enumerate(convs) if number != spatial)
        return wide and pointwise and convs[spatial].kernel_size == self.size == size

    @torch.no_grad()
    def absorb(self, affine: Affine) -> None:
        """Become a given convolution: the 1x1 ones pass channels on, and what is spare keeps its start values."""
        for number, (conv, norm) in enumerate(self._steps()):
            rows, columns = (channels // conv.groups for channels in self._carried(number))
            weight = conv.weight.unflatten(0, (conv.groups, -1))
            weight[:, :rows] = 0
            passed = torch.eye(rows, dtype=torch.float64)[:, :, None, None]
            kernel = affine.weight.unflatten(0, (conv.groups, -1)) if number == self._spatial() else passed
            weight[:, :rows, :columns] = kernel.to(weight)
            if conv.bias is not None:
                conv.bias.unflatten(0, (conv.groups, -1))[:, :rows] = 0
            if norm is not None:
                neutralise(norm)
        conv, norm = self._steps()[-1]
        bias = conv.bias if norm is None else norm.bias
        if bias is not None:
            bias.copy_(affine.bias)

    def _steps(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
        convs = cast(list[nn.Conv2d], list(self.convs))
        norms = cast(list[nn.BatchNorm2d | None], list(self.norms or [None] * len(convs)))
        return list(zip(convs, norms, strict=True))

    def _spatial(self) -> int:
        sizes = [conv.kernel_size for conv, _ in self._steps()]
        return next((number for number, size in enumerate(sizes) if size != (1, 1)), len(sizes) - 1)

    def _carried(self, number: int) -> Size:
        """How many channels a convolution must give, and take, for what is absorbed."""
        convs = [conv for conv, _ in self._steps()]
        taken, given = convs[0].in_channels, convs[-1].out_channels
        spatial = self._spatial()
        return taken if number < spatial else given, taken if number <= spatial else given


class Identity(Branch):
    """The map itself, times a factor for each channel that starts at 1, or through a batch norm."""

    size = (1, 1)
    pads_itself = True

    def __init__(self, channels: int, common: Common) -> None:
        super().__init__()
        self.groups = common.groups
        self.norm = common.norm_of(channels)
        self.scale = None if common.norm else nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            return self.norm(x)
        return x * cast(Tensor, self.scale).to(x.dtype)[:, None, None]

    def affine(self) -> Affine:
        scale = double(cast(Tensor, self.norm.weight if self.norm is not None else self.scale))
        plain = delta(len(scale), self.groups).to(scale), torch.zeros_like(scale)
        return Affine(*plain).normalised(self.norm) if self.norm is not None else Affine(*plain).scaled(scale)

    def last_factor(self) -> Iterable[nn.Parameter]:
        return self.parameters()


class Average(Branch):
    """The mean over the kernel, zeros of the border included, and a 1x1 convolution of it."""

    def __init__(self, in_channels: int, out_channels: int, size: Size, common: Common) -> None:
        super().__init__()
        self.size, self.stride = size, common.stride
        self.pads_itself = common.zeros or size == (1, 1)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=common.groups, bias=common.bias)
        self.norm = common.norm_of(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        padding = (self.size[0] // 2, self.size[1] // 2) if self.pads_itself else 0
        x = self.conv(F.avg_pool2d(x, self.size, self.stride, padding))
        return x if self.norm is None else self.norm(x)

    def affine(self) -> Affine:
        point = affine_of(self.conv)
        mean = point.weight.expand(-1, -1, *self.size) / (self.size[0] * self.size[1])
        return Affine(mean, point.bias).normalised(self.norm)

    def last_factor(self) -> Iterable[nn.Parameter]:
        return (self.conv if self.norm is None else self.norm).parameters()


class Edge(Branch):
    """A 1x1 convolution, then a fixed edge filter of each channel, times a learned factor.

    The filters sum to zero, so that a bias of the convolution would vanish: it has none.
    """

    size = (3, 3)

    def __init__(self, in_channels: int, out_channels: int, edge: str, common: Common) -> None:
        super().__init__()
        self.edge, self.stride, self.pads_itself = edge, common.stride, common.zeros
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=common.groups, bias=False)
        self.scale = nn.Parameter(torch.empty(out_channels))
        fill(self.scale, nn.init.normal_, std=1e-3)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if common.bias else None
        self.norm = common.norm_of(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scale[:, None, None, None] * self._filter(self.scale)
        x = F.conv2d(self.conv(x), weight, self.bias, self.stride, int(self.pads_itself), groups=len(weight))
        return x if self.norm is None else self.norm(x)

    def affine(self) -> Affine:
        scale = double(self.scale)
        filtered = affine_of(self.conv).weight * self._filter(scale)
        bias = torch.zeros_like(scale) if self.bias is None else double(self.bias)
        return Affine(filtered, torch.zeros_like(scale)).scaled(scale).plus(bias).normalised(self.norm)

    def last_factor(self) -> Iterable[nn.Parameter]:
        if self.norm is not None:
            return self.norm.parameters()
        return (parameter for parameter in (self.scale, self.bias) if parameter is not None)

    def _filter(self, like: Tensor) -> Tensor:
        return torch.tensor(EDGES[self.edge], dtype=like.dtype, device=like.device)
