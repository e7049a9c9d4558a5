"""What a router decided: which experts, how much of each, and how well they share the work."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEAD_SHARE = 0.1
"""An expert is dead that gets less than this part of its even share."""


@dataclass
class RouteResult:
    """Where each region (token, window or image) goes, with the losses and the statistics of that.

    T regions are routed: all of them, row by row and image by image, or those that a gate keeps.

    Args:
        indices: numbers of the chosen experts, ``(T, k)``.
        weights: of their outputs, ``(T, k)``; they add up to 1 for k > 1, and are the probability for k = 1.
        probabilities: softmax over all experts, ``(T, E)``, in float32 (float64).
        grid: images, rows and columns of regions.
        losses: by name, already weighted; in training alone.
        regions: where a gate keeps some regions alone: their places in the grid, flattened, ``(T,)``.
        gate: how much of all outputs they take up, between 0 and 1, ``(T,)``.

    >>> route = RouteResult(torch.tensor([[0], [0], [1]]), torch.ones(3, 1), torch.full((3, 4), 0.25), (1, 1, 3))
    >>> route.load(), route.dead_experts().item(), route.total()
    (tensor([0.6667, 0.3333, 0.0000, 0.0000]), 2, tensor(0.))
    """

    indices: Tensor
    weights: Tensor
    probabilities: Tensor
    grid: tuple[int, int, int]
    losses: dict[str, Tensor] = field(default_factory=dict)
    regions: Tensor | None = None
    gate: Tensor | None = None

    def total(self) -> Tensor:
        """Sum of all losses; zero where there are none."""
        return torch.stack(list(self.losses.values())).sum() if self.losses else self.probabilities.new_zeros(())

    def counts(self) -> Tensor:
        """How often each expert was chosen, ``(E,)``."""
        return counts_of(self.indices, self.probabilities)

    def load(self) -> Tensor:
        """The share of each expert in all choices, ``(E,)``; zeros where no region was routed."""
        return self.counts() / _number_of(self.indices)

    def max_violation(self) -> Tensor:
        """How far the busiest expert is above its even share: 0 when balanced, E - 1 when it gets everything."""
        return self.load().max() * self.probabilities.shape[1] - 1

    def utilisation(self) -> Tensor:
        """How evenly the experts are used: the entropy of the load, as a part of the largest possible."""
        return utilisation_of(self.counts())

    def entropy(self) -> Tensor:
        """Mean entropy of the probabilities of a region, as a part of the largest possible: how undecided it is."""
        entropies = normalised_entropy(self.probabilities)
        return entropies.sum() / _number_of(entropies)

    def confidence(self) -> Tensor:
        """How sure the router is of each region of the grid, (B, h, w): 1 less the entropy, times the gate.

        0 where it is undecided and where a region is left alone, 1 where one expert has all of the probability.

        >>> RouteResult(torch.zeros(2, 1).long(), torch.ones(2, 1), torch.eye(2), (1, 1, 2)).confidence()
        tensor([[[1., 1.]]])
        """
        most = math.log(max(self.probabilities.shape[1], 2))
        # Not torch.special.entr, whose gradient at 0 is infinite.
        floor = torch.finfo(self.probabilities.dtype).tiny
        return self._gated(1 + (self.probabilities * self.probabilities.clamp(min=floor).log()).sum(-1) / most)

    def share(self, expert: int) -> Tensor:
        """How probable the router finds an expert in each region of the grid, (B, h, w), times the gate.

        0 where a region is left alone.

        >>> kept, gate = torch.tensor([1]), torch.tensor([0.5])
        >>> RouteResult(kept[:, None], torch.ones(1, 1), torch.eye(2)[:1], (1, 1, 2), {}, kept, gate).share(0)
        tensor([[[0.0000, 0.5000]]])
        """
        return self._gated(self.probabilities[:, expert])

    def dead_experts(self) -> Tensor:
        """How many experts get less than a tenth of their even share."""
        return (self.load() < DEAD_SHARE / self.probabilities.shape[1]).sum()

    def kept_share(self) -> float:
        """The share of regions that were routed; the others passed by all experts."""
        # A program has a row for every region, and a gate of 0 where it passes by.
        routed = self.indices.shape[0] if self.gate is None else int((self.gate > 0).sum())
        return routed / max(math.prod(self.grid), 1)

    def statistics(self) -> dict[str, Tensor]:
        """All of these by name, without gradients."""
        images, rows, columns = self.grid
        everywhere = self.probabilities.new_ones(images * rows * columns)
        gate = self.probabilities.new_ones(self.probabilities.shape[0]) if self.gate is None else self.gate
        kept = (gate > 0).sum() / _number_of(everywhere)
        found = {
            "load": self.load(),
            "max_violation": self.max_violation(),
            "utilisation": self.utilisation(),
            "entropy": self.entropy(),
            "dead_experts": self.dead_experts(),
            "kept_share": kept,
        }
        return {name: value.detach() for name, value in found.items()}

    def _gated(self, values: Tensor) -> Tensor:
        """Values of the routed regions, times the gate, as those of the grid: 0 for regions that are left alone."""
        images, rows, columns = self.grid
        values = values if self.gate is None else values * self.gate
        if self.regions is not None:
            values = values.new_zeros(images * rows * columns).index_put((self.regions,), values)
        return values.view(images, rows, columns)


# Programs that are exported return it too.
torch.export.register_dataclass(RouteResult, serialized_type_name="claritycore.RouteResult")


def counts_of(indices: Tensor, probabilities: Tensor) -> Tensor:
    """How often each expert is among the indices: sums of comparisons, which no device has to wait for.

    >>> counts_of(torch.tensor([[0, 2], [2, 1]]), torch.zeros(2, 4))
    tensor([1., 1., 2., 0.])
    """
    numbers = torch.arange(probabilities.shape[1], device=indices.device)
    return (indices[..., None] == numbers).sum((0, 1)).to(probabilities.dtype)


def utilisation_of(counts: Tensor) -> Tensor:
    """How evenly experts are used that were chosen so often: from 0, where one gets all, to 1; 0 where none was chosen.

    >>> utilisation_of(torch.tensor([4.0, 4.0, 0.0, 0.0]))
    tensor(0.5000)
    """
    return normalised_entropy(counts / counts.sum().clamp(min=1))


def _number_of(values: Tensor) -> Tensor:
    """How many there are, and 1 for none: a tensor, since a number of Python's would be fixed in exported programs."""
    return torch.ones_like(values, dtype=torch.float32).sum().clamp(min=1)


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """Entropy along the last axis, divided by that of the uniform distribution; of a single number 0.

    >>> normalised_entropy(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
    tensor([1., 0.])
    """
    most = math.log(max(probabilities.shape[-1], 2))
    return torch.special.entr(probabilities).sum(-1) / most
