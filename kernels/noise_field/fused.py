"""The noise field in Triton, whose own Philox mixes the words: a lane mixes one place, and stores its four columns."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES = 256
"""Places of a program: two for each of its lanes."""


@triton.jit
def _uniform(word):
    """Return the number of the upper 24 bits."""
    return (word >> 8).to(tl.int32)


@triton.jit
def _pair(length, turn, dtype: tl.constexpr):
    """Transform two words to two normal numbers."""
    u = (_uniform(length) + 1).to(dtype) * 5.9604644775390625e-08
    # Near 1 a GPU's logarithm has few digits that hold; a series has them.
    v = 1.0 - u
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * (0.25 + v * 0.2))))
    radius = tl.sqrt(2.0 * tl.where(v < 0.001, series, -tl.log(u)))
    angle = _uniform(turn).to(dtype) * 5.9604644775390625e-08 * 6.283185307179586
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _noise_kernel(
    noise, samples, seed, layer, top, group, skipped, places, height, width, groups,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Write normal noise (B, H, W); or with WORDS the words themselves, (B * H * groups, 4)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < places
    line = place // groups
    column = place % groups
    sample = tl.load(samples + line // height, mask=there, other=0).to(tl.int32)
    a, b, c, d = tl.philox(seed, column + group, line % height + top, sample, tl.full([BLOCK], layer, tl.int32))
    k = tl.arange(0, 4)[None, :]
    if WORDS:
        rows = tl.join(tl.join(a, c), tl.join(b, d)).to(tl.int32, bitcast=True).reshape(BLOCK, 4)
        tl.store(noise + place.to(tl.int64)[:, None] * 4 + k, rows, mask=there[:, None])
    else:
        first, second = _pair(a, b, dtype)
        third, fourth = _pair(c, d, dtype)
        rows = tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(BLOCK, 4)
        x = (column * 4 - skipped)[:, None] + k
        inside = there[:, None] & (x >= 0) & (x < width)
        tl.store(noise + line.to(tl.int64)[:, None] * width + x, rows.to(noise.dtype.element_ty), mask=inside)


def noise_field(
    samples: Tensor, seed: int, layer: int, size: Sequence[int], offset: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Make the noise; see `noise_field_reference`."""
    noise = torch.empty(len(samples), 1, *size, dtype=dtype, device=samples.device)
    _launch(noise, samples, seed, layer, size, offset, words=False)
    return noise


def words(samples: Tensor, seed: int, layer: int, size: Sequence[int], offset: Sequence[int]) -> Tensor:
    """Return the four words of each group of columns that the map meets: (4, B, H, groups)."""
    groups = _groups(size[1], offset[1])
    out = torch.empty(len(samples), size[0], groups, 4, dtype=torch.int32, device=samples.device)
    _launch(out, samples, seed, layer, size, offset, words=True)
    return out.permute(3, 0, 1, 2).to(torch.int64) & 0xFFFFFFFF


def _groups(width: int, left: int) -> int:
    return (left + width - 1) // 4 - left // 4 + 1


def _launch(
    out: Tensor, samples: Tensor, seed: int, layer: int, size: Sequence[int], offset: Sequence[int], words: bool
) -> None:
    groups = _groups(size[1], offset[1])
    places = len(samples) * size[0] * groups
    with torch.cuda.device_of(out):
        _noise_kernel[(triton.cdiv(places, PLACES),)](
            *(out, samples.contiguous(), seed, _int32(layer), _int32(offset[0]), _int32(offset[1] // 4)),
            *(offset[1] % 4, places, *size, groups),
            BLOCK=PLACES, WORDS=words, dtype=tl.float64 if out.dtype == torch.float64 else tl.float32, num_warps=4,
        )  # fmt: skip


def _int32(word: int) -> int:
    """Read a word modulo 2^32 as a signed one, so that Triton takes it for 32 bits."""
    return (word + 2**31) % 2**32 - 2**31
