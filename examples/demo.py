"""A photograph made four times smaller and restored by the shipped net: `make demo`."""

from pathlib import Path

import torch
from skimage import data
from torch.nn import functional as F

from claritycore.deploy import restore_picture, summarize
from claritycore.images import Picture, imresize, psnr, ssim, write_image
from claritycore.nets import AutoModel
from claritycore.training import degrade

SCALE = 4
# What is shown of the photograph: the spoon, the cup's rim and the wood.
ROWS, COLUMNS = slice(40, 200), slice(200, 440)


def main() -> None:
    photograph = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None] / 255
    # Recipe "clean": MATLAB's bicubic, rounded to 8 bits, as the standard test sets are made.
    small = degrade(photograph, "clean", seeds=[0], scale=SCALE).image
    net = AutoModel.from_pretrained("claritycore-x4").eval()
    restored = restore_picture(net, Picture(small)).pixels
    bicubic = imresize(small, SCALE, intermediate="float").clamp(0, 1)

    print(summarize(net, tuple(small.shape)), end="\n\n")
    for name, image in {"bicubic": bicubic, "claritycore-x4": restored}.items():
        figures = [metric(image, photograph, crop_border=SCALE, y_channel=True).item() for metric in (psnr, ssim)]
        print(f"{name:<16}PSNR {figures[0]:.2f} dB   SSIM {figures[1]:.4f}")

    nearest = F.interpolate(small, scale_factor=SCALE)
    panels = [image[..., ROWS, COLUMNS] for image in (nearest, bicubic, restored, photograph)]
    path = Path("out") / "demo.png"
    path.parent.mkdir(exist_ok=True)
    write_image(path, Picture(torch.cat(panels, dim=3)), overwrite=True)
    print(f"\nlow resolution, bicubic, restored and original side by side: {path.resolve()}")


if __name__ == "__main__":
    main()
