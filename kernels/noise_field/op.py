"""The noise field as one operator: its contract, its checks, and what torch needs to know of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, Kernel
from ..operand_rules import fold, unfold
from ..registration import operator
from .operands import check_map, check_place, numbers_of, plain
from .reference import noise_field_reference

KERNEL = Kernel("noise_field")


def noise_field(
    seed: int,
    size: Sequence[int],
    *,
    samples: Sequence[int] | Tensor,
    layer: int = 0,
    offset: Sequence[int] = (0, 0),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    r"""Make normal noise of which each number depends on its place alone.

    Philox, a cipher, mixes the place of four neighbouring columns to four words, and each two of them become two
    normal numbers:

    .. math::
        (w_0, w_1, w_2, w_3) &= \mathrm{Philox4x32}_{10}
            \big((\lfloor x / 4 \rfloor, y, \mathrm{sample}, \mathrm{layer}), \; \mathrm{seed}\big), \\
        n &= \sqrt{-2 \ln u_0} \, \cos 2 \pi u_1 \quad \text{or} \quad \sqrt{-2 \ln u_0} \, \sin 2 \pi u_1,

    with u of the upper 24 bits of a word: :math:`w_0, w_1` for x modulo 4 of 0 and 1, :math:`w_2, w_3` for 2 and 3. So
    the noise of a crop is the crop of the noise, a tile knows that of the whole, and a sample that of any batch. Words
    are the same bits in every form and on every device; the numbers made of them agree to rounding, and repeat bit for
    bit on one device. No generator of torch is read or moved. No number is above 5.8.

    Shape:
        - size: ``(H, W)``
        - samples: B numbers, or ``(B,)``
        - returns: ``(B, 1, H, W)``

    Args:
        seed: from 0 to 2^63 - 1.
        size: height and width, 0 allowed.
        samples: which sample each map is of, from 0 to 2^32 - 1; a tensor is not read, and counts modulo 2^32.
        layer: which of a net's noises this is, from 0 to 2^32 - 1.
        offset: row and column of the first pixel in the whole; below 0 where a tile reaches beyond.
        device: where the noise is made; None for where samples lie, or the default.
        dtype: of the noise; float64 is computed in float64, all else in float32.
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA devices.

    Raises:
        TypeError: if dtype is not floating-point, or samples no sequence.
        ValueError: if a number is out of range, or no backend has that name.
        RuntimeError: if the named backend cannot run here.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 3.3; Box and Muller, A Note
        on the Generation of Random Normal Deviates (Annals of Mathematical Statistics 29, 1958).

    >>> whole = noise_field(7, (31, 50), samples=[0, 1])
    >>> crop = noise_field(7, (9, 10), samples=[1], offset=(20, 33))
    >>> whole.shape, torch.equal(crop, whole[1:, :, 20:29, 33:43])
    (torch.Size([2, 1, 31, 50]), True)
    """
    check_place(seed, layer, offset)
    check_map(size, dtype)
    seed, layer, size, offset = plain(seed), plain(layer), list(map(plain, size)), list(map(plain, offset))
    numbers = numbers_of(samples, device)
    form = KERNEL.choose(backend, numbers)
    if form == "reference":
        return noise_field_reference(numbers, seed, layer, size, offset, dtype)
    return _noise(numbers, seed, layer, size, offset, dtype, form)


def noise_field_flops(batch: int, height: int, width: int) -> int:
    """Count the floating-point operations: 10 for each two numbers; what mixes words is integer work, and no such."""
    return 5 * batch * height * width


def noise_field_bytes(batch: int, height: int, width: int, *, itemsize: int = 4) -> int:
    """Count the bytes that no noise can avoid to move: each number once."""
    return itemsize * batch * height * width


@operator("noise_field")
def _noise(
    samples: Tensor, seed: int, layer: int, size: Sequence[int], offset: Sequence[int], dtype: torch.dtype, form: str
) -> Tensor:
    if samples.numel() == 0 or 0 in size:
        return samples.new_empty(samples.shape[0], 1, *size, dtype=dtype)
    return KERNEL.form(form).noise_field(samples, seed, layer, size, offset, dtype)


@_noise.register_fake
def _(
    samples: Tensor, seed: int, layer: int, size: Sequence[int], offset: Sequence[int], dtype: torch.dtype, form: str
) -> Tensor:
    return samples.new_empty(samples.shape[0], 1, *size, dtype=dtype)


@_noise.register_vmap
def _(info: Any, dims: tuple[int | None, ...], samples: Tensor, *place: Any) -> tuple[Tensor, int]:
    return unfold(_noise(fold(samples, dims[0], 0, info.batch_size), *place), 0, info.batch_size), 0


_noise.register_autocast()
