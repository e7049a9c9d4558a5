"""Changing the resolution of feature maps and images."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.memory_format import in_format_of
from .checks import check_choice, check_feature_map, check_odd, check_positive
from .initialisation import fill
from .padding import pad_same
from .pixel_shuffle import pixel_shuffle, pixel_unshuffle
from .precision import at_least_float32
from .sampling import bilinear_samples

Style = Literal["lp", "pl"]


class PixelShuffleUp(nn.Module):
    r"""Upsample by a convolution to ``s * s`` times the channels whose groups become the pixels of an s x s cell.

    :math:`y = \mathrm{PixelShuffle}_s(W * x + b)`. At initialisation (ICNR) the s * s kernels of an output channel
    are equal, so that the block is a convolution followed by nearest upsampling: no checkerboard to unlearn. With
    `level` none can be learned: the kernels of a cell sum to their mean sum, as those of an interpolation do, and share
    their mean bias, whatever the parameters are, so that a constant map stays one.

    Shape:
        ``(B, C_in, H, W)`` -> ``(B, C_out, s H, s W)``.

    Args:
        in_channels: number of channels ``C_in``.
        out_channels: number of channels ``C_out``; ``in_channels`` where it is not given.
        scale_factor: upsampling factor ``s``.
        kernel_size: odd size of the convolution's kernel, in input pixels.
        level: whether all pixels of a cell answer a constant map alike.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``kernel_size`` is even, or the input has another number of channels.

    Source:
        Sub-pixel convolution (arXiv:1609.05158), section 3; ICNR (arXiv:1707.02937), section 4; the condition that
        `level` keeps: Sugawara et al., Checkerboard artifacts free convolutional neural networks, APSIPA Transactions
        on Signal and Information Processing 8, 2019.

    >>> PixelShuffleUp(8, scale_factor=3)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 15, 21])
    """

    tile_safe = True
    tile_multiple = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        scale_factor: int = 2,
        kernel_size: int = 3,
        level: bool = False,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_positive(in_channels=in_channels, out_channels=out_channels, scale_factor=scale_factor)
        check_odd(kernel_size=kernel_size)
        self.in_channels = in_channels
        self.scale_factor = scale_factor
        self.receptive_radius = kernel_size // 2
        cell = scale_factor**2
        if level:
            self.conv = _LevelConv2d(in_channels, out_channels, kernel_size, cell=cell)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels * cell, kernel_size, padding=kernel_size // 2)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.in_channels, self)
        return pixel_shuffle(self.conv(x), self.scale_factor)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.conv.parameters():
            # PixelShuffle takes channel c * s * s + i as pixel i of output channel c: neighbours are made equal.
            parameter.copy_(parameter[:: self.scale_factor**2].repeat_interleave(self.scale_factor**2, dim=0))

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}"


class _LevelConv2d(nn.Conv2d):
    """A convolution to `cell` channels for each one, which are equal where the map is constant."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, cell: int) -> None:
        super().__init__(in_channels, out_channels * cell, kernel_size, padding=kernel_size // 2)
        self.cell = cell

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (at_least_float32(x).unflatten(0, (-1, self.cell)) for x in self.parameters())
        means = weight.mean((3, 4), keepdim=True)
        weight = weight - means + means.mean(1, keepdim=True)
        bias = bias.mean(1, keepdim=True).expand_as(bias)
        return self._conv_forward(input, *(x.flatten(0, 1).to(self.weight.dtype) for x in (weight, bias)))


class BicubicUp(nn.Module):
    r"""Upsample by Keys' cubic convolution with a = -0.75 and half-pixel centres; nothing is learned.

    The long skip of the super-resolution nets: what they add to it starts at zero. (MATLAB's bicubic has a = -0.5:
    that one is `claritycore.images.imresize`.)

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, s H, s W)``, any ``C``.

    Args:
        scale_factor: upsampling factor ``s``; 1 returns the input.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``scale_factor`` < 1, or the input has not four dimensions.

    Source:
        Keys, Cubic convolution interpolation for digital image processing, IEEE TASSP 29(6), 1981
        (doi:10.1109/TASSP.1981.1163711), section III.

    >>> BicubicUp(2)(torch.ones(1, 3, 2, 4)).shape
    torch.Size([1, 3, 4, 8])
    """

    tile_safe = True
    tile_multiple = 1

    def __init__(self, scale_factor: int = 2) -> None:
        super().__init__()
        check_positive(scale_factor=scale_factor)
        self.scale_factor = scale_factor
        self.receptive_radius = 0 if scale_factor == 1 else 2

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, None, self)
        scale = self.scale_factor
        if scale == 1:
            return x
        if scale & (scale - 1) == 0:
            return F.interpolate(x, scale_factor=float(scale), mode="bicubic", align_corners=False)
        # In float32 torch's coordinates are exact for powers of 2 alone: by 3 they drift, and a tile is not the whole.
        y = _by_phases(_by_phases(at_least_float32(x), 2, scale), 3, scale)
        return in_format_of(y.to(x.dtype), x)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}"


def _by_phases(x: Tensor, dim: int, scale: int) -> Tensor:
    """Enlarge one axis by Keys' cubic: the weights of each of the `scale` places between two pixels are the same."""
    size, reach = x.shape[dim], (2, 0) if dim == 2 else (0, 2)
    padded = pad_same(x, reach, "replicate")
    taps = [padded.narrow(dim, tap, size) for tap in range(5)]
    places = [(place + 0.5) / scale - 0.5 for place in range(scale)]
    phases = [sum(_keys(abs(tap - 2 - place)) * taps[tap] for tap in range(5)) for place in places]
    return torch.stack(phases, dim=dim + 1).flatten(dim, dim + 1)  # pyright: ignore[reportArgumentType]


def _keys(distance: float, a: float = -0.75) -> float:
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


class DySample(nn.Module):
    r"""Upsample by bilinear samples at learned places: a grid of s x s in each pixel, moved by what the map says.

    The offsets come from a 1x1 convolution; where they are zero the block is
    ``F.interpolate(mode="bilinear", align_corners=False)``, and a fresh one is nearly that. Each group of channels has
    offsets of its own. What lies outside the map is its nearest edge.

    .. math::
        o = o_0 + \lambda \odot (W x + b), \qquad y_{s i + k,\, s j + l} = x(i + o^y_{ijkl},\, j + o^x_{ijkl})

    with the grid :math:`o_0` and :math:`\lambda = 1/4`, or :math:`\lambda = \mathrm{sigmoid}(W' x) / 2` with `dyscope`,
    which starts as 1/4. "lp" computes the offsets of a whole cell from its pixel and then shuffles them into place.
    "pl" shuffles the channels first, so that each pixel of a cell has its offset from C / (s * s) of them: fewer
    weights. Parameters have the names and shapes of the authors' code.

    Places are float32 for half-precision inputs. It is not `tile_safe`: nothing bounds the learned offsets;
    `receptive_radius` is that of the grid alone, the least overlap that tiles need.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, s H, s W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        scale_factor: upsampling factor ``s``.
        style: "lp", first the offsets and then the shuffle, or "pl", the other way round.
        groups: groups of channels that are sampled at places of their own.
        dyscope: whether the range of the offsets is learned too.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``style`` is another word, ``channels`` is no multiple of ``groups`` or, with
            "pl", of s * s, or the input has another number of channels.

    Source:
        Learning to Upsample by Learning to Sample (arXiv:2308.15085), section 3.

    >>> DySample(8, scale_factor=3)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 15, 21])
    """

    tile_safe = False
    tile_multiple = 1
    init_pos: Tensor

    def __init__(
        self,
        channels: int,
        *,
        scale_factor: int = 2,
        style: Style = "lp",
        groups: int = 4,
        dyscope: bool = False,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, scale_factor=scale_factor, groups=groups)
        cell = scale_factor**2
        check_choice("style", style, get_args(Style))
        if channels % groups:
            raise ValueError(f"channels must be a multiple of groups = {groups}, got {channels}")
        if style == "pl" and channels % cell:
            raise ValueError(f'channels must be a multiple of {cell} for style "pl", got {channels}')
        self.channels = channels
        self.scale_factor = scale_factor
        self.style = style
        self.groups = groups
        self.receptive_radius = 0 if scale_factor == 1 else 1
        sizes = (channels, 2 * groups * cell) if style == "lp" else (channels // cell, 2 * groups)
        self.offset = nn.Conv2d(*sizes, 1)
        self.scope = nn.Conv2d(*sizes, 1, bias=False) if dyscope else None
        steps = (torch.arange(scale_factor) - (scale_factor - 1) / 2) / scale_factor
        columns, rows = steps.repeat(scale_factor), steps.repeat_interleave(scale_factor)
        self.register_buffer("init_pos", torch.cat([columns.repeat(groups), rows.repeat(groups)]).view(1, -1, 1, 1))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        places = pixel_shuffle(self._offsets(x), self.scale_factor).unflatten(1, (2, self.groups))
        rows, columns = (_own_pixel(side, self.scale_factor, places) for side in x.shape[2:])
        return in_format_of(bilinear_samples(x, places, rows[:, None], columns).to(x.dtype), x)

    def _offsets(self, x: Tensor) -> Tensor:
        """Offsets in pixels (B, 2 g s s, H, W): those along rows of pixels, and then those along columns."""
        y = x if self.style == "lp" else pixel_shuffle(x, self.scale_factor)
        offsets = at_least_float32(self.offset(y))
        reach = 0.25 if self.scope is None else 0.5 * at_least_float32(self.scope(y)).sigmoid()
        offsets = offsets * reach
        return self.init_pos + (offsets if self.style == "lp" else pixel_unshuffle(offsets, self.scale_factor))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name != "offset.weight":
                parameter.zero_()
            else:
                fill(parameter, nn.init.normal_, std=0.001)

    def extra_repr(self) -> str:
        return f"{self.channels}, scale_factor={self.scale_factor}, style={self.style!r}, groups={self.groups}"


def _own_pixel(side: int, scale_factor: int, like: Tensor) -> Tensor:
    """For each pixel along a side of the upsampled map, the number of the one that it came from."""
    return (torch.arange(side * scale_factor, device=like.device) // scale_factor).to(like.dtype)
