"""What the stages of RSFMoENet consist of, by its config."""

from typing import TYPE_CHECKING

from torch import nn

from ..blocks import (
    ConvExpert,
    DeformableAttention2d,
    EntropyLoss,
    FreqFuse,
    FreqSep,
    FreqSplit2d,
    GatedFFN,
    KernelPrior,
    NoiseInjection,
    PLKBlock,
    RouterPolicy,
    SSMGlobalMixer,
    SwinBlock,
    SwitchBalance,
    TextureExpert,
    TopKRouter,
    WarmUp,
    WindowAttention2d,
)
from .rsfmoe_exit import ExitConfidence
from .rsfmoe_parts import EXPERTS, FrequencyUnit, ModulatedBlock, SteeredBlock, TextureMixture
from .rsfmoe_prompt import DegradationPrompt, ResidualGate
from .stage import opened

if TYPE_CHECKING:
    from .rsfmoe import RSFMoEConfig

CODE_CHANNELS = 8


def encoder_stage(config: "RSFMoEConfig", level: int) -> list[nn.Module]:
    """The blocks of a stage of the encoder, level 0 the finest."""
    blocks: list[nn.Module] = []
    for place in range(config.depths[level]):
        blocks += [_large_kernel(config, level), *_mixer(config, level, place), *_attention(config, level, place)]
    return [*blocks, *_frequencies(config, level, layer=level)]


def bottleneck_stage(config: "RSFMoEConfig", level: int) -> list[nn.Module]:
    """The blocks of the coarsest scale."""
    blocks: list[nn.Module] = []
    for place in range(config.bottleneck):
        blocks += [*_mixer(config, level, place), *_frequencies(config, level, layer=level + place)]
    if config.early_exit:
        blocks.append(ExitConfidence(_width(config, level), least=config.exit_confidence))
    return blocks


def decoder_stage(config: "RSFMoEConfig", level: int) -> list[nn.Module]:
    """The blocks of a stage of the decoder, level 0 the finest."""
    blocks: list[nn.Module] = []
    for place in range(config.depths[level]):
        blocks += [*_attention(config, level, place + 1), _large_kernel(config, level)]
    layer = len(config.depths) + config.bottleneck + level
    return [*blocks, *(_frequencies(config, level, layer=layer) if config.decoder_moe else [])]


def _width(config: "RSFMoEConfig", level: int) -> int:
    return config.embed_dim * 2**level


def degradation_prompt(config: "RSFMoEConfig") -> DegradationPrompt:
    """What finds out how the image is degraded, before all other blocks."""
    prior = None
    if config.kernel_prior:
        options = {"code_channels": CODE_CHANNELS, "cell": 2 ** len(config.depths)}
        prior = KernelPrior(config.embed_dim, kernel_size=config.blur_kernel or None, **options)
    severe_blur = config.severe_blur if config.noise else None
    return DegradationPrompt(
        config.embed_dim, prompt_channels=config.prompt_channels, prior=prior, severe_blur=severe_blur
    )


def residual_gate(config: "RSFMoEConfig") -> ResidualGate | None:
    """What holds the last map back, where there is a prompt or a code to tell when."""
    return ResidualGate(config.condition_channels) if config.condition_channels else None


def _large_kernel(config: "RSFMoEConfig", level: int) -> ModulatedBlock:
    block = PLKBlock(_width(config, level), kernel_size=config.kernel_size, form=config.kernel_form, norm="layer")
    return ModulatedBlock(block, condition_channels=config.condition_channels)


def _mixer(config: "RSFMoEConfig", level: int, place: int) -> list[nn.Module]:
    if config.global_mixer == "ssm":
        # A gate that is a little open: every parameter learns from the first step on.
        return [SSMGlobalMixer(_width(config, level), d_state=config.d_state, gate=0.01)]
    return _windows(config, level, place + 1) if config.global_mixer == "window" and level else []


def _attention(config: "RSFMoEConfig", level: int, place: int) -> list[nn.Module]:
    if config.deformable and level == len(config.depths) - 1:
        heads = _width(config, level) // config.head_dim
        return [_steered(config, level, DeformableAttention2d(_width(config, level), num_heads=heads, stride=4))]
    return _windows(config, level, place) if level else []


def _windows(config: "RSFMoEConfig", level: int, place: int) -> list[nn.Module]:
    """Window attention, shifted at every other place."""
    width, size = _width(config, level), config.window_size
    attention = WindowAttention2d(width, width // config.head_dim, window_size=size, shift=size // 2 * (place % 2))
    return [_steered(config, level, attention)]


def _steered(config: "RSFMoEConfig", level: int, attention: nn.Module) -> SteeredBlock:
    width = _width(config, level)
    block = SwinBlock(width, attention, ffn=GatedFFN(width, expansion=config.mlp_ratio))
    return SteeredBlock(block, width // config.head_dim, condition_channels=config.condition_channels)


def _frequencies(config: "RSFMoEConfig", level: int, *, layer: int) -> list[nn.Module]:
    if config.split == "none":
        return []
    width = _width(config, level)
    texture = _mixture(config, level, layer) if config.moe else TextureExpert(width)
    separation = FreqSep(
        width,
        split=FreqSplit2d(width, kind=config.split),
        structure=ConvExpert(width),
        texture=texture,
        fuse=opened(FreqFuse(width, max_gain=config.hf_gain)),
    )
    return [FrequencyUnit(separation) if config.moe else separation]


def _mixture(config: "RSFMoEConfig", level: int, layer: int) -> TextureMixture:
    width = _width(config, level)
    policies: list[RouterPolicy] = [SwitchBalance(), EntropyLoss()]
    if config.warm_up:
        policies.append(WarmUp(config.warm_up))
    router = TopKRouter(
        2 * width,
        len(EXPERTS),
        k=config.k,
        condition_channels=1 + config.condition_channels,
        bypass=config.bypass,
        policies=policies,
    )
    return TextureMixture(
        width,
        router,
        window_size=config.moe_window,
        stride=2**level,
        cell=2 ** (len(config.depths) - level),
        noise=NoiseInjection(width, clamp=config.noise_clamp) if config.noise else None,
        layer=layer,
    )
