"""SPAN: a small, fast super-resolution net whose blocks gate themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..blocks import SPAB, RepConv2d
from ..blocks.pixel_shuffle import pixel_shuffle
from ..blocks.span import SPAN_BRANCHES
from .base import RestorationNet, check_config, check_image
from .output import RestorationOutput
from .registry import BaseConfig, register_config

# The mean of DIV2K's images, which the released weights expect to be subtracted, in units of 1 / 255.
MEAN = (0.4488, 0.4371, 0.4040)
RANGE = 255.0


@register_config("span")
@dataclass(frozen=True)
class SPANConfig(BaseConfig):
    """Sizes of a SPAN.

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        scale: upscaling factor: 1, 2, 3, 4 or 8.
        num_feat: feature channels.
        num_block: number of blocks.
        normalize: whether the net first subtracts the mean of the image and multiplies it by 255, as released weights
            expect; without, training is more stable. Images that are not RGB have the mean of the three subtracted.

    Raises:
        ValueError: if a number is no integer or < 1, the scale is none of those, or ``normalize`` no bool.

    >>> SPANConfig(scale=2).num_feat
    48
    """

    in_channels: int = 3
    out_channels: int = 3
    scale: int = 4
    num_feat: int = 48
    num_block: int = 6
    normalize: bool = True

    def __post_init__(self) -> None:
        check_config(self, counts=("in_channels", "out_channels", "num_feat", "num_block"))

    def build(self) -> "SPAN":
        return SPAN(self)


class SPAN(RestorationNet):
    r"""Super-resolution by blocks that gate themselves without parameters (swift parameter-free attention).

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, out_channels, s H, s W)``, any H, W >= 1.

    Args:
        config: sizes; the default is the x4 net with 48 channels.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if the image has another number of channels.

    Source:
        SPAN (arXiv:2311.12770), section 3; `reparameterize_model` makes the form that is shipped.

    >>> SPAN(SPANConfig(scale=2, num_feat=8))(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    tile_safe = True
    tile_multiple = 1
    mean: Tensor

    def __init__(self, config: SPANConfig | None = None) -> None:
        config = config or SPANConfig()
        super().__init__(config)
        features = config.num_feat
        self.in_channels, self.scale, self.normalize = config.in_channels, config.scale, config.normalize
        self.register_buffer("mean", _mean(config.in_channels), persistent=False)
        self.conv_first = RepConv2d(config.in_channels, features, branches=SPAN_BRANCHES)
        self.body = nn.ModuleList(SPAB(features) for _ in range(config.num_block))
        self.conv_body = RepConv2d(features, branches=SPAN_BRANCHES)
        self.conv_cat = nn.Conv2d(4 * features, features, 1)
        self.conv_last = nn.Conv2d(features, config.out_channels * config.scale**2, 3, padding=1)
        self.receptive_radius = 3 + config.num_block * SPAB.receptive_radius
        self.register_load_state_dict_post_hook(_fill_mean)

    def features(self, image: Tensor) -> list[Tensor]:
        """The feature map (B, num_feat, H, W) before upsampling."""
        check_image(image, self.in_channels, self)
        x = first = self.conv_first((image - self.mean) * RANGE if self.normalize else image)
        ends: list[tuple[Tensor, Tensor]] = []
        for block in self.body:
            # By the call, and not by another method: sharding and checkpointing take hold of it.
            ends.append(block(x, return_first=True))
            x = ends[-1][0]
        # Besides the last block's output: the stem's, the first block's, and what the last block's gate is made from.
        return [self.conv_cat(torch.cat([first, self.conv_body(x), ends[0][0], ends[-1][1]], dim=1))]

    def forward(self, image: Tensor, *, return_aux: bool = False) -> Tensor | RestorationOutput:
        restored = pixel_shuffle(self.conv_last(self.features(image)[-1]), self.scale).to(image.dtype)
        return RestorationOutput(restored) if return_aux else restored


def _mean(channels: int) -> Tensor:
    return torch.tensor(MEAN if channels == 3 else [sum(MEAN) / 3] * channels)[:, None, None]


def _fill_mean(net: nn.Module, _: object) -> None:
    """No file has the mean: of a net made on meta it is nothing until now."""
    if isinstance(net, SPAN):
        net.mean = _mean(net.in_channels).to(net.conv_last.weight)
