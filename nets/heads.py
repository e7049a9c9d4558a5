"""From feature maps to the image: one scale, several with a head each, or one head for several scales."""

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import DySample, FiLM, PixelShuffleUp
from ..blocks.precision import at_least_float32

Upsampler = Literal["pixelshuffle", "dysample"]

# The factors of each scale: two small steps see and cost less than a large one.
STEPS: dict[int, tuple[int, ...]] = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}


class ReconstructionHead(nn.Module):
    """Enlarge a feature map and make an image of it.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, out_channels, scale * H, scale * W)``

    Args:
        channels: of the feature map.
        out_channels: of the image.
        scale: 1, 2, 3, 4 or 8.
        upsampler: "pixelshuffle" enlarges by 2 or 3 at a time, a convolution before each, which can learn no pattern of
            the scale (`PixelShuffleUp`, level); "dysample" at once.

    Source:
        ESPCN (arXiv:1609.05158), section 3.2: convolution and pixel shuffle.

    >>> ReconstructionHead(8, 3, scale=4)(torch.zeros(1, 8, 5, 7), 4).shape
    torch.Size([1, 3, 20, 28])
    """

    tile_multiple = 1

    def __init__(
        self, channels: int, out_channels: int, *, scale: int = 1, upsampler: Upsampler = "pixelshuffle"
    ) -> None:
        super().__init__()
        self.tile_safe = scale == 1 or upsampler == "pixelshuffle"
        self.upsample = nn.Sequential()
        if self.tile_safe:
            for step in STEPS[scale]:
                self.upsample.extend([PixelShuffleUp(channels, scale_factor=step, level=True), nn.GELU()])
            sizes = [math.prod(STEPS[scale][:place]) for place in range(len(STEPS[scale]) + 1)]
            self.receptive_radius = math.ceil(sum(1 / size for size in sizes))
        else:
            sampling = DySample(channels, scale_factor=scale, groups=math.gcd(channels, 4))
            self.upsample.append(sampling)
            self.receptive_radius = sampling.receptive_radius + 1
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, scale: int) -> Tensor:
        return self.conv(self.upsample(x))

    def last_convolutions(self) -> list[nn.Conv2d]:
        """What makes the image: at zero, the head adds nothing to it."""
        return [self.conv]


class ScaleHeads(nn.Module):
    """A `ReconstructionHead` for each of several scales: they share the body.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, out_channels, scale * H, scale * W)``

    Args:
        channels: of the feature map.
        out_channels: of the image.
        scales: each 1, 2, 3, 4 or 8.
        upsampler: of all heads.

    Source:
        MDSR (arXiv:1707.02921), section 3.3.

    >>> ScaleHeads(8, 3, scales=(2, 4))(torch.zeros(1, 8, 5, 7), 2).shape
    torch.Size([1, 3, 10, 14])
    """

    tile_multiple = 1

    def __init__(
        self, channels: int, out_channels: int, *, scales: Sequence[int], upsampler: Upsampler = "pixelshuffle"
    ) -> None:
        super().__init__()
        heads = [ReconstructionHead(channels, out_channels, scale=scale, upsampler=upsampler) for scale in scales]
        self.heads = nn.ModuleDict({f"x{scale}": head for scale, head in zip(scales, heads, strict=True)})
        self.tile_safe = all(head.tile_safe for head in heads)
        self.receptive_radius = max(head.receptive_radius for head in heads)

    def forward(self, x: Tensor, scale: int) -> Tensor:
        y = self.heads[f"x{scale}"](x, scale)
        if self.training:
            # Distributed training wants a gradient for every parameter: the other heads' are zero.
            others = (p for name, head in self.heads.items() if name != f"x{scale}" for p in head.parameters())
            y = y + sum(0 * parameter.sum() for parameter in others)
        return y

    def last_convolutions(self) -> list[nn.Conv2d]:
        """What makes the image: at zero, the heads add nothing to it."""
        return [head.conv for head in self.heads.values()]  # pyright: ignore[reportReturnType]


class EmbeddedScaleHead(nn.Module):
    r"""One head for several scales, which is told the scale: the same weights whatever it is.

    :math:`y = W_2 * \mathrm{gelu}(W_1 * \mathrm{up}_s(\mathrm{FiLM}(x, e(s))))` with bilinear upsampling and an
    embedding e of two layers of 1 / s and 1 / s^2.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, out_channels, scale * H, scale * W)``

    Args:
        channels: of the feature map.
        out_channels: of the image.

    Source:
        the scale as a condition: ArbSR (arXiv:2004.03791), section 3.

    >>> EmbeddedScaleHead(8, 3)(torch.zeros(1, 8, 5, 7), 3).shape
    torch.Size([1, 3, 15, 21])
    """

    tile_safe = True
    # Bilinear samples and two 3x3 convolutions: at scale 1 no samples, from scale 2 on the convolutions see 1 pixel.
    receptive_radius = 2
    tile_multiple = 1

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(2, channels)
        self.film = FiLM(channels, channels)
        self.expand = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, scale: int) -> Tensor:
        numbers = x.new_tensor([[1 / scale, 1 / scale**2]], dtype=self.embed.weight.dtype)
        x = self.film(x, self.embed(numbers).expand(len(x), -1))
        if scale > 1:
            size = [scale * side for side in x.shape[2:]]
            x = F.interpolate(at_least_float32(x), size, mode="bilinear", align_corners=False).to(x.dtype)
        return self.conv(F.gelu(self.expand(x)))

    def last_convolutions(self) -> list[nn.Conv2d]:
        """What makes the image: at zero, the head adds nothing to it."""
        return [self.conv]
