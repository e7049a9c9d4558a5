"""What a net returns besides the image."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..blocks import DegradationEstimate, RouteResult


@dataclass
class Aux:
    """Losses that the net's own parts ask for, and statistics worth watching.

    Args:
        losses: scalar losses by name, already weighted.
        statistics: tensors by name; no gradient is needed of them.
        degradation: what a `DegradationEstimator` of the net says of its input.
        kernels: what a `KernelPrior` of the net reconstructs (B, k, k). Training holds both against what was drawn.
        structure: what a branch of low frequencies makes of the image alone, at half the size of the net's input.
            Training holds it against the clean image made as small.

    >>> Aux({"balance": torch.tensor(0.5), "z": torch.tensor(0.25)}).total()
    tensor(0.7500)
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    degradation: DegradationEstimate | None = None
    kernels: Tensor | None = None
    structure: Tensor | None = None

    def add_route(self, name: str, route: RouteResult) -> None:
        """Take in the losses and the statistics of a router, under its name in the net.

        >>> aux = Aux()
        >>> route = RouteResult(torch.zeros(3, 1).long(), torch.ones(3, 1), torch.full((3, 2), 0.5), (1, 1, 3))
        >>> aux.add_route("body.0", route)
        >>> aux.statistics["body.0.dead_experts"]
        tensor(1)
        """
        self.losses.update({f"{name}.{key}": value for key, value in route.losses.items()})
        self.statistics.update({f"{name}.{key}": value for key, value in route.statistics().items()})

    def total(self) -> Tensor:
        """Sum of all losses; zero where there are none.

        >>> Aux().total()
        tensor(0.)
        """
        return torch.stack(list(self.losses.values())).sum() if self.losses else torch.zeros(())


@dataclass
class RestorationOutput:
    """A restored image with what came up on the way: `net(image, return_aux=True)`.

    Args:
        image: the restored image (B, C, s H, s W).
        aux: losses and statistics of the net's parts.

    >>> RestorationOutput(torch.zeros(1, 3, 8, 8)).aux.total()
    tensor(0.)
    """

    image: Tensor
    aux: Aux = field(default_factory=Aux)
