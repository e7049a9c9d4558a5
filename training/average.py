"""The exponential moving average of a net's weights."""

import copy

import torch
from torch import nn


class Average:
    """A copy of a net whose weights follow the net's, slowly.

    After step t (counted from 0) the average is ``d a + (1 - d) w`` with ``d = min(decay, (1 + t) / (10 + t))``, so
    that the start values are soon forgotten. Buffers, such as the statistics of batch norms, are those of the net.

    Args:
        net: whose weights are averaged; the average starts as they are.
        decay: the largest share of the old average that a step keeps.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> average = Average(net, 0.999)
    >>> nn.init.constant_(net.weight, 1.0) is nn.init.constant_(average.net.weight, 0.0)
    False
    >>> average.update(net, 0)  # d = 0.1
    >>> average.net.weight
    Parameter containing:
    tensor([[0.9000]])
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Take in the weights that step number `step` has made."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for mine, theirs in zip(self.net.parameters(), net.parameters(), strict=True):
            mine.lerp_(theirs, 1 - decay)
        for mine, theirs in zip(self.net.buffers(), net.buffers(), strict=True):
            mine.copy_(theirs)
