"""The noise field in plain torch: each place is mixed once for its four columns, in memory that is used again.

A product of two words is taken modulo 2^64, which leaves all its bits: its upper word is what an arithmetic shift
brings down, masked. Rows are taken a few at a time, so that all of it stays in the second cache.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .operands import MULTIPLIERS, ROUNDS, UNIT, WEYL, WORD

PLACES = 2**13
"""About so many places are mixed at a time: 64 KiB for each of their words."""


def noise_field(
    samples: Tensor, seed: int, layer: int, size: Sequence[int], offset: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Make the noise; see `noise_field_reference`."""
    height, width = size
    first, groups = _groups(width, offset[1])
    noise = torch.empty(len(samples) * height, 4 * groups, dtype=dtype, device=samples.device)
    rows = max(1, PLACES // groups)
    wide = torch.promote_types(dtype, torch.float32)
    for start in range(0, len(noise), rows):
        part = noise[start : start + rows]
        lines = torch.arange(start, start + len(part), device=samples.device)
        words = _mixed(lines, samples, seed, layer, size, (offset[0], first), groups)
        for pair in (0, 1):
            length, turn = (word.bitwise_right_shift_(8).to(wide) for word in words[2 * pair : 2 * pair + 2])
            radius = length.add_(1).mul_(UNIT).log_().mul_(-2).sqrt_()
            angle = turn.mul_(UNIT).mul_(2 * math.pi)
            part[:, 2 * pair :: 4], part[:, 2 * pair + 1 :: 4] = radius * angle.cos(), angle.sin_().mul_(radius)
    skipped = offset[1] % 4
    return noise[:, skipped : skipped + width].reshape(len(samples), 1, height, width).contiguous()


def words(samples: Tensor, seed: int, layer: int, size: Sequence[int], offset: Sequence[int]) -> Tensor:
    """Return the four words of each group of columns that the map meets: (4, B, H, groups)."""
    first, groups = _groups(size[1], offset[1])
    lines = torch.arange(len(samples) * size[0], device=samples.device)
    mixed = _mixed(lines, samples, seed, layer, size, (offset[0], first), groups)
    return torch.stack(mixed).view(4, len(samples), size[0], groups)


def _groups(width: int, left: int) -> tuple[int, int]:
    """Number the first group of four columns, and count the groups."""
    return left // 4, (left + width - 1) // 4 - left // 4 + 1


def _mixed(
    lines: Tensor, samples: Tensor, seed: int, layer: int, size: Sequence[int], first: Sequence[int], groups: int
) -> list[Tensor]:
    shape = len(lines), groups
    a = torch.arange(first[1], first[1] + groups, device=lines.device).bitwise_and(WORD).expand(shape).contiguous()
    b = (lines % size[0] + first[0]).bitwise_and_(WORD)[:, None].expand(shape).contiguous()
    c = (samples[lines // size[0]] & WORD)[:, None].expand(shape).contiguous()
    d = torch.full_like(c, layer)
    keys = seed & WORD, seed >> 32
    for r in range(ROUNDS):
        key_a, key_c = (key + r * weyl & WORD for key, weyl in zip(keys, WEYL, strict=True))
        a.mul_(MULTIPLIERS[0])
        c.mul_(MULTIPLIERS[1])
        # The words of a product take the places of those two that it is mixed with: none is copied.
        b ^= (c >> 32).bitwise_and_(WORD) ^ key_a
        d ^= (a >> 32).bitwise_and_(WORD) ^ key_c
        a, b, c, d = b, c.bitwise_and_(WORD), d, a.bitwise_and_(WORD)
    return [a, b, c, d]
