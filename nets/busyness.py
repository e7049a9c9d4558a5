"""How busy an image is around each pixel, and gates that leave alone where it is not."""

import torch
from torch import Tensor

from ..blocks import LocalStatistics, TopKRouter
from ..blocks.precision import at_least_float32

GREY_LEVELS = 255
# Side of the windows of which the deviation is taken; regions that are routed as one take the mean of many.
AROUND = 3
# Between the score of a gate and the logarithm of the deviation around a place, in grey levels.
GATE_SLOPE, GATE_START = 2.0, -2.0


def busyness(image: Tensor) -> Tensor:
    """The logarithm of the local deviation of an image in grey levels, (B, 1, H, W): 0 where it is flat.

    >>> busyness(torch.full((1, 3, 4, 4), 0.5)).abs().max()
    tensor(0.)
    """
    grey = at_least_float32(image).mean(1, keepdim=True)
    variance = LocalStatistics(AROUND)(grey)[:, 1:].expm1()
    return 0.5 * (GREY_LEVELS**2 * variance).log1p()


@torch.no_grad()
def start_gate(router: TopKRouter) -> None:
    """Let the gate of a router, if it has one, start by its first condition alone, `busyness`.

    Where the gate is to be 1/2, a deviation of about 2.5 grey levels opens it.

    >>> router = TopKRouter(8, 4, condition_channels=1, bypass=0.5)
    >>> start_gate(router)
    >>> [router(torch.randn(1, 8, 2, 2), [torch.full((1, 1, 2, 2), b)]).kept_share() for b in (0.9, 1.1)]
    [0.0, 1.0]
    """
    if router.gate is not None:
        router.gate.weight.zero_()
        router.gate.weight[:, router.in_channels + 1] = GATE_SLOPE
        router.gate.bias.fill_(GATE_START)
