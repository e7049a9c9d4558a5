"""The routing is right: every form against loops over tokens in float64, outputs and all gradients.

Errors are relative to the largest value of the truth.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claritycore.kernels import expert_mlp, expert_mlp_reference, route_top_k, route_top_k_reference
from claritycore.kernels.expert_routing import fallback, group_by_expert
from tests.kernels.closeness import CPU, GRADIENT_ERROR, OUTPUT_ERROR, assert_close, error

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


@settings(max_examples=8)
@given(case=cases(st.integers(1, 5), st.integers(1, 3), experts=3))
def test_triton_agrees(case, device):
    assert_right(case, "triton", device)


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(form, activation):
    assert_right(Case(5, activation=activation), *form)


SEAMS = [
    Case(1, 1, 1, 1, 1),
    Case(70, 3, 2, 2, 1, skipped=0),  # an expert has more than one block
    Case(3, 40, 70, 2, 1),  # more channels, and more hidden ones, than a block has at the least
    Case(3, k=4),  # all experts
    Case(4, experts=17, k=1),  # more experts than tokens
    Case(4, skipped=1),  # nobody chooses anybody
]


@pytest.mark.parametrize("case", SEAMS, ids=str)
def test_every_form_agrees_at_the_seams(case, form):
    assert_right(case, *form)


def test_triton_divides_the_assignments(device, monkeypatch):
    fused = pytest.importorskip("claritycore.kernels.expert_routing.fused")
    fused_backward = pytest.importorskip("claritycore.kernels.expert_routing.fused_backward")
    monkeypatch.setattr(fused, "ROWS", 16)
    for programs in (1, 3, 1000):  # all to one, unevenly, one block each
        monkeypatch.setattr(fused_backward, "PROGRAMS_PER_PROCESSOR", programs)
        assert_right(Case(60, channels=2, hidden=3, experts=2, k=1, skipped=0), "triton", device)


def test_the_fallback_agrees_whatever_it_cuts(monkeypatch):
    monkeypatch.setattr(fallback, "ROWS", 5)
    assert_right(Case(40), "torch", CPU)


def test_an_expert_may_come_twice(form):
    backend, device = form
    inputs = Case(6, k=2).inputs(device)
    inputs["indices"] = inputs["indices"][:, :1].expand(-1, 2)
    assert_close(run(inputs, backend), run(inputs | {n: inputs[n].cpu() for n in (*TENSORS, "indices")}, "reference"))


# The choice


def choose(logits, k, bias, backend):
    """Weights, indices and the gradient of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    weights, indices = route_top_k(leaf, k, bias=bias, backend=backend)
    upstream = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).to(weights)
    return weights.detach(), indices, torch.autograd.grad(weights, leaf, upstream)[0]


def loop_of_choice(logits, k, bias):
    """The formula, token by token."""
    weights, indices = [], []
    for row in logits.double().tolist():
        powers = [math.exp(value - max(row)) for value in row]
        p = [power / sum(powers) for power in powers]
        scores = row if bias is None else [a + b for a, b in zip(p, bias.tolist(), strict=True)]
        chosen = sorted(range(len(row)), key=lambda e: (-scores[e], e))[:k]
        indices.append(chosen)
        weights.append([p[e] / (sum(p[i] for i in chosen) if k > 1 else 1) for e in chosen])
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(indices)


def logits_of(tokens, experts, kind, device=CPU):
    generator = torch.Generator().manual_seed(tokens * experts)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    if kind == "ties":  # of few values
        logits = (2 * logits).round() / 2
    bias = torch.randn(experts, generator=generator, dtype=torch.float64) / 4 if kind == "bias" else None
    return logits.to(device), None if bias is None else bias.to(device)


KINDS = st.sampled_from(["plain", "ties", "bias"])


@given(tokens=st.integers(1, 9), experts=st.integers(1, 9), k=st.integers(1, 9), kind=KINDS)
def test_the_choice_of_the_reference_is_the_formula(tokens, experts, k, kind):
    logits, bias = logits_of(tokens, experts, kind)
    weights, indices = route_top_k_reference(logits, min(k, experts), bias)
    expected, chosen = loop_of_choice(logits, min(k, experts), bias)
    assert torch.equal(indices, chosen)
    assert error(weights, expected) <= 1e-14


@given(tokens=st.integers(1, 60), experts=st.integers(1, 20), k=st.integers(1, 20), kind=KINDS)
def test_the_choice_of_the_fallback_agrees(tokens, experts, k, kind):
    assert_same_choice(tokens, experts, min(k, experts), kind, "torch", CPU)


@settings(max_examples=12)
@given(tokens=st.integers(1, 9), experts=st.integers(1, 9), k=st.integers(1, 4), kind=KINDS)
def test_the_choice_of_triton_agrees(tokens, experts, k, kind, device):
    assert_same_choice(tokens, experts, min(k, experts), kind, "triton", device)


def assert_same_choice(tokens, experts, k, kind, backend, device):
    logits, bias = logits_of(tokens, experts, kind)
    placed = logits.to(device), k, None if bias is None else bias.to(device)
    for results in (choose(*placed, backend), choose(placed[0].float(), k, placed[2], backend)):
        # Scores of float32 may come in another order only where float32 makes another choice of them.
        truth = choose(logits if results[0].dtype == torch.float64 else logits.float(), k, bias, "reference")
        assert torch.equal(results[1].cpu(), truth[1])
        tight = results[0].dtype == torch.float64
        assert error(results[0], truth[0]) <= (1e-14 if tight else OUTPUT_ERROR)
        scale = max(1.0, truth[2].abs().max().item())
        assert (results[2].cpu() - truth[2]).abs().max() <= (1e-14 if tight else GRADIENT_ERROR) * scale


@pytest.mark.parametrize("tokens", [3, 700])
def test_the_choice_of_triton_agrees_over_many_programs(tokens, device, monkeypatch):
    fused_route = pytest.importorskip("claritycore.kernels.expert_routing.fused_route")
    monkeypatch.setattr(fused_route, "TILE", 256)
    assert_same_choice(tokens, 5, 2, "ties", "triton", device)


# The grouping


@given(tokens=st.integers(0, 30), experts=st.integers(1, 9), k=st.integers(1, 3))
def test_groups_are_stable_and_whole(tokens, experts, k):
    indices = torch.randint(-1, experts, (tokens, k), generator=torch.Generator().manual_seed(tokens))
    groups = group_by_expert(indices, experts)
    flat = indices.flatten().tolist()
    lists = [[a for a, e in enumerate(flat) if e == expert] for expert in (*range(experts), -1)]
    assert groups.order.tolist() == [a for each in lists for a in each]
    assert groups.counts.tolist() == [len(each) for each in lists[:-1]]
    assert torch.equal(groups.order[groups.inverse()], torch.arange(tokens * k))


@pytest.mark.parametrize("experts", [3, 300])  # beyond a byte
def test_triton_groups_alike(experts, device, monkeypatch):
    fused_route = pytest.importorskip("claritycore.kernels.expert_routing.fused_route")
    monkeypatch.setattr(fused_route, "TILE", 64)
    indices = torch.randint(-1, experts, (150, 2), generator=torch.Generator().manual_seed(0))
    groups, expected = fused_route.group(indices.to(device), experts), group_by_expert(indices, experts)
    assert all(torch.equal(got.cpu(), want) for got, want in zip(groups, expected, strict=True))


def test_wrong_numbers_would_be_seen():
    inputs = Case(5).inputs()
    turned = inputs | {"weights": inputs["weights"].flip(1)}
    assert error(expert_mlp(**turned), loop(**inputs)) > 1e3 * OUTPUT_ERROR
