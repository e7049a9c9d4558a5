"""JPEG as libjpeg computes it, on tensors: a quality per sample, and gradients that pass through the rounding."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks.checks import check_choice

SUBSAMPLINGS = ("4:2:0", "4:4:4")

# Tables K.1 and K.2 of the standard.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99, 99, 99, 99, 99, 99, 99, 99),) * 4,
)

# Left halves of the rows of the cosine transform, times 2^13; the right ones mirror them with the sign of the row. As
# libjpeg adds rounded factors up, entries that are equal in theory differ in the last place.
COSINES = (
    (8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260),
    (10703, 4433, -4433, -10703),
    (9633, -2259, -11362, -6436),
    (8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633),
    (4433, -10704, 10704, -4433),
    (2260, -6436, 9633, -11363),
)

# Parts of 65,536: from RGB to Y, Cb, Cr with what is added before the floor, and back.
TO_YCC = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329))
TO_YCC_ROUNDING = (32768, (128 << 16) + 32767, (128 << 16) + 32767)
RED_OF_CR, GREEN_OF_CB, GREEN_OF_CR, BLUE_OF_CB = 91881, -22554, -46802, 116130


def jpeg(
    image: Tensor, quality: float | Sequence[float] | Tensor, *, subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0"
) -> Tensor:
    """Compress images as JPEG and decode them, as libjpeg-turbo does in its default settings, bit for bit.

    (On Apple's GPUs, which have no float64, nearly so.) Integer transforms, the standard's tables, chroma averaged when
    it is halved and interpolated when it is doubled. RGB is compressed as luma and chroma; one channel, and each of any
    other number of channels, as luma alone. The image is first clamped to [0, 1] and rounded to 8 bits. In the backward
    pass every rounding counts as the identity.

    Shape: ``(B, C, H, W)`` -> the same, of the same dtype and device; ``quality`` is one number, or ``(B,)``.

    Args:
        image: floating-point images in [0, 1].
        quality: from 1 to 100; between whole numbers it is that of the tables, which libjpeg has for whole ones only.
        subsampling: of chroma: "4:2:0" halves both sides, "4:4:4" none.

    Returns:
        The images as they would be decoded.

    Raises:
        TypeError: if ``image`` is not floating point.
        ValueError: if ``image`` is not ``(B, C, H, W)`` with H, W >= 1, a quality is out of range, there are not as
            many as images, or ``subsampling`` is unknown.

    Source: ITU-T T.81; the integer arithmetic is that of libjpeg 6b.

    >>> jpeg(torch.full((1, 3, 5, 9), 0.5), 30).mul(255).unique()
    tensor([128.])
    """
    check_image(image)
    check_choice("subsampling", subsampling, SUBSAMPLINGS)
    scale = _table_scale(quality, image)
    # The sums of the transforms are integers beyond 2^24; Apple's GPUs have no float64.
    dtype = torch.float32 if image.device.type == "mps" else torch.float64
    x = _floored((255 * image.clamp(0, 1).to(dtype)).add_(0.5))
    with torch.autocast(image.device.type, enabled=False):
        if image.shape[1] != 3:
            planes = x.flatten(0, 1)[:, None]
            decoded = _compressed(planes, _table(LUMA, scale, dtype).repeat_interleave(image.shape[1], 0))
            return (decoded.view_as(x) / 255).to(image.dtype)
        y, chroma = _to_ycc(x)
        y = _compressed(y, _table(LUMA, scale, dtype))
        table = _table(CHROMA, scale, dtype)
        if subsampling == "4:2:0":
            chroma = _doubled(_compressed(_halved(chroma), table), image.shape[2:])
        else:
            chroma = _compressed(chroma, table)
        return (_to_rgb(y, chroma) / 255).to(image.dtype)


def check_image(image: Tensor) -> None:
    """Raise unless these are floating-point images (B, C, H, W) with none of the sides empty."""
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1], got {image.dtype}")
    if image.ndim != 4 or 0 in image.shape[1:]:
        raise ValueError(f"image must be (B, C, H, W) with C, H, W >= 1, got shape {tuple(image.shape)}")


class _Through(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


def straight_floor(x: Tensor) -> Tensor:
    """Round down, with the gradient of the identity.

    >>> straight_floor(torch.tensor([1.7, -0.2]))
    tensor([ 1., -1.])
    """
    return straight(x, x.detach().floor())


def straight(x: Tensor, value: Tensor) -> Tensor:
    """Give what was made of `x`, with the gradient as if nothing had been done.

    >>> x = torch.tensor(1.7, requires_grad=True)
    >>> torch.autograd.grad(straight(x, x.detach().round()), x)[0]
    tensor(1.)
    """
    return _Through.apply(x, value) if x.requires_grad else value  # pyright: ignore[reportReturnType]


def _floored(x: Tensor) -> Tensor:
    """The same of a tensor that nobody else looks at: in place where no gradient is wanted, as memory is the cost."""
    return straight_floor(x) if x.requires_grad else x.floor_()


def _table_scale(quality: float | Sequence[float] | Tensor, image: Tensor) -> Tensor:
    given = torch.as_tensor(quality, dtype=torch.float64, device="cpu")
    if given.ndim > 1 or (given.ndim == 1 and len(given) != len(image)):
        raise ValueError(f"quality must be one number or {len(image)}, one for each image, got {tuple(given.shape)}")
    if not ((given >= 1) & (given <= 100)).all():
        raise ValueError(f"quality must be from 1 to 100, got {given.tolist()}")
    scale = torch.where(given < 50, 5000 / given, 200 - 2 * given).floor()
    return scale.expand(len(image)).to(image.device, torch.float32)


def _table(base: Sequence[Sequence[int]], scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the quantisation tables (B, 8, 8)."""
    steps = torch.tensor(base, device=scale.device) * scale[:, None, None]
    return ((steps + 50) / 100).floor().clamp(1, 255).to(dtype)


def _to_ycc(x: Tensor) -> tuple[Tensor, Tensor]:
    weights, rounding = x.new_tensor(TO_YCC), x.new_tensor(TO_YCC_ROUNDING)
    sums = torch.einsum("ij,bjhw->bihw", weights, x)
    ycc = _floored(sums.add_(rounding[:, None, None]).mul_(1 / 65536))
    return ycc[:, :1], ycc[:, 1:]


def _to_rgb(y: Tensor, chroma: Tensor) -> Tensor:
    cb, cr = (chroma - 128).split(1, dim=1)
    sums = torch.cat([RED_OF_CR * cr, GREEN_OF_CB * cb + GREEN_OF_CR * cr, BLUE_OF_CB * cb], 1)
    return _floored(sums.add_(32768).mul_(1 / 65536)).add(y).clamp(0, 255)


def _halved(x: Tensor) -> Tensor:
    """Average 2 x 2 pixels; halves are rounded down in even columns, and up in odd ones."""
    x = F.pad(x, (0, -x.shape[3] % 16, 0, x.shape[2] % 2), mode="replicate")
    x = x[:, :, ::2] + x[:, :, 1::2]
    sums = x[..., ::2] + x[..., 1::2]
    bias = 1 + torch.arange(sums.shape[3], device=x.device) % 2
    return _floored(sums.add_(bias).mul_(1 / 4))


def _doubled(x: Tensor, size: Sequence[int]) -> Tensor:
    """Enlarge to twice the size and crop: three quarters of the nearest sample and one of the next, on each axis."""
    height, width = (side + 1 for side in size)
    x = x[..., : height // 2, : width // 2]
    if x.shape[3] <= 2:  # too narrow: libjpeg repeats the samples
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : size[0], : size[1]]
    x = _interleaved(x, dim=2)
    x = _interleaved(x, dim=3)
    rounding = torch.tensor([8, 7], device=x.device).repeat(x.shape[3] // 2)
    return _floored((x + rounding).mul_(1 / 16))[..., : size[0], : size[1]]


def _interleaved(x: Tensor, dim: int) -> Tensor:
    """Twice as many samples along an axis, times 4."""
    size = x.shape[dim]
    before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)], dim)
    return torch.stack([3 * x + before, 3 * x + after], dim + 1).flatten(dim, dim + 1)


def _compressed(planes: Tensor, table: Tensor) -> Tensor:
    """Transform blocks of 8 x 8, quantise, and transform back: planes (B, C, H, W), whole numbers from 0 to 255."""
    height, width = planes.shape[2:]
    x = F.pad(planes - 128, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (B, C, rows, columns, 8, 8)
    half = x.new_tensor(COSINES)
    cosines = torch.cat([half, half.flip(1) * x.new_tensor([1, -1] * 4)[:, None]], 1)
    # Eight times the coefficients, halves of a step away from zero.
    coefficients = _passed(_passed(blocks, cosines.T, 11).mT, cosines.T, 15).mT
    steps = table[:, None, None, None]
    shares = coefficients.div_(8 * steps)
    levels = straight(shares, shares.detach().sign().mul_(0.5).add_(shares.detach()).trunc_())
    decoded = _passed(_passed((levels * steps).mT, cosines, 11).mT, cosines, 18)
    joined = decoded.add_(128).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return joined[..., :height, :width].clamp(0, 255)


def _passed(x: Tensor, matrix: Tensor, bits: int) -> Tensor:
    """One pass of a transform along the last axis, its sums rounded to whole multiples of 2^bits."""
    return _floored((x @ matrix).add_(1 << (bits - 1)).mul_(1 / (1 << bits)))
