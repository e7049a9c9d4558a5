"""What every form of the scan takes and gives: its operands, their rules, and the checkpoints of the state."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..operand_rules import check_tensors, compute_dtype

CHECKPOINT_STEPS = 32
"""The state is kept once in so many steps; backward recomputes the rest from there."""

LARGEST_STATE = 256
"""The largest N: a Triton program keeps that many numbers of a channel in registers, and other forms follow it."""


class Operands(NamedTuple):
    """The tensors of one scan, and in the same places their gradients.

    `B` and `C` are (D, N) where constant, else (B, G, N, L). The forms of this folder exchange freely, since each

    - takes `Operands` and the two flags forward, and returns `y` (B, D, L), the last state (B, D, N) and the
      checkpoints (B, K, D, N): the state before steps 0, 32, 64, ... in the order of the scan, and the last;
    - takes the same, the checkpoints and the gradients of `y` and of the last state backward, and returns `Operands`.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state and of all arithmetic."""
        return compute_dtype(self.u)

    @property
    def groups(self) -> int:
        """How many groups of channels have a B or C of their own."""
        return next((x.shape[1] for x in (self.B, self.C) if x.ndim == 4), 1)

    def outputs(self, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate what forward returns: y, the last state and the checkpoints."""
        batch, channels, length = self.u.shape
        state = self.A.shape[1]
        checkpoints = (length + CHECKPOINT_STEPS - 1) // CHECKPOINT_STEPS + 1
        return (
            torch.empty_like(self.u, dtype=out_dtype),
            self.u.new_empty(batch, channels, state, dtype=self.dtype),
            self.u.new_empty(batch, checkpoints, channels, state, dtype=self.dtype),
        )


def check_operands(x: Operands, out_dtype: torch.dtype | None) -> None:
    """Raise unless the operands fit together; `B` and `C` may have any of their three shapes."""
    required = ("u", "delta", "A", "B", "C")
    check_tensors({name: value for name, value in x._asdict().items() if value is not None or name in required}, "u")
    named = {name: value for name, value in x._asdict().items() if value is not None}
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(f"out_dtype must be a floating-point dtype, got {out_dtype!r}")
    if x.u.ndim != 3:
        raise ValueError(f"u must be (B, D, L), got shape {tuple(x.u.shape)}")
    batch, channels, length = x.u.shape
    if x.A.ndim != 2 or x.A.shape[0] != channels or not 1 <= x.A.shape[1] <= LARGEST_STATE:
        rule = f"(D, N) with D = {channels} and N from 1 to {LARGEST_STATE}"
        raise ValueError(f"A must be {rule}, got shape {tuple(x.A.shape)}")
    state = x.A.shape[1]
    shapes = {
        "delta": ("(B, D, L)", (batch, channels, length)),
        "D": ("(D,)", (channels,)),
        "z": ("(B, D, L)", (batch, channels, length)),
        "delta_bias": ("(D,)", (channels,)),
        "initial_state": ("(B, D, N)", (batch, channels, state)),
    }
    for name, (rule, shape) in shapes.items():
        if name in named and named[name].shape != shape:
            raise ValueError(f"{name} must be {rule} = {shape}, got shape {tuple(named[name].shape)}")
    for name in ("B", "C"):
        _check_projection(name, named[name], batch, channels, state, length)
    if x.B.ndim > 2 and x.C.ndim > 2 and _groups(x.B) != _groups(x.C):
        raise ValueError(f"B and C must have the same number of groups, got {_groups(x.B)} and {_groups(x.C)}")


def _check_projection(name: str, x: Tensor, batch: int, channels: int, state: int, length: int) -> None:
    expected = {
        2: (channels, state),
        3: (batch, state, length),
        4: (batch, x.shape[1] if x.ndim == 4 else 1, state, length),
    }
    if x.ndim not in expected or x.shape != expected[x.ndim]:
        sizes = f"B = {batch}, D = {channels}, N = {state}, L = {length}"
        raise ValueError(f"{name} must be (D, N), (B, N, L) or (B, G, N, L) with {sizes}, got shape {tuple(x.shape)}")
    if x.ndim == 4 and (x.shape[1] == 0 or channels % x.shape[1]):
        raise ValueError(f"D must be divisible by the groups of {name}, got D = {channels} and G = {x.shape[1]}")


def _groups(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 4 else 1
