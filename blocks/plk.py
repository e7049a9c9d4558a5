"""Partial large kernels: a wide receptive field for a quarter of the channels, and the block built around it."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_choice, check_feature_map, check_odd, check_positive
from .initialisation import fill
from .norm import LayerNorm2d
from .rep_conv import DILATED_BRANCHES, RepConv2d

Form = Literal["dense", "dilated", "rectangular", "depthwise"]
Activation = Literal["gelu", "mish"]
BlockNorm = Literal["none", "layer", "group"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "mish": F.mish}
NORM_GROUPS = 4
LARGEST_KERNEL = 1023


class PartialLargeKernelConv(nn.Module):
    r"""Convolve the first channels with a large kernel and pass the others on.

    :math:`y = [W * x_{1..c},\; x_{c+1..C}]` with :math:`c = \lfloor r C \rfloor`. What is trained, and what
    `reparameterize_model` leaves of it:

    - ``"dense"``: one convolution over all c channels
    - ``"dilated"``: the same with 5x5 branches of dilation 1, 2, ... beside it; leaves one convolution
    - ``"rectangular"``: K x n, n x K and n x n with n = K / 3; leaves two strips
    - ``"depthwise"``: a depthwise kernel with UniRepLKNet's dilated branches, then 1x1; leaves these two

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    Args:
        channels: number of channels ``C``.
        kernel_size: odd size ``K`` of the kernel.
        split_ratio: share ``r`` of the channels that are convolved, in (0, 1].
        form: one of those above.
        branches: instead of those that ``form`` trains, in the notation of `RepConv2d`.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a size is < 1 or even, ``kernel_size`` > 1023, no channel is convolved, ``form`` is unknown, or
            the input has another number of channels.

    Source:
        PLKSR (arXiv:2404.11848), section 3.2; rectangular: SLaK (arXiv:2207.03620); dilated: UniRepLKNet
        (arXiv:2311.15599), section 3.1.

    >>> PartialLargeKernelConv(16, kernel_size=9)(torch.zeros(1, 16, 5, 7)).shape
    torch.Size([1, 16, 5, 7])
    """

    tile_safe = True
    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 17,
        split_ratio: float = 0.25,
        form: Form = "dense",
        branches: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        check_odd(kernel_size=kernel_size)
        if kernel_size > LARGEST_KERNEL:  # of which the branches would be listed
            raise ValueError(f"kernel_size must be at most {LARGEST_KERNEL}, got {kernel_size}")
        check_choice("form", form, get_args(Form))
        if not 1 <= channels * split_ratio <= channels:
            raise ValueError(f"split_ratio must leave 1 to {channels} channels to convolve, got {split_ratio}")
        self.channels = channels
        self.convolved = int(channels * split_ratio)
        self.conv = RepConv2d(
            self.convolved,
            kernel_size=kernel_size,
            groups=self.convolved if form == "depthwise" else 1,
            branches=branches or trained_branches(form, kernel_size),
        )
        self.point = nn.Conv2d(self.convolved, self.convolved, 1) if form == "depthwise" else nn.Identity()
        self.receptive_radius = self.conv.receptive_radius

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        convolved, passed = x.split((self.convolved, self.channels - self.convolved), dim=1)
        convolved = self.point(self.conv(convolved))
        return torch.cat([convolved, passed], dim=1) if self.convolved < self.channels else convolved


class ElementwiseAttention(nn.Module):
    r"""Gate every element by a convolution of its neighbourhood: :math:`y = x \odot \sigma(W * x + b)`, 3x3.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    Args:
        channels: number of channels ``C``.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, or the input has another number of channels.

    Source:
        PLKSR (arXiv:2404.11848), section 3.3.

    >>> ElementwiseAttention(8)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True
    receptive_radius = 1
    tile_multiple = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        return x * torch.sigmoid(self.conv(x))


class DoubleConvChannelMixer(nn.Module):
    r"""Mix channels and close neighbours: :math:`y = W_2 * \phi(W_1 * x + b_1) + b_2`, both 3x3.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    Args:
        channels: number of channels ``C``.
        expansion: the hidden width in multiples of ``C``.
        activation: "gelu" or "mish".
        branches: what each convolution is trained as, in the notation of `RepConv2d`; by default as it is.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``activation`` or a branch is unknown, or the input has another number of
            channels.

    Source:
        PLKSR (arXiv:2404.11848), section 3.1 (DCCM); branches as in ECBSR (doi:10.1145/3474085.3475291).

    >>> DoubleConvChannelMixer(8)(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True
    receptive_radius = 2
    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        *,
        expansion: int = 2,
        activation: Activation = "gelu",
        branches: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, expansion=expansion)
        check_choice("activation", activation, ACTIVATIONS)
        self.channels = channels
        self.activation = activation
        self.conv1 = _mixing_conv(channels, expansion * channels, branches)
        self.conv2 = _mixing_conv(expansion * channels, channels, branches)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        return self.conv2(ACTIVATIONS[self.activation](self.conv1(x)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class PLKBlock(nn.Module):
    r"""Mix channels, look far, gate, refine, and add the input: the block of PLKSR.

    :math:`y = x + W_r * \mathrm{EA}(\mathrm{PLK}(\mathrm{DCCM}(x)))` with a 1x1 kernel :math:`W_r`.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    Args:
        channels: number of channels ``C``.
        kernel_size: odd size of the large kernel.
        split_ratio: share of the channels that it convolves.
        form: of the `PartialLargeKernelConv`: "dense", "dilated", "rectangular" or "depthwise".
        attention: whether `ElementwiseAttention` gates.
        norm: "none"; "layer" normalises the channels of each pixel first; "group" is RealPLKSR's normalisation before
            the sum, in 4 groups, and a number the same in so many: it takes the statistics of the whole map, so tiles
            are not exact.
        branches: what the large kernel is trained as, instead of what ``form`` says.
        mixer: `DoubleConvChannelMixer` of one's own: with another activation, width or branches.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a size, form or norm is none of those, the mixer is of other channels, or the input has another
            number of channels.

    Source:
        PLKSR (arXiv:2404.11848), section 3 and figure 3.

    >>> PLKBlock(16, kernel_size=9, form="dilated")(torch.zeros(1, 16, 5, 7)).shape
    torch.Size([1, 16, 5, 7])
    """

    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 17,
        split_ratio: float = 0.25,
        form: Form = "dense",
        attention: bool = True,
        norm: BlockNorm | int = "none",
        branches: Sequence[str] | None = None,
        mixer: DoubleConvChannelMixer | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.mixer = mixer or DoubleConvChannelMixer(channels)
        if self.mixer.channels != channels:
            raise ValueError(f"mixer must be of {channels} channels, got {self.mixer.channels}")
        self.large_kernel = PartialLargeKernelConv(
            channels, kernel_size=kernel_size, split_ratio=split_ratio, form=form, branches=branches
        )
        self.attention = ElementwiseAttention(channels) if attention else nn.Identity()
        self.refine = nn.Conv2d(channels, channels, 1)
        self.norm = _norm(norm, channels)
        self.tile_safe = norm in ("none", "layer")
        self.receptive_radius = self.mixer.receptive_radius + self.large_kernel.receptive_radius + int(attention)
        _start_small(self.mixer.conv2, self.refine, self.attention, self.large_kernel)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        y = self.mixer(self.norm(x) if isinstance(self.norm, LayerNorm2d) else x)
        y = self.refine(self.attention(self.large_kernel(y)))
        return x + (self.norm(y) if isinstance(self.norm, nn.GroupNorm) else y)


@torch.no_grad()
def _start_small(*parts: nn.Module) -> None:
    """Start convolutions as those of PLKSR do."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                fill(module.weight, nn.init.trunc_normal_, std=0.02)


def trained_branches(form: Form, kernel_size: int) -> tuple[str, ...]:
    """The branches that each form of `PartialLargeKernelConv` is trained with."""
    whole = f"{kernel_size}x{kernel_size}"
    if form == "dilated":
        return whole, *(f"5x5@{dilation}" for dilation in range(1, (kernel_size - 1) // 4 + 1))
    if form == "rectangular":
        short = kernel_size // 3 | 1
        return tuple(dict.fromkeys((f"{kernel_size}x{short}", f"{short}x{kernel_size}", f"{short}x{short}")))
    if form == "depthwise":
        known = max((size for size in DILATED_BRANCHES if size <= kernel_size), default=None)
        return (whole, *DILATED_BRANCHES[known][1:]) if known else (whole,)
    return (whole,)


def _mixing_conv(in_channels: int, out_channels: int, branches: Sequence[str] | None) -> nn.Module:
    if branches is None:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return RepConv2d(in_channels, out_channels, branches=branches)


def _norm(norm: BlockNorm | int, channels: int) -> LayerNorm2d | nn.GroupNorm | None:
    if type(norm) is not int:
        check_choice("norm", norm, get_args(BlockNorm))
    groups = NORM_GROUPS if norm == "group" else norm
    if groups == "none":
        return None
    if groups == "layer":
        return LayerNorm2d(channels)
    check_positive(norm=groups)
    if channels % groups:
        raise ValueError(f"channels must be a multiple of {groups}, the groups of the norm, got {channels}")
    return nn.GroupNorm(groups, channels)
