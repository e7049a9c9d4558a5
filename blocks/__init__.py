"""Building blocks: each an `nn.Module` that stands alone, takes any H, W >= 1 and keeps the dtype of its input."""

from .channel_attention import ChannelAttention
from .ffn import ConvGate, GatedFFN, NAFBlock
from .multi_scale import MSGDown, MSGUp, OverlapPatchEmbed, SkipFusion
from .norm import LayerNorm2d, RMSNorm2d
from .plk import DoubleConvChannelMixer, ElementwiseAttention, PartialLargeKernelConv, PLKBlock
from .rep_conv import RepConv2d
from .reparam import (
    Reparameterizable,
    ReparameterizationReport,
    reparameterize_model,
    to_training_form,
    verify_reparameterization,
)
from .resample import BicubicUp, DySample, PixelShuffleUp
from .rrdb import RRDB, ResidualDenseBlock
from .selective_scan import SelectiveScan2d, SSMGlobalMixer
from .span import SPAB

__all__ = [
    "RRDB",
    "SPAB",
    "BicubicUp",
    "ChannelAttention",
    "ConvGate",
    "DoubleConvChannelMixer",
    "DySample",
    "ElementwiseAttention",
    "GatedFFN",
    "LayerNorm2d",
    "MSGDown",
    "MSGUp",
    "NAFBlock",
    "OverlapPatchEmbed",
    "PLKBlock",
    "PartialLargeKernelConv",
    "PixelShuffleUp",
    "RMSNorm2d",
    "RepConv2d",
    "Reparameterizable",
    "ReparameterizationReport",
    "ResidualDenseBlock",
    "SSMGlobalMixer",
    "SelectiveScan2d",
    "SkipFusion",
    "reparameterize_model",
    "to_training_form",
    "verify_reparameterization",
]
