"""The selective scan as torch sees it: compile, export, vmap, autocast, gradient checks, and what it refuses."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from claritycore.kernels.selective_scan import (
    selective_scan,
    selective_scan_bytes,
    selective_scan_exponentials,
    selective_scan_flops,
)
from claritycore.kernels.selective_scan.op import KERNEL
from tests.kernels.closeness import CPU, GRADIENT_ERROR, OUTPUT_ERROR, assert_close, error
from tests.kernels.test_selective_scan import TENSORS, Case, run

OP, BACKWARD = torch.ops.claritycore.selective_scan, torch.ops.claritycore.selective_scan_backward
MIXED = Case(34, channels=4, groups=2, batch=2, constant_C=True)


def both(*tensors, backend, case):
    """y and the last state from the tensors in the order of TENSORS."""
    flags = {"delta_softplus": case.softplus, "reverse": case.reverse}
    return selective_scan(**dict(zip(TENSORS, tensors, strict=True)), **flags, return_last_state=True, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", [Case(5, groups=2, reverse=True), Case(3, constant_B=True, constant_C=True)], ids=str)
def test_gradients_of_everything(backend, case):
    leaves = [case.inputs()[name].requires_grad_() for name in TENSORS]
    assert gradcheck(lambda *x: both(*x, backend=backend, case=case), leaves)
    if backend == "reference":
        assert gradgradcheck(lambda *x: both(*x, backend=backend, case=case), leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_derivative_is_refused(backend, device):
    inputs = Case(3, channels=1).inputs(device if backend == "triton" else CPU, torch.float32)
    u = inputs["u"].requires_grad_()
    (gradient,) = torch.autograd.grad(selective_scan(**inputs, backend=backend).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated twice only with backend="reference"'):
        gradient.sum().backward()


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_it_meets_the_rules_of_torch(form, device):
    case = MIXED if form == "torch" else Case(3, channels=2)
    inputs = case.inputs(device if form == "triton" else CPU, torch.float32)
    operands = [inputs[name].requires_grad_() for name in TENSORS]
    opcheck(OP, (*operands, True, False, None, form))
    operands = [x.detach() for x in operands]
    y, state, checkpoints = OP(*operands, True, False, None, form)
    opcheck(BACKWARD, (*operands, checkpoints, y, state, True, False, form))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph(backend, dynamic, device):
    case = Case(3, channels=2)
    device = CPU if backend == "auto" else device
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (3, 5):
        inputs = Case(length, channels=2).inputs(device, torch.float32)
        leaves = [inputs[name].requires_grad_() for name in TENSORS]
        y, state = compiled(*leaves, backend=backend, case=case)
        gradients = torch.autograd.grad((y.sum(), state.sum()), leaves)
        expected = both(*leaves, backend=backend, case=case)
        expected += torch.autograd.grad([x.sum() for x in expected], leaves)
        assert all(torch.equal(got, want) for got, want in zip((y, state, *gradients), expected, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_with_any_length(strict):
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, delta_softplus=True)

    def inputs(length):
        return tuple(Case(length).inputs(dtype=torch.float32)[name] for name in TENSORS[:5])

    length = torch.export.Dim("length", min=1)
    shapes = ({2: length}, {2: length}, None, {3: length}, {3: length})
    program = torch.export.export(Scan(), inputs(40), dynamic_shapes=shapes, strict=strict)
    assert [node.target for node in program.graph.nodes].count(OP.default) == 1
    for other in (1, 33, 500):
        assert torch.equal(program.module()(*inputs(other)), Scan()(*inputs(other)))


def test_it_runs_on_meta():
    inputs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in MIXED.inputs().items()}
    y, state = selective_scan(**inputs, return_last_state=True)
    assert y.shape == (2, 4, 34)
    assert state.shape == (2, 4, 3)


def test_vmap_folds_into_the_channels():
    inputs = [MIXED.inputs()[name] for name in TENSORS]
    dims = [0, 2, None, 1, 0, None, None, 0, 1]
    many = [x if d is None else torch.stack([x, x * 0.5, x * 2], d) for x, d in zip(inputs, dims, strict=True)]

    def scan(backend):
        leaves = [x.clone().requires_grad_() for x in many]
        outputs = torch.vmap(lambda *x: both(*x, backend=backend, case=MIXED), in_dims=tuple(dims))(*leaves)
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs]
        return *outputs, *torch.autograd.grad(outputs, leaves, weights)

    for got, want in zip(scan("torch"), scan("reference"), strict=True):
        assert error(got, want) <= 1e-12


def test_vmap_over_gradients_keeps_those_of_parameters_apart():
    inputs = [MIXED.inputs()[name].requires_grad_() for name in TENSORS]
    upstream = torch.linspace(-1, 1, 3 * 2 * 4 * 34, dtype=torch.float64).view(3, 2, 4, 34)

    def gradients(backend):
        y, _ = both(*inputs, backend=backend, case=MIXED)
        pull = torch.vmap(lambda g: torch.autograd.grad(y, inputs, g, retain_graph=True))
        return pull(upstream)

    for got, want in zip(gradients("torch"), gradients("reference"), strict=True):
        assert error(got, want) <= 1e-12


def test_the_reference_obeys_autocast_too():
    leaves = [MIXED.inputs(dtype=torch.float32)[name] for name in TENSORS]
    with torch.autocast("cpu", torch.bfloat16):
        reference, fast = (both(*leaves, backend=backend, case=MIXED) for backend in ("reference", "torch"))
    assert [x.dtype for x in reference] == [x.dtype for x in fast] == [torch.bfloat16, torch.float32]
    assert error(fast[0], reference[0]) <= 1e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_what_varies_over_time(compiled):
    scan = torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both
    leaves = [MIXED.inputs(dtype=torch.float32)[name].requires_grad_() for name in TENSORS]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = scan(*leaves, backend="auto", case=MIXED)
    gradients = torch.autograd.grad((y.sum(), state.sum()), leaves)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert {g.dtype for g in gradients} == {torch.float32}
    cast = [x.bfloat16() if n in ("u", "delta", "B", "z") else x for n, x in zip(TENSORS, leaves, strict=True)]
    assert torch.equal(y, both(*cast, backend="auto", case=MIXED)[0])


def test_the_environment_may_ask_for_the_reference(monkeypatch):
    monkeypatch.setenv("CLARITYCORE_BACKEND", "reference")
    inputs = Case(3).inputs()
    delta = inputs["delta"].requires_grad_()
    (gradient,) = torch.autograd.grad(selective_scan(**inputs).sum(), delta, create_graph=True)
    gradient.sum().backward()  # which only the reference can do
    assert delta.grad is not None


def test_mixed_dtypes_follow_u():
    inputs = Case(9).inputs(dtype=torch.float32)
    doubles = inputs | {"A": inputs["A"].double(), "D": inputs["D"].double()}
    results = run(doubles, "torch")
    assert results["y"].dtype == results["last_state"].dtype == torch.float32
    assert results["gradient of A"].dtype == torch.float64
    assert_close(results, run(inputs, "torch"), OUTPUT_ERROR, GRADIENT_ERROR)


REFUSED = [
    ({"u": torch.zeros(4, 5)}, ValueError, r"u must be \(B, D, L\), got shape \(4, 5\)"),
    ({"delta": torch.zeros(1, 4, 6)}, ValueError, r"delta must be \(B, D, L\) = \(1, 4, 5\), got shape \(1, 4, 6\)"),
    ({"A": torch.zeros(3, 3)}, ValueError, r"A must be \(D, N\) with D = 4 and N from 1 to 256, got shape \(3, 3\)"),
    ({"A": torch.zeros(4, 257)}, ValueError, r"A must be .*, got shape \(4, 257\)"),
    ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, "A must be real, got torch.complex64"),
    ({"B": torch.zeros(1, 3, 6)}, ValueError, r"B must be \(D, N\), .* with B = 1, D = 4, N = 3, L = 5, got .*6\)"),
    ({"C": torch.zeros(5)}, ValueError, r"C must be \(D, N\), \(B, N, L\) or \(B, G, N, L\) .*, got shape \(5,\)"),
    ({"B": torch.zeros(1, 3, 3, 5)}, ValueError, "D must be divisible by the groups of B, got D = 4 and G = 3"),
    ({"B": torch.zeros(1, 2, 3, 5)}, ValueError, "B and C must have the same number of groups, got 2 and 1"),
    ({"D": torch.zeros(3)}, ValueError, r"D must be \(D,\) = \(4,\), got shape \(3,\)"),
    ({"z": torch.zeros(4, 5)}, ValueError, r"z must be \(B, D, L\) = \(1, 4, 5\), got shape \(4, 5\)"),
    ({"delta_bias": torch.zeros(4, 1)}, ValueError, r"delta_bias must be \(D,\) = \(4,\), got shape \(4, 1\)"),
    ({"initial_state": torch.zeros(1, 3, 4)}, ValueError, r"initial_state must be \(B, D, N\) = \(1, 4, 3\), got"),
    ({"u": torch.zeros(1, 4, 5, dtype=torch.int64)}, TypeError, "u must be floating-point, got torch.int64"),
    ({"delta": torch.zeros(1, 4, 5, device="meta")}, ValueError, "delta must be on the device of u, cpu, got meta"),
    ({"out_dtype": torch.int32}, TypeError, "out_dtype must be a floating-point dtype, got torch.int32"),
    ({"out_dtype": "float32"}, TypeError, "out_dtype must be a floating-point dtype, got 'float32'"),
    ({"B": None}, TypeError, "B must be a tensor, got None"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_bad_input_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        selective_scan(**Case(5).inputs(dtype=torch.float32) | change)


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="selective_scan cannot run with backend='triton': its tensors are on cpu"):
        selective_scan(**Case(5).inputs(dtype=torch.float32), backend="triton")


def test_it_counts_its_work():
    assert KERNEL.name == "selective_scan"
    assert selective_scan_flops(2, 96, 4096, 16) == 9 * 2 * 96 * 4096 * 16
    assert selective_scan_bytes(1, 4, 5, 3) == 4 * 5 * (3 * 4 + 2 * 3)
    assert selective_scan_bytes(1, 4, 5, 3, groups=2, itemsize=2, backward=True) == 2 * 5 * (8 * 4 + 6 * 2 * 3)
    assert selective_scan_exponentials(1, 4, 5, 3, backward=True) == 2 * 4 * 5 * 3
