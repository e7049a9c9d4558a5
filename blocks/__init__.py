"""Building blocks: each an `nn.Module` that stands alone, takes any H, W >= 1 and keeps the dtype of its input."""

from .norm import LayerNorm2d, RMSNorm2d
from .resample import BicubicUp, PixelShuffleUp
from .rrdb import RRDB, ResidualDenseBlock
from .selective_scan import SelectiveScan2d, SSMGlobalMixer

__all__ = [
    "RRDB",
    "BicubicUp",
    "LayerNorm2d",
    "PixelShuffleUp",
    "RMSNorm2d",
    "ResidualDenseBlock",
    "SSMGlobalMixer",
    "SelectiveScan2d",
]
