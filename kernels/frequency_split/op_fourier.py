"""The split by a radial mask in the Fourier domain: one transform forward and one back, in plain torch."""

import math
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from ..memory_format import in_format_of
from ..operand_rules import check_tensors, compute_dtype
from .operands import HIGHEST_CUTOFF, check_map, gaussian_sigma, is_open, mirror

Mask = Literal["gaussian", "butterworth", "ideal"]

LEAST_PADDING, MOST_PADDING = 4, 32
LEARNED_PADDING = 8
"""Pixels beyond the border where a cutoff is learned, and so may be any."""


def fft_split(
    x: Tensor, cutoff: float | Tensor, *, mask: Mask = "gaussian", padding: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Split a map into low and high frequencies by a radial mask: the low ones pass, the high ones are what is left.

    With the distance from zero frequency :math:`r = 2 \sqrt{f_y^2 + f_x^2}`, f in cycles per pixel, and the cutoff c,

    .. math::
        \mathrm{low} = \mathcal{F}^{-1}\big(M(r / c) \, \mathcal{F} x\big), \qquad \mathrm{high} = x - \mathrm{low},

    where M is :math:`e^{-r^2 / 2 c^2}` ("gaussian"), :math:`1 / (1 + (r / c)^4)` ("butterworth") or 1 up to c and 0
    beyond ("ideal", whose steps ring by 9 %). The mask at zero frequency is 1: the mean of a map is in `low`. The
    response depends on the cutoff alone, not on the size of the map.

    The map is mirrored beyond its borders, so that these do not meet their opposites, and sides are padded on to
    products of 2, 3 and 5, for which transforms are fast. One transform forward, one back. (A size that a compiled or
    exported program leaves open is not rounded, so that one program serves every size: results then differ near the
    borders, at a cutoff of 0.25 by 1e-4 of the largest value, at 0.5 and beyond by 2 %.)
    Arithmetic is float64 where `x` is, else float32, also under autocast; `low + high` equals `x` to the last bit or
    the next. Differentiable any number of times; a sample depends on nothing but itself. Memory format kept.

    Shape:
        - x: ``(B, C, H, W)``, any H and W from 1 up
        - cutoff: a number, ``()``, ``(C,)`` or ``(B, C)``
        - returns: low and high, each ``(B, C, H, W)`` in the dtype of x

    Args:
        x: the feature map.
        cutoff: c in cycles per two pixels: 1 is the highest frequency along an axis, 1.414 the corner of the spectrum.
            Numbers are above 0 and at most 1.42; tensors should be, and are not looked at.
        mask: "gaussian", "butterworth" or "ideal".
        padding: pixels beyond each border. None: five deviations of the Gaussian of that cutoff, from 4 to 32, and
            8 where the cutoff is a tensor.

    Raises:
        TypeError: if a tensor is not real and floating-point, or the cutoff is neither a number nor a tensor.
        ValueError: if the cutoff is out of range or its shape does not fit x, no mask has that name, the padding is
            no integer or negative, or the cutoff of an ideal mask requires a gradient.

    Source: Gonzalez and Woods, Digital Image Processing, section 4.8: ideal, Butterworth and Gaussian filters.

    >>> x = torch.randn(1, 3, 31, 17)
    >>> low, high = fft_split(x, 0.25)
    >>> low.shape, bool((low + high - x).abs().max() < 1e-6)
    (torch.Size([1, 3, 31, 17]), True)
    """
    _check(x, cutoff, mask, padding)
    if padding is None:
        padding = LEARNED_PADDING if isinstance(cutoff, Tensor) else padding_of(cutoff)
    wide = x.to(compute_dtype(x))  # autocast lowers nothing that follows
    if x.numel() == 0:
        return wide.to(x.dtype), wide.to(x.dtype)
    low = _low(wide, cutoff, mask, padding)
    return low.to(x.dtype), (wide - low).to(x.dtype)


def fft_split_flops(batch: int, channels: int, height: int, width: int, *, padding: int = LEAST_PADDING) -> int:
    """Count the floating-point operations of one forward split: 2.5 n log2 n for each transform of n padded pixels.

    Beside them stand two for each number of the half spectrum and one for each pixel.
    """
    rows, columns = smooth(height + 2 * padding), smooth(width + 2 * padding)
    transform = 5 * rows * columns * math.log2(rows * columns) / 2
    return batch * channels * (round(2 * transform) + 2 * rows * (columns // 2 + 1) + height * width)


def smooth(size: int) -> int:
    """Return the least product of 2, 3 and 5 that is no smaller.

    >>> [smooth(n) for n in (1, 7, 127, 135, 257)]
    [1, 8, 128, 135, 270]
    """
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def _low(x: Tensor, cutoff: float | Tensor, mask: Mask, padding: int) -> Tensor:
    height, width = x.shape[2:]
    below, right = (_transformed(size, padding) - size - padding for size in (height, width))
    padded = mirror(x.contiguous(), padding, below, padding, right)
    size = padded.shape[2], padded.shape[3]
    # Real numbers times real numbers: a complex product would take twice the time.
    spectrum = torch.view_as_real(torch.fft.rfft2(padded)) * _gain(x, cutoff, mask, size)[..., None]
    filtered = torch.fft.irfft2(torch.view_as_complex(spectrum), s=size)
    return in_format_of(filtered[:, :, padding : padding + height, padding : padding + width], x)


def _transformed(size: int, padding: int) -> int:
    """Return the size of the transform: of an open one without a branch, each of which would fix it to some sizes."""
    if is_open(size):
        return size + 2 * padding
    return smooth(int(size) + 2 * padding)  # torch.jit.trace gives tensors for sizes


def _gain(x: Tensor, cutoff: float | Tensor, mask: Mask, size: tuple[int, int]) -> Tensor:
    """Return the mask on the half spectrum, (H, W // 2 + 1) or one for each channel or each map."""
    rows = torch.arange(size[0], dtype=x.dtype, device=x.device)[:, None]
    fy = 2 * torch.minimum(rows, size[0] - rows) / size[0]
    fx = 2 * torch.arange(size[1] // 2 + 1, dtype=x.dtype, device=x.device) / size[1]
    if isinstance(cutoff, Tensor):
        cutoff = cutoff.to(x.dtype)[..., None, None]
    if mask == "gaussian":  # a product of two: exponentials along the sides alone
        return torch.exp(-0.5 * (fy / cutoff) ** 2) * torch.exp(-0.5 * (fx / cutoff) ** 2)
    squared = (fy / cutoff) ** 2 + (fx / cutoff) ** 2
    return 1 / (1 + squared**2) if mask == "butterworth" else (squared <= 1).to(x.dtype)


def padding_of(cutoff: float) -> int:
    """Five deviations of a Gaussian of that cutoff, in pixels: beyond, nothing of it is left to float32."""
    return min(max(math.ceil(5 * gaussian_sigma(cutoff)), LEAST_PADDING), MOST_PADDING)


def _check(x: Tensor, cutoff: float | Tensor, mask: str, padding: int | None) -> None:
    check_map(x)
    if mask not in get_args(Mask):
        raise ValueError(f"mask must be one of {', '.join(get_args(Mask))}, got {mask!r}")
    if padding is not None and (type(padding) is not int or padding < 0):
        raise ValueError(f"padding must be an integer of at least 0, got {padding!r}")
    if not isinstance(cutoff, Tensor):
        if not isinstance(cutoff, Real):
            raise TypeError(f"cutoff must be a number or a tensor, got {cutoff!r}")
        if not 0 < cutoff <= HIGHEST_CUTOFF:
            raise ValueError(f"cutoff must be above 0 and at most {HIGHEST_CUTOFF}, got {cutoff}")
        return
    check_tensors({"x": x, "cutoff": cutoff}, "x")
    batch, channels = x.shape[:2]
    from_the_end = zip(reversed(cutoff.shape), (channels, batch), strict=False)
    if cutoff.ndim > 2 or not all(got == wanted for got, wanted in from_the_end):
        rule = f"(), (C,) = ({channels},) or (B, C) = ({batch}, {channels})"
        raise ValueError(f"cutoff must be a number or {rule}, got shape {tuple(cutoff.shape)}")
    if mask == "ideal" and cutoff.requires_grad:
        raise ValueError("cutoff of an ideal mask must not require a gradient: a step has none to give")
