"""Argument checks that every block shares, so that their messages read alike."""

from torch import Tensor, nn


def check_positive(**values: int) -> None:
    """Raise ValueError for the first value below 1, naming it."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_feature_map(x: Tensor, channels: int, block: nn.Module) -> None:
    """Raise ValueError unless `x` is a feature map (B, channels, H, W) with H, W >= 1."""
    if x.ndim != 4 or x.shape[1] != channels:
        name = type(block).__name__
        raise ValueError(f"{name} takes (B, C, H, W) with C = {channels} channels, got shape {tuple(x.shape)}")
