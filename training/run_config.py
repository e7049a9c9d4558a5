"""A run as a file says it: TOML whose keys are the flags of `claritycore train`."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..nets import AutoConfig, BaseConfig
from ..nets.registry import nearest
from .settings import TrainingSettings


def read_config(
    path: str | PathLike[str], config: BaseConfig | None, settings: TrainingSettings
) -> tuple[BaseConfig, TrainingSettings]:
    """Override a net and its training by what a file says; keys are spelled as flags or as fields.

    Args:
        path: a TOML file, flat: ``model = "plksr"``, ``scale = 4``, ``batch-size = 16``, ...
        config: of the net; None leaves it to the file's `model`, which else must agree.
        settings: of the training.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no TOML, a key is unknown (the nearest is offered), or a value is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        given = {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text("utf-8")).items()}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    model = given.pop("model", None)
    if model is not None:
        found = AutoConfig.from_name(str(model))
        if config is not None and found.model_type != config.model_type:
            raise ValueError(f"{path} is for {found.model_type}, and not for {config.model_type}: give one of them")
        config = found if config is None else config
    if config is None:
        raise ValueError(f"{path} must name its net, as in model = 'plksr', unless --model does")
    try:
        return override(config, settings, given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def override(
    config: BaseConfig, settings: TrainingSettings, given: Mapping[str, Any]
) -> tuple[BaseConfig, TrainingSettings]:
    """Replace fields of a net's config and of its training's settings.

    Raises:
        ValueError: if a field is unknown, or its value is refused.
        TypeError: if a value is of another type.

    >>> from claritycore.nets import AutoConfig
    >>> config, settings = override(AutoConfig.from_name("span"), TrainingSettings(), {"scale": 2, "lr": 1e-3})
    >>> config.scale, settings.lr
    (2, 0.001)
    """
    of_net = [field.name for field in fields(config)]  # pyright: ignore[reportArgumentType]
    of_training = [field.name for field in fields(settings)]
    for key in given:
        if key not in of_net and key not in of_training:
            raise ValueError(f"there is no field {key!r}{nearest(key, [*of_net, *of_training])}")
    standing = {name: getattr(config, name) for name in of_net} | {
        name: getattr(settings, name) for name in of_training
    }
    values = {key: _as_is(key, value, standing[key]) for key, value in given.items()}
    config = replace(config, **{key: value for key, value in values.items() if key in of_net})  # pyright: ignore
    return config, replace(settings, **{key: value for key, value in values.items() if key in of_training})


def write_config(path: str | PathLike[str], config: BaseConfig, settings: TrainingSettings) -> None:
    """Write the file that `read_config` reads the same run from; what has no value is left out."""
    given = {"model": config.model_type, **config.to_dict(), **asdict(settings)}
    lines = [f"{key.replace('_', '-')} = {_toml(value)}" for key, value in given.items() if value is not None]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_is(name: str, value: Any, standing: Any) -> Any:
    """Bring a value to the type of the one that stands; None may become anything."""
    value = tuple(value) if isinstance(value, list) else value
    if type(standing) is float and type(value) is int:
        return float(value)
    if standing is not None and type(value) is not type(standing):
        raise ValueError(f"{name} must be {type(standing).__name__}, got {value!r}")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
