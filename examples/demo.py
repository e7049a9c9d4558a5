"""A photograph through a net assembled from blocks: `make demo`.

The net is fresh from its initialisation: its last layer starts at zero, so that what it adds to bicubic upsampling is
nothing yet, and training starts from there.
"""

from pathlib import Path

import torch
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

from claritycore.blocks import RRDB, BicubicUp, PixelShuffleUp
from claritycore.deploy import summarize
from claritycore.images import Picture, imresize, psnr, ssim, write_image

SCALE = 4


class SmallNet(nn.Module):
    """Bicubic upsampling, and a small body that learns what it misses."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.skip = BicubicUp(SCALE)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(channels, growth_channels=16) for _ in range(2)))
        self.head = PixelShuffleUp(channels, 3, scale_factor=SCALE)
        nn.init.zeros_(self.head.conv.weight)
        nn.init.zeros_(self.head.conv.bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.skip(image) + self.head(self.body(self.stem(image)))


def main() -> None:
    torch.manual_seed(0)
    photograph = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None] / 255
    low = imresize(photograph, 1 / SCALE)
    net = SmallNet().eval()
    with torch.inference_mode():
        restored = net(low)

    print(summarize(net, tuple(low.shape)), end="\n\n")
    for name, image in {
        "nearest": F.interpolate(low, scale_factor=SCALE),
        "the net, not trained yet": restored,
        "MATLAB's bicubic": imresize(low, SCALE, intermediate="float"),
    }.items():
        figures = [metric(image, photograph, crop_border=SCALE, y_channel=True).item() for metric in (psnr, ssim)]
        print(f"{name:<26}PSNR {figures[0]:.2f} dB   SSIM {figures[1]:.4f}")

    path = Path("out") / "demo.png"
    path.parent.mkdir(exist_ok=True)
    panels = [F.interpolate(low, scale_factor=SCALE), restored, photograph]
    write_image(path, Picture(torch.cat(panels, dim=3)), overwrite=True)
    print(f"\nlow resolution, restored and original side by side: {path.resolve()}")


if __name__ == "__main__":
    main()
