"""Losses of two images pixel by pixel and over the window of SSIM, and what every loss of two images starts with."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..images.metrics import SSIM_SIGMA, SSIM_WINDOW

SMALLEST_EPS = 1e-12  # its square must not vanish in float32, nor what that adds to the square of a pixel's rounding


class ImageLoss(nn.Module):
    """Base of the losses of two images: it checks both and hands them to `compare`, in float32 or wider.

    Half-precision images are widened and autocast is off inside; float64 stays. Every loss is a mean, so that its
    weight holds for crops and batches of any size.

    Shape:
        two of ``(B, C, H, W)`` -> scalar.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if the images are not ``(B, C, H, W)`` of one shape with at least one pixel.

    >>> class LargestError(ImageLoss):
    ...     def compare(self, restored, target):
    ...         return (restored - target).abs().amax()
    >>> LargestError()(torch.zeros(1, 3, 4, 5), torch.ones(1, 3, 4, 5))
    tensor(1.)
    """

    def __init__(self) -> None:  # that of nn.Module would take any argument, and tell no reader that there is none
        super().__init__()

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        restored, target = check_images(restored, target, self)
        with torch.autocast(restored.device.type, enabled=False):
            return self.compare(restored, target)

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        """Give the loss of two checked images of one dtype.

        Raises:
            NotImplementedError: if the subclass does not say how.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override compare()")


def check_images(restored: Tensor, target: Tensor, loss: nn.Module) -> tuple[Tensor, Tensor]:
    """Raise unless these are two images (B, C, H, W) of one shape; return them in one dtype of at least float32."""
    name = type(loss).__name__
    if not (restored.is_floating_point() and target.is_floating_point()):
        raise TypeError(f"{name} takes floating-point images, got {restored.dtype} and {target.dtype}")
    if restored.shape != target.shape or restored.ndim != 4 or 0 in restored.shape:
        raise ValueError(
            f"{name} takes two images (B, C, H, W) of one shape with B, C, H, W >= 1, "
            f"got shapes {tuple(restored.shape)} and {tuple(target.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(restored.dtype, target.dtype), torch.float32)
    return restored.to(dtype), target.to(dtype)


def checked_eps(eps: float) -> float:
    """Raise unless this can be told from nothing in float32."""
    if not (isinstance(eps, int | float) and SMALLEST_EPS <= eps < math.inf):
        raise ValueError(f"eps must be a number of at least {SMALLEST_EPS}, got {eps!r}")
    return eps


class L1Loss(ImageLoss):
    r"""Mean absolute error: :math:`\mathrm{mean}(|a - b|)`.

    Shape:
        two of ``(B, C, H, W)`` -> scalar.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if the images are not ``(B, C, H, W)`` of one shape with at least one pixel.

    >>> L1Loss()(torch.zeros(1, 3, 4, 5), torch.full((1, 3, 4, 5), 0.5))
    tensor(0.5000)
    """

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        return (restored - target).abs().mean()


class L2Loss(ImageLoss):
    r"""Mean squared error: :math:`\mathrm{mean}((a - b)^2)`.

    Shape:
        two of ``(B, C, H, W)`` -> scalar.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if the images are not ``(B, C, H, W)`` of one shape with at least one pixel.

    >>> L2Loss()(torch.zeros(1, 3, 4, 5), torch.full((1, 3, 4, 5), 0.5))
    tensor(0.2500)
    """

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(restored, target)


class CharbonnierLoss(ImageLoss):
    r"""Absolute error that is smooth at zero: :math:`\mathrm{mean}(\sqrt{(a - b)^2 + \epsilon^2})`.

    It is eps, not zero, where the images are equal.

    Shape:
        two of ``(B, C, H, W)`` -> scalar.

    Args:
        eps: below this difference the loss is quadratic.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if ``eps`` is below 1e-12 or not finite, or the images are not ``(B, C, H, W)`` of one shape with
            at least one pixel.

    Source: LapSRN (arXiv:1704.03915), section 3.3.

    >>> CharbonnierLoss()(torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 4, 5))
    tensor(0.0010)
    """

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = checked_eps(eps)

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        return ((restored - target).square() + self.eps**2).sqrt().mean()

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class PSNRLoss(ImageLoss):
    r"""Minus the PSNR in dB, the mean over images: :math:`10 \log_{10}(\mathrm{mean}((a - b)^2) + \epsilon)`.

    Each image counts by its ratio: one that is nearly right already, and that a net should leave alone, teaches as much
    as one that is far off, whose absolute error drowns it in the other losses.

    Shape:
        two of ``(B, C, H, W)``, of values up to 1 -> scalar.

    Args:
        eps: mean square error below which there is little left to gain; by default that of 50 dB, what rounding to
            8 bits is about to hide.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if ``eps`` is below 1e-12 or not finite, or the images are not ``(B, C, H, W)`` of one shape with
            at least one pixel.

    Source: HINet (arXiv:2105.06086), which trains for the PSNR, and NAFNet after it.

    >>> PSNRLoss()(torch.zeros(1, 3, 4, 5), torch.full((1, 3, 4, 5), 0.1))
    tensor(-19.9957)
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = checked_eps(eps)

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        return 10 * ((restored - target).square().flatten(1).mean(1) + self.eps).log10().mean()

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class SSIMLoss(ImageLoss):
    r"""One minus the structural similarity, the mean over pixels and channels that `claritycore.images.ssim` takes.

    With the sum and the difference of the images, :math:`s = a + b` and :math:`d = a - b`, and means and variances
    over the Gaussian window of 11 x 11 pixels,

    .. math::
        1 - \mathrm{SSIM} = p + q - p q, \quad
        p = \frac{\mu_d^2}{(\mu_s^2 + \mu_d^2) / 2 + C_1}, \quad
        q = \frac{\sigma_d^2}{(\sigma_s^2 + \sigma_d^2) / 2 + C_2},

    :math:`C_1 = 0.01^2`, :math:`C_2 = 0.03^2`. Written so, float32 loses nothing where the images are nearly equal,
    and the loss of equal images is zero.

    Shape:
        two of ``(B, C, H, W)``, H and W >= 11 -> scalar.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if the images are not ``(B, C, H, W)`` of one shape with at least one pixel, or smaller than the
            window.

    Source: Z. Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.

    >>> SSIMLoss()(torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16))
    tensor(0.)
    """

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        if min(restored.shape[2:]) < SSIM_WINDOW:
            raise ValueError(
                f"SSIMLoss takes images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, "
                f"got {restored.shape[2]} x {restored.shape[3]}"
            )
        total, difference = restored + target, restored - target
        maps = torch.cat([total, difference, total.square(), difference.square()], 1)
        mean_s, mean_d, square_s, square_d = _window_means(maps).chunk(4, 1)
        variance_s, variance_d = square_s - mean_s.square(), square_d - mean_d.square()
        p = mean_d.square() / ((mean_s.square() + mean_d.square()) / 2 + 0.01**2)
        q = variance_d / ((variance_s + variance_d) / 2 + 0.03**2)
        return (p + q - p * q).mean()


def _window_means(maps: Tensor) -> Tensor:
    """Weigh by the Gaussian window, only where it lies inside the maps."""
    offset = torch.arange(SSIM_WINDOW, device=maps.device, dtype=maps.dtype) - SSIM_WINDOW // 2
    window = (-offset.square() / (2 * SSIM_SIGMA**2)).exp()
    window = (window / window.sum()).expand(maps.shape[1], 1, 1, SSIM_WINDOW)
    # Dense planes and a group for each channel: CUDA's kernel for that takes no TF32, which would drown the variances.
    maps = F.conv2d(maps.contiguous(), window.mT, groups=maps.shape[1])
    return F.conv2d(maps, window, groups=maps.shape[1])
