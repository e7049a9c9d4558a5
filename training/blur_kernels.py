"""Blur kernels, one per sample, and blurring by them.

Every kernel is ``(B, k, k)`` with k odd, computed in float64 and summing to 1. What a row of the parameters asks for
beyond ``support`` is left out, so that samples with kernels of different sizes share one tensor.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks.checks import check_odd
from ..blocks.padding import pad_same
from ..blocks.precision import at_least_float32
from .jpeg import check_image

# A Gaussian as narrow as this is one pixel, to the last bit.
SMALLEST_SIGMA = 1e-3


def gaussian_kernels(
    size: int,
    sigma_x: Tensor,
    sigma_y: Tensor | None = None,
    theta: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    shift: Tensor | None = None,
    support: Tensor | None = None,
) -> Tensor:
    r"""Make Gaussian kernels :math:`e^{-q^\beta / 2}` with :math:`q = d^T \Sigma^{-1} d`, for each offset :math:`d`.

    The covariance has the standard deviation ``sigma_x`` along the direction ``theta``, counted from the x axis to the
    y axis, which points down, and ``sigma_y`` across it. Standard deviations of 0 give the kernel that does nothing.

    Shape: parameters ``(B,)`` -> ``(B, size, size)``, float64.

    Args:
        size: side of the kernels, odd.
        sigma_x: standard deviations.
        sigma_y: those of the other axis; by default the same.
        theta: directions in radians; by default 0.
        beta: exponents of the generalised Gaussian; by default 1, a Gaussian. Below 1 it is more pointed.
        shift: where the kernel is centred, right of and below its middle by as many pixels.
        support: sides of the part that is used, odd; by default all.

    Raises:
        ValueError: if ``size`` is not odd.

    Source: Wang et al., Real-ESRGAN (arXiv:2107.10833), section 3.1.

    >>> gaussian_kernels(3, torch.tensor([0.0]))[0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    power = _power(_quadratic_form(size, sigma_x, sigma_y, theta, shift), beta)
    return _normalised((0.5 * (power.amin((1, 2), keepdim=True) - power)).exp(), support)


def plateau_kernels(
    size: int,
    sigma_x: Tensor,
    sigma_y: Tensor | None = None,
    theta: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    support: Tensor | None = None,
) -> Tensor:
    r"""Make kernels with a flat top, :math:`1 / (q^\beta + 1)`; arguments as those of `gaussian_kernels`.

    >>> plateau_kernels(5, torch.tensor([1.0])).sum().item()
    1.0
    """
    q = _quadratic_form(size, sigma_x, sigma_y, theta, None)
    return _normalised(1 / (_power(q, beta) + 1), support)


def sinc_kernels(size: int, cutoff: Tensor, *, support: Tensor | None = None) -> Tensor:
    r"""Make ideal low-pass kernels, :math:`\omega J_1(\omega r) / (2 \pi r)`, which ring at edges.

    Shape: ``cutoff`` ``(B,)`` -> ``(B, size, size)``, float64.

    Args:
        size: side of the kernels, odd.
        cutoff: radians a pixel; pi is the Nyquist frequency of the axes.
        support: sides of the part that is used, odd; by default all.

    Raises:
        ValueError: if ``size`` is not odd.

    Source: Wang et al., Real-ESRGAN (arXiv:2107.10833), section 3.3.

    >>> round(sinc_kernels(21, torch.tensor([1.0])).sum().item(), 6)
    1.0
    """
    x, y = _offsets(size, cutoff.device)
    radius = (x**2 + y**2).sqrt()
    omega = cutoff.double()[:, None, None]
    ring = omega * torch.special.bessel_j1(omega * radius) / (2 * math.pi * radius.clamp(min=1))
    return _normalised(torch.where(radius > 0, ring, omega**2 / (4 * math.pi)), support)


def motion_kernels(size: int, length: Tensor, angle: Tensor, bends: Tensor | None = None) -> Tensor:
    """Make the kernels of a camera that moves at constant speed: along a line, or a path that bends.

    The path has the given length, and its centre of mass in the middle of the kernel. It is cut into short steps, and
    each puts its share on the four pixels around its middle, by their distances. What leaves the kernel is left out.

    Shape: ``length`` and ``angle`` ``(B,)``, ``bends`` ``(B, N)`` -> ``(B, size, size)``, float64.

    Args:
        size: side of the kernels, odd.
        length: of the paths, in pixels; 0 gives the kernel that does nothing.
        angle: the direction at the start in radians, from the x axis to the y axis, which points down.
        bends: by how many radians the direction turns at each of N equal parts of the path; None for a line.

    Raises:
        ValueError: if ``size`` is not odd.

    >>> motion_kernels(5, torch.tensor([3.0]), torch.tensor([0.0]))[0, 2].mul(24).round().tolist()
    [1.0, 7.0, 8.0, 7.0, 1.0]
    """
    check_odd(size=size)
    steps = 32 * size
    turned = angle.double()[:, None]
    if bends is None:
        turned = turned.expand(-1, steps)
    else:
        part = torch.arange(steps, device=bends.device) * bends.shape[1] // steps
        turned = turned + bends.double().cumsum(1)[:, part]
    step = length.double()[:, None] / steps
    axis = torch.arange(size, device=length.device, dtype=torch.float64) - size // 2
    weights = []
    for part in (turned.sin(), turned.cos()):  # rows, then columns
        path = (part * step).cumsum(1)
        path = path - part * step / 2
        path = path - path.mean(1, keepdim=True)
        weights.append((1 - (path[..., None] - axis).abs()).clamp(min=0))
    return _normalised(torch.einsum("bni,bnj->bij", *weights), None)


def blur(image: Tensor, kernels: Tensor) -> Tensor:
    r"""Blur each sample by its kernel: :math:`y_{h, w} = \sum_{i, j} k_{ij} x_{h + i, w + j}`, with i and j around 0.

    The image is reflected at its borders; where it is smaller than the kernel's reach, its far edge is repeated.
    Computed in float32, in float64 where the image is.

    Shape: ``image`` ``(B, C, H, W)`` -> the same, of the same dtype; ``kernels`` is ``(B, k, k)``, k odd.

    Args:
        image: floating-point images.
        kernels: a kernel for each sample, the same for all its channels.

    Raises:
        TypeError: if ``image`` is not floating point.
        ValueError: if ``image`` is not ``(B, C, H, W)`` with H, W >= 1, or ``kernels`` not ``(B, k, k)`` with k odd.

    >>> image = torch.rand(1, 3, 4, 6)
    >>> torch.equal(blur(image, gaussian_kernels(5, torch.zeros(1))), image)
    True
    """
    check_image(image)
    batch, channels = image.shape[:2]
    if kernels.ndim != 3 or len(kernels) != batch or kernels.shape[1] != kernels.shape[2]:
        raise ValueError(f"kernels must be ({batch}, k, k), a kernel for each image, got {tuple(kernels.shape)}")
    size = kernels.shape[1]
    check_odd(**{"the side of kernels": size})
    padded = pad_same(at_least_float32(image), (size // 2, size // 2), "reflect")
    weights = kernels.to(padded)[:, None].repeat_interleave(channels, 0)
    return _by_plane(padded, weights).to(image.dtype)


def sharpen(image: Tensor, *, radius: int = 50, weight: float = 0.5, threshold: float = 10 / 255) -> Tensor:
    """Sharpen by an unsharp mask, where the image differs from its blurred form by more than the threshold.

    With the blur of OpenCV for that radius (a Gaussian of side 51 and sigma 8), as Real-ESRGAN sharpens the images that
    it degrades, and those that its pixel losses aim at. Computed in float32, in float64 where the image is.

    Shape: ``(B, C, H, W)`` -> the same, of the same dtype.

    Args:
        image: floating-point images in [0, 1].
        radius: side of the Gaussian, made odd by 1 more.
        weight: of what is added.
        threshold: the smallest difference that is sharpened.

    Raises:
        TypeError: if ``image`` is not floating point.
        ValueError: if ``image`` is not ``(B, C, H, W)`` with H, W >= 1.

    Source: Wang et al., Real-ESRGAN (arXiv:2107.10833), section 4.1.

    >>> sharpen(torch.full((1, 3, 4, 6), 0.5)).unique()
    tensor([0.5000])
    """
    check_image(image)
    side = radius + 1 - radius % 2
    offsets = torch.arange(side, dtype=torch.float64, device=image.device) - side // 2
    line = (-0.5 * (offsets / (0.3 * ((side - 1) * 0.5 - 1) + 0.8)) ** 2).exp()
    line = (line / line.sum()).expand(image.shape[0] * image.shape[1], 1, 1, -1)

    def smoothed(x: Tensor) -> Tensor:
        padded = pad_same(x, (side // 2, side // 2), "reflect")
        return _by_plane(_by_plane(padded, line.to(x)), line.mT.to(x))

    # Besides the rounding: torch 2.13 never comes back from float16 planes and wide kernels where a CPU has AMX for it.
    x = at_least_float32(image)
    residual = x - smoothed(x)
    mask = smoothed((residual.detach().abs() > threshold).to(x))
    return (x + mask * ((x + weight * residual).clamp(0, 1) - x)).to(image.dtype)


def _by_plane(image: Tensor, weights: Tensor) -> Tensor:
    """Convolve each plane of the images with its own kernel, (B C, 1, kh, kw), without padding."""
    planes = image.reshape(1, -1, *image.shape[2:])
    # A single plane would go to cuDNN, which may round float32 to TF32; with more, torch's own kernel does not.
    if len(weights) == 1 and image.is_cuda:
        planes, weights = planes.double(), weights.double()
    with torch.autocast(image.device.type, enabled=False):
        convolved = F.conv2d(planes, weights, groups=len(weights))
    return convolved.view(*image.shape[:2], *convolved.shape[2:]).to(image.dtype)


def _offsets(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    check_odd(size=size)
    axis = torch.arange(size, device=device, dtype=torch.float64) - size // 2
    return axis[None, None, :], axis[None, :, None]


def _quadratic_form(
    size: int, sigma_x: Tensor, sigma_y: Tensor | None, theta: Tensor | None, shift: Tensor | None
) -> Tensor:
    x, y = _offsets(size, sigma_x.device)
    if shift is not None:
        x, y = x - shift.double()[:, None, None], y - shift.double()[:, None, None]
    theta = (torch.zeros_like(sigma_x) if theta is None else theta).double()[:, None, None]
    cosine, sine = theta.cos(), theta.sin()
    along, across = (
        sigma.double().clamp(min=SMALLEST_SIGMA)[:, None, None]
        for sigma in (sigma_x, sigma_x if sigma_y is None else sigma_y)
    )
    return ((cosine * x + sine * y) / along) ** 2 + ((cosine * y - sine * x) / across) ** 2


def _power(q: Tensor, beta: Tensor | None) -> Tensor:
    return q if beta is None else q ** beta.double()[:, None, None]


def _normalised(kernels: Tensor, support: Tensor | None) -> Tensor:
    if support is not None:
        x, y = _offsets(kernels.shape[-1], kernels.device)
        kernels = kernels * (torch.maximum(x.abs(), y.abs()) <= (support // 2)[:, None, None])
    return kernels / kernels.sum((1, 2), keepdim=True)
