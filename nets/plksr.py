"""PLKSR and RealPLKSR: super-resolution by partial large kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..blocks import DoubleConvChannelMixer, DySample, PLKBlock
from ..blocks.initialisation import fill
from ..blocks.pixel_shuffle import pixel_shuffle
from ..blocks.plk import NORM_GROUPS, Activation, BlockNorm, Form
from .base import RestorationNet, check_config, check_image
from .heads import Upsampler
from .output import RestorationOutput
from .registry import BaseConfig, register_config

SIZES = {
    "plksr-tiny": {"num_block": 12, "kernel_size": 13, "attention": False},
    "realplksr": {"activation": "mish", "norm": "group"},
}


@register_config("plksr", sizes=SIZES)
@dataclass(frozen=True)
class PLKSRConfig(BaseConfig):
    """Sizes of a PLKSR.

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        scale: upscaling factor: 1, 2, 3, 4 or 8.
        num_feat: feature channels.
        num_block: number of blocks.
        kernel_size: odd size of the large kernel.
        split_ratio: share of the channels that it convolves.
        form: of the large kernel: "dense", "dilated", "rectangular" or "depthwise".
        branches: what it is trained as, in the notation of `RepConv2d`; empty: what `form` says.
        attention: whether each block gates its elements.
        norm: "none", or "layer" or "group" in each block; "group" is RealPLKSR's, and makes tiles inexact.
        norm_groups: of norm "group".
        activation: of the channel mixers, "gelu" or "mish".
        dropout: share of the feature channels that training drops before the last convolution.
        upsampler: "pixelshuffle" or "dysample".

    Raises:
        ValueError: if a number is no integer or < 1, a choice is none of those, or no block can have the sizes.

    >>> PLKSRConfig(scale=2).num_block
    28
    """

    in_channels: int = 3
    out_channels: int = 3
    scale: int = 4
    num_feat: int = 64
    num_block: int = 28
    kernel_size: int = 17
    split_ratio: float = 0.25
    form: Form = "dense"
    branches: tuple[str, ...] = ()
    attention: bool = True
    norm: BlockNorm = "none"
    norm_groups: int = NORM_GROUPS
    activation: Activation = "gelu"
    dropout: float = 0.0
    upsampler: Upsampler = "pixelshuffle"

    def __post_init__(self) -> None:
        check_config(self, counts=("in_channels", "out_channels", "num_feat", "num_block", "norm_groups"))
        if self.norm == "group" and self.num_feat % self.norm_groups:
            raise ValueError(f"num_feat must be a multiple of norm_groups {self.norm_groups}, got {self.num_feat}")
        with torch.device("meta"):
            _block(self)  # raises for a kernel_size, split_ratio or branches that no block can have
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def build(self) -> "PLKSR":
        return PLKSR(self)


class PLKSR(RestorationNet):
    r"""Super-resolution by blocks that convolve a quarter of their channels with a large kernel.

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, out_channels, s H, s W)``, any H, W >= 1.

    Args:
        config: sizes; the default is the main x4 net.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if the image has another number of channels.

    Source:
        PLKSR (arXiv:2404.11848), section 3; RealPLKSR: the mish activation, group norm and DySample head with which
        it is trained on real degradations (github.com/dslisleedh/PLKSR, issue 4). The image is added in front of the
        shuffle, where it has as many channels as the output; else nothing is.

    >>> PLKSR(PLKSRConfig(scale=2, num_feat=8, num_block=1, kernel_size=5))(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    tile_multiple = 1

    def __init__(self, config: PLKSRConfig | None = None) -> None:
        config = config or PLKSRConfig()
        super().__init__(config)
        self.in_channels, self.scale = config.in_channels, config.scale
        self.adds_image = config.in_channels == config.out_channels
        self.samples = config.upsampler == "dysample"
        shuffled = config.out_channels * config.scale**2
        self.conv_first = nn.Conv2d(config.in_channels, config.num_feat, 3, padding=1)
        self.body = nn.Sequential(*(_block(config) for _ in range(config.num_block)))
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_last = nn.Conv2d(config.num_feat, shuffled, 3, padding=1)
        if self.samples:
            groups = config.out_channels if config.scale % 2 else 4
            self.upsample = DySample(shuffled, scale_factor=config.scale, groups=groups, dyscope=True)
            # At scale 1 the sampled map has the channels of the image already.
            self.conv_end = nn.Conv2d(shuffled, config.out_channels, 1) if config.scale > 1 else nn.Identity()
        blocks = [block for block in self.body if isinstance(block, PLKBlock)]
        self.tile_safe = all(block.tile_safe for block in blocks) and not self.samples
        self.receptive_radius = 2 + sum(block.receptive_radius for block in blocks) + int(self.samples)
        for conv in (self.conv_first, self.conv_last):
            fill(conv.weight, nn.init.trunc_normal_, std=0.02)

    def features(self, image: Tensor) -> list[Tensor]:
        """The feature map (B, num_feat, H, W) before upsampling."""
        check_image(image, self.in_channels, self)
        return [self.body(self.conv_first(image))]

    def forward(self, image: Tensor, *, return_aux: bool = False) -> Tensor | RestorationOutput:
        y = self.conv_last(self.dropout(self.features(image)[-1]))
        if self.adds_image:
            y = y + image.repeat_interleave(self.scale**2, dim=1)
        y = self.conv_end(self.upsample(y)) if self.samples else pixel_shuffle(y, self.scale)
        restored = y.to(image.dtype)
        return RestorationOutput(restored) if return_aux else restored


def _block(config: PLKSRConfig) -> PLKBlock:
    return PLKBlock(
        config.num_feat,
        kernel_size=config.kernel_size,
        split_ratio=config.split_ratio,
        form=config.form,
        attention=config.attention,
        norm=config.norm_groups if config.norm == "group" else config.norm,
        branches=config.branches,
        mixer=DoubleConvChannelMixer(config.num_feat, activation=config.activation),
    )
