"""Nets by name: configs register themselves, and a config builds its net."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..blocks import reparameterize_model
from .building import built_for
from .checkpoints import Checkpoint, check_weights, put_back_prefixes, read_checkpoint
from .layouts import nearest_layout, recognize

if TYPE_CHECKING:
    from .base import RestorationNet

ConfigT = TypeVar("ConfigT", bound="type[BaseConfig]")


class BaseConfig:
    """Base of every net's config: subclass it as a dataclass and name it with `register_config`.

    It is a plain class, so that frozen and unfrozen dataclasses may both derive from it. A config whose net
    `AutoModel` shall build overrides `build`.

    >>> @dataclass
    ... class WidthConfig(BaseConfig):
    ...     width: int = 8
    >>> WidthConfig().to_dict()
    {'width': 8}
    """

    model_type: str = ""

    def build(self) -> "RestorationNet":
        """Make the net that this config describes.

        Raises:
            NotImplementedError: if the subclass does not say how.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override build(), so no net can be made from it")

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain values, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "model_type"}  # pyright: ignore[reportArgumentType]


class _Entry(NamedTuple):
    config_class: type[BaseConfig]
    overrides: Mapping[str, Any]


_NETS: dict[str, _Entry] = {}
_PRESETS: dict[str, tuple[BaseConfig, Any]] = {}


def register_config(name: str, *, sizes: Mapping[str, Mapping[str, Any]] | None = None) -> Callable[[ConfigT], ConfigT]:
    """Class decorator that makes a config known by name.

    Args:
        name: the name of the family: lower case, with dashes.
        sizes: further names, each with the field values in which it differs from the defaults.

    Raises:
        TypeError: if the class is not a dataclass deriving from `BaseConfig`.
        ValueError: if a name is taken by another class, or the class's `model_type` says something else.

    >>> @register_config("my-net")
    ... @dataclass
    ... class MyNetConfig(BaseConfig):
    ...     scale: int = 4
    >>> AutoConfig.from_name("my-net", scale=2)
    MyNetConfig(scale=2)
    """

    def register(config_class: ConfigT) -> ConfigT:
        if not (issubclass(config_class, BaseConfig) and is_dataclass(config_class)):
            raise TypeError(f"{config_class.__name__} must be a dataclass that derives from BaseConfig")
        if config_class.model_type not in ("", name):
            raise ValueError(f"{config_class.__name__}.model_type is {config_class.model_type!r}, not {name!r}")
        entries = {key: _Entry(config_class, fields) for key, fields in {name: {}, **(sizes or {})}.items()}
        for key in entries:
            taken = _NETS.get(key)
            if taken and not _same(taken.config_class, config_class):
                raise ValueError(f"the name {key!r} is taken by {taken.config_class.__name__}")
        _NETS.update(entries)
        config_class.model_type = name
        return config_class

    return register


def list_models() -> list[str]:
    """Names that `AutoConfig.from_name` knows, sorted.

    >>> "rrdbnet" in list_models()
    True
    """
    return sorted(_NETS)


def register_presets(presets: Mapping[str, tuple[BaseConfig, Any]]) -> None:
    """Make training presets known by name: each a net's config and the settings it is trained with.

    Raises:
        ValueError: if a name is taken already.

    >>> register_presets({"rrdbnetx2-quick": (AutoConfig.from_name("rrdbnet", scale=2), {"steps": 1000})})
    """
    for name, preset in presets.items():
        if name in _PRESETS and _PRESETS[name] != preset:
            raise ValueError(f"the preset name {name!r} is taken")
        _PRESETS[name] = preset


def registered_presets() -> dict[str, tuple[BaseConfig, Any]]:
    """The presets that are known, by name, in the order in which they were registered.

    >>> "rrdbnetx4-quick" in registered_presets()
    False
    """
    return dict(_PRESETS)


class AutoConfig:
    """Finds configs by name.

    >>> AutoConfig.from_name("rrdbnet", scale=2).scale
    2
    """

    @staticmethod
    def from_name(name: str, **overrides: Any) -> BaseConfig:
        """Make the config called `name`, with some fields overridden.

        Raises:
            ValueError: if no net has that name, or a field is unknown or has a bad value; it offers the nearest name.

        >>> AutoConfig.from_name("rrdbnet-lite", scale=2).num_feat
        32
        """
        if name not in _NETS:
            raise ValueError(f"there is no net {name!r}{nearest(name, _NETS)}")
        entry = _NETS[name]
        known = [field.name for field in fields(entry.config_class)]  # pyright: ignore[reportArgumentType]
        for key in overrides:
            if key not in known:
                raise ValueError(f"{name} has no field {key!r}{nearest(key, known)}")
        return entry.config_class(**{**entry.overrides, **overrides})


class AutoModel:
    """Makes nets from configs and from files.

    >>> AutoModel.from_config(AutoConfig.from_name("rrdbnet-lite", num_block=1)).config.num_block
    1
    """

    @staticmethod
    def from_config(config: BaseConfig) -> "RestorationNet":
        """Make the net that `config` describes, with fresh weights.

        Raises:
            TypeError: if `config` is no config.

        >>> type(AutoModel.from_config(AutoConfig.from_name("rrdbnet-lite", num_block=1))).__name__
        'RRDBNet'
        """
        if not isinstance(config, BaseConfig):
            raise TypeError(f"config must come from AutoConfig.from_name or derive from BaseConfig, got {config!r}")
        return config.build()

    @staticmethod
    def from_pretrained(
        path_or_name: str | PathLike[str], config: BaseConfig | None = None, **overrides: Any
    ) -> "RestorationNet":
        """Make the net that a checkpoint describes and load its weights, strictly.

        A file of this package names its net; one of a public layout of `RRDBNet`, `PLKSR` or `SPAN` is recognised by
        the names and shapes of its tensors. `inspect_checkpoint` reports what was recognised, and what was assumed.

        Args:
            path_or_name: a safetensors file, a folder with a model.safetensors, a .pth, .pt or .ckpt file of tensors,
                or the name of shipped weights, "claritycore-x4" for one (`claritycore list` lists them).
            config: the net's config, needed where the file is of no known layout.
            overrides: fields of the config that the file leaves open, or gives otherwise.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, holds objects that would run code, is of no known layout while
                `config` is not given, is one of another net than `config`, or does not fit the net; if both
                `config` and `overrides` are given.

        >>> AutoModel.from_pretrained("claritycore-x4").config.scale
        4
        >>> import tempfile
        >>> net = AutoModel.from_config(AutoConfig.from_name("rrdbnet-lite", num_block=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = net.save_pretrained(folder)
        ...     AutoModel.from_pretrained(path).config == net.config
        True
        """
        checkpoint = read_checkpoint(path_or_name)
        config, state = describe(checkpoint, path_or_name, config, overrides)
        draft(config, state, path_or_name)
        model = _in_form_of(state, config.build())
        model.load_state_dict(state)
        return model


def describe(
    checkpoint: Checkpoint, path: str | PathLike[str], config: BaseConfig | None, overrides: Mapping[str, Any]
) -> tuple[BaseConfig, dict[str, Tensor]]:
    """Say which net a checkpoint is of, and give its tensors under the names that they have in it.

    Args:
        checkpoint: what was read.
        path: from where, for messages.
        config: what the caller says; None leaves it to the checkpoint.
        overrides: fields of the config that the caller sets.

    Raises:
        ValueError: as `AutoModel.from_pretrained`.
    """
    if config is not None and overrides:
        raise ValueError(f"give either config or its fields ({', '.join(overrides)}), not both")
    if config is not None:
        with torch.device("meta"):
            checkpoint = put_back_prefixes(checkpoint, config.build())
    family, fields, state = checkpoint.model_type, checkpoint.config, checkpoint.state
    found = recognize(state) if family is None else None
    # A net of the caller's own may have the names of a public one: then they stay as they are.
    if found and (config is None or config.model_type == found.layout.family):
        if found.reading is None:
            raise ValueError(f"{path} {found.refusal}")
        family, (state, fields, _) = found.layout.family, found.reading
    if config is None:
        if family is None:
            hint = f"from_pretrained takes its config{nearest_layout(state)}"
            raise ValueError(f"{path} does not say which net it belongs to; {hint}")
        with built_for(state, path):  # some configs try their sizes
            try:
                config = AutoConfig.from_name(family, **{**fields, **overrides})
            except ValueError as error:
                raise ValueError(f"{path} describes a net that cannot be made: {error}") from error
    elif family not in (None, config.model_type):
        raise ValueError(f"{path} is a checkpoint of {family}, not of {config.model_type}")
    return config, state


def draft(config: BaseConfig, state: Mapping[str, Tensor], path: str | PathLike[str]) -> "RestorationNet":
    """Make a net without memory for its weights and compare it with a state: one that does not fit costs nothing.

    Raises:
        ValueError: if a tensor is missing, left over or of another shape, or the net far too large for the state.
    """
    with built_for(state, path):
        model = _in_form_of(state, config.build())
        check_weights(model, dict(state), path)
    return model


def is_deployed(state: Mapping[str, Tensor]) -> bool:
    """Whether a state is of a net whose `Reparameterizable` blocks are in their deployed form."""
    return any(re.search(r"(^|\.)fused(_wide)?\.", key) for key in state)


def _in_form_of(state: Mapping[str, Tensor], model: "RestorationNet") -> "RestorationNet":
    """Deploy a fresh net if the state is one of a deployed net."""
    if is_deployed(state) and not is_deployed(model.state_dict()):
        reparameterize_model(model.eval(), inplace=True).train()
    return model


def nearest(name: str, known: Iterable[str]) -> str:
    """End of a message about an unknown name: the nearest known one, or all of them.

    >>> nearest("rrdbnte", ["rrdbnet", "span"])
    '; did you mean rrdbnet?'
    """
    spelled = {str(key).casefold(): key for key in known}
    close = difflib.get_close_matches(str(name).casefold(), spelled, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {spelled[close[0]]}?"
    return f"; known are {', '.join(sorted(spelled.values())) or 'none'}"


def _same(a: type, b: type) -> bool:
    # A module that is run again, as in a notebook, makes its classes anew.
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)
