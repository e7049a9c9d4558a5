"""Losses of two images against their formulas, by the full spectrum and by convolutions, and against torch's own.

python -m benchmarks.losses
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.training.frequency_losses import FFTLoss, FocalFrequencyLoss, LaplacianLoss
from claritycore.training.pixel_losses import CharbonnierLoss, L1Loss, L2Loss, PSNRLoss, SSIMLoss

from .runner import Benchmark, Case, Work, main

CASES = [{"batch": batch, "channels": 3, "height": 256, "width": 256} for batch in (1, 8)]
# The sign of a difference near zero is a matter of rounding, and with it one of the summands of the gradient.
SIGNS = {torch.float32: 2e-2}

Loss = Callable[[Tensor, Tensor], Tensor]


def pair(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    target = torch.rand(*case.values(), device=device, dtype=dtype)
    return target + 0.05 * torch.randn_like(target), target


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    """Both images are read; both have a gradient."""
    return Work(bytes=2 * (1 + backward) * math.prod(case.values()) * dtype.itemsize)


def l1(a: Tensor, b: Tensor) -> Tensor:
    return torch.mean(torch.abs(a - b))


def l2(a: Tensor, b: Tensor) -> Tensor:
    return torch.mean((a - b) ** 2)


def charbonnier(a: Tensor, b: Tensor) -> Tensor:
    return torch.mean(torch.sqrt((a - b) ** 2 + 1e-6))


def mean_psnr(a: Tensor, b: Tensor) -> Tensor:
    return torch.mean(10 * torch.log10(torch.mean((a - b) ** 2, dim=(1, 2, 3)) + 1e-5))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Wang's formula with all 121 weights of the window in one convolution."""
    offset = torch.arange(-5.0, 6.0, dtype=a.dtype, device=a.device)
    window = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(a.shape[1], 1, 11, 11)

    def weighed(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=a.shape[1])

    mu_a, mu_b = weighed(a), weighed(b)
    var_a, var_b, cov = weighed(a * a) - mu_a**2, weighed(b * b) - mu_b**2, weighed(a * b) - mu_a * mu_b
    similarity = (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4) / ((mu_a**2 + mu_b**2 + 1e-4) * (var_a + var_b + 9e-4))
    return 1 - similarity.mean()


def fft(a: Tensor, b: Tensor) -> Tensor:
    return torch.mean(torch.abs(torch.fft.fft2(a, norm="ortho").abs() - torch.fft.fft2(b, norm="ortho").abs()))


def focal(a: Tensor, b: Tensor) -> Tensor:
    error = torch.fft.fft2(a, norm="ortho") - torch.fft.fft2(b, norm="ortho")
    power = error.real**2 + error.imag**2
    weight = power.detach().sqrt()
    return torch.mean(weight / weight.amax((2, 3), keepdim=True) * power)


def laplacian(a: Tensor, b: Tensor) -> Tensor:
    """The pyramid of each image by padded convolutions; sides must halve evenly."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=a.dtype, device=a.device) / 16
    kernel = (taps[:, None] * taps).expand(a.shape[1], 1, 5, 5)

    def bands(image: Tensor) -> list[Tensor]:
        found = []
        for _ in range(5):
            padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
            coarse = F.conv2d(padded, kernel, stride=2, groups=a.shape[1])
            spread = F.pad(coarse, (1, 1, 1, 1), mode="replicate")
            larger = F.conv_transpose2d(spread, 4 * kernel, stride=2, groups=a.shape[1])
            found.append(image - larger[..., 4:-3, 4:-3])
            image = coarse
        return [*found, image]

    return torch.stack([(x - y).abs().mean() for x, y in zip(bands(a), bands(b), strict=True)]).sum()


def widened(loss: Loss) -> Loss:
    """Take half precision in float32, as ours does of itself."""

    def of(a: Tensor, b: Tensor) -> Tensor:
        dtype = torch.promote_types(a.dtype, torch.float32)
        return loss(a.to(dtype), b.to(dtype))

    return of


def compare(
    name: str, reference: Loss, ours: Loss, peer: Loss | None = None, tolerance: Mapping[torch.dtype, float] = {}
) -> Benchmark:
    providers = {"reference": widened(reference), "ours": ours} | ({"torch": widened(peer)} if peer else {})
    return Benchmark(
        name=f"loss_{name}",
        cases=CASES,
        inputs=pair,
        providers=providers,
        peer="torch" if peer else "",
        backward=True,
        tolerance={torch.float16: 2e-2, **tolerance},  # gradients of a mean come near its smallest number
        work=work,
    )


if __name__ == "__main__":
    raise SystemExit(
        main(
            compare("l1", l1, L1Loss(), F.l1_loss),
            compare("l2", l2, L2Loss(), F.mse_loss),
            compare("charbonnier", charbonnier, CharbonnierLoss()),
            compare("psnr", mean_psnr, PSNRLoss()),
            compare("ssim", ssim, SSIMLoss()),
            compare("fft", fft, FFTLoss(), tolerance=SIGNS),
            compare("focal", focal, FocalFrequencyLoss()),
            compare("laplacian", laplacian, LaplacianLoss(), tolerance=SIGNS),
        )
    )
