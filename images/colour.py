"""The luma channel that super-resolution is measured on."""

import torch
from torch import Tensor


def rgb_to_y(image: Tensor) -> Tensor:
    r"""Give the luma of RGB images: :math:`Y = (16 + 65.481 R + 128.553 G + 24.966 B) / 255`.

    BT.601 in studio swing, as MATLAB's `rgb2ycbcr` of a `double` image: black is 16 / 255, white 235 / 255.
    Nothing is rounded.

    Shape: ``(B, 3, H, W)`` -> ``(B, 1, H, W)``, of the same dtype and device.

    Args:
        image: floating-point RGB images in [0, 1].

    Returns:
        The luma.

    Raises:
        TypeError: if ``image`` is not floating point.
        ValueError: if ``image`` is not ``(B, 3, H, W)``.

    Source: ITU-R BT.601-7, section 2.5.

    >>> (255 * rgb_to_y(torch.ones(1, 3, 1, 1))).round().item()
    235.0
    """
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1], got {image.dtype}")
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"image must be (B, 3, H, W), got shape {tuple(image.shape)}")
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=image.dtype, device=image.device)
    return ((image * weights[:, None, None]).sum(1, keepdim=True) + 16) / 255
