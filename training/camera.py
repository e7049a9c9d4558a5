r"""A camera run backwards and forwards: from sRGB to raw samples of a sensor, its noise, and back.

Backwards (`unprocess`): the tone curve :math:`3 x^2 - 2 x^3` and the gamma 2.2 are inverted, colours go to the camera's
own by its matrix, and the gains of brightness and white balance are taken off. The sensor then sees one colour a pixel
(red, green / green, blue), with noise whose variance is `shot * x + read`. Forwards (`process`): gains, demosaicing by
the gradient-corrected linear filters of Malvar, He and Cutler, matrix, gamma and tone curve.

Brooks et al., Unprocessing Images for Learned Raw Denoising (arXiv:1811.11127), give the steps and the distributions;
Malvar et al., High-quality linear interpolation for demosaicing of Bayer-patterned color images (ICASSP 2004), the
filters.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks.padding import pad_same
from .noise import mix_channels, normal_fields

# From XYZ to the colours of four cameras, as their DNG files state it, and from linear sRGB to XYZ.
XYZ_TO_CAMERA = (
    ((1.0234, -0.2969, -0.2266), (-0.5625, 1.6328, -0.0469), (-0.0703, 0.2188, 0.6406)),
    ((0.4913, -0.0541, -0.0202), (-0.6130, 1.3513, 0.2906), (-0.1564, 0.2151, 0.7183)),
    ((0.8380, -0.2630, -0.0639), (-0.2887, 1.0725, 0.2496), (-0.0627, 0.1427, 0.5438)),
    ((0.6596, -0.2079, -0.0562), (-0.4782, 1.3016, 0.1933), (-0.0970, 0.1581, 0.5181)),
)
RGB_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
GAMMA = 2.2
# Gains are not taken off near white, where a sensor is saturated: from this brightness on they fade to 1.
SATURATION = 0.9
# Keeps the slopes of the curves finite at black and white.
SMALLEST = 1e-6

SHOT = (1e-4, 1.2e-2)
READ_SLOPE, READ_OFFSET, READ_SPREAD = 2.18, 1.20, 0.26
BRIGHTNESS_MEAN, BRIGHTNESS_SPREAD = 0.8, 0.1
RED_GAIN, BLUE_GAIN = (1.9, 2.4), (1.5, 1.9)

# Eighths: green at red and blue; a colour in the row, or the column, of its samples; red at blue and blue at red.
MALVAR_GREEN = ((0, 0, -1, 0, 0), (0, 0, 2, 0, 0), (-1, 2, 4, 2, -1), (0, 0, 2, 0, 0), (0, 0, -1, 0, 0))
MALVAR_ROW = ((0, 0, 0.5, 0, 0), (0, -1, 0, -1, 0), (-1, 4, 5, 4, -1), (0, -1, 0, -1, 0), (0, 0, 0.5, 0, 0))
MALVAR_COLUMN = tuple(zip(*MALVAR_ROW, strict=True))
MALVAR_CROSS = ((0, 0, -1.5, 0, 0), (0, 2, 0, 2, 0), (-1.5, 0, 6, 0, -1.5), (0, 2, 0, 2, 0), (0, 0, -1.5, 0, 0))
REACH = 2


class Camera(NamedTuple):
    """What distinguishes the cameras of a batch.

    Shape: ``matrix`` ``(B, 3, 3)``, ``gains`` ``(B, 3)``, ``shot`` and ``read`` ``(B,)``.
    """

    matrix: Tensor
    gains: Tensor
    shot: Tensor
    read: Tensor


def draw_camera(rng: np.random.Generator) -> dict[str, float | np.ndarray]:
    """Draw a camera: its matrix, gains and noise, from the distributions of Brooks et al.

    >>> sorted(draw_camera(np.random.default_rng(0)))
    ['blue_gain', 'brightness', 'matrix', 'read', 'red_gain', 'shot']
    """
    weights = rng.random(len(XYZ_TO_CAMERA))
    matrix = np.tensordot(weights / weights.sum(), np.array(XYZ_TO_CAMERA), 1) @ np.array(RGB_TO_XYZ)
    log_shot = rng.uniform(math.log(SHOT[0]), math.log(SHOT[1]))
    return {
        "matrix": matrix / matrix.sum(1, keepdims=True),
        "brightness": 1 / rng.normal(BRIGHTNESS_MEAN, BRIGHTNESS_SPREAD),
        "red_gain": rng.uniform(*RED_GAIN),
        "blue_gain": rng.uniform(*BLUE_GAIN),
        "shot": math.exp(log_shot),
        "read": math.exp(READ_SLOPE * log_shot + READ_OFFSET + rng.normal(0, READ_SPREAD)),
    }


def through_camera(image: Tensor, rngs: Sequence[np.random.Generator] | None, camera: Camera) -> Tensor:
    """Take images through a camera.

    The image is continued by reflection where demosaicing reaches beyond it, so the sensor is a little larger. Images
    that are not RGB are seen by a sensor without colours: only curves, brightness and noise.

    Shape: ``(B, C, H, W)`` -> the same, in [0, 1].

    Args:
        image: floating-point images in [0, 1], float32 or float64.
        rngs: a generator for each sample; None for a camera without noise.
        camera: what it is like.

    >>> camera = Camera(torch.eye(3)[None], torch.ones(1, 3), torch.zeros(1), torch.zeros(1))
    >>> through_camera(torch.full((1, 3, 1, 1), 0.5), None, camera).mul(100).round()[0, :, 0, 0]
    tensor([50., 50., 50.])
    """
    colour = image.shape[1] == 3
    gains = camera.gains.to(image)[..., None, None]
    matrix = camera.matrix if colour else None
    if not colour:
        gains = gains[:, 1:2]
    raw = unprocess(image, matrix, gains)
    if colour:
        raw = mosaic(pad_same(raw, (REACH, REACH), "reflect"))
    if rngs is not None:
        raw = raw + normal_fields(rngs, raw) * noise_deviation(raw, camera.shot, camera.read)
    return process(raw, matrix, gains)


def unprocess(image: Tensor, matrix: Tensor | None, gains: Tensor) -> Tensor:
    """Undo what a camera does after the sensor, up to the mosaic; without a matrix colours stay as they are."""
    x = image.clamp(SMALLEST, 1 - SMALLEST)
    x = 0.5 - ((1 - 2 * x).asin() / 3).sin()
    x = x.clamp(min=SMALLEST) ** GAMMA
    if matrix is not None:
        x = mix_channels(x, matrix)
    saturated = ((x.mean(1, keepdim=True) - SATURATION).clamp(min=0) / (1 - SATURATION)) ** 2
    return (x * torch.maximum(saturated + (1 - saturated) / gains, 1 / gains)).clamp(0, 1)


def noise_deviation(raw: Tensor, shot: Tensor, read: Tensor) -> Tensor:
    """The standard deviation of the sensor's noise at each sample, the root of `shot * raw + read`."""
    shot, read = (value.to(raw)[:, None, None, None] for value in (shot, read))
    return (shot * raw.clamp(min=0) + read).sqrt()


def process(raw: Tensor, matrix: Tensor | None, gains: Tensor) -> Tensor:
    """Make sRGB of a mosaic, larger by the reach of demosaicing; without a matrix of linear samples."""
    if matrix is not None:
        x = mosaic_gains(raw, gains)
        x = mix_channels(demosaic(x.clamp(0, 1)), torch.linalg.inv(matrix.double().cpu()))
    else:
        x = raw * gains
    x = x.clamp(SMALLEST**GAMMA, 1) ** (1 / GAMMA)
    return 3 * x**2 - 2 * x**3


def mosaic(image: Tensor) -> Tensor:
    """Keep one colour a pixel: red at even rows and columns, blue at odd ones, green elsewhere.

    Shape: ``(B, 3, H, W)`` -> ``(B, 1, H, W)``.

    >>> mosaic(torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand(1, 3, 2, 2))
    tensor([[[[1., 2.],
              [2., 3.]]]])
    """
    red, green, blue = image.split(1, dim=1)
    odd_row, odd_column = _phases(image)
    return torch.where(odd_row, torch.where(odd_column, blue, green), torch.where(odd_column, green, red))


def mosaic_gains(raw: Tensor, gains: Tensor) -> Tensor:
    """Multiply each sample of a mosaic by the gain of its colour, (B, 3, 1, 1)."""
    return raw * mosaic(gains.expand(-1, -1, *raw.shape[2:]))


def demosaic(raw: Tensor) -> Tensor:
    """Interpolate the missing colours of a mosaic; two samples around it are used up.

    Shape: ``(B, 1, H + 4, W + 4)`` -> ``(B, 3, H, W)``.

    >>> demosaic(torch.full((1, 1, 5, 6), 0.5)).unique()
    tensor([0.5000])
    """
    filters = raw.new_tensor([MALVAR_GREEN, MALVAR_ROW, MALVAR_COLUMN, MALVAR_CROSS])[:, None] / 8
    with torch.autocast(raw.device.type, enabled=False):
        # One plane for each filter: as many groups stay clear of cuDNN, which may round to TF32.
        green, in_row, in_column, cross = F.conv2d(raw.expand(-1, 4, -1, -1), filters, groups=4).split(1, dim=1)
    here = raw[..., REACH:-REACH, REACH:-REACH]
    odd_row, odd_column = _phases(here)
    is_green = odd_row ^ odd_column
    own_row, other_row = torch.where(is_green, in_row, here), torch.where(is_green, in_column, cross)
    red = torch.where(odd_row, other_row, own_row)
    blue = torch.where(odd_row, own_row, other_row)
    return torch.cat([red, torch.where(is_green, here, green), blue], 1)


def _phases(image: Tensor) -> tuple[Tensor, Tensor]:
    height, width = image.shape[2:]
    rows, columns = (torch.arange(side, device=image.device) % 2 == 1 for side in (height, width))
    return rows[:, None], columns
