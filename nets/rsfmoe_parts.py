"""The parts of RSFMoENet that are told what the degradation is: prompt, large kernels, attention, texture experts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import (
    DeblurExpert,
    DegradationEstimate,
    DenoiseExpert,
    DetailExpert,
    FiLM,
    FreqSep,
    KernelPrior,
    MoE2d,
    NoiseField,
    NoiseInjection,
    PLKBlock,
    PromptGenerator,
    RouteResult,
    SwinBlock,
    TextureExpert,
    TopKRouter,
)
from ..blocks.padding import cropped
from ..blocks.precision import at_least_float32
from ..blocks.tiling import tiling_of
from .busyness import AROUND, GREY_LEVELS, start_gate
from .stage import Conditioned, Context

EXPERTS = (DetailExpert, TextureExpert, DeblurExpert, DenoiseExpert)


@dataclass
class RSFMoEContext(Context):
    """What one pass of RSFMoENet knows besides.

    Args:
        prompt: of each image (B, D); given, or made by `DegradationPrompt`.
        code: of the blur kernels (B, N, h, w), one for each cell of the net's stride.
        busyness: of the padded image (B, 1, H, W), see `busyness`.
        severity: how severe the blur is (B,), between 0 and 1.
        noise: names the noise, where the image begins in the whole; without one there is none in eval.
        samples: numbers of the images in the batch, where these are not all of it.
        confidence: logits of the confidence in an early exit (B,).
        exits: whether each image takes it (B,).
        plain: whether all images take it.
    """

    prompt: Tensor | None = None
    code: Tensor | None = None
    busyness: Tensor | None = None
    severity: Tensor | None = None
    noise: NoiseField | None = None
    samples: Tensor | None = None
    confidence: Tensor | None = None
    exits: Tensor | None = None
    plain: bool = False

    def of(self, images: Tensor) -> "RSFMoEContext":
        """What is known of these images of the batch, by number."""
        names = ("prompt", "code", "busyness", "severity")
        values = {name: getattr(self, name) for name in names}
        chosen = {name: None if value is None else value[images] for name, value in values.items()}
        return replace(self, **chosen, samples=images)

    def conditions(self) -> Tensor:
        """Prompt and mean code of each image side by side (B, D + N)."""
        codes = [] if self.code is None else [self.code.mean((2, 3))]
        return torch.cat([*([] if self.prompt is None else [self.prompt]), *codes], dim=1)


def traces(x: Tensor) -> Tensor:
    """Means of the channels, and how far pixels deviate from their surroundings, (B, 2 C, 1, 1).

    The first tell of colours alone; what noise adds to an image, and what blur takes away, is in the second: logarithms
    in grey levels, which a linear layer can read as they are.

    >>> traces(torch.full((1, 1, 4, 4), 0.5)).flatten()
    tensor([0.5000, 0.0000])
    """
    wide = at_least_float32(x)
    around = F.avg_pool2d(wide, AROUND, stride=1, padding=AROUND // 2, count_include_pad=False)
    power = (wide - around).square().mean((2, 3), keepdim=True)
    return torch.cat([wide.mean((2, 3), keepdim=True), 0.5 * (GREY_LEVELS**2 * power).log1p()], dim=1).to(x.dtype)


class DegradationPrompt(Conditioned):
    """Find out what is wrong with the image and tell it by the context; the map is passed on as it is.

    A prompt from the `traces` of the map, where none is given; with a prior the code of the blur kernel, and what
    kernel it stands for; with a severity how severe the prompt says the blur is, from 0 at so many pixels of its
    deviation to 1 at one more. Kernel and estimate go to the `Aux`, where training holds them against what was drawn.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        channels: of the map.
        prompt_channels: of the prompt, 0 for none.
        prior: of the blur kernels, or None.
        severe_blur: deviation of a blur in pixels from which on it is severe, or None.
    """

    tile_safe = False

    def __init__(
        self, channels: int, *, prompt_channels: int, prior: KernelPrior | None, severe_blur: float | None
    ) -> None:
        super().__init__()
        self.generator = PromptGenerator(2 * channels, prompt_channels) if prompt_channels else None
        self.prior, self.severe_blur = prior, severe_blur
        self.reading = None if severe_blur is None else nn.Linear(prompt_channels, 3)
        # A fresh reading says the same of every image: a blur of 1.4 pixels.
        for parameter in [] if self.reading is None else self.reading.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: RSFMoEContext) -> Tensor:
        if self.generator is not None:
            context.prompt = self._prompt(self.generator, x, context.prompt)
        if self.prior is not None:
            code = context.code = self.prior(x)
            if self.prior.kernel_size is not None:
                context.aux.kernels = self.prior.reconstruct(code)
        if self.reading is not None and self.severe_blur is not None and context.prompt is not None:
            estimate = DegradationEstimate.of_logits(self.reading(context.prompt))
            context.aux.degradation = estimate
            context.severity = (estimate.blur - self.severe_blur).clamp(0, 1)
        return x

    def _prompt(self, generator: PromptGenerator, x: Tensor, given: Tensor | None) -> Tensor:
        if given is None:
            return generator(traces(x))
        # Distributed training wants a gradient for every parameter: those of what is not used are zero.
        return given.to(x.dtype) + (0 * generator(traces(x)) if self.training else 0)


class SteeredBlock(Conditioned):
    r"""A block of attention whose logits the prompt scales: :math:`\lambda = \exp(\tanh(W d))` for each head.

    W starts at zero, and the scale at 1; it stays between 1 / e and e.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        block: with an attention of `num_heads` that takes a ``logit_scale``.
        condition_channels: of d, prompt and mean code; 0 for a block that nothing steers.
    """

    def __init__(self, block: SwinBlock, num_heads: int, *, condition_channels: int) -> None:
        super().__init__()
        self.block = block
        self.steer = nn.Linear(condition_channels, num_heads, bias=False) if condition_channels else None
        if self.steer is not None:
            nn.init.zeros_(self.steer.weight)
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(block)

    def forward(self, x: Tensor, context: RSFMoEContext) -> Tensor:
        if self.steer is None:
            return self.block(x)
        return self.block(x, at_least_float32(self.steer(context.conditions())).tanh().exp())


class ModulatedBlock(Conditioned):
    """A block of large kernels whose result prompt and mean code scale and shift, see `FiLM`; afresh they do neither.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        block: of large kernels.
        condition_channels: of prompt and mean code; 0 for a block that nothing modulates.
    """

    def __init__(self, block: PLKBlock, *, condition_channels: int) -> None:
        super().__init__()
        self.block = block
        self.film = FiLM(block.channels, condition_channels) if condition_channels else None
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(block)

    def forward(self, x: Tensor, context: RSFMoEContext) -> Tensor:
        y = self.block(x)
        return y if self.film is None else self.film(y, context.conditions())


class TextureMixture(Conditioned):
    """Texture experts for the high frequencies: by windows, the hard ones alone, with noise where blur is severe.

    The router is told the busyness of the image in each window, the code of the blur kernel, and the prompt; its gate
    starts as one that flat windows do not pass. Noise is as strong as the router is sure, times the severity of blur.

    Shape:
        - high: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        channels: of the map.
        router: of 2 C channels, told so many conditions; see `MoE2d`.
        window_size: side of the windows.
        stride: pixels of the image to one of the map.
        cell: side of the cells of kernel codes in pixels of the map.
        noise: what is added to the texture, or None.
        layer: which of the net's noises this is.
    """

    def __init__(
        self,
        channels: int,
        router: TopKRouter,
        *,
        window_size: int,
        stride: int,
        cell: int,
        noise: NoiseInjection | None,
        layer: int,
    ) -> None:
        super().__init__()
        experts = [kind(channels) for kind in EXPERTS]
        self.moe = MoE2d(channels, experts, level="window", window_size=window_size, router=router)
        self.stride, self.cell, self.noise, self.layer = stride, cell, noise, layer
        self.tile_safe, self.tile_multiple = self.moe.tile_safe, self.moe.tile_multiple
        around = -(-(AROUND // 2) // stride)
        self.receptive_radius = max(self.moe.receptive_radius, window_size - 1 + around)
        start_gate(router)

    def forward(self, high: Tensor, context: RSFMoEContext) -> Tensor:
        y, route = self.moe(high, self._conditions(high, context))
        context.aux.add_route(self.path, route)
        if self.noise is None or context.severity is None:
            return y
        gate = self._confidence(route, y) * context.severity[:, None, None, None]
        return self.noise(y, self._field(context), gate)

    def _conditions(self, high: Tensor, context: RSFMoEContext) -> list[Tensor]:
        found: list[Tensor] = []
        if context.busyness is not None:
            found.append(F.avg_pool2d(context.busyness, self.stride))
        if context.code is not None:
            found.append(_spread(context.code, self.cell))
        return found if context.prompt is None else [*found, context.prompt]

    def _confidence(self, route: RouteResult, like: Tensor) -> Tensor:
        """How sure the router is at each pixel, (B, 1, H, W)."""
        windows = _spread(route.confidence()[:, None], self.moe.window_size)
        return cropped(windows, like.shape[2], like.shape[3])

    def _field(self, context: RSFMoEContext) -> NoiseField | None:
        given = context.noise
        if given is None:
            return None
        offset = (given.offset[0] // self.stride, given.offset[1] // self.stride)
        samples = given.samples if context.samples is None else context.samples
        if given.samples is not None and context.samples is not None:
            samples = torch.as_tensor(given.samples, device=context.samples.device)[context.samples]
        return NoiseField(given.seed, given.layer + self.layer, samples, offset)


class FrequencyUnit(Conditioned):
    """A `FreqSep` whose texture path is told the context.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        separation: with a `Conditioned` as its texture path.
    """

    def __init__(self, separation: FreqSep) -> None:
        super().__init__()
        self.separation = separation
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(separation)

    def forward(self, x: Tensor, context: RSFMoEContext) -> Tensor:
        return self.separation(x, texture_condition=context)


def _spread(cells: Tensor, side: int) -> Tensor:
    """Give each pixel what its cell has: (B, C, h, w) -> (B, C, side h, side w)."""
    return cells[:, :, :, None, :, None].expand(-1, -1, -1, side, -1, side).flatten(4, 5).flatten(2, 3)
