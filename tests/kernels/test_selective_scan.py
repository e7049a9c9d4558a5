"""The selective scan is right: every form against the formula in float64, outputs and all gradients.

Errors are relative to the largest value of the truth.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claritycore.kernels.selective_scan import fallback_windows, selective_scan, selective_scan_reference
from tests.kernels.closeness import CPU, assert_close

TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """One combination of sizes and options."""

    length: int
    batch: int = 1
    channels: int = 4
    state: int = 3
    groups: int = 1
    constant_B: bool = False
    constant_C: bool = False
    D: bool = True
    z: bool = True
    bias: bool = True
    softplus: bool = True
    initial: bool = True
    reverse: bool = False

    def inputs(self, device=CPU, dtype=torch.float64):
        """The arguments of one call; the same numbers whatever the device and dtype."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        over_time = self.batch, self.channels, self.length
        varying, constant = (self.batch, self.groups, self.state, self.length), (self.channels, self.state)
        delta = draw(*over_time)
        return {
            "u": draw(*over_time),
            "delta": delta if self.softplus else delta.abs() / 2,
            "A": -draw(*constant).exp(),
            "B": draw(*(constant if self.constant_B else varying)),
            "C": draw(*(constant if self.constant_C else varying)),
            "D": draw(self.channels) if self.D else None,
            "z": draw(*over_time) if self.z else None,
            "delta_bias": (draw(self.channels) - 2 if self.softplus else draw(self.channels).abs() / 4)
            if self.bias
            else None,
            "initial_state": draw(self.batch, *constant) if self.initial else None,
            "delta_softplus": self.softplus,
            "reverse": self.reverse,
        }


def cases(lengths, batches=(1, 2)):
    flag = st.booleans()
    return st.builds(
        lambda per_group, **options: Case(channels=per_group * options["groups"], **options),
        per_group=st.integers(1, 3),
        length=lengths,
        batch=st.sampled_from(batches),
        state=st.integers(1, 5),
        groups=st.integers(1, 2),
        **dict.fromkeys(("constant_B", "constant_C", "D", "z", "bias", "softplus", "initial", "reverse"), flag),
    )


def run(inputs, backend):
    """y, the last state and the gradient of every input, by name."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    y, state = selective_scan(**{**inputs, **leaves}, return_last_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (y, state)]
    if inputs["reverse"]:
        upstream[0] = upstream[0].flip(-1)
    # The reference does not link an empty y to its inputs.
    roots, upstream = zip(*((x, g) for x, g in zip((y, state), upstream, strict=True) if x.requires_grad), strict=True)
    gradients = torch.autograd.grad(roots, list(leaves.values()), upstream, materialize_grads=True)
    results = {"y": y, "last_state": state} | {f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def assert_right(case, backend, device):
    assert_close(run(case.inputs(device, torch.float32), backend), run(case.inputs(), "reference"))


def loop(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    """The formula, number by number."""
    batch, channels, length = u.shape
    y, state = np.zeros(u.shape), np.zeros((batch, *A.shape)) if initial_state is None else np.array(initial_state)

    def at(x, b, d, t):
        return x[d] if x.ndim == 2 else x[b, d * x.shape[1] // channels, :, t]

    for t in reversed(range(length)) if reverse else range(length):
        for b, d in np.ndindex(batch, channels):
            step = delta[b, d, t] + (0 if delta_bias is None else delta_bias[d])
            step = np.logaddexp(0, step) if delta_softplus else step
            state[b, d] = np.exp(step * A[d]) * state[b, d] + step * at(B, b, d, t) * u[b, d, t]
            y[b, d, t] = at(C, b, d, t) @ state[b, d] + (0 if D is None else D[d]) * u[b, d, t]
            y[b, d, t] *= 1 if z is None else z[b, d, t] / (1 + np.exp(-z[b, d, t]))
    return torch.from_numpy(y), torch.from_numpy(state)


def numbers(inputs):
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@given(case=cases(st.integers(0, 20)))
def test_the_reference_is_the_formula(case):
    y, state = selective_scan_reference(**case.inputs(), return_last_state=True)
    assert_close(
        {"y": y, "state": state}, dict(zip(("y", "state"), loop(**numbers(case.inputs())), strict=True)), 1e-13
    )


@given(case=cases(st.integers(0, 300)))
def test_the_fallback_agrees(case):
    assert_right(case, "torch", CPU)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 255, 1023, 2049, 5000])
def test_the_fallback_agrees_at_every_length(length, softplus, monkeypatch):
    five_chunks = 5 * 32 * 2 * 3
    monkeypatch.setattr(fallback_windows, "WINDOW_ELEMENTS", five_chunks)
    assert_right(Case(length, channels=2, softplus=softplus, reverse=length % 2 == 0), "torch", CPU)


@settings(max_examples=settings.default.max_examples * 2 // 5)
@given(case=cases(st.integers(0, 9)))
def test_triton_agrees(case, device):
    assert_right(case, "triton", device)


@pytest.mark.parametrize(
    "case",
    [
        Case(70, channels=2, reverse=True),
        Case(65, channels=2, constant_B=True, constant_C=True, z=False, D=False),
        Case(300, channels=1, initial=False),
        Case(3, channels=70, state=16, z=False),  # more channels than a program holds
        Case(3, channels=90, state=16, groups=2),  # and in groups that do not fill it
        Case(3, channels=3, state=150),
        Case(3, channels=3, state=256),
    ],
    ids=str,
)
def test_triton_agrees_at_its_seams(case, device):
    assert_right(case, "triton", device)


def test_triton_agrees_without_chunks(device, monkeypatch):
    fused = pytest.importorskip("claritycore.kernels.selective_scan.fused")
    monkeypatch.setattr(fused, "PROGRAMS_PER_PROCESSOR", 0)
    assert_right(Case(67, channels=2, z=False), "triton", device)


@pytest.mark.slow
def test_a_very_long_scan():
    case = Case(200_000, channels=1, state=2)
    y, state = selective_scan(**case.inputs(dtype=torch.float32), return_last_state=True)
    truth = loop(**numbers(case.inputs()))
    assert_close({"y": y, "state": state}, dict(zip(("y", "state"), truth, strict=True)))
