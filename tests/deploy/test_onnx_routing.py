"""ONNX of the routing, run by onnxruntime with numbers of tokens other than the exported one."""

import pytest
import torch
from torch import nn

from claritycore.kernels import expert_mlp, route_top_k
from tests.deploy.test_onnx import DYNAMIC, check, pytestmark  # noqa: F401
from tests.strategies import normal

TOKENS = {0: DYNAMIC}


class Choice(nn.Module):
    def __init__(self, k) -> None:
        super().__init__()
        self.k = k

    def forward(self, logits, bias=None):
        return route_top_k(logits, self.k, bias=bias)


@pytest.mark.parametrize(("k", "biased"), [(1, False), (3, True)])
def test_the_choice_with_other_numbers_of_tokens(k, biased):
    def make(tokens):
        logits = (2 * normal((tokens, 5))).round()  # with ties
        return logits, *([normal((5,), seed=1)] if biased else [])

    check(Choice(k), make, [7, 1, 40], (TOKENS, *([{}] if biased else [])))


class Routed(nn.Module):
    def __init__(self, k, activation) -> None:
        super().__init__()
        self.k, self.activation = k, activation
        w1, w2 = normal((4, 6, 3), seed=1), normal((4, 3, 6), seed=2)
        experts = {"w1": w1, "b1": normal((4, 6), seed=3), "w2": w2, "b2": normal((4, 3), seed=4)}
        self.experts = nn.ParameterDict(experts)

    def forward(self, x, logits):
        weights, indices = route_top_k(logits, self.k)
        indices = torch.where(logits.sum(1, keepdim=True) > 1, -1, indices)
        return expert_mlp(x, weights, indices, **self.experts, activation=self.activation)


@pytest.mark.parametrize(("k", "activation"), [(1, "relu"), (2, "gelu")])
def test_the_experts_with_other_numbers_of_tokens(k, activation):
    def make(tokens):
        return normal((tokens, 3)), normal((tokens, 4), seed=5)

    check(Routed(k, activation), make, [6, 1, 50], (TOKENS, TOKENS))


def test_an_expert_that_nobody_chose_changes_nothing():
    net = Routed(1, "gelu")
    with torch.no_grad():
        for value in net.experts.values():
            value[3] = float("nan")

    def make(tokens):
        return normal((tokens, 3)), normal((tokens, 4), seed=5) - torch.tensor([0.0, 0.0, 0.0, 50.0])

    check(net, make, [6], (TOKENS, TOKENS))
