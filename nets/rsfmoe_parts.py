"""The parts of RSFMoENet that are told what the degradation is: large kernels, attention, texture experts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import (
    DeblurExpert,
    DenoiseExpert,
    DetailExpert,
    FiLM,
    FreqSep,
    MoE2d,
    NoiseField,
    NoiseInjection,
    PLKBlock,
    RouteResult,
    SwinBlock,
    TextureExpert,
    TopKRouter,
)
from ..blocks.padding import cropped
from ..blocks.precision import at_least_float32
from ..blocks.tiling import tiling_of
from .busyness import AROUND, start_gate
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
        faults: blur and JPEG of the images (B, 2, 1, 1), for `DegradationPrompt`; None where the prompt is given.
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
    faults: Tensor | None = None

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
