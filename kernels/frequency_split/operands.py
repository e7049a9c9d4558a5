"""What every form of the splits takes: which pixel is where beyond a border, the taps of a Gaussian, the rules."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operand_rules import check_tensors

HIGHEST_CUTOFF = 1.42
"""Beyond the corner of the spectrum, at the square root of 2, there is nothing to cut."""


def gaussian_sigma(cutoff: float) -> float:
    r"""Return the deviation, in pixels, of the blur whose spectrum is the Gaussian mask of that cutoff.

    .. math:: \sigma = \frac{1}{\pi c}

    It is its own inverse: the cutoff of a blur is `gaussian_sigma` of its deviation.

    Args:
        cutoff: in cycles per two pixels, above 0.

    Raises:
        ValueError: if the cutoff is not above 0.

    >>> round(gaussian_sigma(0.25), 3)
    1.273
    """
    if not cutoff > 0:
        raise ValueError(f"cutoff must be above 0, got {cutoff}")
    return 1 / (math.pi * cutoff)


def radius_of(sigma: Sequence[float]) -> int:
    """Return how many pixels to each side a blur looks: three of the largest deviation."""
    return math.ceil(3 * max(sigma))


def taps_of(sigma: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sample each Gaussian as far as it looks, and norm its sum to 1: (1 or C, 2 radius + 1)."""
    radius = radius_of(sigma)
    deviation = torch.cat([torch.full((1, 1), s, dtype=torch.float64) for s in sigma])  # which can be exported
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / deviation) ** 2) * (offsets.abs() <= torch.ceil(3 * deviation))
    return (taps / taps.sum(1, keepdim=True)).to(device, dtype)


def mirrored(size: int, before: int, after: int, device: torch.device) -> Tensor:
    """Number the pixels of an axis and beyond: the border is a mirror, and once it runs out the last one repeats.

    >>> mirrored(3, 3, 1, torch.device("cpu"))
    tensor([2, 2, 1, 0, 1, 2, 1])
    """
    index = torch.arange(-before, size + after, device=device)
    return torch.where(index < size, index.abs(), 2 * (size - 1) - index).clamp(0, size - 1)


def mirror(x: Tensor, above: int, below: int, left: int, right: int) -> Tensor:
    """Continue a map beyond its borders, as `mirrored` numbers its pixels."""
    height, width = x.shape[2:]
    # Torch's own padding is several times as fast on a CPU; on a GPU its gradient does not repeat bit for bit.
    fixed = isinstance(height, int) and isinstance(width, int)  # an export may leave them open
    if x.is_cpu and fixed and max(above, below) < height and max(left, right) < width:
        return F.pad(x, (left, right, above, below), mode="reflect")
    x = x.index_select(2, mirrored(height, above, below, x.device))
    return x.index_select(3, mirrored(width, left, right, x.device))


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_format_of(x: Tensor, value: Tensor) -> Tensor:
    """Lay a map out as `x` is, channels last or first."""
    if x.is_contiguous() or not x.permute(0, 2, 3, 1).is_contiguous():
        return value.contiguous()
    return value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def empty_map(x: Tensor, height: int, width: int) -> Tensor:
    """Allocate a map of another size in the format of `x`."""
    batch, channels = x.shape[:2]
    return in_format_of(x, x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2))


def check_map(x: Tensor) -> None:
    """Raise unless `x` is a feature map."""
    check_tensors({"x": x}, "x")
    if x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W), got shape {tuple(x.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have at least one row and column, got shape {tuple(x.shape)}")


def check_bands(bands: Sequence[Tensor], size: Sequence[int]) -> None:
    """Raise unless these are the bands of a map of that size."""
    if len(bands) != 4:
        raise ValueError(f"bands must be the four (LL, LH, HL, HH), got {len(bands)}")
    named: dict[str, Tensor] = dict(zip(("LL", "LH", "HL", "HH"), bands, strict=True))
    check_tensors(named, "LL")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be a height and a width of at least 1, got {tuple(size)}")
    half = tuple((side + 1) // 2 for side in size)
    for name, band in named.items():
        if band.ndim != 4 or tuple(band.shape[2:]) != half:
            rule = f"(B, C, {half[0]}, {half[1]}) for a map of {size[0]} x {size[1]}"
            raise ValueError(f"{name} must be {rule}, got shape {tuple(band.shape)}")
        if band.shape != bands[0].shape or band.dtype != bands[0].dtype:
            rule = f"the shape and dtype of LL, {tuple(bands[0].shape)} and {bands[0].dtype}"
            raise ValueError(f"{name} must have {rule}, got {tuple(band.shape)} and {band.dtype}")


def deviations(sigma: float | Sequence[float] | Tensor, channels: int) -> list[float]:
    """Read one deviation, or one for each channel; raise unless they can blur."""
    if isinstance(sigma, Tensor):
        if sigma.requires_grad:
            raise ValueError("sigma must not require a gradient: learn a cutoff with fft_split")
        if tuple(sigma.shape) not in ((), (channels,)):
            raise ValueError(f"sigma must be a number or (C,) = ({channels},), got shape {tuple(sigma.shape)}")
        values = sigma.double().reshape(-1).tolist()
    elif isinstance(sigma, Sequence):
        values = [float(value) for value in sigma]
        if len(values) != channels:
            raise ValueError(f"sigma must be a number or one for each of {channels} channels, got {len(values)}")
    else:
        values = [float(sigma)]
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f"sigma must be above 0 and finite, got {value}")
    return values
