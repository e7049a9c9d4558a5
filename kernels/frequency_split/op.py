"""The blur and the Haar transform as operators: their contracts, and what torch needs to know of them."""

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import Backend, Kernel
from .operands import check_bands, check_map, deviations
from .reference import blur_split_reference, haar_merge_reference, haar_split_reference

BLUR, HAAR = Kernel("blur_split"), Kernel("haar_split")

Bands = tuple[Tensor, Tensor, Tensor, Tensor]


def blur_split(x: Tensor, sigma: float | Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    check_map(x)
    return blur_split_reference(x, deviations(sigma, x.shape[1]))


def haar_split(x: Tensor, *, backend: Backend = "auto") -> tuple[Bands, tuple[int, int]]:
    check_map(x)
    return haar_split_reference(x), (x.shape[2], x.shape[3])


def haar_merge(bands: Sequence[Tensor], size: Sequence[int], *, backend: Backend = "auto") -> Tensor:
    check_bands(bands, size)
    return haar_merge_reference(bands, size)
