"""The stages of HERSR that conditions reach: experts at the bottleneck, texture at the end."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..blocks import FiLM, ModulatedNoiseConv2d, MoE2d, NoiseField
from ..blocks.precision import at_least_float32
from ..blocks.tiling import Tiling, tiling_of
from .stage import Conditioned, Context

LARGEST_NOISE = 3.0


@dataclass
class HERSRContext(Context):
    """What one pass of HERSR knows besides.

    Args:
        prompt: a vector for each image (B, D), or a map (B, D, h, w) of the bottleneck's size.
        noise: what the texture stage adds; in eval None is none, in training it is drawn.
    """

    prompt: Tensor | None = None
    noise: NoiseField | None = None


class ExpertBottleneck(Conditioned):
    r"""Experts for the coarsest map: :math:`y = x' + \sum_i g_i(x', p) E_i(x')` with :math:`x' = \mathrm{FiLM}(x, p)`.

    Args:
        moe: the mixture.
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
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(prompt, film, moe)

    def forward(self, x: Tensor, context: HERSRContext) -> Tensor:
        conditions = []
        if self.film is not None:
            conditions = [self._prompt(x, context, self.film.condition_channels)]
            x = self.film(x, conditions[0])
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
