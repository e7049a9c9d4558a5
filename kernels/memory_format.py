"""Channels-last or contiguous: which of the two a map is in, and how a result is brought into that of its input."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of each pixel lie side by side. A map that is both (one channel, one pixel) counts as such.

    >>> is_channels_last(torch.zeros(1, 8, 5, 7)), is_channels_last(torch.zeros(1, 1, 5, 7))
    (False, True)
    """
    return x.permute(0, 2, 3, 1).is_contiguous()  # vmap cannot be asked for a memory format


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format in which a result of `x` is made: channels-last where `x` is that alone, else contiguous.

    >>> memory_format_of(torch.zeros(1, 8, 5, 7))
    torch.contiguous_format
    """
    return torch.channels_last if is_channels_last(x) and not x.is_contiguous() else torch.contiguous_format


def channels_last(x: Tensor) -> Tensor:
    """Lay the channels of each pixel side by side; free where they are.

    >>> channels_last(torch.zeros(1, 8, 5, 7)).stride()
    (280, 1, 56, 8)
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # vmap makes no memory format either


def in_format_of(y: Tensor, x: Tensor) -> Tensor:
    """Bring a map `y` into the memory format of `x`; free where it is in it already.

    >>> in_format_of(torch.zeros(1, 8, 5, 7), torch.zeros(1, 5, 7, 8).permute(0, 3, 1, 2)).stride()
    (280, 1, 56, 8)
    """
    return channels_last(y) if memory_format_of(x) is torch.channels_last else y.contiguous()
