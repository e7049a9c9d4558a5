"""What holds of the depthwise convolution whatever its numbers: dtypes, layouts, reach, repetition."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from claritycore.kernels.depthwise_conv2d import depthwise_conv2d
from claritycore.kernels.depthwise_conv2d.operands import Operands
from tests.kernels.closeness import CPU, assert_close, error
from tests.kernels.test_depthwise_conv2d import FORMATS, Case, run, tensors, wide

BLURRED = Case(3, 4, 3, 5, batch=2, activation="gelu")


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


def memory_format(x):
    return [name for name, layout in FORMATS.items() if x.is_contiguous(memory_format=layout)]


@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
def test_float64_stays_float64(form, activation):
    backend, device = form
    case = Case(3, 5, 3, 5, activation=activation)
    results = run(case.inputs(device), backend)
    assert {value.dtype for value in results.values()} == {torch.float64}
    assert_close(results, run(case.inputs(), "reference"), 1e-14, 1e-13)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_the_cast(form, dtype, activation):
    backend, device = form
    case = Case(3, 4, 5, 17 if backend == "torch" else 5, activation=activation, channels_are="last")
    inputs = case.inputs(device, torch.float32)
    half = inputs | {"x": inputs["x"].to(dtype)}
    results, truth = run(half, backend), run(wide(half), "reference")
    cast = run(half | {"x": half["x"].float()}, backend)["y"].to(dtype)
    assert results["y"].dtype == results["gradient of x"].dtype == dtype
    assert results["gradient of weight"].dtype == torch.float32
    assert error(results["y"], truth["y"]) <= 1.1 * error(cast, truth["y"])
    # The gradient of y arrives in half, too.
    assert_close(results, truth, 1e-2, 1e-2)
    everything = inputs | {name: value.to(dtype) for name, value in tensors(inputs).items()}
    results = run(everything, backend)
    assert {value.dtype for value in results.values()} == {dtype}
    assert_close(results, run(wide(everything), "reference"), 1e-2, 1e-2)


@pytest.mark.parametrize("columns", [3, 17])
def test_the_memory_format_is_kept(form, columns):
    backend, device = form
    for channels_are in FORMATS:
        results = run(Case(3, 4, 3, columns, batch=2, channels_are=channels_are).inputs(device), backend)
        assert memory_format(results["y"]) == memory_format(results["gradient of x"]) == [channels_are]
    inputs = Case(3, 4, 3, columns).inputs(device)
    turned = inputs["x"].transpose(2, 3).contiguous().transpose(2, 3)
    assert depthwise_conv2d(**inputs | {"x": turned}, backend=backend).stride() == turned.stride()


@pytest.mark.parametrize("channels_are", FORMATS)
def test_the_reference_keeps_the_memory_format_too(channels_are):
    inputs = Case(3, 4, 3, 5, batch=2, channels_are=channels_are, activation="gelu").inputs()
    assert memory_format(depthwise_conv2d(**inputs, backend="reference")) == [channels_are]


def test_views_are_accepted_and_left_alone(form):
    backend, device = form
    columns = 17 if backend == "torch" else 3
    inputs = Case(3, 4, 3, columns, batch=2, activation="silu").inputs(device, torch.float32)
    truth = run(inputs, backend)
    nan = float("nan")
    a_slice = torch.full((2, 5, 8, 9), nan, device=device)[:, :4:2, 1:7:2, :8:2]
    scattered = torch.full((4, 8, 2, 9), nan, device=device).permute(2, 3, 1, 0)[:, :2, :6:2]
    weight = torch.empty(3, columns, 4, device=device).permute(2, 0, 1)[::2, None]
    for x in (a_slice, scattered):
        views = inputs | {"x": x, "weight": weight, "bias": torch.empty(4, device=device)[::2]}
        for name, value in tensors(views).items():
            value.copy_(inputs[name])
        kept = {name: value.clone() for name, value in tensors(views).items()}
        leaves = {name: value.detach().requires_grad_() for name, value in tensors(views).items()}
        y = depthwise_conv2d(**views | leaves, backend=backend)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
        results = {"y": y} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        assert_close(results, truth, 1e-6, 1e-6)
        assert all(torch.equal(views[name], kept[name]) for name in kept)
    expanded = torch.autograd.grad(depthwise_conv2d(**inputs | leaves, backend=backend).sum(), leaves["x"])[0]
    ones = torch.ones_like(y)
    dense = torch.autograd.grad(depthwise_conv2d(**inputs | leaves, backend=backend), leaves["x"], ones)[0]
    assert error(expanded, dense) <= 1e-6


def test_it_repeats_bit_for_bit(form):
    backend, device = form
    inputs = Case(5, 4, 3, 5, batch=2, activation="silu").inputs(device, torch.float32)
    once, again = run(inputs, backend), run(inputs, backend)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("channels_are", FORMATS)
def test_an_image_does_not_depend_on_its_batch(form, channels_are):
    backend, device = form
    inputs = Case(5, 4, 3, 17 if backend == "torch" else 3, batch=3, channels_are=channels_are).inputs(device)
    inputs = {name: value.float() if torch.is_tensor(value) else value for name, value in inputs.items()}
    y = depthwise_conv2d(**inputs, backend=backend)
    assert error(depthwise_conv2d(**inputs | {"x": inputs["x"][1:2]}, backend=backend), y[1:2]) <= 1e-6


def test_a_tile_is_a_part_of_the_whole(form):
    backend, device = form
    inputs = Case(9, 8, 3, 5).inputs(device, torch.float32)
    whole = depthwise_conv2d(**inputs, backend=backend)
    tile = depthwise_conv2d(**inputs | {"x": inputs["x"][:, :, 2:8, 1:7]}, backend=backend)
    assert error(tile[:, :, 1:-1, 2:-2], whole[:, :, 3:7, 3:5]) <= 1e-6


@pytest.mark.parametrize("channels_are", FORMATS)
def test_a_pixel_reaches_as_far_as_its_kernel(form, channels_are):
    backend, device = form
    rows, columns = (3, 17) if backend == "torch" else (3, 5)
    inputs = Case(7, 23, rows, columns, channels_are=channels_are).inputs(device, torch.float32)
    inputs["x"][0, 1, 3, 11] = float("nan")
    y = depthwise_conv2d(**inputs, backend=backend)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, 1, 3 - rows // 2 : 4 + rows // 2, 11 - columns // 2 : 12 + columns // 2] = True
    assert torch.equal(y.isnan(), reached)


def test_nan_passes_through_every_activation(form):
    backend, device = form
    for activation in ("relu", "leaky_relu", "gelu", "silu"):
        inputs = Case(1, 1, 1, 1, activation=activation).inputs(device, torch.float32)
        inputs["x"][:] = float("nan")
        assert depthwise_conv2d(**inputs, backend=backend).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 2), (1, 0, 2), (1, 3, 0)])
def test_nothing_gives_nothing(form, shape):
    backend, device = form
    for activation in (None, "relu"):
        inputs = Case(*shape[1:], 3, 3, batch=shape[0], activation=activation).inputs(device, torch.float32)
        results = run(inputs, backend)
        assert results["y"].shape == (shape[0], 2, *shape[1:])
        assert not results["gradient of weight"].any()


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",)])
def test_each_gradient_can_be_had_alone(form, wanted):
    backend, device = form
    inputs = BLURRED.inputs(device, torch.float32)
    expected = run(inputs, backend)
    leaves = {name: inputs[name].clone().requires_grad_() for name in wanted}
    y = depthwise_conv2d(**inputs | leaves, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    assert all(torch.equal(g, expected[f"gradient of {name}"]) for name, g in zip(wanted, gradients, strict=True))


def test_forms_read_what_the_other_left(device):
    if device.type != "cpu":
        pytest.skip("one form on each device")
    fused = pytest.importorskip("claritycore.kernels.depthwise_conv2d.fused")
    from claritycore.kernels.depthwise_conv2d import fallback

    inputs = Case(3, 4, 3, 5, activation="leaky_relu").inputs(dtype=torch.float32)
    operands = Operands(*tensors(inputs).values())
    for forward, backward in ((fallback, fused), (fused, fallback)):
        y = forward.forward(operands, "leaky_relu")
        theirs = backward.backward(operands, y, y, "leaky_relu", (True, True, True))
        own = forward.backward(operands, y, y, "leaky_relu", (True, True, True))
        assert all(error(got, want) <= 1e-6 for got, want in zip(theirs, own, strict=True))


class Moves(TorchDispatchMode):
    """Lists the ops that copy or reorder what is as large as a feature map."""

    names = ("copy", "clone", "contiguous", "pad", "cat", "_to")

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        moves = any(name in func.__name__ for name in self.names) and isinstance(out, torch.Tensor)
        if moves and out.is_floating_point() and out.numel() == self.size:
            self.found.append((func.__name__, tuple(out.shape)))
        return out


@pytest.mark.parametrize("channels_are", FORMATS)
def test_triton_moves_no_feature_map(device, channels_are):
    fused = pytest.importorskip("claritycore.kernels.depthwise_conv2d.fused")
    inputs = Case(5, 7, 3, 3, channels=4, channels_are=channels_are).inputs(device, torch.float32)
    operands = Operands(*tensors(inputs).values())
    with Moves(operands.x.numel()) as moves:
        y = fused.forward(operands, "gelu")
        fused.backward(operands, None, y, "gelu", (True, True, True))
    assert moves.found == []
    with Moves(operands.x.numel()) as moves:
        operands.x.clone()
    assert moves.found, "it sees no move where there is one"
