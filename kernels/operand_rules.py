"""What holds of every op's operands, whatever computes it: what they may be, and what torch's modes make of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what is computed from `x`: float64 where that is float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def check_tensors(named: Mapping[str, Tensor | None], first: str) -> None:
    """Raise unless all are real, floating-point and on the device of the `first`."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {value!r}")
        if value.is_complex():
            raise TypeError(f"{name} must be real, got {value.dtype}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {value.dtype}")
        check_device(name, value, first, cast(Tensor, named[first]))


def check_device(name: str, value: Tensor, first: str, other: Tensor) -> None:
    """Raise unless two tensors share a device."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {first}, {other.device}, got {value.device}")


def those_wanted(operands: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    """The operands whose gradients are asked for."""
    return [v for v, needed in zip(operands, wanted, strict=True) if needed and v is not None]


def narrow(
    operands: Mapping[str, Tensor | None], varying: Sequence[str], dtype: torch.dtype, constant_axes: int = 2
) -> list[Tensor | None]:
    """Cast what varies over time or pixels, unless it is float64; what has so few axes is constant."""
    return [
        x if x is None or name not in varying or x.ndim <= constant_axes or x.dtype == torch.float64 else x.to(dtype)
        for name, x in operands.items()
    ]


def under_autocast(
    operands: Mapping[str, Tensor | None], varying: Sequence[str], device: torch.device, constant_axes: int = 2
) -> dict[str, Any]:
    """Do for a form that is no operator what `Operator.register_autocast` does for operators."""
    if not torch.is_autocast_enabled(device.type):
        return dict(operands)
    dtype = torch.get_autocast_dtype(device.type)
    return dict(zip(operands, narrow(operands, varying, dtype, constant_axes), strict=True))


def refuse_second_derivative(name: str) -> Callable[..., NoReturn]:
    """Make the autograd rule of a backward op that has no gradient of its own."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(f'{name} can be differentiated twice only with backend="reference"')

    return refuse


def fold(x: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """Fold what vmap maps over, `size` calls along `dim`, into an axis of each call's operand."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, axis).flatten(axis, axis + 1)


def unfold(x: Tensor, axis: int, size: int) -> Tensor:
    """Undo `fold`; the calls come back along `axis`."""
    return x.unflatten(axis, (size, x.shape[axis] // size))


def like(value: Tensor, operand: Tensor) -> Tensor:
    """Give a result the strides and the dtype of an operand, with a copy where it must be."""
    fresh = torch.empty_like(operand, device="meta")
    if value.dtype == operand.dtype and value.stride() == fresh.stride():
        return value
    return torch.empty_like(operand).copy_(value)
