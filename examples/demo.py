"""A photograph made smaller and enlarged again, and one spoilt and restored, by the shipped nets: `make demo`."""

from pathlib import Path

import torch
from skimage import data
from torch import Tensor
from torch.nn import functional as F

from claritycore.deploy import restore_picture, summarize
from claritycore.images import Picture, imresize, psnr, ssim, write_image
from claritycore.nets import AutoModel
from claritycore.training import degrade

SCALE = 4
SEED = 3  # a blur of 0.9 pixels, noise of 22 grey levels and JPEG at quality 89; of 0 the recipe draws no fault
# What is shown of the photograph: the spoon, the cup's rim and the wood.
ROWS, COLUMNS = slice(40, 200), slice(200, 440)


def main() -> None:
    photograph = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None] / 255
    # Recipe "clean": MATLAB's bicubic, rounded to 8 bits, as the standard test sets are made.
    small = degrade(photograph, "clean", seeds=[0], scale=SCALE).image
    bicubic = imresize(small, SCALE, intermediate="float").clamp(0, 1)
    enlarged = restored("claritycore-x4", small)
    # Recipe "joint": blur, noise and JPEG, each or not, as strong as the seed has it.
    spoilt = degrade(photograph, "joint", seeds=[SEED]).image
    mended = restored("claritycore-joint-x1", spoilt)

    print(f"{'of the luma, by 4':<22}{'PSNR':>8}{'SSIM':>9}")
    for name, image in {"bicubic": bicubic, "claritycore-x4": enlarged}.items():
        print(figures(name, image, photograph, crop_border=SCALE, y_channel=True))
    print(f"\n{'of all channels':<22}{'PSNR':>8}{'SSIM':>9}")
    for name, image in {"blur, noise and JPEG": spoilt, "claritycore-joint-x1": mended}.items():
        print(figures(name, image, photograph))

    nearest = F.interpolate(small, scale_factor=SCALE)
    above = [image[..., ROWS, COLUMNS] for image in (nearest, bicubic, enlarged)]
    below = [image[..., ROWS, COLUMNS] for image in (spoilt, mended, photograph)]
    path = Path("out") / "demo.png"
    path.parent.mkdir(exist_ok=True)
    picture = torch.cat([torch.cat(row, dim=3) for row in (above, below)], dim=2)
    write_image(path, Picture(picture), overwrite=True)
    print(f"\nlow resolution, bicubic and enlarged; below, spoilt, restored and original: {path.resolve()}")


def restored(name: str, image: Tensor) -> Tensor:
    """What a shipped net makes of an image; what it consists of is printed."""
    net = AutoModel.from_pretrained(name).eval()
    print(summarize(net, tuple(image.shape)), end="\n\n")
    return restore_picture(net, Picture(image)).pixels


def figures(name: str, image: Tensor, photograph: Tensor, **options: object) -> str:
    quality, likeness = (metric(image, photograph, **options).item() for metric in (psnr, ssim))
    return f"{name:<22}{quality:>5.2f} dB{likeness:>9.4f}"


if __name__ == "__main__":
    main()
