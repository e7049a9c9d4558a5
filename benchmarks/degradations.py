"""Recipes by `degrade` against their samples one by one, `jpeg` against Pillow, `blur` against a convolution a sample.

python -m benchmarks.degradations
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from claritycore.training.blur_kernels import blur, gaussian_kernels
from claritycore.training.degradations import degrade
from claritycore.training.jpeg import jpeg

from .runner import Benchmark, Case, Work, main

# Crops of a training step: 64 pixels a side after shrinking.
RECIPES = [
    {"recipe": recipe, "scale": scale, "batch": 4, "size": 64 * scale}
    for recipe, scale in (
        *[("clean", 4), ("joint", 4), ("joint", 1), ("noise25", 1), ("poisson", 1), ("camera", 1)],
        *[("stress", 4), ("real-esrgan", 4), ("bsrgan", 4)],
    )
]
JPEGS = [{"batch": batch, "channels": 3, "size": size} for batch, size in [(4, 64), (4, 256), (1, 1024)]]
BLURS = [{"batch": 4, "size": size, "kernel": kernel} for size, kernel in [(64, 13), (256, 13), (256, 21)]]


def smooth(batch: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Colours that change slowly, with some texture, as in photographs of 8 bits."""
    coarse = torch.rand(batch, 3, size // 16, size // 16)
    image = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return ((image + 0.05 * torch.randn_like(image)).clamp(0, 1).mul(255).round() / 255).to(device, dtype)


def clean(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, str, int]:
    return smooth(case["batch"], case["size"], device, dtype), case["recipe"], case["scale"]


def recipe_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    pixels = case["batch"] * case["size"] ** 2
    return Work(bytes=3 * (pixels + pixels // case["scale"] ** 2) * dtype.itemsize)


def one_by_one(image: Tensor, recipe: str, scale: int) -> Tensor:
    return torch.cat([degrade(sample[None], recipe, [seed], scale).image for seed, sample in enumerate(image)])


def together(image: Tensor, recipe: str, scale: int) -> Tensor:
    return degrade(image, recipe, range(len(image)), scale).image


def to_compress(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return smooth(case["batch"], case["size"], device, dtype), torch.linspace(30, 95, case["batch"]).round().int()


def jpeg_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return Work(bytes=2 * case["batch"] * case["channels"] * case["size"] ** 2 * dtype.itemsize)


def through_pillow(image: Tensor, quality: Tensor) -> Tensor:
    """Encode and decode each sample, as a data loader would."""
    decoded = []
    for sample, each in zip(image.cpu(), quality.tolist(), strict=True):
        file = io.BytesIO()
        samples = (255 * sample).round().byte().permute(1, 2, 0)
        Image.fromarray(samples.numpy()).save(file, "JPEG", quality=each)
        decoded.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return (torch.stack(decoded) / 255).contiguous().to(image)


def to_blur(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sigma = torch.linspace(0.5, 3, case["batch"], dtype=torch.float64)
    kernels = gaussian_kernels(case["kernel"], sigma, 2 * sigma, sigma)
    return smooth(case["batch"], case["size"], device, dtype), kernels.to(device, dtype)


def blur_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    values = 3 * case["batch"] * case["size"] ** 2
    return Work(bytes=2 * values * dtype.itemsize, flops=2 * values * case["kernel"] ** 2)


def blur_by_sample(image: Tensor, kernels: Tensor) -> Tensor:
    rim = kernels.shape[-1] // 2
    padded = F.pad(image, (rim, rim, rim, rim), mode="reflect")
    blurred = [F.conv2d(x[:, None], k[None, None])[:, 0] for x, k in zip(padded, kernels, strict=True)]
    return torch.stack(blurred)


DEGRADE = Benchmark(
    name="degrade",
    cases=RECIPES,
    inputs=clean,
    providers={"reference": one_by_one, "ours": together},
    work=recipe_work,
)

JPEG = Benchmark(
    name="jpeg",
    cases=JPEGS,
    inputs=to_compress,
    providers={"reference": through_pillow, "ours": jpeg},
    work=jpeg_work,
)

BLUR = Benchmark(
    name="blur",
    cases=BLURS,
    inputs=to_blur,
    providers={"reference": blur_by_sample, "ours": blur},
    work=blur_work,
)

if __name__ == "__main__":
    raise SystemExit(main(DEGRADE, JPEG, BLUR))
