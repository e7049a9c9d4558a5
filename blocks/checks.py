"""Argument checks that every block shares, so that their messages read alike."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn


def check_positive(**values: int) -> None:
    """Raise ValueError for the first value that is no integer of at least 1, naming it."""
    _check_integers(1, values)


def check_not_negative(**values: int) -> None:
    """Raise ValueError for the first value that is no integer of at least 0, naming it."""
    _check_integers(0, values)


def check_odd(**values: int) -> None:
    """Raise ValueError for the first value that is no odd integer of at least 1, naming it."""
    for name, value in values.items():
        if type(value) is not int or value < 1 or value % 2 == 0:
            raise ValueError(f"{name} must be an odd integer of at least 1, got {value!r}")


def check_choice(name: str, value: object, known: Iterable[object]) -> None:
    """Raise ValueError unless the value is one of those known, and of its type: True and 1.0 are no 1."""
    if value not in (known := tuple(known)) or type(value) not in map(type, known):
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")


def check_heads(channels: int, num_heads: int) -> None:
    """Raise ValueError unless both are integers of at least 1 and each head has as many channels."""
    check_positive(channels=channels, num_heads=num_heads)
    if channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels, got {num_heads}")


def check_shift(shift: tuple[int, int], window_size: tuple[int, int]) -> None:
    """Raise ValueError unless windows begin within the first one."""
    if any(s >= w for s, w in zip(shift, window_size, strict=True)):
        raise ValueError(f"shift must be less than window_size {window_size}, got {shift}")


def check_feature_map(x: Tensor, channels: int | None, block: nn.Module) -> None:
    """Raise unless `x` is a floating-point feature map (B, channels, H, W) with H, W >= 1; None takes any channels."""
    name = type(block).__name__
    if not x.is_floating_point():
        raise TypeError(f"{name} takes floating-point feature maps, got {x.dtype}")
    if x.ndim != 4 or x.shape[1] != (x.shape[1] if channels is None else channels) or 0 in x.shape[2:]:
        wanted = "any C" if channels is None else f"C = {channels} channels"
        raise ValueError(f"{name} takes (B, C, H, W) with {wanted} and H, W >= 1, got shape {tuple(x.shape)}")


def _check_integers(least: int, values: Mapping[str, int]) -> None:
    for name, value in values.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
