"""The early exit of RSFMoENet: how confident it is of an image, and the blocks that such an image passes by."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.moe_dispatch import computes_all
from ..blocks.precision import at_least_float32
from ..blocks.tiling import tiling_of
from ..kernels.memory_format import in_format_of
from .rsfmoe_parts import RSFMoEContext
from .stage import Conditioned, Stage

# Of the mean absolute difference of an early image, at which a confidence of 1 / e is right: a grey level.
EXIT_TOLERANCE = 1 / 255
EXIT_WEIGHT = 0.1


class ExitConfidence(Conditioned):
    """How sure one may be that an image needs no block of the decoder; the map is passed on as it is.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        channels: of the map.
        least: confidence from which on an image takes the early exit, in eval.

    Source:
        BranchyNet (arXiv:1709.01686), section III: leaving early; what it is sure of is ours.
    """

    tile_safe = False

    def __init__(self, channels: int, *, least: float) -> None:
        super().__init__()
        self.linear, self.least = nn.Linear(channels, 1), least

    def forward(self, x: Tensor, context: RSFMoEContext) -> Tensor:
        means = at_least_float32(x).mean((2, 3)).to(self.linear.weight.dtype)
        context.confidence = at_least_float32(self.linear(means)).flatten()
        sure = context.confidence.detach().sigmoid()
        context.aux.statistics[f"{self.path}.confidence"] = sure
        context.exits = None if self.training else sure >= self.least
        return x

    @staticmethod
    def losses(confidence: Tensor, early: Tensor, full: Tensor) -> dict[str, Tensor]:
        """What the early image lacks, and the confidence against that: it is to be exp(-distance / a grey level)."""
        distance = (at_least_float32(early) - at_least_float32(full).detach()).abs().mean((1, 2, 3))
        right = (-distance.detach() / EXIT_TOLERANCE).exp()
        surprise = F.binary_cross_entropy_with_logits(confidence, right)
        return {"confidence": EXIT_WEIGHT * surprise, "early": EXIT_WEIGHT * distance.mean()}


class Skippable(Conditioned):
    """Blocks of the decoder that images with an early exit pass by.

    Shape:
        - x: ``(B, C, H, W)``
        - returns: ``(B, C, H, W)``

    Args:
        blocks: modules as `Stage` takes them.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stage = Stage(*blocks)
        self.tile_safe, self.receptive_radius, self.tile_multiple = tiling_of(self.stage)

    def forward(self, x: Tensor, context: RSFMoEContext) -> Tensor:
        if context.plain:
            return x
        if context.exits is None:
            return self.stage(x, context)
        if computes_all(x):
            return torch.where(context.exits[:, None, None, None], x, self.stage(x, context))
        rest = context.exits.logical_not().nonzero().flatten()
        if len(rest) == 0:
            return x
        return in_format_of(x.index_copy(0, rest, self.stage(x[rest], context.of(rest))), x)
