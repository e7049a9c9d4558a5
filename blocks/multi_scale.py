"""The ways down and up between the scales of a U-Net, and what joins them: multi-scale gated paths (MSG)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_choice, check_feature_map, check_odd, check_positive
from .ffn import ConvGate
from .padding import pad_to_multiple, take
from .pixel_shuffle import pixel_shuffle, pixel_unshuffle
from .resample import DySample, PixelShuffleUp
from .safe_conv import SafeConv2d

DownForm = Literal["strided", "unshuffle"]
UpForm = Literal["pixelshuffle", "expand", "dysample"]
FusionForm = Literal["concat", "add"]


class MSGDown(nn.Module):
    r"""Halve a map, or take it down by any whole factor, with a convolution and a gated convolution after it.

    "strided": :math:`y = \mathrm{gate}(W *_s x + b)`, a 3x3 convolution in steps of s. "unshuffle":
    :math:`y = \mathrm{gate}(\mathrm{PixelUnshuffle}_s(W * x + b))`, to C_out / (s * s) channels at the full size, so
    that no pixel is passed over. The gate is a `ConvGate`, which starts by passing on what it gets.

    Where H or W is no multiple of s, "unshuffle" pads below and on the right by reflection.

    Shape:
        ``(B, C_in, H, W)`` -> ``(B, C_out, ceil(H / s), ceil(W / s))``, memory format kept.

    Args:
        in_channels: number of channels ``C_in``.
        out_channels: number of channels ``C_out``; ``in_channels`` where it is not given.
        scale_factor: the factor ``s``.
        form: "strided" or "unshuffle".
        gated: whether the gated convolution follows.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``form`` is another word, ``out_channels`` is no multiple of s * s with
            "unshuffle", or the input has another number of channels.

    Source:
        "unshuffle" without the gate: Restormer (arXiv:2111.09881), section 3; the gate: arXiv:1806.03589, section 3.1.

    >>> MSGDown(8, 16)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 16, 3, 4])
    """

    tile_safe = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        scale_factor: int = 2,
        form: DownForm = "strided",
        gated: bool = True,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_positive(in_channels=in_channels, out_channels=out_channels, scale_factor=scale_factor)
        check_choice("form", form, get_args(DownForm))
        cell = scale_factor**2
        if form == "unshuffle" and out_channels % cell:
            raise ValueError(f'out_channels must be a multiple of {cell} for form "unshuffle", got {out_channels}')
        self.in_channels = in_channels
        self.scale_factor = scale_factor
        self.form = form
        self.tile_multiple = scale_factor
        self.receptive_radius = 1 + (scale_factor if gated else 0)
        width, stride = (out_channels, scale_factor) if form == "strided" else (out_channels // cell, 1)
        self.conv = SafeConv2d(in_channels, width, 3, stride=stride, padding=1)
        self.gate = ConvGate(out_channels) if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.in_channels, self)
        if self.form == "strided":
            return self.gate(self.conv(x))
        x = self.conv(pad_to_multiple(x, self.scale_factor))
        return self.gate(pixel_unshuffle(x, self.scale_factor))

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}, form={self.form!r}"


class MSGUp(nn.Module):
    r"""Upsample a map, then a convolution and a gated convolution: the way back up of a U-Net.

    "pixelshuffle": :math:`y = \mathrm{gate}(W * \mathrm{PixelShuffle}_s(x) + b)`, whose convolution reads
    C_in / (s * s) channels. "expand": :math:`y = \mathrm{gate}(\mathrm{PixelShuffle}_s(W * x + b))`, a convolution to
    s * s C_out channels at the lower size, which starts as nearest upsampling and stays level (`PixelShuffleUp`).
    "dysample": :math:`y = \mathrm{gate}(W * \mathrm{DySample}_s(x) + b)`, which samples all channels where the map
    says, in four groups if C_in allows it, and is not `tile_safe`. The gate is a `ConvGate`, which starts by passing on
    what it gets.

    Shape:
        ``(B, C_in, H, W)`` -> ``(B, C_out, s H, s W)``, memory format kept.

    Args:
        in_channels: number of channels ``C_in``.
        out_channels: number of channels ``C_out``; ``in_channels`` where it is not given.
        scale_factor: the factor ``s``.
        form: "pixelshuffle", "expand" or "dysample".
        gated: whether the gated convolution follows.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``form`` is another word, ``in_channels`` is no multiple of s * s with
            "pixelshuffle", or the input has another number of channels.

    Source:
        Sub-pixel convolution (arXiv:1609.05158), section 3, with "expand" as in Restormer (arXiv:2111.09881); DySample
        (arXiv:2308.15085), section 3; the gate: arXiv:1806.03589, section 3.1.

    >>> MSGUp(16, 8)(torch.zeros(1, 16, 3, 4)).shape
    torch.Size([1, 8, 6, 8])
    """

    tile_multiple = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        scale_factor: int = 2,
        form: UpForm = "pixelshuffle",
        gated: bool = True,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_positive(in_channels=in_channels, out_channels=out_channels, scale_factor=scale_factor)
        check_choice("form", form, get_args(UpForm))
        cell = scale_factor**2
        if form == "pixelshuffle" and in_channels % cell:
            raise ValueError(f'in_channels must be a multiple of {cell} for form "pixelshuffle", got {in_channels}')
        self.in_channels = in_channels
        self.scale_factor = scale_factor
        self.form = form
        self.tile_safe = form != "dysample"
        if form == "expand":
            self.upsample = PixelShuffleUp(in_channels, out_channels, scale_factor=scale_factor, level=True)
            self.receptive_radius = 1 + math.ceil(int(gated) / scale_factor)
        else:
            width = in_channels if form == "dysample" else in_channels // cell
            self.conv = nn.Conv2d(width, out_channels, 3, padding=1)
            # Two 3x3 convolutions at the upper size, one without the gate.
            self.receptive_radius = math.ceil((1 + int(gated)) / scale_factor)
        if form == "dysample":
            self.upsample = DySample(in_channels, scale_factor=scale_factor, groups=math.gcd(in_channels, 4))
            self.receptive_radius += self.upsample.receptive_radius
        self.gate = ConvGate(out_channels) if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.in_channels, self)
        x = pixel_shuffle(x, self.scale_factor) if self.form == "pixelshuffle" else self.upsample(x)
        return self.gate(x if self.form == "expand" else self.conv(x))

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}, form={self.form!r}"


class SkipFusion(nn.Module):
    r"""Join the map of a decoder with that of the encoder at its scale, whatever the odd size left over.

    "concat": :math:`y = W [x, s] + b`; "add": :math:`y = W (x + s) + b`; with a 1x1 convolution and s the skip. The
    result has the size of the skip: of a larger x the last rows and columns are dropped, of one that is a pixel
    smaller the last are repeated.

    Shape:
        ``(B, C, H', W')`` and ``(B, C_skip, H, W)`` -> ``(B, C, H, W)``, H' >= H - 1 and W' >= W - 1; memory format
        kept.

    Args:
        channels: number of channels ``C`` of the decoder's map and of the result.
        skip_channels: number of channels ``C_skip``; ``channels`` where it is not given.
        form: "concat" or "add".

    Raises:
        TypeError: if an input is not floating point.
        ValueError: if a number is < 1, ``form`` is another word, the two numbers of channels differ with "add", an
            input has another number of channels, or x has another batch size than the skip or is smaller by more than
            a pixel.

    Source:
        U-Net (arXiv:1505.04597), section 2, with the 1x1 convolution of Restormer (arXiv:2111.09881), section 3.

    >>> SkipFusion(8, skip_channels=4)(torch.zeros(1, 8, 6, 8), torch.zeros(1, 4, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True
    receptive_radius = 0
    tile_multiple = 1

    def __init__(self, channels: int, *, skip_channels: int | None = None, form: FusionForm = "concat") -> None:
        super().__init__()
        skip_channels = channels if skip_channels is None else skip_channels
        check_positive(channels=channels, skip_channels=skip_channels)
        check_choice("form", form, get_args(FusionForm))
        if form == "add" and skip_channels != channels:
            raise ValueError(f'skip_channels must be channels = {channels} for form "add", got {skip_channels}')
        self.channels = channels
        self.skip_channels = skip_channels
        self.form = form
        self.project = nn.Conv2d(channels + (skip_channels if form == "concat" else 0), channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        check_feature_map(skip, self.skip_channels, self)
        if not torch.compiler.is_compiling() and (len(x) != len(skip) or _smaller(x, skip)):
            raise ValueError(
                "x must have the batch size of skip and be at most 1 pixel smaller, "
                f"got {tuple(x.shape)} for {tuple(skip.shape)}"
            )
        x = _cut_or_continued(x, skip.shape[2], skip.shape[3])
        return self.project(x + skip if self.form == "add" else torch.cat([x, skip], dim=1))

    def extra_repr(self) -> str:
        return f"form={self.form!r}"


class OverlapPatchEmbed(nn.Module):
    r"""Bring an image to feature maps by a convolution whose kernels overlap: the first layer of a net.

    :math:`y = W *_s x`, or :math:`W *_s x + b`, in steps of s.

    Shape:
        ``(B, C_in, H, W)`` -> ``(B, embed_dim, ceil(H / s), ceil(W / s))``, memory format kept.

    Args:
        in_channels: number of channels ``C_in``.
        embed_dim: number of channels of the result.
        kernel_size: odd size of the kernel.
        stride: step ``s`` of the kernel, at most its size.
        bias: whether the convolution has one.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``kernel_size`` is even or less than ``stride``, or the input has another number
            of channels.

    Source:
        Restormer (arXiv:2111.09881), section 3; with a stride: PVT v2 (arXiv:2106.13797), section 3.2.

    >>> OverlapPatchEmbed(3, 8, stride=2)(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 8, 3, 4])
    """

    tile_safe = True

    def __init__(
        self, in_channels: int, embed_dim: int, *, kernel_size: int = 3, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, embed_dim=embed_dim, stride=stride)
        check_odd(kernel_size=kernel_size)
        if kernel_size < stride:
            raise ValueError(f"kernel_size must be at least stride = {stride}, got {kernel_size}")
        self.in_channels = in_channels
        self.tile_multiple = stride
        self.receptive_radius = kernel_size // 2
        self.proj = SafeConv2d(in_channels, embed_dim, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.in_channels, self)
        return self.proj(x)


def _smaller(x: Tensor, skip: Tensor) -> bool:
    return any(have < want - 1 for have, want in zip(x.shape[2:], skip.shape[2:], strict=True))


def _cut_or_continued(x: Tensor, height: int, width: int) -> Tensor:
    """Drop rows and columns from the end, or repeat the last, until the map has this size."""
    if torch.compiler.is_compiling():
        # In an exported program either may be the larger: a branch would fix which.
        for dim, size in ((2, height), (3, width)):
            x = take(x, dim, torch.arange(size, device=x.device).clamp(max=x.shape[dim] - 1))
        return x
    beyond = [0, max(width - x.shape[3], 0), 0, max(height - x.shape[2], 0)]
    return (F.pad(x, beyond, mode="replicate") if any(beyond) else x)[..., :height, :width]
