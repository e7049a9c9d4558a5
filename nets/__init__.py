"""Reference nets, assembled from the blocks, and the registry that makes them by name."""

from .base import RestorationNet
from .estimators import load_estimator, save_estimator
from .finetuning import MatchReport, freeze, load_matching
from .harmonic import HARMONIC, HARMONICConfig
from .hersr import HERSR, HERSRConfig
from .inspection import CheckpointInfo, convert_state, inspect_checkpoint
from .output import Aux, RestorationOutput
from .plksr import PLKSR, PLKSRConfig
from .registry import AutoConfig, AutoModel, BaseConfig, list_models, register_config, register_presets
from .rrdbnet import RRDBNet, RRDBNetConfig
from .rsfmoe import RSFMoEConfig, RSFMoENet
from .span import SPAN, SPANConfig
from .stage import Conditioned, Context, Stage
from .swin_unet import SwinUNet, SwinUNetConfig
from .unet import UNet, UNetConfig

__all__ = [
    "HARMONIC",
    "HERSR",
    "PLKSR",
    "SPAN",
    "AutoConfig",
    "AutoModel",
    "Aux",
    "BaseConfig",
    "CheckpointInfo",
    "Conditioned",
    "Context",
    "HARMONICConfig",
    "HERSRConfig",
    "MatchReport",
    "PLKSRConfig",
    "RRDBNet",
    "RRDBNetConfig",
    "RSFMoEConfig",
    "RSFMoENet",
    "RestorationNet",
    "RestorationOutput",
    "SPANConfig",
    "Stage",
    "SwinUNet",
    "SwinUNetConfig",
    "UNet",
    "UNetConfig",
    "convert_state",
    "freeze",
    "inspect_checkpoint",
    "list_models",
    "load_estimator",
    "load_matching",
    "register_config",
    "register_presets",
    "save_estimator",
]
