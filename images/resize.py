"""Bicubic resizing that gives the numbers of MATLAB's `imresize`."""

import math
from typing import Literal

import torch
from torch import Tensor


def imresize(image: Tensor, scale: float, *, intermediate: Literal["uint8", "float"] = "uint8") -> Tensor:
    r"""Resize by the bicubic kernel of MATLAB's `imresize`, antialiased when shrinking.

    Each axis is a weighted sum, rows (height) first:
    :math:`y_j = \sum_i w_{ij} x_i / \sum_i w_{ij}` with :math:`w_{ij} = k(s (u_j - i))`,
    :math:`u_j = j / \mathrm{scale} + (1 - 1 / \mathrm{scale}) / 2` counted from 1, :math:`s = \min(\mathrm{scale}, 1)`
    and the cubic kernel :math:`k` with a = -0.5. Beyond the border the image is mirrored, its edge pixel repeated.

    ``intermediate="uint8"`` is what MATLAB does with an 8-bit image: the input and each axis are rounded to 8 bits,
    halves upwards, and clamped. The low-resolution images of the public test sets are made this way.
    ``intermediate="float"`` is what it does with a `double` image: nothing is rounded or clamped, so bicubic overshoot
    leaves [0, 1], and gradients flow; some published x8 sets are this, rounded once when the file is written.

    The image is taken as it is: to pair it with a low-resolution one, crop it to a multiple of the factor before.

    Shape: ``(B, C, H, W)`` -> ``(B, C, ceil(H * scale), ceil(W * scale))``, of the same dtype and device.

    Args:
        image: floating-point images in [0, 1].
        scale: the factor of both sides, above 0: 0.25 shrinks to a quarter.
        intermediate: ``"uint8"`` or ``"float"``, see above.

    Returns:
        The resized images.

    Raises:
        TypeError: if ``image`` is not floating point.
        ValueError: if ``image`` is not ``(B, C, H, W)`` with H and W above 0, ``scale`` not positive and finite, or
            ``intermediate`` unknown.

    Source: R. Keys, Cubic convolution interpolation for digital image processing, 1981; the MATLAB documentation of
    `imresize`.

    >>> imresize(torch.ones(1, 3, 9, 7), 1 / 3).shape
    torch.Size([1, 3, 3, 3])
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1], got {image.dtype}")
    if image.ndim != 4 or 0 in image.shape[2:]:
        raise ValueError(f"image must be (B, C, H, W) with H and W above 0, got shape {tuple(image.shape)}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if intermediate not in ("uint8", "float"):
        raise ValueError(f'intermediate must be "uint8" or "float", got {intermediate!r}')

    # Bit for bit means float64 sums; Apple's GPUs have no float64.
    x = image.to(torch.float32 if image.device.type == "mps" else torch.float64)
    if intermediate == "float":
        return _resize_axis(_resize_axis(x, scale, -2), scale, -1).to(image.dtype)
    x = _to_bytes(255 * x)
    x = _to_bytes(_resize_axis(x, scale, -2))
    x = _to_bytes(_resize_axis(x, scale, -1))
    return (x / 255).to(image.dtype)


def _to_bytes(x: Tensor) -> Tensor:
    """Round halves upwards, as MATLAB's `uint8(...)` does, where torch would round them to even."""
    return (x + 0.5).floor().clamp(0, 255)


def _resize_axis(x: Tensor, scale: float, dim: Literal[-2, -1]) -> Tensor:
    indices, weights = _taps(x.shape[dim], scale)
    indices, weights = indices.to(x.device), weights.to(x)
    if dim == -2:
        weights = weights[..., None]
    # One tap after the other: the order of the sum, so its last bit, is the same on every device.
    return sum((w * x.index_select(dim, i) for i, w in zip(indices, weights, strict=True)), x.new_zeros(()))


def _taps(length: int, scale: float) -> tuple[Tensor, Tensor]:
    """Which input pixels, with which weights, make each output pixel: two tensors (taps, output length)."""
    shrink = min(scale, 1.0)
    width = 4 / shrink
    centre = torch.arange(1, math.ceil(length * scale) + 1, dtype=torch.float64) / scale + 0.5 * (1 - 1 / scale)
    offsets = torch.arange(math.ceil(width) + 2, dtype=torch.float64)
    position = (centre - width / 2).floor() + offsets[:, None]
    weights = _cubic(shrink * (centre - position))
    weights = weights / weights.sum(0)
    inside = (position.long() - 1) % (2 * length)
    indices = torch.minimum(inside, 2 * length - 1 - inside)
    used = weights.any(1)
    return indices[used], weights[used]


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, 0.0))
