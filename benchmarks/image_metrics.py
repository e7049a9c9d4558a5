"""`imresize`, `psnr` and `ssim` against their formulas, the metrics also against scikit-image.

`imresize` has no peer: the bicubic of Pillow, scikit-image and torch is another than MATLAB's, in kernel or in border.

python -m benchmarks.image_metrics
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.images import imresize, psnr, ssim

from .runner import Benchmark, Case, Work, main

PAIRS = [{"batch": 1, "channels": 3, "height": height, "width": width} for height, width in [(256, 256), (1080, 1920)]]


def image(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | float]:
    shape = 1, 3, case["height"], case["width"]
    return {"image": torch.rand(shape, device=device, dtype=dtype), "scale": case["scale"]}


def pair(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    target = torch.rand(*case.values(), device=device, dtype=dtype)
    return target + 0.05 * torch.randn_like(target), target


def resize_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return Work(bytes=3 * case["height"] * case["width"] * (1 + case["scale"] ** 2) * dtype.itemsize)


def metric_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return Work(bytes=2 * math.prod(case.values()) * dtype.itemsize)


def resize_matrix(length: int, scale: float) -> Tensor:
    """Row j holds the weights of output pixel j by MATLAB's formula, the image mirrored beyond its border."""
    shrink = min(scale, 1.0)
    matrix = torch.zeros(math.ceil(length * scale), length, dtype=torch.float64)
    for j, row in enumerate(matrix):
        centre = (j + 0.5) / scale - 0.5
        first, last = math.ceil(centre - 2 / shrink), math.floor(centre + 2 / shrink)
        for i in range(first, last + 1):
            mirrored = i % (2 * length)
            row[min(mirrored, 2 * length - 1 - mirrored)] += keys(shrink * (centre - i))
    return matrix / matrix.sum(1, keepdim=True)


def keys(distance: float, a: float = -0.5) -> float:
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def resize_by_matrices(image: Tensor, scale: float) -> Tensor:
    rows, columns = (resize_matrix(side, scale).to(image.device) for side in image.shape[2:])
    return (rows @ image.double() @ columns.T).to(image.dtype)


def eight_bit(x: Tensor) -> Tensor:
    return (x.double().clamp(0, 1) * 255).round()


def psnr_formula(image: Tensor, target: Tensor) -> Tensor:
    mean_square = ((eight_bit(image) - eight_bit(target)) ** 2).mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mean_square)


def ssim_formula(image: Tensor, target: Tensor) -> Tensor:
    """Wang's formula on 8-bit values, with all 121 weights of the window in one convolution."""
    a, b = eight_bit(image), eight_bit(target)
    offset = torch.arange(-5.0, 6.0, dtype=torch.float64, device=a.device)
    window = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(a.shape[1], 1, 11, 11)
    weighed = partial(F.conv2d, weight=window, groups=a.shape[1])
    mu_a, mu_b = weighed(a), weighed(b)
    var_a, var_b, cov = weighed(a * a) - mu_a**2, weighed(b * b) - mu_b**2, weighed(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean((1, 2, 3))


def psnr_of_skimage(image: Tensor, target: Tensor) -> Tensor:
    from skimage.metrics import peak_signal_noise_ratio

    pairs = zip(eight_bit(image).cpu().numpy(), eight_bit(target).cpu().numpy(), strict=True)
    values = [peak_signal_noise_ratio(b, a, data_range=255) for a, b in pairs]
    return torch.tensor(values, dtype=torch.float64, device=image.device)


def ssim_of_skimage(image: Tensor, target: Tensor) -> Tensor:
    """Its mean, too, leaves out the 5 pixels at the border whose window is not wholly inside."""
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}
    pairs = zip(eight_bit(image).cpu().numpy(), eight_bit(target).cpu().numpy(), strict=True)
    values = [structural_similarity(a, b, data_range=255, **options) for a, b in pairs]
    return torch.tensor(values, dtype=torch.float64, device=image.device)


RESIZE = Benchmark(
    name="imresize",
    cases=[
        {"height": height, "width": width, "scale": scale}
        for height, width, scale in [(256, 256, 0.25), (64, 64, 4), (1080, 1920, 0.25), (270, 480, 4)]
    ],
    inputs=image,
    providers={"reference": resize_by_matrices, "ours": partial(imresize, intermediate="float")},
    work=resize_work,
)

PSNR = Benchmark(
    name="psnr",
    cases=PAIRS,
    inputs=pair,
    providers={"reference": psnr_formula, "ours": psnr, "scikit-image": psnr_of_skimage},
    peer="scikit-image",
    work=metric_work,
)

SSIM = Benchmark(
    name="ssim",
    cases=PAIRS,
    inputs=pair,
    providers={"reference": ssim_formula, "ours": ssim, "scikit-image": ssim_of_skimage},
    peer="scikit-image",
    work=metric_work,
)

if __name__ == "__main__":
    raise SystemExit(main(RESIZE, PSNR, SSIM))
