"""RRDBNet, the generator of ESRGAN and Real-ESRGAN."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import RRDB, PixelShuffleUp
from ..blocks.padding import cropped, pad_to_multiple
from ..blocks.pixel_shuffle import pixel_unshuffle
from .base import RestorationNet, check_config, check_image
from .heads import STEPS
from .output import RestorationOutput
from .registry import BaseConfig, register_config

SIZES = {"rrdbnet-lite": {"num_feat": 32, "num_block": 6, "num_grow_ch": 16}}
NEGATIVE_SLOPE = 0.2


@register_config("rrdbnet", sizes=SIZES)
@dataclass(frozen=True)
class RRDBNetConfig(BaseConfig):
    """Sizes of an RRDBNet.

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        scale: upscaling factor: 1, 2, 3, 4 or 8.
        num_feat: feature channels.
        num_block: number of RRDB blocks.
        num_grow_ch: growth of their dense blocks.
        upsampler: "pixelshuffle", or "nearest+conv", the net of ESRGAN with the tensor names of BasicSR: scales 1 and
            2 then unshuffle the image by 4 and 2 first and upsample by 4, as there.
        unshuffle_stem: False for "nearest+conv" without that unshuffling: the nets of ESRGAN for scales 1 and 2, with
            no stage and with one. Nothing changes at other scales, nor with "pixelshuffle".

    Raises:
        ValueError: if a number is no integer or < 1, or the scale, the upsampler or the stem is none of those.

    >>> RRDBNetConfig(scale=2, upsampler="nearest+conv").unshuffle
    2
    """

    in_channels: int = 3
    out_channels: int = 3
    scale: int = 4
    num_feat: int = 64
    num_block: int = 23
    num_grow_ch: int = 32
    upsampler: Literal["pixelshuffle", "nearest+conv"] = "pixelshuffle"
    unshuffle_stem: bool = True

    def __post_init__(self) -> None:
        check_config(self, counts=("in_channels", "out_channels", "num_feat", "num_block", "num_grow_ch"))

    @property
    def unshuffle(self) -> int:
        """By how much the stem folds pixels into channels."""
        unshuffles = self.upsampler == "nearest+conv" and self.unshuffle_stem
        return {1: 4, 2: 2}.get(self.scale, 1) if unshuffles else 1

    @property
    def stages(self) -> tuple[int, ...]:
        """The factors by which the features are upsampled, one after the other."""
        return STEPS[self.scale * self.unshuffle]

    def build(self) -> "RRDBNet":
        return RRDBNet(self)


class RRDBNet(RestorationNet):
    r"""Super-resolution by residual-in-residual dense blocks; no normalisation layer.

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, out_channels, s H, s W)``, any H, W >= 1.

    Args:
        config: sizes; the default is the full x4 net.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if the image has another number of channels.

    Source:
        ESRGAN (arXiv:1809.00219), section 3.1; the unshuffling stem: Real-ESRGAN (arXiv:2107.10833), section 3.4.

    >>> RRDBNet(RRDBNetConfig(scale=2, num_feat=8, num_block=1, num_grow_ch=4))(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    tile_safe = True

    def __init__(self, config: RRDBNetConfig | None = None) -> None:
        config = config or RRDBNetConfig()
        super().__init__(config)
        features = config.num_feat
        self.scale = config.scale
        self.in_channels = config.in_channels
        self.tile_multiple = config.unshuffle
        self.stages = config.stages
        self.conv_first = nn.Conv2d(config.in_channels * config.unshuffle**2, features, 3, padding=1)
        self.body = nn.Sequential(
            *(RRDB(features, growth_channels=config.num_grow_ch) for _ in range(config.num_block))
        )
        self.conv_body = nn.Conv2d(features, features, 3, padding=1)
        # Each stage has its own name, conv_up1 and on, as in the checkpoints that people have.
        shuffles = config.upsampler == "pixelshuffle"
        for number, factor in enumerate(config.stages, start=1):
            up = PixelShuffleUp(features, scale_factor=factor) if shuffles else _NearestConvUp(features, factor)
            self.add_module(f"conv_up{number}", up)
        self.conv_hr = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, config.out_channels, 3, padding=1)
        self.receptive_radius = _receptive_radius(config)

    def features(self, image: Tensor) -> list[Tensor]:
        """The feature map (B, num_feat, H, W) before upsampling; H and W are divided by the stem's unshuffling."""
        check_image(image, self.in_channels, self)
        image = pad_to_multiple(image, self.tile_multiple)
        x = self.conv_first(pixel_unshuffle(image, self.tile_multiple))
        return [x + self.conv_body(self.body(x))]

    def forward(self, image: Tensor, *, return_aux: bool = False) -> Tensor | RestorationOutput:
        x = self.features(image)[-1]
        for number in range(1, len(self.stages) + 1):
            x = getattr(self, f"conv_up{number}")(x)
        restored = self.conv_last(F.leaky_relu(self.conv_hr(x), NEGATIVE_SLOPE))
        if self.tile_multiple > 1:
            restored = cropped(restored, image.shape[-2] * self.scale, image.shape[-1] * self.scale)
        restored = restored.to(image.dtype)
        return RestorationOutput(restored) if return_aux else restored


class _NearestConvUp(nn.Conv2d):
    """Nearest upsampling, then a 3x3 convolution and leaky ReLU; a Conv2d itself, for the names in checkpoints."""

    def __init__(self, channels: int, scale_factor: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.scale_factor = scale_factor

    def forward(self, x: Tensor) -> Tensor:
        upsampled = F.interpolate(x, scale_factor=float(self.scale_factor), mode="nearest")
        return F.leaky_relu(super().forward(upsampled), NEGATIVE_SLOPE)


def _receptive_radius(config: RRDBNetConfig) -> int:
    """Follow the left edge of what becomes of an input pixel back to the input, for each that the stem folds into one.

    A 3x3 convolution moves it 1 to the left; upsampling by s brings pixel i from pixel i // s.
    """
    reaches = []
    for pixel in range(config.unshuffle):
        left = config.scale * pixel - 2  # conv_last, conv_hr
        for factor in reversed(config.stages):
            left = left // factor - 1 if config.upsampler == "pixelshuffle" else (left - 1) // factor
        left -= 2 + config.num_block * RRDB.receptive_radius  # conv_body, conv_first
        reaches.append(pixel - left * config.unshuffle)
    return max(reaches)
