"""What every form of the splits takes: which pixel is where beyond a border, the taps of a Gaussian, the rules."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory_format import in_format_of
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
    fixed = not is_open(height) and not is_open(width)
    if x.is_cpu and fixed and max(above, below) < height and max(left, right) < width:
        return F.pad(x, (left, right, above, below), mode="reflect")
    x = x.index_select(2, mirrored(height, above, below, x.device))
    return x.index_select(3, mirrored(width, left, right, x.device))


def is_open(size: int) -> bool:
    """Whether a program that is compiled or exported leaves a size open, whatever it is in this call."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # which costs half a second to import

    return not has_static_value(size)


def empty_map(x: Tensor, height: int, width: int) -> Tensor:
    """Allocate a map of another size in the format of `x`."""
    batch, channels = x.shape[:2]
    return in_format_of(x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2), x)


def check_map(x: Tensor) -> None:
    """Raise unless `x` is a feature map."""
    check_tensors({"x": x}, "x")
    if x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W), got shape {tuple(x.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have at least one row and column, got shape {tuple(x.shape)}")


def check_bands(bands: Sequence[Tensor], size: Sequence[int]) -> None:
    """Raise unless these are the bands of a map of that size."""
    if not isinstance(bands, Sequence | Tensor) or len(bands) != 4:
        got = len(bands) if isinstance(bands, Sequence | Tensor) else repr(bands)
        raise ValueError(f"bands must be the four (LL, LH, HL, HH), got {got}")
    named: dict[str, Tensor] = dict(zip(("LL", "LH", "HL", "HH"), bands, strict=True))
    check_tensors(named, "LL")
    sides = tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int | torch.SymInt) and side >= 1 for side in sides):
        raise ValueError(f"size must be a height and a width of at least 1, got {size!r}")
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
    else:
        numbers = list(sigma) if isinstance(sigma, Sequence) else [sigma]
        if not all(isinstance(number, Real) for number in numbers):
            raise TypeError(f"sigma must be a number, a sequence of numbers or a tensor, got {sigma!r}")
        if isinstance(sigma, Sequence) and len(numbers) != channels:
            raise ValueError(f"sigma must be a number or one for each of {channels} channels, got {len(numbers)}")
        values = [float(number) for number in numbers]
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f"sigma must be above 0 and finite, got {value}")
    return values
