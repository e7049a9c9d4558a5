"""The definition of the noise field: Philox4x32-10 of a place, and Box and Muller's transform of its words."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .operands import MULTIPLIERS, ROUNDS, UNIT, WEYL, WORD

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Mix four words of 32 bits, held in int64, by ten rounds."""
    a, b, c, d = counter
    for r in range(ROUNDS):
        (high_a, low_a), (high_c, low_c) = _product(MULTIPLIERS[0], a), _product(MULTIPLIERS[1], c)
        a, b = high_c ^ b ^ (key[0] + r * WEYL[0] & WORD), low_c
        c, d = high_a ^ d ^ (key[1] + r * WEYL[1] & WORD), low_a
    return a, b, c, d


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower word of a product, by halves: no sum leaves int64."""
    low, high = multiplier * (word & 0xFFFF), multiplier * (word >> 16)
    carried = (low >> 16) + high
    return carried >> 16, (carried & 0xFFFF) << 16 | (low & 0xFFFF)


def words_reference(samples: Tensor, seed: int, layer: int, size: Sequence[int], offset: Sequence[int]) -> Tensor:
    """Return the four words of each pixel's place, which it shares with its neighbours in a group of four columns."""
    rows, columns = (torch.arange(n, device=samples.device) + first for n, first in zip(size, offset, strict=True))
    group = torch.div(columns, 4, rounding_mode="floor")
    place = group, rows[:, None], samples[:, None, None], torch.full_like(group, layer)
    a, b, c, d = torch.broadcast_tensors(*(axis & WORD for axis in place))
    return torch.stack(philox((a, b, c, d), (seed & WORD, seed >> 32)))


def noise_field_reference(
    samples: Tensor, seed: int, layer: int, size: Sequence[int], offset: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Compute `noise_field` by its formula; see there for the contract."""
    words = words_reference(samples, seed, layer, size, offset) >> 8
    column = (torch.arange(size[1], device=samples.device) + offset[1]) % 4
    wide = torch.promote_types(dtype, torch.float32)
    length, turn = (torch.where(column < 2, words[i], words[2 + i]).to(wide) for i in (0, 1))
    radius, angle = torch.sqrt(-2 * torch.log((length + 1) * UNIT)), 2 * math.pi * (turn * UNIT)
    noise = radius * torch.where(column % 2 == 0, torch.cos(angle), torch.sin(angle))
    return noise.to(dtype)[:, None]
