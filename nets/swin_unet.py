"""SwinUNet: a U-Net whose stages are window attention, for restoration and super-resolution."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..blocks import GatedFFN, SwinBlock, WindowAttention2d
from ..blocks.multi_scale import UpForm
from .registry import register_config
from .stage import Stage
from .unet import UNet
from .windowed import WindowedConfig

SIZES = {
    "swin-unet-tiny": {"embed_dim": 24, "depths": (2, 2, 2), "refinement": 2, "head_dim": 12},
    "swin-unet-small": {"embed_dim": 32, "depths": (2, 2, 4), "refinement": 2, "head_dim": 16},
    "swin-unet-base": {},
    "swin-unet-large": {"ffn": "gated", "mlp_ratio": 2.66},
}


@register_config("swin-unet", sizes=SIZES)
@dataclass(frozen=True)
class SwinUNetConfig(WindowedConfig):
    """Sizes of a SwinUNet, besides what all U-Nets of windows have; the default is the base size.

    Args:
        mlp_ratio: hidden channels of the network for each pixel, in multiples of the stage's.
        ffn: "mlp", Swin's network, or "gated", Restormer's with a depthwise convolution.
        residual_scale: by which each block multiplies what it adds.

    Raises:
        ValueError: if a number is no integer or < 1, a choice is none of those, `head_dim` does not divide `embed_dim`,
            or no block can have the sizes.

    >>> SwinUNetConfig(embed_dim=32).depths
    (4, 4, 6, 8)
    """

    up: UpForm = "expand"
    mlp_ratio: float = 2.0
    ffn: Literal["mlp", "gated"] = "mlp"
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4, got {self.embed_dim}")
        if not 1 <= self.mlp_ratio * self.embed_dim < math.inf or not math.isfinite(self.residual_scale):
            given = f"{self.mlp_ratio} and {self.residual_scale}"
            raise ValueError(f"mlp_ratio must leave a channel, and residual_scale be finite, got {given}")

    def build(self) -> "SwinUNet":
        return SwinUNet(self)


class SwinUNet(UNet):
    r"""U-Net of shifted-window attention: each stage alternates whole and shifted windows of any map.

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, out_channels, s H, s W)``, any H, W >= 1.

    Args:
        config: sizes; the default is the base size, scale 1.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if the image has another number of channels, or ``scale`` is none of the net's.

    Source:
        Restormer (arXiv:2111.09881), section 3, for the topology: convolutions with pixel unshuffle and shuffle between
        the stages, skips by concatenation, a refinement stage; its blocks are those of Swin Transformer
        (arXiv:2103.14030), section 3.

    >>> config = SwinUNetConfig(scale=2, embed_dim=8, depths=(1, 1), refinement=1, head_dim=4)
    >>> SwinUNet(config)(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    def __init__(self, config: SwinUNetConfig | None = None) -> None:
        config = config or SwinUNetConfig()
        *outer, coarsest = config.stages
        super().__init__(
            config,
            widths=[width for width, _ in config.stages],
            encoder=[_stage(config, *stage) for stage in outer],
            bottleneck=_stage(config, *coarsest),
            decoder=[_stage(config, *stage) for stage in outer],
            refinement=_stage(config, config.embed_dim, config.refinement),
        )


def _stage(config: SwinUNetConfig, width: int, depth: int) -> Stage:
    return Stage(*(_block(config, width, config.window_size // 2 * (place % 2)) for place in range(depth)))


def _block(config: SwinUNetConfig, width: int, shift: int) -> nn.Module:
    attention = WindowAttention2d(width, width // config.head_dim, window_size=config.window_size, shift=shift)
    ffn = GatedFFN(width, expansion=config.mlp_ratio) if config.ffn == "gated" else None
    return SwinBlock(width, attention, mlp_ratio=config.mlp_ratio, ffn=ffn, residual_scale=config.residual_scale)
