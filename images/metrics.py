"""PSNR and SSIM as the tables of the field compute them."""

import torch
from torch import Tensor

from .colour import rgb_to_y

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_STRIP = 64  # rows at a time
TARGET_SLACK = 1e-3  # how far a target may leave [0, 1]: rounding, and nothing that was made for another range


def psnr(
    image: Tensor, target: Tensor, *, crop_border: int = 0, y_channel: bool = False, depth: int | None = 8
) -> Tensor:
    r"""Peak signal-to-noise ratio in dB of each image: :math:`-10 \log_{10} \mathrm{mean}((a - b)^2)`.

    Both images are first clamped and rounded to 8 bits, as in the file that would be written. Two protocols are behind
    the tables of super-resolution; both compare the luma and leave out ``scale`` pixels on each side:

    - today's, which rounds RGB and not its luma: ``psnr(sr, hr, crop_border=scale, y_channel=True)``.
      With ``lr = imresize(hr, 1 / scale)`` and ``sr = imresize(lr, scale, intermediate="float")``, bicubic x4 on Set5
      reads 28.43 / 0.8113.
    - the classic one, which rounds the luma: ``psnr(rgb_to_y(sr), rgb_to_y(hr), crop_border=scale)``. Its bicubic
      x4 on Set5, 28.42 / 0.8104, is of ``y``, the luma of ``hr`` rounded to 8 bits, shrunk and enlarged with
      ``intermediate="float"``: ``psnr(imresize(imresize(y, 1 / 4, ...), 4, ...), y, crop_border=4)``.

    Denoising and deblurring compare RGB without a crop: ``psnr(image, target)``.

    Shape: two of ``(B, C, H, W)`` -> ``(B,)`` in float64.

    Args:
        image: floating-point images in [0, 1]; restored ones may overshoot.
        target: the images to compare with, in [0, 1], of the same shape.
        crop_border: pixels to leave out on each side.
        y_channel: compare the luma (`rgb_to_y`) of RGB images.
        depth: the bits, 8 or 16, that the images are rounded to before anything else; None takes them as they are.

    Returns:
        One value for each image; infinite where image and target are equal.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if the shapes differ or are not ``(B, C, H, W)``, ``target`` leaves [0, 1] by more than 0.001,
            nothing is left inside the border, ``depth`` is another, or ``y_channel`` is asked of images that are not
            RGB.

    Source: the test protocol of SwinIR (arXiv:2108.10257) and, for the classic one, of SRCNN (arXiv:1501.00092).

    >>> psnr(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8) / 255).round(decimals=2).item()
    48.13
    """
    image, target = _prepare(image, target, crop_border, y_channel, depth)
    return -10 * (image - target).square().mean(dim=(1, 2, 3)).log10()


def ssim(
    image: Tensor, target: Tensor, *, crop_border: int = 0, y_channel: bool = False, depth: int | None = 8
) -> Tensor:
    r"""Structural similarity of each image, the mean over its pixels and channels of a Gaussian-windowed ratio.

    :math:`\frac{(2 \mu_a \mu_b + C_1)(2 \sigma_{ab} + C_2)}
    {(\mu_a^2 + \mu_b^2 + C_1)(\sigma_a^2 + \sigma_b^2 + C_2)}` with an 11 x 11 window of sigma 1.5 that stays
    inside the image, :math:`C_1 = 0.01^2`, :math:`C_2 = 0.03^2`. The two protocols are those of `psnr`.

    Shape: two of ``(B, C, H, W)`` -> ``(B,)`` in float64.

    Args:
        image: floating-point images in [0, 1]; restored ones may overshoot.
        target: the images to compare with, in [0, 1], of the same shape.
        crop_border: pixels to leave out on each side.
        y_channel: compare the luma (`rgb_to_y`) of RGB images.
        depth: the bits, 8 or 16, that the images are rounded to before anything else; None takes them as they are.

    Returns:
        One value for each image; 1 where image and target are equal.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: as `psnr`, and if less than 11 x 11 pixels are left inside the border.

    Source: Z. Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.

    >>> ssim(torch.ones(1, 3, 11, 11), torch.ones(1, 3, 11, 11)).item()
    1.0
    """
    image, target = _prepare(image, target, crop_border, y_channel, depth)
    if min(image.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"image must have at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels inside the border, "
            f"got {image.shape[2]} x {image.shape[3]}"
        )
    height, width = (side - SSIM_WINDOW + 1 for side in image.shape[2:])
    # Strip by strip, overlapping by the window: whole planes in float64 would all lie outside the cache.
    strips = (slice(top, top + SSIM_STRIP + SSIM_WINDOW - 1) for top in range(0, height, SSIM_STRIP))
    sums = [_similarity(image[:, :, rows], target[:, :, rows]).sum(dim=(1, 2, 3)) for rows in strips]
    return torch.stack(sums).sum(0) / (image.shape[1] * height * width)


def _similarity(image: Tensor, target: Tensor) -> Tensor:
    mean_a, mean_b = _blur(image), _blur(target)
    product, squares = mean_a * mean_b, mean_a**2 + mean_b**2
    covariance = _blur(image * target) - product
    variances = _blur(image**2 + target**2) - squares
    c1, c2 = 0.01**2, 0.03**2
    return (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))


def _blur(x: Tensor) -> Tensor:
    """Weigh by the Gaussian window, only where it lies inside the image."""
    offset = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = (-(offset**2) / (2 * SSIM_SIGMA**2)).exp()
    weights = (window / window.sum()).tolist()
    # Sums of shifted images: torch's convolution of float64 planes takes six times as long on a CPU.
    for dim in (2, 3):
        length = x.shape[dim] - SSIM_WINDOW + 1
        total = x.narrow(dim, 0, length) * weights[0]
        for start in range(1, SSIM_WINDOW):
            total.add_(x.narrow(dim, start, length), alpha=weights[start])
        x = total
    return x


def _prepare(
    image: Tensor, target: Tensor, crop_border: int, y_channel: bool, depth: int | None
) -> tuple[Tensor, Tensor]:
    if image.shape != target.shape:
        raise ValueError(f"image and target must have one shape, got {tuple(image.shape)} and {tuple(target.shape)}")
    if image.ndim != 4:
        raise ValueError(f"image must be (B, C, H, W), got shape {tuple(image.shape)}")
    if not (image.is_floating_point() and target.is_floating_point()):
        raise TypeError(f"image and target must be floating point in [0, 1], got {image.dtype} and {target.dtype}")
    if crop_border < 0 or 2 * crop_border >= min(image.shape[2:]):
        raise ValueError(
            f"crop_border must be at least 0 and leave pixels of {image.shape[2]} x {image.shape[3]}, got {crop_border}"
        )
    if depth not in (8, 16, None):
        raise ValueError(f"depth must be 8, 16 or None, got {depth!r}")
    # A restored image may overshoot; a target that does is of another range, and its figure would mean nothing.
    low, high = (limit.item() for limit in target.aminmax()) if target.numel() else (0, 0)
    if not -TARGET_SLACK <= low <= high <= 1 + TARGET_SLACK:
        raise ValueError(f"images must be in [0, 1], got a target with values from {low:.4g} to {high:.4g}")

    def prepare(x: Tensor) -> Tensor:
        x = (x.cpu() if x.device.type == "mps" else x).double()  # Apple's GPUs have no float64
        x = x[..., crop_border : x.shape[2] - crop_border, crop_border : x.shape[3] - crop_border]
        if depth is not None:
            x = x.clamp(0, 1).mul_(2**depth - 1).round_().div_(2**depth - 1)
        return rgb_to_y(x) if y_channel else x

    return prepare(image), prepare(target)
