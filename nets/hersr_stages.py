"""The stages of HERSR, from its config: two paths, experts at the bottleneck, texture at the end."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..blocks import (
    AttentionExpert,
    ConvExpert,
    FiLM,
    FreqSep,
    FreqSplit2d,
    FrequencyExpert,
    ImportanceBalance,
    ModulatedNoiseConv2d,
    MoE2d,
    NoiseField,
    PartialLargeKernelConv,
    PromptGenerator,
    SpectralMix2d,
    SwitchBalance,
    TopKRouter,
)
from ..blocks.precision import at_least_float32
from ..blocks.tiling import Tiling, tiling_of
from .busyness import start_gate
from .dual_path import AtHalfSize, DualPath, SplitEntry, context_path, local_path
from .stage import Conditioned, Context, Stage

if TYPE_CHECKING:
    from .hersr import HERSRConfig

LARGEST_NOISE = 3.0


@dataclass
class HERSRContext(Context):
    """What one pass of HERSR knows besides.

    Args:
        prompt: a vector for each image (B, D), or a map (B, D, h, w) of the bottleneck's size.
        noise: what the texture stage adds; in eval None is none, in training it is drawn.
        busyness: of the image (B, 1, h, w), in the bottleneck's size, for a gate that passes by what is easy.
    """

    prompt: Tensor | None = None
    noise: NoiseField | None = None
    busyness: Tensor | None = None


class ExpertBottleneck(Conditioned):
    r"""Experts for the coarsest map: :math:`y = x' + \sum_i g_i(x', p) E_i(x')` with :math:`x' = \mathrm{FiLM}(x, p)`.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        moe: the mixture; the gate of its router, if it has one, is told how busy the image is, and the router p.
        prompt: what makes p of the map; None takes the one of the pass, which is zero where it has none.
        film: what p modulates the map by; without one there is no p.

    >>> from claritycore.blocks import DetailExpert, DenoiseExpert
    >>> from claritycore.nets import Aux
    >>> moe, context = MoE2d(8, [DetailExpert(8), DenoiseExpert(8)], level="image"), HERSRContext(1, Aux())
    >>> ExpertBottleneck(moe)(torch.zeros(1, 8, 5, 7), context).shape
    torch.Size([1, 8, 5, 7])
    """

    def __init__(self, moe: MoE2d, *, prompt: nn.Module | None = None, film: FiLM | None = None) -> None:
        super().__init__()
        self.moe, self.prompt, self.film = moe, prompt, film
        self.gated = moe.router.gate is not None
        # How busy a cell is, pixels of the next one tell too.
        around = Tiling(True, int(self.gated), 1)
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(around, prompt, film, moe)

    def forward(self, x: Tensor, context: HERSRContext) -> Tensor:
        conditions = [context.busyness] if self.gated and context.busyness is not None else []
        if self.film is not None:
            conditions.append(self._prompt(x, context, self.film.condition_channels))
            x = self.film(x, conditions[-1])
        y, route = self.moe(x, conditions)
        context.aux.add_route(self.path, route)
        return y

    def _prompt(self, x: Tensor, context: HERSRContext, width: int) -> Tensor:
        if self.prompt is not None:
            return self.prompt(x)
        return x.new_zeros(x.shape[0], width) if context.prompt is None else context.prompt


class TextureStage(Conditioned):
    r"""Modulated convolution with noise, :math:`y = \sqrt 2 \, \mathrm{lrelu}(\mathrm{ModConv}(x, v) + a n + b)`.

    The style v is the mean of each channel over the map, or ones. The strength a of the noise is learned, and starts
    at zero.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        channels: number of channels.
        constant: whether the style is ones, so that nothing depends on the whole map.

    Source:
        StyleGAN2 (arXiv:1912.04958), figure 2.

    >>> from claritycore.nets import Aux
    >>> TextureStage(8)(torch.zeros(1, 8, 5, 7), HERSRContext(1, Aux())).shape
    torch.Size([1, 8, 5, 7])
    """

    def __init__(self, channels: int, *, constant: bool = False) -> None:
        super().__init__()
        self.constant = constant
        self.conv = ModulatedNoiseConv2d(channels, channels, style_channels=channels, noise_clamp=LARGEST_NOISE)
        own = Tiling(constant, 0, 1)
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(own, self.conv)

    def forward(self, x: Tensor, context: HERSRContext) -> Tensor:
        wide = at_least_float32(x)
        style = wide.new_ones(x.shape[:2]) if self.constant else wide.mean((2, 3))
        return self.conv(x, style, context.noise)


def encoder_stage(config: "HERSRConfig", scale: int) -> Stage:
    """Both paths at one scale, 0 the finest, where the first map is split by frequency for them."""
    first, *others = (_block(config, scale, shifted=place % 2 == 1) for place in range(config.depths[scale]))
    if scale > 0 or config.split == "none":
        return Stage(first, *others)
    return Stage(SplitEntry(FreqSplit2d(config.widths[0], kind=config.split), first), *others)


def decoder_stage(config: "HERSRConfig", scale: int) -> Stage:
    """The same blocks, then low and high frequencies weighted anew."""
    # The first block is shifted, so that a stage of one differs from that of the encoder.
    blocks = [_block(config, scale, shifted=place % 2 == 0) for place in range(config.depths[scale])]
    if config.split == "none":
        return Stage(*blocks)
    width = config.widths[scale]
    return Stage(*blocks, FreqSep(width, split=FreqSplit2d(width, kind=config.split)))


def _block(config: "HERSRConfig", scale: int, *, shifted: bool) -> DualPath:
    width, whole = config.widths[scale], config.statistics == "map"
    local = local_path(
        width,
        kernel_size=config.kernel_size,
        form=config.form,
        norm_groups=config.norm_groups if whole else None,
        mean_window=None if whole else 2 * config.window_size - 1,
    )
    context = context_path(
        width,
        width // config.head_dim,
        window_size=config.window_size,
        shifted=shifted,
        mlp_ratio=config.mlp_ratio,
        overlap_ratio=config.overlap_ratio,
    )
    return DualPath(width, local=local, context=AtHalfSize(width, context) if scale == 0 else context)


def bottleneck(config: "HERSRConfig") -> ExpertBottleneck:
    """Experts for images or windows, by prompt where there is one, past what a gate finds easy."""
    width, number, prompted = config.widths[-1], len(config.experts), config.prompt != "none"
    k = number if config.k is None else config.k
    # Where everything goes to all experts, the shares of choices are even: what can be balanced is the weights.
    balance = ImportanceBalance(config.balance) if k == number else SwitchBalance(config.balance)
    condition, gated = config.prompt_dim if prompted else 0, config.bypass > 0
    router = TopKRouter(
        2 * width,
        number,
        k=k,
        condition_channels=gated + condition,
        bypass=config.bypass,
        policies=(balance,),
    )
    start_gate(router)
    form = "spatial" if config.statistics == "local" else "vector"
    return ExpertBottleneck(
        MoE2d(
            width,
            [_expert(config, name) for name in config.experts],
            level=config.level,
            window_size=config.window_size,
            router=router,
        ),
        prompt=PromptGenerator(width, condition, form=form) if config.prompt == "generated" else None,
        film=FiLM(width, condition) if prompted else None,
    )


def _expert(config: "HERSRConfig", name: str) -> nn.Module:
    width, size = config.widths[-1], config.window_size
    if name == "attention":
        return AttentionExpert(width, width // config.head_dim, window_size=size)
    if name == "frequency":
        whole = config.level == "image" and config.frequency == "fft"
        return SpectralMix2d(width) if whole else FrequencyExpert(width, window_size=size)
    if config.level == "window":
        return ConvExpert(width, kernel_size=config.kernel_size)
    large = PartialLargeKernelConv(width, kernel_size=config.kernel_size, form=config.form)
    return nn.Sequential(large, ConvExpert(width, kernel_size=3))
