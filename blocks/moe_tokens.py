"""The experts of tokens: the weights of many pointwise networks in four tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.expert_routing import expert_mlp
from .experts import PointwiseExpert
from .initialisation import fill
from .moe_dispatch import Assignment


class StackedExperts(nn.Module):
    """Pointwise experts of one width, which a token is taken to by its assignment.

    Shape:
        ``(T, C)`` -> ``(T, C)``

    Args:
        experts: whose weights are taken over.

    Source:
        Outrageously Large Neural Networks (arXiv:1701.06538), section 2; grouped as `expert_mlp` takes them.

    >>> experts = StackedExperts([PointwiseExpert(8), PointwiseExpert(8)])
    >>> assignment = Assignment(torch.tensor([[1]] * 5), torch.ones(5, 1), (1, 1, 5), None)
    >>> experts(torch.randn(5, 8), assignment).shape
    torch.Size([5, 8])
    """

    def __init__(self, experts: Sequence[PointwiseExpert]) -> None:
        super().__init__()
        self.w1 = _stacked([expert.fc1.weight for expert in experts])
        self.b1 = _stacked([expert.fc1.bias for expert in experts])
        self.w2 = _stacked([expert.fc2.weight for expert in experts])
        self.b2 = _stacked([expert.fc2.bias for expert in experts])

    def forward(self, tokens: Tensor, assignment: Assignment) -> Tensor:
        return expert_mlp(tokens, assignment.weights, assignment.indices, self.w1, self.b1, self.w2, self.b2)

    def extra_repr(self) -> str:
        return f"{self.w1.shape[0]}, {self.w1.shape[2]}, hidden={self.w1.shape[1]}"


def _stacked(parameters: Sequence[Tensor]) -> nn.Parameter:
    each = [parameter.detach() for parameter in parameters]
    stacked = each[0].new_empty(len(each), *each[0].shape)
    fill(stacked, lambda out: torch.stack(each, out=out))
    return nn.Parameter(stacked)
