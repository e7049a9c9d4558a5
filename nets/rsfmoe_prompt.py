"""How RSFMoENet finds out what is wrong with an image, and what it holds back where that is little."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import DegradationEstimate, KernelPrior, PromptGenerator
from ..blocks.degradation_features import blockiness, edge_width
from ..blocks.precision import at_least_float32
from .busyness import AROUND, GREY_LEVELS
from .rsfmoe_parts import RSFMoEContext
from .stage import Conditioned

GAIN = 4.0  # brings `faults`, which differ by some tenths, to the spread of `traces`


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


def faults(image: Tensor) -> Tensor:
    """How wide edges are, and how far the blocks of a JPEG show, (B, 2, 1, 1): what means over a map cannot tell.

    Logarithms of `edge_width` and `blockiness`: by `traces` alone blurred images and JPEGs look like good photographs.

    >>> faults(torch.full((1, 3, 8, 8), 0.5))[0, 1].item()
    0.0
    """
    return GAIN * torch.stack([edge_width(image), blockiness(image)], dim=1).log()[:, :, None, None]


class DegradationPrompt(Conditioned):
    """Find out what is wrong with the image and tell it by the context; the map is passed on as it is.

    A prompt from the `traces` of the map and the `faults` of the image, where none is given; with a prior the code of
    the blur kernel, and what kernel it stands for; with a severity how severe the prompt says the blur is, from 0 at so
    many pixels of its deviation to 1 at one more. Kernel and estimate go to the `Aux`, where training holds them
    against what was drawn.

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
        self.generator = PromptGenerator(2 * channels + 2, prompt_channels) if prompt_channels else None
        self.prior, self.severe_blur = prior, severe_blur
        self.reading = None if severe_blur is None else nn.Linear(prompt_channels, 3)
        # A fresh reading says the same of every image: a blur of 1.4 pixels.
        for parameter in [] if self.reading is None else self.reading.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: RSFMoEContext) -> Tensor:
        if self.generator is not None:
            context.prompt = self._prompt(self.generator, x, context)
        if self.prior is not None:
            code = context.code = self.prior(x)
            if self.prior.kernel_size is not None:
                context.aux.kernels = self.prior.reconstruct(code)
        if self.reading is not None and self.severe_blur is not None and context.prompt is not None:
            estimate = DegradationEstimate.of_logits(self.reading(context.prompt))
            context.aux.degradation = estimate
            context.severity = (estimate.blur - self.severe_blur).clamp(0, 1)
        return x

    def _prompt(self, generator: PromptGenerator, x: Tensor, context: RSFMoEContext) -> Tensor:
        given = context.prompt
        if given is not None and not self.training:
            return given.to(x.dtype)
        seen = x.new_zeros(len(x), 2, 1, 1) if context.faults is None else context.faults
        made = generator(torch.cat([traces(x), seen.to(x.dtype)], dim=1))
        # Distributed training wants a gradient for every parameter: those of what is not used are zero.
        return made if given is None else given.to(x.dtype) + 0 * made


class ResidualGate(Conditioned):
    r"""Hold the last map back where there is little to mend: :math:`y = x \, \sigma(W d + b)`, image by image.

    d is what the prompt says, and the mean code. What the net adds to the image is made of y, so that it leaves a good
    photograph alone by one number, instead of by many that must cancel. W starts at zero, b at 2.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        condition_channels: of d, prompt and mean code.
    """

    def __init__(self, condition_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(condition_channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 2.0)

    def forward(self, x: Tensor, context: RSFMoEContext) -> Tensor:
        return x * self.linear(context.conditions()).sigmoid()[:, :, None, None]
