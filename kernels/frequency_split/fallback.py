"""The blur and the Haar transform in plain torch, fast."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operand_rules import like
from .operands import mirrored, radius_of, taps_of
from .reference import arithmetic, haar_merge_reference, haar_split_reference


def blur_split(x: Tensor, sigma: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Blur; one deviation, or one for each channel."""
    wide = x.to(arithmetic(x.dtype))
    low = _blur(wide, sigma)
    return like(low, x), like(wide - low, x)


def blur_split_adjoint(low: Tensor, high: Tensor, sigma: Sequence[float]) -> Tensor:
    """Bring gradients of both bands to `x`."""
    raise NotImplementedError


def _blur(x: Tensor, sigma: Sequence[float]) -> Tensor:
    radius, channels = radius_of(sigma), x.shape[1]
    taps = taps_of(sigma, x.dtype, x.device).expand(channels, -1)[:, None, None]
    for axis, weight in ((2, taps.mT), (3, taps)):
        padded = x.index_select(axis, mirrored(x.shape[axis], radius, radius, x.device))
        x = F.conv2d(padded, weight, groups=channels)
    return x


haar_split, haar_merge = haar_split_reference, haar_merge_reference
