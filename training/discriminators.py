"""The network that tells restored images from real ones while a net is trained against it."""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ..blocks.checks import check_feature_map, check_positive
from ..blocks.padding import pad_to_multiple


class UNetDiscriminator(nn.Module):
    r"""Judge each pixel of an image, real or restored, by a U-Net of three scales whose weights have spectral norm 1.

    A 3x3 convolution to n channels, three of 4x4 in steps of 2 to 2n, 4n and 8n, and back up: bilinear doubling, a
    3x3 convolution, and the sum with the map of that scale; then two more convolutions and the one that judges. All
    but the first and the last are normalised by their largest singular value, and a leaky ReLU of slope 0.2 follows
    all but the last. Sides that are no multiple of 8 are padded by reflection, and the logits cropped.

    Shape:
        ``(B, C, H, W)`` -> ``(B, 1, H, W)``, logits: positive where the image looks real.

    Args:
        in_channels: number of channels ``C``.
        width: number of channels ``n``; Real-ESRGAN has 64.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if a number is < 1, or the image has another number of channels.

    Source: Real-ESRGAN (arXiv:2107.10833), section 3.4; spectral normalisation: arXiv:1802.05957.

    >>> UNetDiscriminator(3, 8)(torch.rand(1, 3, 5, 7)).shape
    torch.Size([1, 1, 5, 7])
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, width=width)
        self.in_channels = in_channels
        n = width
        self.first = nn.Conv2d(in_channels, n, 3, padding=1)
        self.down = nn.ModuleList(_normalized(n << i, n << i + 1, 4, stride=2) for i in range(3))
        self.up = nn.ModuleList(_normalized(n << i + 1, n << i, 3) for i in (2, 1, 0))
        self.after = nn.ModuleList(_normalized(n, n, 3) for _ in range(2))
        self.last = nn.Conv2d(n, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)[-1]

    def features(self, image: Tensor) -> list[Tensor]:
        """Give the maps after each convolution, of which the last is the logits.

        >>> [maps.shape[-1] for maps in UNetDiscriminator(3, 8).features(torch.rand(1, 3, 8, 8))]
        [8, 4, 2, 1, 2, 4, 8, 8, 8, 8]
        """
        check_feature_map(image, self.in_channels, self)
        height, width = image.shape[2:]
        maps = [F.leaky_relu(self.first(pad_to_multiple(image, 8)), 0.2)]
        for conv in self.down:
            maps.append(F.leaky_relu(conv(maps[-1]), 0.2))
        for conv, skip in zip(self.up, maps[2::-1], strict=True):
            larger = F.interpolate(maps[-1], scale_factor=2, mode="bilinear", align_corners=False)
            maps.append(F.leaky_relu(conv(larger), 0.2) + skip)
        for conv in self.after:
            maps.append(F.leaky_relu(conv(maps[-1]), 0.2))
        return [*maps, self.last(maps[-1])[..., :height, :width]]


def _normalized(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=1, bias=False)
    return spectral_norm(conv)
