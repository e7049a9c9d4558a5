"""Building blocks: each an `nn.Module` that stands alone, takes any H, W >= 1 and keeps the dtype of its input."""

from .channel_attention import ChannelAttention, TransposedAttention
from .conditioning import FiLM, LocalStatistics, PromptGenerator
from .cross_attention import CrossAttention2d
from .deformable_attention import DeformableAttention2d
from .degradation import DegradationEstimate, DegradationEstimator, KernelPrior
from .degradation_features import blockiness, edge_width, haar_sigma, immerkaer_sigma
from .experts import ConvExpert, DetailExpert, Expert, PointwiseExpert, TextureExpert
from .experts_restoration import ArtifactExpert, DeblurExpert, DenoiseExpert
from .experts_windowed import AttentionExpert, FrequencyExpert
from .ffn import ConvGate, GatedFFN, NAFBlock
from .frequency import FreqBands, FreqSplit2d
from .frequency_attention import FrequencyCrossAttention
from .frequency_fusion import FreqFuse, FreqSep
from .frequency_mixing import HighPass, SpectralMix2d
from .hybrid_attention import GridAttention, HybridAttention
from .modulated import ModulatedConv2d, ModulatedNoiseConv2d
from .moe import MoE2d
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
from .route_result import RouteResult
from .router import TopKRouter
from .router_policies import (
    BiasBalance,
    EntropyLoss,
    ImportanceBalance,
    RouterNoise,
    RouterPolicy,
    SwitchBalance,
    Temperature,
    WarmUp,
    ZLoss,
)
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
    "ArtifactExpert",
    "AttentionExpert",
    "BiasBalance",
    "BicubicUp",
    "BlockSource",
    "ChannelAttention",
    "ConvAttention",
    "ConvExpert",
    "ConvGate",
    "CrossAttention2d",
    "DeblurExpert",
    "DeformableAttention2d",
    "DegradationEstimate",
    "DegradationEstimator",
    "DenoiseExpert",
    "DetailExpert",
    "DoubleConvChannelMixer",
    "DySample",
    "ElementwiseAttention",
    "EntropyLoss",
    "Expert",
    "FiLM",
    "FreqBands",
    "FreqFuse",
    "FreqSep",
    "FreqSplit2d",
    "FrequencyCrossAttention",
    "FrequencyExpert",
    "GatedFFN",
    "GridAttention",
    "HighPass",
    "HybridAttention",
    "ImportanceBalance",
    "KernelPrior",
    "LayerNorm2d",
    "LocalStatistics",
    "MSGDown",
    "MSGUp",
    "MoE2d",
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
    "PointwiseExpert",
    "PromptGenerator",
    "RMSNorm2d",
    "RepConv2d",
    "Reparameterizable",
    "ReparameterizationReport",
    "ResidualDenseBlock",
    "RouteResult",
    "RouterNoise",
    "RouterPolicy",
    "SSMGlobalMixer",
    "SelectiveScan2d",
    "SkipFusion",
    "SpectralMix2d",
    "SwinBlock",
    "SwitchBalance",
    "Temperature",
    "TextureExpert",
    "TextureHead",
    "TopKRouter",
    "TransposedAttention",
    "WarmUp",
    "WindowAttention2d",
    "ZLoss",
    "blockiness",
    "convert_block_state",
    "edge_width",
    "haar_sigma",
    "immerkaer_sigma",
    "reparameterize_model",
    "to_training_form",
    "verify_reparameterization",
]
