"""How vmap folds its calls into the heads: of each operand, and of the layout."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .operands import Layout


def parts_of(operands: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return how many parts the last axis of each operand has, each with all heads."""
    return (3 if operands[1] is None else 1), 2, 1, 1, 2


def folded(size: int, dims: Sequence[int | None], operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Fold the calls of all operands."""
    each = zip(operands, dims, parts_of(operands), strict=False)
    return [None if x is None else fold_heads(x, dim, parts, size) for x, dim, parts in each]


def fold_heads(x: Tensor, dim: int | None, parts: int, size: int) -> Tensor:
    """Fold `size` calls along `dim` into the heads of each part of the last axis."""
    calls = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return calls.unflatten(-1, (parts, -1)).movedim(0, -2).flatten(-3)


def unfold_heads(x: Tensor, parts: int, size: int) -> Tensor:
    """Undo `fold_heads`; the calls come first."""
    return x.unflatten(-1, (parts, size, -1)).movedim(-2, 0).flatten(-2)


def with_heads_of_all(size: int, layout: Sequence[Any]) -> Layout:
    """Count the heads of all calls."""
    one = Layout(*layout)
    return one._replace(num_heads=size * one.num_heads)
