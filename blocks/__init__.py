"""Building blocks: each an `nn.Module` that stands alone, takes any H, W >= 1 and keeps the dtype of its input."""

from .channel_attention import ChannelAttention, TransposedAttention
from .deformable_attention import DeformableAttention2d
from .ffn import ConvGate, GatedFFN, NAFBlock
from .frequency import FreqBands, FreqSplit2d
from .frequency_attention import FrequencyCrossAttention
from .frequency_fusion import FreqFuse, FreqSep
from .frequency_mixing import HighPass, SpectralMix2d
from .hybrid_attention import GridAttention, HybridAttention
from .modulated import ModulatedConv2d, ModulatedNoiseConv2d
from .multi_scale import MSGDown, MSGUp, OverlapPatchEmbed, SkipFusion
from .noise_injection import NoiseField, NoiseInjection
from .norm import LayerNorm2d, RMSNorm2d
from .plk import DoubleConvChannelMixer, ElementwiseAttention, PartialLargeKernelConv, PLKBlock
from .porting import BLOCK_SOURCES, BlockSource, convert_block_state
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
from .swin import ConvAttention, SwinBlock
from .texture_head import TextureHead
from .window_attention import OverlappingCrossAttention, WindowAttention2d

__all__ = [
    "BLOCK_SOURCES",
    "RRDB",
    "SPAB",
    "BicubicUp",
    "BlockSource",
    "ChannelAttention",
    "ConvAttention",
    "ConvGate",
    "DeformableAttention2d",
    "DoubleConvChannelMixer",
    "DySample",
    "ElementwiseAttention",
    "FreqBands",
    "FreqFuse",
    "FreqSep",
    "FreqSplit2d",
    "FrequencyCrossAttention",
    "GatedFFN",
    "GridAttention",
    "HighPass",
    "HybridAttention",
    "LayerNorm2d",
    "MSGDown",
    "MSGUp",
    "ModulatedConv2d",
    "ModulatedNoiseConv2d",
    "NAFBlock",
    "NoiseField",
    "NoiseInjection",
    "OverlapPatchEmbed",
    "OverlappingCrossAttention",
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
    "SpectralMix2d",
    "SwinBlock",
    "TextureHead",
    "TransposedAttention",
    "WindowAttention2d",
    "convert_block_state",
    "reparameterize_model",
    "to_training_form",
    "verify_reparameterization",
]
