"""Resizing by the kernels that degradations are drawn from."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from ..blocks.checks import check_choice, check_positive
from ..images import imresize
from .jpeg import check_image

ResizeMode = Literal["area", "bilinear", "bicubic", "nearest", "matlab"]
RESIZE_MODES = ("area", "bilinear", "bicubic", "nearest", "matlab")


def resize(image: Tensor, size: tuple[int, int], mode: ResizeMode) -> Tensor:
    """Resize images to a size in pixels.

    "area" averages the pixels under each new one. "bilinear" and "bicubic" (a = -0.75) take the nearest two and four
    pixels of each axis whatever the factor, as OpenCV and torch do: shrinking by more than 2 leaves pixels out.
    "nearest" takes one. "matlab" is `imresize`, bicubic (a = -0.5) and antialiased when shrinking, for factors that are
    the same on both axes.

    Shape: ``(B, C, H, W)`` -> ``(B, C, *size)``, of the same dtype.

    Args:
        image: floating-point images.
        size: height and width.
        mode: one of those named.

    Raises:
        TypeError: if ``image`` is not floating point.
        ValueError: if ``image`` is not ``(B, C, H, W)`` with H, W >= 1, ``size`` not positive, ``mode`` unknown, or the
            factors of "matlab" differ.

    >>> resize(torch.ones(1, 3, 8, 6), (5, 9), "area").shape
    torch.Size([1, 3, 5, 9])
    """
    check_image(image)
    check_choice("mode", mode, RESIZE_MODES)
    check_positive(height=size[0], width=size[1])
    height, width = image.shape[2:]
    if mode == "matlab":
        if size[0] * width != size[1] * height:
            raise ValueError(f"size of mode 'matlab' must keep the ratio of {height} x {width}, got {tuple(size)}")
        # The product of a side and its factor may lie a hair above the size, and be rounded up.
        return imresize(image, size[0] / height, intermediate="float")[..., : size[0], : size[1]]
    if mode in ("area", "nearest"):
        return F.interpolate(image, size=size, mode=mode)
    return F.interpolate(image, size=size, mode=mode, align_corners=False)
