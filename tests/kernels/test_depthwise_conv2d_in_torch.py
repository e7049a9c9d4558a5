"""The depthwise convolution as torch sees it: compile, export, vmap, autocast, gradient checks, and what it refuses."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from claritycore.deploy import flop_formulas
from claritycore.kernels.depthwise_conv2d import (
    ACTIVATIONS,
    depthwise_conv2d,
    depthwise_conv2d_bytes,
    depthwise_conv2d_flops,
)
from claritycore.kernels.depthwise_conv2d.op import KERNEL
from tests.kernels.closeness import CPU, error
from tests.kernels.test_depthwise_conv2d import TENSORS, Case

OP, BACKWARD = torch.ops.claritycore.depthwise_conv2d, torch.ops.claritycore.depthwise_conv2d_backward
MIXED = Case(3, 4, 3, 5, batch=2, activation="gelu", channels_are="last")
TINY = Case(2, 2, 1, 3, channels=1, activation="relu")


def convolve(*operands, backend, activation):
    """y from the tensors in the order of TENSORS."""
    return depthwise_conv2d(*operands, activation=activation, backend=backend)


def leaves_of(case, device=CPU, dtype=torch.float32):
    inputs = case.inputs(device, dtype)
    return [inputs[name].requires_grad_() for name in TENSORS]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_everything(backend, activation):
    leaves = leaves_of(Case(3, 2, 3, 3, channels=1, activation=activation), dtype=torch.float64)
    assert gradcheck(lambda *x: convolve(*x, backend=backend, activation=activation), leaves)
    if backend == "reference":
        assert gradgradcheck(lambda *x: convolve(*x, backend=backend, activation=activation), leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_derivative_is_refused(backend, device):
    leaves = leaves_of(TINY, device if backend == "triton" else CPU)
    y = convolve(*leaves, backend=backend, activation="relu")
    (gradient,) = torch.autograd.grad(y.sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r'depthwise_conv2d can be .* twice only with backend="reference"'):
        gradient.sum().backward()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_it_meets_the_rules_of_torch(form, activation, device):
    case = MIXED if form == "torch" else TINY
    operands = leaves_of(case, device if form == "triton" else CPU)
    opcheck(OP, (*operands, activation, form))
    operands = [x.detach() for x in operands]
    y = OP(*operands, activation, form)
    wanted = [True, activation != "relu", True]
    opcheck(BACKWARD, (*operands, y if activation == "relu" else None, y, activation, wanted, form))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph(backend, dynamic, device):
    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((2, 3), (3, 5)):
        case = Case(*size, 1, 3, activation="gelu", channels_are="last")
        leaves = leaves_of(case, CPU if backend == "auto" else device)
        y = compiled(*leaves, backend=backend, activation="gelu")
        expected = convolve(*leaves, backend=backend, activation="gelu")
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        gradients = torch.autograd.grad(y.sum(), leaves)
        for got, want in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_with_any_size(strict):
    class Convolution(torch.nn.Module):
        def forward(self, x, weight, bias):
            return depthwise_conv2d(x, weight, bias, activation="silu")

    def inputs(*size, batch=1):
        return tuple(Case(*size, 3, 17, batch=batch).inputs(dtype=torch.float32)[name] for name in TENSORS)

    sizes = {axis: torch.export.Dim(name, min=1) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    program = torch.export.export(
        Convolution(), inputs(6, 7, batch=2), dynamic_shapes=(sizes, None, None), strict=strict
    )
    assert [node.target for node in program.graph.nodes].count(OP.default) == 1
    for *size, batch in ((1, 1, 1), (13, 4, 3)):
        arguments = inputs(*size, batch=batch)
        assert torch.equal(program.module()(*arguments), Convolution()(*arguments))


def test_it_runs_on_meta():
    inputs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in MIXED.inputs().items()}
    y = depthwise_conv2d(**inputs)
    assert y.shape == (2, 2, 3, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dims", [(0, 2, None), (None, 0, 1), (3, None, 0)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_vmap_keeps_calls_apart(dims, activation):
    inputs = [MIXED.inputs()[name] for name in TENSORS]
    many = [x if d is None else torch.stack([x, x * 0.5, x * 2], d) for x, d in zip(inputs, dims, strict=True)]

    def results(backend):
        leaves = [x.clone().requires_grad_() for x in many]
        y = torch.vmap(lambda *x: convolve(*x, backend=backend, activation=activation), in_dims=dims)(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        return y, *torch.autograd.grad(y, leaves, weights)

    for got, want in zip(results("torch"), results("reference"), strict=True):
        assert error(got, want) <= 1e-12


@pytest.mark.parametrize("activation", [None, "relu"])
def test_vmap_over_gradients_keeps_those_of_parameters_apart(activation):
    leaves = leaves_of(MIXED, dtype=torch.float64)
    upstream = torch.linspace(-1, 1, 3 * 2 * 2 * 3 * 4, dtype=torch.float64).view(3, 2, 2, 3, 4)

    def gradients(backend):
        y = convolve(*leaves, backend=backend, activation=activation)
        return torch.vmap(lambda g: torch.autograd.grad(y, leaves[1:], g, retain_graph=True))(upstream)

    for got, want in zip(gradients("torch"), gradients("reference"), strict=True):
        assert error(got, want) <= 1e-12


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_map_alone(compiled):
    call = torch.compile(convolve, fullgraph=True, backend="aot_eager") if compiled else convolve
    leaves = leaves_of(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*leaves, backend="auto", activation="gelu")
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.sum(), leaves)} == {torch.float32}
    assert torch.equal(y, convolve(leaves[0].bfloat16(), *leaves[1:], backend="auto", activation="gelu"))


def test_autocast_leaves_float64_and_the_reference_right():
    leaves = leaves_of(MIXED, dtype=torch.float64)
    floats = leaves_of(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve(*leaves, backend="auto", activation=None)
        reference, fast = (convolve(*floats, backend=backend, activation=None) for backend in ("reference", "torch"))
    assert torch.equal(y, convolve(*leaves, backend="auto", activation=None))
    assert reference.dtype == fast.dtype == torch.bfloat16
    assert error(fast, reference) <= 1e-2


def test_backward_under_autocast_is_no_less_exact():
    leaves = leaves_of(MIXED)
    y = convolve(*leaves, backend="torch", activation="gelu")
    expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(got, want) for got, want in zip(gradients, expected, strict=True))


def test_the_environment_may_ask_for_the_reference(monkeypatch):
    monkeypatch.setenv("CLARITYCORE_BACKEND", "reference")
    leaves = leaves_of(MIXED)
    y = convolve(*leaves, backend="auto", activation="gelu")
    (gradient,) = torch.autograd.grad(y.sum(), leaves[1], create_graph=True)
    gradient.sum().backward()  # which only the reference can do
    assert leaves[1].grad is not None


def test_mixed_dtypes_follow_x():
    x, weight, bias = leaves_of(MIXED)
    y = convolve(x, weight.double(), bias.double(), backend="torch", activation=None)
    assert y.dtype == torch.float32
    assert torch.equal(y, convolve(x, weight, bias, backend="torch", activation=None))
    doubled = convolve(x.double(), weight, bias, backend="torch", activation=None)
    assert doubled.dtype == torch.float64
    assert torch.autograd.grad(doubled.sum(), weight)[0].dtype == torch.float32


REFUSED = [
    ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x must be \(B, C, H, W\), got shape \(2, 3, 4\)"),
    ({"weight": torch.zeros(3, 1, 3, 5)}, ValueError, r"weight must be \(C, 1, kh, kw\) with C = 2 and odd kh and kw"),
    ({"weight": torch.zeros(2, 2, 3, 5)}, ValueError, r"weight must be .*, got shape \(2, 2, 3, 5\)"),
    ({"weight": torch.zeros(2, 1, 4, 5)}, ValueError, r"weight must be .* odd kh and kw, got shape \(2, 1, 4, 5\)"),
    ({"weight": torch.zeros(2, 1, 3, 0)}, ValueError, r"weight must be .* odd kh and kw, got shape \(2, 1, 3, 0\)"),
    ({"weight": torch.zeros(2, 3, 5)}, ValueError, r"weight must be .*, got shape \(2, 3, 5\)"),
    ({"bias": torch.zeros(3)}, ValueError, r"bias must be \(C,\) = \(2,\), got shape \(3,\)"),
    ({"activation": "tanh"}, ValueError, "activation must be one of None, relu, leaky_relu, gelu, silu, got 'tanh'"),
    ({"weight": None}, TypeError, "weight must be a tensor, got None"),
    ({"x": torch.zeros(2, 2, 3, 4, dtype=torch.uint8)}, TypeError, "x must be floating-point, got torch.uint8"),
    ({"weight": torch.zeros(2, 1, 3, 5, dtype=torch.complex64)}, TypeError, "weight must be real, got torch.complex64"),
    ({"bias": torch.zeros(2, device="meta")}, ValueError, "bias must be on the device of x, cpu, got meta"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED, ids=[message[:50] for _, _, message in REFUSED])
def test_bad_input_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        depthwise_conv2d(**MIXED.inputs(dtype=torch.float32) | change)


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="depthwise_conv2d cannot run with backend='triton': its tensors are on cpu"):
        depthwise_conv2d(**MIXED.inputs(), backend="triton")


def test_it_counts_its_work():
    assert KERNEL.name == "depthwise_conv2d"
    assert depthwise_conv2d_flops(2, 3, 5, 7, 11, 13) == 2 * (2 * 3 * 5 * 7) * (11 * 13)
    assert depthwise_conv2d_bytes(2, 3, 5, 7, 11, 13) == 4 * (2 * 2 * 3 * 5 * 7 + 3 * 11 * 13)
    backward = depthwise_conv2d_bytes(2, 3, 5, 7, 11, 13, itemsize=2, backward=True)
    assert backward == 2 * (5 * 2 * 3 * 5 * 7 + 3 * 3 * 11 * 13)


@pytest.mark.parametrize(("activation", "convolutions"), [(None, 3), ("relu", 3), ("gelu", 4)])
def test_the_counter_of_torch_counts_the_same(activation, convolutions):
    x, weight, bias = leaves_of(MIXED)

    def counted(*operands):
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
            convolve(*operands, backend="torch", activation=activation).sum().backward()
        return counter.get_total_flops()

    one = depthwise_conv2d_flops(2, 2, 3, 4, 3, 5)
    assert counted(x, weight, bias) == convolutions * one
    assert counted(x.detach(), weight, bias) == (convolutions - 1) * one
