"""How the Triton form lays tensors out: numbers of one step side by side, steps reached along a path."""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """A tensor over time as the kernels read it; how far apart its rows are, all tensors of its kind agree upon."""

    pointer: Tensor
    batch: int = 0
    """How far batches are apart."""
    group: int = 0
    """How far groups are apart; 0 where they share."""


class Path(NamedTuple):
    """What the directions of a scan go through: rows in a line, an image of them, or an order of each batch's own."""

    length: int
    height: int | None = None
    width: int | None = None
    order: Tensor | None = None  # (B, L)


class Scan(NamedTuple):
    """The operands of one scan, in the order in which the kernels take them; channels go group by group."""

    u: Rows
    delta: Rows
    A: Tensor
    B: Rows
    C: Rows
    D: Tensor | None
    z: Rows | None
    delta_bias: Tensor | None


def time_first(x: Tensor) -> Tensor:
    """(B, D, L) -> (B, L, D), contiguous; free where the channels already lie side by side."""
    return x.transpose(1, 2).contiguous()


def rows_of(x: Tensor, groups: int) -> Rows:
    """Read (B, L, D), contiguous."""
    return Rows(x, x.shape[1] * x.shape[2], x.shape[2] // groups)


def time_last(x: Tensor, target: Tensor) -> Tensor:
    """(B, L, D) -> (B, D, L) with the strides of `target`, whose memory is used if it must be."""
    x = x.transpose(1, 2)
    return x if x.stride() == target.stride() else target.copy_(x)
