"""What holds of the selective scan whatever its numbers: states, time, dtypes, layouts, repetition."""

import numpy as np
import pytest
import torch

from claritycore.kernels.selective_scan import fallback, selective_scan, selective_scan_reference
from claritycore.kernels.selective_scan.operands import Operands
from tests.kernels.closeness import CPU, GRADIENT_ERROR, OUTPUT_ERROR, assert_close, error
from tests.kernels.test_selective_scan import TENSORS, Case, run


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


def test_float64_stays_float64(form):
    backend, device = form
    case = Case(40, channels=2)
    results = run(case.inputs(device), backend)
    assert {value.dtype for value in results.values()} == {torch.float64}
    assert_close(results, run(case.inputs(), "reference"), 1e-13, 1e-12)


def test_large_steps_forget_and_never_overflow(form):
    backend, device = form
    inputs = Case(35, channels=2, bias=False).inputs(device, torch.float32)
    inputs["delta"] = inputs["delta"] * 40
    results = run(inputs, backend)
    assert all(value.isfinite().all() for value in results.values())
    assert_close(results, run({k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}, "reference"))


@pytest.mark.parametrize("raw", [-30.0, -17.0, -12.0, -8.0, -1.0, 19.9, 20.1])
def test_softplus_is_accurate_everywhere(form, raw):
    backend, device = form
    inputs = Case(1, channels=1, state=1, z=False, D=False, bias=False, initial=False).inputs(device, torch.float32)
    inputs["delta"] = torch.full_like(inputs["delta"], raw)
    truth = run({k: v.cpu().double() if torch.is_tensor(v) else v for k, v in inputs.items()}, "reference")
    results = run(inputs, backend)
    assert error(results["last_state"], truth["last_state"]) <= 3e-6
    assert error(results["gradient of delta"], truth["gradient of delta"]) <= 3e-6


def test_a_step_of_zero_leaves_the_state_as_it_is(form):
    backend, device = form
    inputs = Case(40, channels=2, softplus=False, bias=False).inputs(device, torch.float32)
    inputs["delta"] = torch.zeros_like(inputs["delta"])
    _, state = selective_scan(**inputs, return_last_state=True, backend=backend)
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_with_carried_state_are_one_scan(form, reverse):
    backend, device = form
    case = Case(48, channels=2, reverse=reverse)
    inputs = case.inputs(device, torch.float32)
    y, state = selective_scan(**inputs, return_last_state=True, backend=backend)
    pieces, carried = [], inputs["initial_state"]
    bounds = [(0, 1), (1, 35), (35, 48)]
    for start, stop in reversed(bounds) if reverse else bounds:
        over_time = {k: v[..., start:stop] for k, v in inputs.items() if k in ("u", "delta", "B", "C", "z")}
        piece = inputs | over_time | {"initial_state": carried}
        part, carried = selective_scan(**piece, return_last_state=True, backend=backend)
        pieces.append(part)
    whole = torch.cat(pieces[::-1] if reverse else pieces, dim=-1)
    assert error(whole, y) <= OUTPUT_ERROR
    assert error(carried, state) <= OUTPUT_ERROR


def test_reverse_is_flip_scan_flip(form):
    backend, device = form
    inputs = Case(35, channels=2).inputs(device, torch.float32)
    flipped = {k: v.flip(-1) if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    backwards = run(inputs | {"reverse": True}, backend)
    forwards = run(flipped, backend)
    for name, value in forwards.items():
        over_time = name == "y" or name.removeprefix("gradient of ") in ("u", "delta", "B", "C", "z")
        assert error(backwards[name], value.flip(-1) if over_time else value) <= 1e-6


def test_gradients_repeat_bit_for_bit(form):
    backend, device = form
    inputs = Case(35, channels=2).inputs(device, torch.float32)
    once, again = run(inputs, backend), run(inputs, backend)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_sample_does_not_depend_on_its_batch(form):
    backend, device = form
    inputs = Case(35, batch=2, channels=1).inputs(device, torch.float32)
    single = {k: v[1:] if k in ("u", "delta", "B", "C", "z", "initial_state") else v for k, v in inputs.items()}
    y, alone = selective_scan(**inputs, backend=backend), selective_scan(**single, backend=backend)
    assert error(alone, y[1:]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_the_cast(form, dtype):
    backend, device = form
    half = {k: v.to(dtype) if k in ("u", "delta", "B", "C", "z") else v
            for k, v in Case(40, channels=3).inputs(device, torch.float32).items()}  # fmt: skip
    wide = {k: v.float() if torch.is_tensor(v) else v for k, v in half.items()}
    truth = run({k: v.cpu().double() if torch.is_tensor(v) else v for k, v in half.items()}, "reference")
    results = run(half, backend)
    cast = {name: value.to(results[name].dtype) for name, value in run(wide, backend).items()}
    assert results["y"].dtype == results["gradient of B"].dtype == dtype
    assert results["last_state"].dtype == results["gradient of A"].dtype == torch.float32
    for name in ("y", "last_state"):
        assert error(results[name], truth[name]) <= 1.1 * error(cast[name], truth[name])
    # The gradient of y arrives in half, too; beyond that the gradients are those of float32.
    assert_close(results, truth, 1e-2, 1e-2)


def test_the_output_may_be_wider_than_the_input(form):
    backend, device = form
    inputs = Case(20, channels=2).inputs(device, torch.float32)
    half = {k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    y = selective_scan(**half, out_dtype=torch.float32, backend=backend)
    truth = selective_scan_reference(**{k: v.cpu().double() if torch.is_tensor(v) else v for k, v in half.items()})
    assert y.dtype == torch.float32
    assert error(y, truth) <= OUTPUT_ERROR


def test_views_are_accepted_and_left_alone(form):
    backend, device = form
    inputs = Case(20, channels=4, groups=2, batch=2).inputs(device, torch.float32)
    truth = run(inputs, backend)
    views = dict(inputs)
    for name in TENSORS:  # each lies in a buffer twice as long, its axes in another order
        x = inputs[name]
        buffer = x.new_full((2 * x.shape[-1], *x.shape[:-1]), float("nan"))[::2]
        views[name] = buffer.movedim(0, -1).copy_(x)
        assert not views[name].is_contiguous() or x.ndim == 0
    kept = {name: views[name].clone() for name in TENSORS}
    leaves = [views[name].requires_grad_() for name in TENSORS]
    y, state = selective_scan(**views, return_last_state=True, backend=backend)
    gradients = torch.autograd.grad((y.sum(), state.sum()), leaves)
    assert y.stride() == torch.empty_like(views["u"]).stride()
    assert error(y, truth["y"]) <= 1e-6
    assert error(state, truth["last_state"]) <= 1e-6
    same = [inputs[name].clone().requires_grad_() for name in TENSORS]
    y, state = selective_scan(**inputs | dict(zip(TENSORS, same, strict=True)), return_last_state=True, backend=backend)
    for got, want in zip(gradients, torch.autograd.grad((y.sum(), state.sum()), same), strict=True):
        assert error(got, want) <= 1e-6
    assert all(torch.equal(views[name], kept[name]) for name in TENSORS)


def test_the_arguments_are_those_of_mamba(form):
    backend, device = form
    inputs = Case(20, channels=4, groups=2, initial=False).inputs(device, torch.float32)
    u, delta, A, B, C, D, z, delta_bias = (inputs[name] for name in TENSORS[:-1])
    y, state = selective_scan(u, delta, A, B, C, D, z, delta_bias, True, True, backend=backend)
    step = torch.nn.functional.softplus(delta + delta_bias[:, None])
    B, C = (x.repeat_interleave(2, dim=1) for x in (B, C))
    decay = torch.exp(torch.einsum("bdl,dn->bdln", step, A))
    drive = torch.einsum("bdl,bdnl,bdl->bdln", step, B, u)
    h, outputs = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[-1]):
        h = decay[:, :, t] * h + drive[:, :, t]
        outputs.append(torch.einsum("bdn,bdn->bd", h, C[..., t]))
    expected = (torch.stack(outputs, -1) + D[:, None] * u) * torch.nn.functional.silu(z)
    assert error(y, expected) <= OUTPUT_ERROR
    assert error(state, h) <= OUTPUT_ERROR


def test_forms_read_each_others_checkpoints(device):
    if device.type != "cpu":
        pytest.skip("one form on each device")
    inputs = Case(40, channels=2).inputs(dtype=torch.float32)
    operands = Operands(*(inputs[name] for name in TENSORS))
    fused = pytest.importorskip("claritycore.kernels.selective_scan.fused")
    for forward, backward in ((fallback, fused), (fused, fallback)):
        y, state, checkpoints = forward.forward(operands, True, False, torch.float32)
        assert checkpoints.isfinite().all()
        theirs = backward.backward(operands, checkpoints, y, state, True, False)
        own = forward.backward(operands, checkpoints, y, state, True, False)
        for got, want in zip(theirs, own, strict=True):
            assert error(got, want) <= GRADIENT_ERROR


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.slow
def test_more_elements_than_fit_in_32_bits():
    case = Case(2**20, channels=2200, state=1, z=False, D=False, bias=False, initial=False)
    u = torch.ones(1, 1, 1, dtype=torch.bfloat16, device="cuda").expand(1, case.channels, case.length)
    B = torch.ones(1, 1, case.length, device="cuda")
    y = selective_scan(u, u, -torch.ones(case.channels, 1, device="cuda"), B, B)
    assert error(y[0, -1, -9:], y[0, 0, -9:]) == 0
    assert y[0, -1, -1].item() == pytest.approx(1 / (1 - np.exp(-1)), rel=1e-2)


def test_an_empty_batch(form):
    backend, device = form
    inputs = Case(5).inputs(device, torch.float32)
    empty = {k: v[:0] if k in ("u", "delta", "B", "C", "z", "initial_state") else v for k, v in inputs.items()}
    results = run(empty, backend)
    assert results["y"].shape == (0, 4, 5)
    assert not results["gradient of A"].any()


def test_only_the_last_state_is_used(form):
    backend, device = form
    inputs = Case(9, channels=2).inputs(device, torch.float32)
    A = inputs["A"].requires_grad_()
    _, state = selective_scan(**inputs, return_last_state=True, backend=backend)
    got = torch.autograd.grad(state.sum(), A)[0]
    _, state = selective_scan(**inputs, return_last_state=True, backend="reference")
    assert error(got, torch.autograd.grad(state.sum(), A)[0]) <= GRADIENT_ERROR
