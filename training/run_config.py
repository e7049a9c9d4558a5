"""A run as a file says it: TOML whose keys are the flags of `claritycore train`."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..nets import AutoConfig, BaseConfig
from ..nets.registry import nearest
from .settings import TrainingSettings

WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text in quotes"}


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
    kinds = get_type_hints(type(config)) | get_type_hints(TrainingSettings)
    values = {key: _as_field(key, value, kinds[key]) for key, value in given.items()}
    config = replace(config, **{key: value for key, value in values.items() if key in of_net})  # pyright: ignore
    return config, replace(settings, **{key: value for key, value in values.items() if key in of_training})


def write_config(path: str | PathLike[str], config: BaseConfig, settings: TrainingSettings) -> None:
    """Write the file that `read_config` reads the same run from; what has no value is left out."""
    given = {"model": config.model_type, **config.to_dict(), **asdict(settings)}
    lines = [f"{key.replace('_', '-')} = {_toml(value)}" for key, value in given.items() if value is not None]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_field(name: str, value: Any, kind: Any) -> Any:
    """Bring a value of a file to the type of a field: lists become tuples, and whole numbers others."""
    if not _fits(value, kind):
        raise ValueError(f"{name} must be {_in_words(kind)}, got {value!r}")
    if type(value) is int and int not in _alternatives(kind) and float in _alternatives(kind):
        return float(value)
    return _frozen(value)


def _fits(value: Any, kind: Any) -> bool:
    if len(kinds := _alternatives(kind)) > 1:
        return any(_fits(value, other) for other in kinds)
    (kind,) = kinds
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        first, *others = get_args(kind)
        each = [first] * len(value) if others == [...] else [first, *others]
        return len(each) == len(value) and all(map(_fits, value, each))
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # the config itself names the choices
    if kind is float:
        return type(value) in (float, int)
    # What a file cannot say otherwise is left to the config.
    return type(value) is kind if kind in WORDS else get_origin(kind) is not tuple


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return WORDS[str]
    if get_origin(kind) is tuple:
        return f"a list, each {_in_words(get_args(kind)[0])}"
    kinds = _alternatives(kind)
    return WORDS.get(kind, str(kind)) if len(kinds) == 1 and kinds[0] is kind else " or ".join(map(_in_words, kinds))


def _alternatives(kind: Any) -> list[Any]:
    """The types of a union; None is left out, which a file cannot say."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    return [other for other in kinds if other is not NoneType]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
