"""The routing is right: every form against loops over tokens in float64, outputs and all gradients.

Errors are relative to the largest value of the truth.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from claritycore.kernels import expert_mlp, expert_mlp_reference
from tests.kernels.test_selective_scan import CPU, assert_close, error

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu")
TENSORS = ("x", "weights", "w1", "b1", "w2", "b2")


@dataclass(frozen=True)
class Case:
    """One combination of sizes and options."""

    tokens: int
    channels: int = 5
    hidden: int = 7
    experts: int = 4
    k: int = 2
    activation: str = "gelu"
    skipped: float = 0.2
    crowded: bool = False

    def inputs(self, device=CPU, dtype=torch.float64):
        """The arguments of one call; the same numbers whatever the device and dtype."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        indices = torch.rand(self.tokens, self.experts, generator=generator).argsort(-1)[:, : self.k]
        if self.crowded:  # and some expert may have no token
            indices = (indices - 1).clamp(min=0)
        indices = indices.masked_fill(torch.rand(indices.shape, generator=generator) < self.skipped, -1)
        return {
            "x": draw(self.tokens, self.channels),
            "weights": draw(self.tokens, self.k),
            "indices": indices.to(device),
            "w1": draw(self.experts, self.hidden, self.channels) / math.sqrt(self.channels),
            "b1": draw(self.experts, self.hidden),
            "w2": draw(self.experts, self.channels, self.hidden) / math.sqrt(self.hidden),
            "b2": draw(self.experts, self.channels),
            "activation": self.activation,
        }


def cases(tokens, sides, experts=6):
    return st.integers(1, experts).flatmap(
        lambda experts: st.builds(
            Case,
            tokens=tokens,
            channels=sides,
            hidden=sides,
            experts=st.just(experts),
            k=st.integers(1, experts),
            activation=st.sampled_from(ACTIVATIONS),
            skipped=st.sampled_from([0, 0.3, 1]),
            crowded=st.booleans(),
        )
    )


def run(inputs, backend):
    """y and the gradient of every input, by name."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in TENSORS}
    y = expert_mlp(**inputs | leaves, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_right(case, backend, device):
    assert_close(run(case.inputs(device, torch.float32), backend), run(case.inputs(), "reference"))


def loop(x, weights, indices, w1, b1, w2, b2, activation):
    """The formula, token by token."""
    curve = {
        "relu": lambda z: max(z, 0),
        "leaky_relu": lambda z: z if z > 0 else 0.2 * z,
        "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
        "silu": lambda z: z / (1 + math.exp(-z)),
    }[activation]
    x, weights, indices, w1, b1, w2, b2 = (v.numpy() for v in (x, weights, indices, w1, b1, w2, b2))
    y = np.zeros(x.shape)
    for t, slot in np.ndindex(indices.shape):
        e = indices[t, slot]
        if e >= 0:
            hidden = np.array([curve(z) for z in w1[e] @ x[t] + b1[e]])
            y[t] += weights[t, slot] * (w2[e] @ hidden + b2[e])
    return torch.from_numpy(y)


@given(case=cases(st.integers(1, 9), st.integers(1, 6)))
def test_the_reference_is_the_formula(case):
    assert error(expert_mlp_reference(**case.inputs()), loop(**case.inputs())) <= 1e-14


@given(case=cases(st.integers(1, 40), st.integers(1, 20)))
def test_the_fallback_agrees(case):
    assert_right(case, "torch", CPU)
