"""The stages and the branches of HARMONIC, from its config."""

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from ..blocks import (
    ArtifactExpert,
    ChannelAttention,
    ConvExpert,
    ConvGate,
    DeblurExpert,
    DeformableAttention2d,
    DenoiseExpert,
    DetailExpert,
    EntropyLoss,
    FreqFuse,
    FreqSplit2d,
    FrequencyCrossAttention,
    GatedFFN,
    HighPass,
    HybridAttention,
    ModulatedNoiseConv2d,
    MoE2d,
    MSGDown,
    MSGUp,
    OverlappingCrossAttention,
    PartialLargeKernelConv,
    PLKBlock,
    PointwiseExpert,
    SkipFusion,
    SSMGlobalMixer,
    SwinBlock,
    SwitchBalance,
    TextureExpert,
    TopKRouter,
    WindowAttention2d,
)
from .busyness import start_gate
from .harmonic_branches import BandFusion, FrequencyResidual, HighBranch, LowBranch, TextureBlock
from .stage import Stage, opened

if TYPE_CHECKING:
    from .harmonic import HARMONICConfig

# Weights of the losses that keep experts in use, and their router decided.
BALANCE, ENTROPY = 0.01, 0.001

EXPERTS = 4
# Pixels between the places that deformable attention samples: with one for each, all would attend to all.
SAMPLING = 4


def window_stage(config: "HARMONICConfig", width: int, depth: int) -> Stage:
    """Whole and shifted windows in turn, and an overlapping one; the last block has the gates of the stage.

    On the fast path, as many blocks of large depthwise kernels.
    """
    if depth == 0:
        return Stage()
    if config.fast_path:
        return Stage(*(_convolution(config, width) for _ in range(depth + bool(config.overlap_ratio))))
    size, heads = config.window_size, width // config.head_dim
    shifts = [size // 2 * (place % 2) for place in range(depth)]
    attentions: list[nn.Module] = [WindowAttention2d(width, heads, window_size=size, shift=shift) for shift in shifts]
    if config.overlap_ratio:
        ratio = config.overlap_ratio
        attentions.append(OverlappingCrossAttention(width, heads, window_size=size, overlap_ratio=ratio))
    return Stage(*(_block(config, width, attention) for attention in attentions[:-1]), _last(config, attentions[-1]))


def bottleneck(config: "HARMONICConfig", width: int, depth: int) -> Stage:
    """Long and plain windows in turn, all with tokens of the map, each before a scan or deformable attention."""
    if config.fast_path:
        return Stage(*(_convolution(config, width) for _ in range(depth)))
    heads, size = width // config.head_dim, config.window_size
    blocks: list[nn.Module] = []
    for place in range(depth):
        form = config.long_range if place % 2 == 0 else "window"
        attention = HybridAttention(width, heads, window_size=size, form=form, global_size=config.global_size)
        blocks.append(_block(config, width, attention) if place + 1 < depth else _last(config, attention))
        if config.mixer == "ssm":
            blocks.append(SSMGlobalMixer(width, gate=0.01))
        elif config.mixer == "deformable":
            deformable = DeformableAttention2d(width, num_heads=heads, stride=SAMPLING)
            blocks.append(_block(config, width, deformable))
    return Stage(*blocks)


def fusion(config: "HARMONICConfig", width: int, level: int) -> BandFusion:
    """Low and high frequencies attend to each other, on the fast path a convolution gates both; then they are added."""
    if config.branches == "low":
        return BandFusion(level, SkipFusion(width), both=False)
    if config.fast_path:
        return BandFusion(level, opened(FreqFuse(width, max_gain=config.max_gain)), both=True)
    crossing = FrequencyCrossAttention(width, width // config.head_dim, window_size=config.window_size)
    return BandFusion(level, opened(FreqFuse(width, gate=crossing, max_gain=config.max_gain)), both=True)


def low_branch(config: "HARMONICConfig", widths: list[int]) -> LowBranch:
    """Of the scales that decoders have, and of half the size at least."""
    fine, *coarse = widths[: max(2, len(widths) - 1)]
    return LowBranch(
        config.in_channels,
        config.out_channels,
        widths=(fine, coarse[0]),
        downs=_ways_down(config, [fine, *coarse]),
        stages=[_structure_stage(config, width, last=width == coarse[-1]) for width in coarse],
        up=MSGUp(coarse[0], fine, form=config.up, gated=config.gated),
    )


def high_branch(config: "HARMONICConfig", widths: list[int]) -> HighBranch:
    """Modulated by its edges, but on the fast path, where tiles are to be exact."""
    return HighBranch(
        config.in_channels,
        widths[0],
        edges=HighPass(config.in_channels, kind=config.edges),
        texture=_texture_stage(config, widths[0]),
        downs=_ways_down(config, widths),
        style="constant" if config.fast_path else "edges",
    )


def frequency_residual(config: "HARMONICConfig") -> FrequencyResidual:
    """What adds the correction to the image."""
    split = FreqSplit2d(config.out_channels, kind=config.split)
    return FrequencyResidual(config.out_channels, split=split, max_gain=config.max_gain, limit=config.high_limit)


def _ways_down(config: "HARMONICConfig", widths: list[int]) -> list[MSGDown]:
    return [MSGDown(fine, wide, form=config.down, gated=config.gated) for fine, wide in pairwise(widths)]


def _structure_stage(config: "HARMONICConfig", width: int, *, last: bool) -> Stage:
    """Large kernels that fuse; after those of the last stage a scan, where the config has one."""
    options = {"kernel_size": config.kernel_size, "form": "depthwise", "attention": not config.fast_path}
    blocks: list[nn.Module] = [PLKBlock(width, **options) for _ in range(config.low_depth)]
    if last and config.low_ssm and not config.fast_path:
        blocks.append(SSMGlobalMixer(width, gate=0.01))
    return Stage(*blocks)


def _texture_stage(config: "HARMONICConfig", width: int) -> Stage:
    """Experts with modulated noise; on the fast path, and without experts, plain convolutions in their place."""
    style = 1 if config.fast_path else config.in_channels
    blocks: list[nn.Module] = []
    for layer in range(config.high_depth):
        noise = ModulatedNoiseConv2d(width, width, style_channels=style, noise_clamp=config.noise_clamp)
        experts = _experts(config, width) if config.moe and not config.fast_path else DetailExpert(width)
        blocks.append(TextureBlock(width, experts, noise=noise if config.noise else None, layer=layer))
    return Stage(*blocks)


def _experts(config: "HARMONICConfig", width: int) -> MoE2d:
    """Four experts, of noise, blur, compression and texture, and a deterministic one for what the router doubts.

    The router is told how busy and how steep the high frequencies are; its gate starts as one that flat regions do not
    pass.
    """
    by_token = config.moe_level == "token"
    router = TopKRouter(
        width if by_token else 2 * width,
        EXPERTS,
        k=config.top_k,
        condition_channels=1 + config.in_channels,
        bypass=config.bypass,
        policies=(SwitchBalance(BALANCE), EntropyLoss(ENTROPY, diversity=ENTROPY)),
    )
    start_gate(router)
    if by_token:
        experts = [PointwiseExpert(width) for _ in range(EXPERTS)]
        return MoE2d(width, experts, router=router, fallback=PointwiseExpert(width))
    return MoE2d(
        width,
        [DenoiseExpert(width), DeblurExpert(width), ArtifactExpert(width), TextureExpert(width)],
        level="window",
        window_size=config.window_size,
        router=router,
        fallback=ConvExpert(width),
    )


def _block(config: "HARMONICConfig", width: int, attention: nn.Module) -> SwinBlock:
    return SwinBlock(width, attention, ffn=GatedFFN(width, expansion=config.ffn_expansion))


def _convolution(config: "HARMONICConfig", width: int) -> SwinBlock:
    """The block of the windows with a large depthwise kernel in the place of attention."""
    kernel = PartialLargeKernelConv(width, kernel_size=config.kernel_size, split_ratio=1.0, form="depthwise")
    return _block(config, width, kernel)


def _last(config: "HARMONICConfig", attention: nn.Module) -> SwinBlock:
    """The last block of a stage. Its gates lie within the residuals: a map that they fade would not come back."""
    width: int = attention.channels  # pyright: ignore[reportAssignmentType]
    if config.conv_gate != "none":
        gate = ConvGate(width)
        attention = nn.Sequential(*([gate, attention] if config.conv_gate == "pre" else [attention, gate]))
    ffn = GatedFFN(width, expansion=config.ffn_expansion)
    channels = [ChannelAttention(width, form="efficient")] if config.channel_attention else []
    return SwinBlock(width, attention, ffn=nn.Sequential(ffn, *channels))
