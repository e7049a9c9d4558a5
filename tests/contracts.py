"""One row of truth per public block: how to build it, and what it promises. The property tests come from here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from claritycore import blocks
from claritycore.kernels.memory_format import in_format_of, memory_format_of

Shape = tuple[int, ...]


def same(shape: Shape) -> Shape:
    return shape


def upsampled(scale: int, channels: int | None = None) -> Callable[[Shape], Shape]:
    return lambda shape: (shape[0], channels or shape[1], scale * shape[2], scale * shape[3])


def downsampled(scale: int, channels: int | None = None) -> Callable[[Shape], Shape]:
    return lambda shape: (shape[0], channels or shape[1], -(-shape[2] // scale), -(-shape[3] // scale))


def both_bands(shape: Shape) -> Shape:
    return shape[0], 2 * shape[1], *shape[2:]


def louder(block: nn.Module, factor: float) -> nn.Module:
    """Scale every parameter: where a block starts near zero, its output would be little but rounding."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(factor)
    return block


@dataclass(frozen=True)
class Contract:
    """What a block promises.

    Args:
        build: makes the block for a number of channels.
        out_shape: output shape from input shape.
        channels: numbers of channels it is tried with; one that it was not built for must raise.
        any_channels: it takes whatever channels come.
        pixels: how many a map must have for every parameter to matter: in a scan over one, nothing decays.
        stride: pixels along a side to one of the coarsest map within; of one with a side of 1 torch exports a program
            of its own.
        tile_safe: an output pixel depends on input pixels within `receptive_radius` alone.
        fuses: it has a deployed form.
    """

    build: Callable[[int], nn.Module]
    out_shape: Callable[[Shape], Shape] = same
    channels: tuple[int, ...] = (1, 4)
    any_channels: bool = False
    pixels: int = 1
    stride: int = 1
    tile_safe: bool = True
    fuses: bool = False

    def make(self, channels: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """Build the block with every parameter off its initial value, so that no zero hides a path."""
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed also writes down a traceback for each device: 4 ms
        block = self.build(channels)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return block.to(dtype)


class SkipFusionOfOne(blocks.SkipFusion):
    """Both inputs are the same map: the properties are those of blocks that take one."""

    def forward(self, x):
        return super().forward(x, x)


class BandsOfOne(blocks.FreqSplit2d):
    """Both bands as one map, and the condition, where there is one, from the map itself."""

    def forward(self, x):
        condition = x.mean((2, 3)) if self.condition_channels and x.ndim == 4 and x.is_floating_point() else None
        bands = super().forward(x, condition)
        return torch.cat([bands.low, bands.high], dim=1)


class FreqFuseOfOne(blocks.FreqFuse):
    """The bands are two maps that go with no split."""

    def forward(self, x):
        return super().forward(x, (x.square(), x))


class HighPassAndOne(blocks.HighPass):
    """With the map beside it: of a flat one the edges are nothing but rounding."""

    def forward(self, x):
        return torch.cat([x, super().forward(x)], dim=1)


class FrequencyCrossAttentionOfOne(blocks.FrequencyCrossAttention):
    """Two maps of one, and both outputs as one."""

    def forward(self, x):
        bands = super().forward((x, x.square()))
        return torch.cat([bands.low, bands.high], dim=1)


class MoEOfOne(blocks.MoE2d):
    """The map alone, without where its regions went."""

    def forward(self, x):
        return super().forward(x)[0]


def decided(moe):
    """Let how strong a pixel is decide alone, and clearly: ties are near only where its root mean square is 1."""
    with torch.no_grad():
        moe.router.linear.weight.zero_()
        moe.router.linear.weight[:, -1] = torch.arange(3.0) * 3
    return moe


class ProbabilitiesOfOne(blocks.TopKRouter):
    """The probabilities of the experts as a map."""

    def forward(self, x):
        route = super().forward(x)
        return (
            route.probabilities.view(*route.grid, self.num_experts)
            .permute(0, 3, 1, 2)
            .to(x.dtype)
            .contiguous(memory_format=memory_format_of(x))
        )


def style_of(x: torch.Tensor, width: int) -> torch.Tensor:
    """A style that is the same for all maps."""
    row = torch.linspace(0.5, 1.5, width, dtype=x.dtype, device=x.device)
    return row.expand(x.shape[0] if x.ndim == 4 else 1, width)


class ModulatedConvOfOne(blocks.ModulatedConv2d):
    def forward(self, x):
        return super().forward(x, style_of(x, self.style_channels))


class ModulatedNoiseConvOfOne(blocks.ModulatedNoiseConv2d):
    def forward(self, x):
        return super().forward(x, style_of(x, self.conv.style_channels), blocks.NoiseField(3))


class NoiseInjectionByField(blocks.NoiseInjection):
    def forward(self, x):
        return super().forward(x, blocks.NoiseField(3))


class TextureHeadOfOne(blocks.TextureHead):
    """The image is the features."""

    def forward(self, x):
        return super().forward(x, x, blocks.NoiseField(3))


def constants(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """The same numbers whatever the map, for conditions that come from elsewhere."""
    return torch.arange(math.prod(shape), device=like.device).to(like.dtype).sin().view(shape)


class FiLMOfOne(blocks.FiLM):
    """Conditioned on numbers of its own."""

    def forward(self, x):
        return super().forward(x, constants(x, 1, self.condition_channels).expand(x.shape[0], -1))


class CrossAttention2dOfOne(blocks.CrossAttention2d):
    """With three tokens of its own."""

    def forward(self, x):
        return super().forward(x, constants(x, 1, 3, self.token_channels).expand(x.shape[0], -1, -1))


class PromptOfOne(blocks.PromptGenerator):
    """A vector as a map of one pixel."""

    def forward(self, x):
        prompt = super().forward(x)
        return prompt if prompt.ndim == 4 else prompt[:, :, None, None]


class EstimateOfOne(blocks.DegradationEstimator):
    """The numbers as a map of one pixel."""

    def forward(self, x):
        return super().forward(x).condition()[:, :, None, None]


class KernelsOfOne(blocks.KernelPrior):
    """The kernels of the codes, each as a map."""

    tile_safe = False

    def forward(self, x):
        return in_format_of(self.reconstruct(super().forward(x))[:, None], x)


def one_pixel(channels: int) -> Callable[[Shape], Shape]:
    return lambda shape: (shape[0], channels, 1, 1)


# By class, and after a blank by form where a class has several.
BRANCHES = ("5x5", "3x3@2", "1x1", "identity", "1x1-3x3", "average", "laplacian")
ATTENTION = {"channels": (4, 8), "pixels": 5}
PLK = {"channels": (4, 8), "fuses": True}

CONTRACTS: dict[str, Contract] = {
    "LayerNorm2d": Contract(blocks.LayerNorm2d, channels=(2, 4)),
    "RMSNorm2d": Contract(blocks.RMSNorm2d),
    "ResidualDenseBlock": Contract(lambda c: blocks.ResidualDenseBlock(c, growth_channels=2)),
    "RRDB": Contract(lambda c: blocks.RRDB(c, growth_channels=2)),
    "PixelShuffleUp": Contract(lambda c: blocks.PixelShuffleUp(c, 3, scale_factor=3), upsampled(3, 3)),
    "RepConv2d": Contract(lambda c: blocks.RepConv2d(c, kernel_size=5, branches=BRANCHES), fuses=True),
    "RepConv2d depthwise": Contract(
        lambda c: blocks.RepConv2d(c, kernel_size=9, groups=c, branches=("9x9", "5x5@2", "identity")), fuses=True
    ),
    "RepConv2d strips": Contract(
        lambda c: blocks.RepConv2d(c, 3, kernel_size=7, padding_mode="reflect", branches=("7x3", "3x7", "1x1")),
        lambda shape: (shape[0], 3, *shape[2:]),
        fuses=True,
    ),
    "PartialLargeKernelConv": Contract(
        lambda c: blocks.PartialLargeKernelConv(c, kernel_size=9, split_ratio=0.5, form="dilated"), **PLK
    ),
    "PartialLargeKernelConv dense": Contract(
        lambda c: blocks.PartialLargeKernelConv(c, kernel_size=5, split_ratio=1.0), **PLK
    ),
    "PartialLargeKernelConv depthwise": Contract(
        lambda c: blocks.PartialLargeKernelConv(c, kernel_size=7, split_ratio=0.5, form="depthwise"), **PLK
    ),
    "PartialLargeKernelConv rectangular": Contract(
        lambda c: blocks.PartialLargeKernelConv(c, kernel_size=9, split_ratio=0.5, form="rectangular"), **PLK
    ),
    "ElementwiseAttention": Contract(blocks.ElementwiseAttention),
    "DoubleConvChannelMixer": Contract(blocks.DoubleConvChannelMixer),
    "DoubleConvChannelMixer branches": Contract(
        lambda c: blocks.DoubleConvChannelMixer(c, branches=("3x3", "1x1", "1x1-3x3")), fuses=True
    ),
    "PLKBlock": Contract(lambda c: blocks.PLKBlock(c, kernel_size=5, form="dilated", norm="layer"), **PLK),
    "PLKBlock group norm": Contract(
        lambda c: blocks.PLKBlock(
            c, kernel_size=5, norm="group", mixer=blocks.DoubleConvChannelMixer(c, activation="mish")
        ),
        channels=(8, 16),
        tile_safe=False,
        fuses=True,
    ),
    "SPAB": Contract(lambda c: louder(blocks.SPAB(c), 1.5), fuses=True),
    "BicubicUp": Contract(lambda c: blocks.BicubicUp(2), upsampled(2), any_channels=True),
    "DySample": Contract(
        lambda c: blocks.DySample(c, groups=2, dyscope=True), upsampled(2), channels=(2, 4), tile_safe=False, pixels=2
    ),
    "DySample pl": Contract(
        lambda c: blocks.DySample(c, scale_factor=3, style="pl", groups=3, dyscope=True),
        upsampled(3),
        channels=(9, 18),
        tile_safe=False,
        pixels=2,
    ),
    "MSGDown": Contract(lambda c: blocks.MSGDown(c, 6), downsampled(2, 6)),
    "MSGDown unshuffle": Contract(lambda c: blocks.MSGDown(c, 8, form="unshuffle"), downsampled(2, 8)),
    "MSGUp": Contract(lambda c: blocks.MSGUp(c, 3), upsampled(2, 3), channels=(4, 8)),
    "MSGUp expand": Contract(lambda c: blocks.MSGUp(c, 3, form="expand"), upsampled(2, 3)),
    "MSGUp dysample": Contract(
        lambda c: blocks.MSGUp(c, 3, form="dysample"), upsampled(2, 3), channels=(2, 4), tile_safe=False, pixels=2
    ),
    "SkipFusion": Contract(SkipFusionOfOne),
    "SkipFusion add": Contract(lambda c: SkipFusionOfOne(c, form="add")),
    "OverlapPatchEmbed": Contract(
        lambda c: blocks.OverlapPatchEmbed(c, 6, kernel_size=5, stride=2, bias=True), downsampled(2, 6)
    ),
    "GatedFFN": Contract(lambda c: blocks.GatedFFN(c, bias=True)),
    "ConvGate": Contract(blocks.ConvGate),
    "NAFBlock": Contract(blocks.NAFBlock, channels=(2, 4), tile_safe=False),
    "NAFBlock group norm": Contract(
        lambda c: blocks.NAFBlock(c, norm_groups=2), channels=(4, 8), pixels=2, tile_safe=False
    ),
    "NAFBlock window": Contract(lambda c: blocks.NAFBlock(c, window_size=5), channels=(2, 4)),
    # With so many numbers in between that one of them survives the ReLU.
    "ChannelAttention": Contract(lambda c: blocks.ChannelAttention(c, reduction=1), channels=(1, 16), tile_safe=False),
    "ChannelAttention efficient": Contract(
        lambda c: blocks.ChannelAttention(c, form="efficient", kernel_size=3), tile_safe=False
    ),
    # Of windows of 3 shifted by 1, the middle of a map of 9 is the first pixel of one: it reaches as far as any.
    "WindowAttention2d": Contract(
        lambda c: louder(blocks.WindowAttention2d(c, c // 2, window_size=3, shift=1), 3), **ATTENTION
    ),
    "WindowAttention2d cosine": Contract(
        lambda c: louder(blocks.WindowAttention2d(c, c // 2, window_size=3, shift=1, bias="cpb", cosine=True), 0.7),
        **ATTENTION,
    ),
    "WindowAttention2d dilated": Contract(
        lambda c: louder(blocks.WindowAttention2d(c, 1, window_size=(2, 2), dilation=2, bias="dynamic"), 1.5),
        **ATTENTION,
    ),
    "OverlappingCrossAttention": Contract(
        lambda c: louder(blocks.OverlappingCrossAttention(c, c // 2, window_size=2, overlap_ratio=1.0), 3), **ATTENTION
    ),
    "GridAttention": Contract(
        lambda c: louder(blocks.GridAttention(c, c // 2, grid_size=3), 3), tile_safe=False, **ATTENTION
    ),
    "HybridAttention": Contract(
        lambda c: louder(blocks.HybridAttention(c, c // 2, window_size=3, shift=1, global_size=2), 3),
        tile_safe=False,
        **ATTENTION,
    ),
    "HybridAttention grid": Contract(
        lambda c: louder(blocks.HybridAttention(c, c // 2, window_size=3, form="grid", global_size=0), 3),
        tile_safe=False,
        **ATTENTION,
    ),
    "SwinBlock": Contract(
        lambda c: blocks.SwinBlock(c, blocks.WindowAttention2d(c, c // 2, window_size=3, shift=1), mlp_ratio=2),
        **ATTENTION,
    ),
    "SwinBlock residual scale": Contract(
        lambda c: blocks.SwinBlock(c, blocks.WindowAttention2d(c, 2, window_size=3, shift=1), residual_scale=0.2),
        **ATTENTION,
    ),
    "SwinBlock post norm": Contract(
        lambda c: blocks.SwinBlock(
            c, blocks.WindowAttention2d(c, 2, window_size=3, shift=1, cosine=True), post_norm=True
        ),
        **ATTENTION,
    ),
    "ConvAttention": Contract(
        lambda c: blocks.ConvAttention(
            c, blocks.WindowAttention2d(c, 2, window_size=3), compress=1, reduction=1, scale=0.5
        ),
        tile_safe=False,
        **ATTENTION,
    ),
    "TransposedAttention": Contract(
        lambda c: blocks.TransposedAttention(c, num_heads=2, bias=True), channels=(4, 8), tile_safe=False, pixels=2
    ),
    # Five pixels of which one lies in no corner: clamped there, an offset may be without effect.
    "DeformableAttention2d": Contract(
        lambda c: blocks.DeformableAttention2d(c, num_heads=2), channels=(4, 8), tile_safe=False, pixels=5
    ),
    "DeformableAttention2d groups": Contract(
        lambda c: blocks.DeformableAttention2d(c, num_heads=4, groups=2, stride=2, kernel_size=3),
        channels=(8, 16),
        tile_safe=False,
        pixels=13,
        stride=2,
    ),
    "FreqSplit2d": Contract(BandsOfOne, both_bands, pixels=2, tile_safe=False),
    "FreqSplit2d conditioned": Contract(
        lambda c: BandsOfOne(c, cutoff=[0.15 + 0.02 * i for i in range(c)], condition_channels=c),
        both_bands,
        pixels=2,
        tile_safe=False,
    ),
    "FreqSplit2d dct": Contract(lambda c: BandsOfOne(c, kind="dct"), both_bands, pixels=2, tile_safe=False),
    "FreqSplit2d blur": Contract(lambda c: BandsOfOne(c, kind="blur"), both_bands),
    "FreqSplit2d haar": Contract(lambda c: BandsOfOne(c, kind="haar"), both_bands, stride=2),
    "FreqSplit2d avgpool": Contract(lambda c: BandsOfOne(c, kind="avgpool"), both_bands, stride=2),
    "FreqSplit2d laplacian": Contract(lambda c: BandsOfOne(c, kind="laplacian"), both_bands, stride=2),
    "FreqFuse": Contract(FreqFuseOfOne),
    "FreqFuse no gate": Contract(lambda c: FreqFuseOfOne(c, gate=None, max_gain=2.0)),
    "FreqFuse attention": Contract(
        lambda c: louder(FreqFuseOfOne(c, gate=blocks.FrequencyCrossAttention(c, c // 2, window_size=3, shift=1)), 3),
        **ATTENTION,
    ),
    "FreqSep": Contract(lambda c: blocks.FreqSep(c), pixels=2, tile_safe=False),
    "FreqSep paths": Contract(
        lambda c: blocks.FreqSep(
            c,
            split=blocks.FreqSplit2d(c, kind="haar"),
            structure=blocks.RepConv2d(c, kernel_size=5),
            texture=blocks.ElementwiseAttention(c),
        ),
        pixels=2,
        stride=2,
        fuses=True,
    ),
    "SpectralMix2d": Contract(blocks.SpectralMix2d, tile_safe=False),
    "HighPass": Contract(blocks.HighPass, pixels=2),
    "HighPass laplacian": Contract(lambda c: blocks.HighPass(c, kind="laplacian"), pixels=2),
    "HighPass learned": Contract(lambda c: HighPassAndOne(c, kind="learned", kernel_size=5), both_bands, pixels=2),
    "FrequencyCrossAttention": Contract(
        lambda c: louder(FrequencyCrossAttentionOfOne(c, c // 2, window_size=3, shift=1), 3), both_bands, **ATTENTION
    ),
    "PointwiseExpert": Contract(blocks.PointwiseExpert),
    "ConvExpert": Contract(lambda c: blocks.ConvExpert(c, kernel_size=5)),
    "DetailExpert": Contract(blocks.DetailExpert),
    "TextureExpert": Contract(blocks.TextureExpert),
    "DeblurExpert": Contract(lambda c: blocks.DeblurExpert(c, kernel_size=3)),
    "DenoiseExpert": Contract(lambda c: blocks.DenoiseExpert(c, kernel_size=3), pixels=2),
    "ArtifactExpert": Contract(blocks.ArtifactExpert),
    "AttentionExpert": Contract(
        lambda c: louder(blocks.AttentionExpert(c, c // 2, window_size=2), 3), channels=(4, 8), pixels=5
    ),
    "FrequencyExpert": Contract(lambda c: blocks.FrequencyExpert(c, window_size=2), stride=2, pixels=2),
    "TopKRouter": Contract(
        lambda c: ProbabilitiesOfOne(c, 3), lambda shape: (shape[0], 3, *shape[2:]), channels=(2, 4)
    ),
    # Every expert for every region, but for one row: at near ties rounding decides on the choice.
    "MoE2d": Contract(lambda c: MoEOfOne(c, [blocks.PointwiseExpert(c) for _ in range(2)])),
    "MoE2d choosing": Contract(
        lambda c: decided(MoEOfOne(c, [blocks.PointwiseExpert(c) for _ in range(3)], k=1)),
    ),
    "MoE2d window": Contract(
        lambda c: MoEOfOne(
            c, [blocks.DetailExpert(c), blocks.ConvExpert(c, kernel_size=3)], level="window", window_size=2
        ),
        stride=2,
    ),
    "MoE2d image": Contract(
        lambda c: MoEOfOne(c, [blocks.TextureExpert(c), blocks.PointwiseExpert(c)], level="image"), tile_safe=False
    ),
    "ModulatedConv2d": Contract(
        lambda c: ModulatedConvOfOne(c, 6, style_channels=3), lambda shape: (shape[0], 6, *shape[2:])
    ),
    "ModulatedConv2d up": Contract(
        lambda c: ModulatedConvOfOne(c, 3, style_channels=3, resample="up"), upsampled(2, 3)
    ),
    "ModulatedConv2d down": Contract(
        lambda c: ModulatedConvOfOne(c, 5, style_channels=3, resample="down", demodulate=False),
        downsampled(2, 5),
        stride=2,
    ),
    "NoiseInjection": Contract(NoiseInjectionByField),
    "ModulatedNoiseConv2d": Contract(lambda c: ModulatedNoiseConvOfOne(c, c, style_channels=3, kernel_size=5)),
    "ModulatedNoiseConv2d up": Contract(
        lambda c: ModulatedNoiseConvOfOne(c, 3, style_channels=3, kernel_size=5, resample="up", clamp=256.0),
        upsampled(2, 3),
    ),
    "TextureHead": Contract(lambda c: TextureHeadOfOne(c, c, limit=1.0), pixels=9, tile_safe=False),
    "FiLM": Contract(lambda c: louder(FiLMOfOne(c, 5), 5)),
    "CrossAttention2d": Contract(lambda c: louder(CrossAttention2dOfOne(c, 5, num_heads=2), 3), channels=(4, 8)),
    "PromptGenerator": Contract(lambda c: PromptOfOne(c, 6, num_prompts=3), one_pixel(6), tile_safe=False),
    "PromptGenerator grid": Contract(
        lambda c: PromptOfOne(c, 6, num_prompts=3, form="grid", size=3),
        lambda shape: (shape[0], 6, *shape[2:]),
        tile_safe=False,
        pixels=4,
    ),
    "PromptGenerator spatial": Contract(
        lambda c: PromptOfOne(c, 6, num_prompts=3, form="spatial"), lambda shape: (shape[0], 6, *shape[2:])
    ),
    "LocalStatistics": Contract(lambda c: blocks.LocalStatistics(5), both_bands, any_channels=True),
    "DegradationEstimator": Contract(
        lambda c: EstimateOfOne(c, widths=(4, 6), hidden=8), one_pixel(3), stride=4, tile_safe=False
    ),
    "KernelPrior": Contract(lambda c: blocks.KernelPrior(c, cell=4), downsampled(4, 8), stride=4),
    "KernelPrior kernels": Contract(
        lambda c: KernelsOfOne(c, cell=4, kernel_size=5), lambda shape: (shape[0], 1, 5, 5), stride=4, tile_safe=False
    ),
    "SelectiveScan2d": Contract(lambda c: blocks.SelectiveScan2d(c, d_state=4), tile_safe=False, pixels=2),
    "SSMGlobalMixer": Contract(lambda c: blocks.SSMGlobalMixer(c, d_state=4, gate=0.5), tile_safe=False, pixels=2),
}
