"""What every form of the noise field takes: the numbers of a place, the constants of Philox, the rules."""

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
"""A word has 32 bits; coordinates and numbers of samples count modulo 2^32."""

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

UNIT = 2.0**-24
"""The upper 24 bits of a word become a number: so many a float32 holds, and every device makes the same of them."""


def numbers_of(samples: Sequence[int] | Tensor, device: torch.device | str | None) -> Tensor:
    """Bring the numbers of samples to the device as int64; raise unless they are numbers."""
    if isinstance(samples, Tensor):
        if samples.ndim != 1 or samples.dtype not in (torch.int64, torch.int32):
            got = f"shape {tuple(samples.shape)} of {samples.dtype}"
            raise ValueError(f"samples must be a sequence of numbers or a tensor (B,) of int64, got {got}")
        return samples.to(samples.device if device is None else device, torch.int64)
    if not isinstance(samples, Iterable):
        raise TypeError(f"samples must be a sequence of numbers or a tensor (B,) of int64, got {samples!r}")
    numbers = list(samples)
    for sample in numbers:
        _check_word("samples", sample)
    return torch.tensor([plain(sample) for sample in numbers], dtype=torch.int64, device=device)


def check_place(seed: int, layer: int, offset: Sequence[int]) -> None:
    """Raise unless these name a noise and a place in it."""
    if not _is_number(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
    _check_word("layer", layer)
    if not _is_pair(offset) or not all(-(2**62) <= place < 2**62 for place in offset):
        raise ValueError(f"offset must be a row and a column, below 2^62, got {offset!r}")


def check_map(size: Sequence[int], dtype: torch.dtype) -> None:
    """Raise unless a map of such a size and dtype can be made."""
    if not _is_pair(size) or any(side < 0 for side in size):
        raise ValueError(f"size must be a height and a width of at least 0, got {size!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating-point, got {dtype!r}")


def plain(value: int) -> int:
    """Make a number of numpy one of Python; one that torch leaves open stays so."""
    return value if isinstance(value, torch.SymInt) else int(value)


def _check_word(name: str, value: int) -> None:
    if not _is_number(value) or not 0 <= value <= WORD:
        raise ValueError(f"{name} must be integers from 0 to 2^32 - 1, got {value!r}")


def _is_pair(values: object) -> bool:
    return isinstance(values, Sequence) and len(values) == 2 and all(map(_is_number, values))


def _is_number(value: object) -> bool:
    return isinstance(value, Integral | torch.SymInt) and not isinstance(value, bool)
