"""What every net shares: a config, and files that describe the net."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from ..blocks.checks import check_choice, check_positive
from .checkpoints import Checkpoint, write_checkpoint
from .registry import AutoModel, BaseConfig

SCALES = (1, 2, 3, 4, 8)


class RestorationNet(nn.Module):
    """Base of the reference nets: `net(image) -> image`, saved with its config in one file.

    The reference nets also have `features(image) -> list` of feature maps, for heads of the user's own, and the facts
    that tiling needs: `tile_safe`, `receptive_radius` (in input pixels) and `tile_multiple`.

    Args:
        config: what the net was made from; it is saved with the weights.

    >>> class Conv(RestorationNet):
    ...     def __init__(self, config):
    ...         super().__init__(config)
    ...         self.conv = nn.Conv2d(3, 3, 3, padding=1)
    ...     def forward(self, image):
    ...         return self.conv(image)
    >>> Conv(BaseConfig())(torch.zeros(1, 3, 4, 4)).shape
    torch.Size([1, 3, 4, 4])
    """

    tile_safe: bool
    receptive_radius: int
    tile_multiple: int

    def __init__(self, config: BaseConfig) -> None:
        super().__init__()
        self.config = config

    def extra_repr(self) -> str:
        return repr(self.config)

    def save_pretrained(self, path: str | PathLike[str]) -> Path:
        """Write weights and config to a .safetensors file, or into a folder; returns the path of the file."""
        return write_checkpoint(path, Checkpoint(self.state_dict(), self.config.model_type, self.config.to_dict()))

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | PathLike[str], config: BaseConfig | None = None, **overrides: Any
    ) -> Self:
        """Load a checkpoint of this net; `AutoModel.from_pretrained` says what is read and raised.

        Raises:
            ValueError: besides, if the checkpoint is one of another net.
        """
        model = AutoModel.from_pretrained(path_or_name, config, **overrides)
        if not isinstance(model, cls):
            raise ValueError(f"{path_or_name} is a checkpoint of {type(model).__name__}, not of {cls.__name__}")
        return model


def stated(net: object, name: str, default: int) -> int:
    """Look up what a net, or its config, says of itself; a config may be given, too.

    >>> stated(nn.Conv2d(1, 3, 3), "in_channels", 3), stated(nn.ReLU(), "scale", 1)
    (1, 1)
    """
    return getattr(net, name, getattr(getattr(net, "config", None), name, default))


def scales_of(config: BaseConfig) -> tuple[int, ...]:
    """All scales that a net of this config enlarges by.

    >>> scales_of(BaseConfig())
    (1,)
    """
    return getattr(config, "scales", ()) or (getattr(config, "scale", 1),)


def check_config(config: BaseConfig, *, counts: Iterable[str]) -> None:
    """Raise unless `counts` are integers of at least 1, the scale is one of `SCALES`, and each choice one of its own.

    Choices are the fields annotated with a `Literal`, and those that are True or False.
    """
    check_positive(**{name: getattr(config, name) for name in counts})
    check_choice("scale", getattr(config, "scale", 1), SCALES)
    for name, kind in get_type_hints(type(config)).items():
        if kind is bool or get_origin(kind) is Literal:
            check_choice(name, getattr(config, name), get_args(kind) or (True, False))


def check_image(image: Tensor, channels: int, net: nn.Module) -> None:
    """Raise unless `image` is floating point and (B, channels, H, W) with H, W >= 1."""
    name = type(net).__name__
    if not image.is_floating_point():
        raise TypeError(f"{name} takes floating-point images in [0, 1], got {image.dtype}")
    if image.ndim != 4 or image.shape[1] != channels or 0 in image.shape[2:]:
        wanted = f"C = {channels} channels and H, W >= 1"
        raise ValueError(f"{name} takes images (B, C, H, W) with {wanted}, got {tuple(image.shape)}")
