"""Reference nets, assembled from the blocks, and the registry that makes them by name."""

from .base import RestorationNet
from .output import Aux, RestorationOutput
from .registry import AutoConfig, AutoModel, BaseConfig, list_models, register_config, register_presets
from .rrdbnet import RRDBNet, RRDBNetConfig

__all__ = [
    "AutoConfig",
    "AutoModel",
    "Aux",
    "BaseConfig",
    "RRDBNet",
    "RRDBNetConfig",
    "RestorationNet",
    "RestorationOutput",
    "list_models",
    "register_config",
    "register_presets",
]
