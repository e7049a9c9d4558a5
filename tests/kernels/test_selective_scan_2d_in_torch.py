"""The scan over images as torch sees it: compile, export, vmap, autocast, gradient checks, and what it refuses."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from claritycore.kernels.selective_scan_2d import (
    selective_scan_2d,
    selective_scan_2d_bytes,
    selective_scan_2d_exponentials,
    selective_scan_2d_flops,
)
from claritycore.kernels.selective_scan_2d.op import KERNEL
from claritycore.kernels.selective_scan_2d.operands import Operands2d
from tests.kernels.closeness import CPU, error
from tests.kernels.test_selective_scan_2d import OVER_PIXELS, ROWS, Case

OP, BACKWARD = torch.ops.claritycore.selective_scan_2d, torch.ops.claritycore.selective_scan_2d_backward
TENSORS = Operands2d._fields[:-1]
MIXED = Case(3, 4, batch=2, directions=("column", "row_reversed"))
TINY = Case(2, 2, directions=("column_reversed",))


def scan(*tensors, backend, case, order=None):
    """y from the tensors in the order of TENSORS."""
    options = {"delta_softplus": case.softplus, "directions": case.directions, "merge": case.merge, "order": order}
    return selective_scan_2d(**dict(zip(TENSORS, tensors, strict=True)), **options, backend=backend)


def leaves_of(case, device=CPU, dtype=torch.float32):
    inputs = case.inputs(device, dtype)
    return [inputs[name].requires_grad_() for name in TENSORS]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", [MIXED, Case(3, 1, merge=False), Case(2, 2, directions=ROWS, order=True)], ids=str)
def test_gradients_of_everything(backend, case):
    order = case.inputs()["order"]
    leaves = leaves_of(case, dtype=torch.float64)
    assert gradcheck(lambda *x: scan(*x, backend=backend, case=case, order=order), leaves)


def test_the_reference_can_be_differentiated_twice():
    assert gradgradcheck(lambda *x: scan(*x, backend="reference", case=TINY), leaves_of(TINY, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_derivative_is_refused_elsewhere(backend, device):
    leaves = leaves_of(TINY, device if backend == "triton" else CPU)
    (gradient,) = torch.autograd.grad(scan(*leaves, backend=backend, case=TINY).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'selective_scan_2d can be .* twice only with backend="reference"'):
        gradient.sum().backward()


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_it_meets_the_rules_of_torch(form, merge, device):
    case = MIXED if form == "torch" else TINY
    leaves = leaves_of(case, device if form == "triton" else CPU)
    codes = [1, 2] if form == "torch" else [3]
    opcheck(OP, (*leaves, None, codes, True, merge, form))
    operands = [x.detach() for x in leaves]
    y, checkpoints = OP(*operands, None, codes, True, merge, form)
    opcheck(BACKWARD, (*operands, None, checkpoints, y, codes, True, merge, form))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph(backend, dynamic, device):
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((2, 3), (3, 5)):
        case = Case(*size, directions=("column", "row_reversed"), channels=1)
        leaves = leaves_of(case, CPU if backend == "auto" else device)
        y = compiled(*leaves, backend=backend, case=case)
        gradients = torch.autograd.grad(y.sum(), leaves)
        expected = scan(*leaves, backend=backend, case=case)
        assert torch.equal(y, expected)
        for got, want in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_with_any_size(strict):
    class Scan(torch.nn.Module):
        def forward(self, x, delta, A, B, C):
            return selective_scan_2d(x, delta, A, B, C, delta_softplus=True)

    def inputs(*size, batch=1):
        return tuple(Case(*size, batch=batch).inputs(dtype=torch.float32)[name] for name in TENSORS[:5])

    height, width = torch.export.Dim("height", min=1), torch.export.Dim("width", min=1)
    batch = torch.export.Dim("batch", min=1)
    image, ways = {0: batch, 1: height, 2: width}, {0: batch, 2: height, 3: width}
    shapes = (image, ways, None, ways, ways)
    program = torch.export.export(Scan(), inputs(6, 7, batch=2), dynamic_shapes=shapes, strict=strict)
    assert [node.target for node in program.graph.nodes].count(OP.default) == 1
    for *size, batch in ((1, 1, 1), (13, 4, 3)):
        arguments = inputs(*size, batch=batch)
        assert torch.equal(program.module()(*arguments), Scan()(*arguments))


def test_it_runs_on_meta():
    inputs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in MIXED.inputs().items()}
    assert selective_scan_2d(**inputs).shape == (2, 3, 4, 2)
    assert selective_scan_2d(**inputs | {"merge": False}).shape == (2, 2, 3, 4, 2)


def test_vmap_keeps_calls_apart():
    dims = [0, 2, 1, 1, 0, None, 0]
    inputs = [MIXED.inputs()[name] for name in TENSORS]
    many = [x if d is None else torch.stack([x, x * 0.5, x * 2], d) for x, d in zip(inputs, dims, strict=True)]

    def results(backend):
        leaves = [x.clone().requires_grad_() for x in many]
        y = torch.vmap(lambda *x: scan(*x, backend=backend, case=MIXED), in_dims=tuple(dims))(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        return y, *torch.autograd.grad(y, leaves, weights)

    for got, want in zip(results("torch"), results("reference"), strict=True):
        assert error(got, want) <= 1e-12


def test_vmap_over_gradients_keeps_those_of_parameters_apart():
    leaves = leaves_of(MIXED, dtype=torch.float64)
    upstream = torch.linspace(-1, 1, 3 * 2 * 3 * 4 * 2, dtype=torch.float64).view(3, 2, 3, 4, 2)

    def gradients(backend):
        y = scan(*leaves, backend=backend, case=MIXED)
        return torch.vmap(lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True))(upstream)

    for got, want in zip(gradients("torch"), gradients("reference"), strict=True):
        assert error(got, want) <= 1e-12


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_what_varies_over_pixels(compiled):
    call = torch.compile(scan, fullgraph=True, backend="aot_eager") if compiled else scan
    leaves = leaves_of(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*leaves, backend="auto", case=MIXED)
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.sum(), leaves)} == {torch.float32}
    cast = [x.bfloat16() if name in OVER_PIXELS else x for name, x in zip(TENSORS, leaves, strict=True)]
    assert torch.equal(y, scan(*cast, backend="auto", case=MIXED))


def test_autocast_leaves_float64_as_it_is():
    leaves = leaves_of(TINY, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = scan(*leaves, backend="auto", case=TINY)
    assert torch.equal(y, scan(*leaves, backend="auto", case=TINY))


def test_the_environment_may_ask_for_the_reference(monkeypatch):
    monkeypatch.setenv("CLARITYCORE_BACKEND", "reference")
    leaves = leaves_of(TINY)
    (gradient,) = torch.autograd.grad(scan(*leaves, backend="auto", case=TINY).sum(), leaves[1], create_graph=True)
    gradient.sum().backward()  # which only the reference can do
    assert leaves[1].grad is not None


def test_mixed_dtypes_follow_x():
    leaves = [x.double() if name in ("A", "D") else x for name, x in zip(TENSORS, leaves_of(MIXED), strict=True)]
    y = scan(*leaves, backend="torch", case=MIXED)
    assert y.dtype == torch.float32
    assert torch.autograd.grad(y.sum(), leaves[2])[0].dtype == torch.float64


ORDER = torch.arange(15).view(1, 15)
REFUSED = [
    ({"x": torch.zeros(3, 5, 2)}, ValueError, r"x must be \(B, H, W, D\), got shape \(3, 5, 2\)"),
    ({"delta": torch.zeros(1, 3, 5, 2)}, ValueError, r"delta must be \(B, K, H, W, D\) = \(1, 4, 3, 5, 2\), got shape"),
    ({"A": torch.zeros(2, 3)}, ValueError, r"A must be \(K, D, N\) with K = 4, D = 2 and N from 1 to 256, got .*3\)"),
    ({"A": torch.zeros(4, 2, 257)}, ValueError, r"A must be .*, got shape \(4, 2, 257\)"),
    ({"A": torch.zeros(4, 2, 3, dtype=torch.complex64)}, TypeError, "A must be real, got torch.complex64"),
    ({"B": torch.zeros(1, 4, 5, 3, 3)}, ValueError, r"B must be \(B, K, H, W, N\) = \(1, 4, 3, 5, 3\), got shape"),
    ({"C": torch.zeros(1, 3, 5, 3)}, ValueError, r"C must be \(B, K, H, W, N\) = \(1, 4, 3, 5, 3\), got shape"),
    ({"D": torch.zeros(8)}, ValueError, r"D must be \(K, D\) = \(4, 2\), got shape \(8,\)"),
    ({"delta_bias": torch.zeros(2)}, ValueError, r"delta_bias must be \(K, D\) = \(4, 2\), got shape \(2,\)"),
    ({"x": torch.zeros(1, 3, 5, 2, dtype=torch.uint8)}, TypeError, "x must be floating-point, got torch.uint8"),
    ({"B": torch.zeros(1, 4, 3, 5, 3, device="meta")}, ValueError, "B must be on the device of x, cpu, got meta"),
    ({"directions": ()}, ValueError, r"directions must be a sequence of one or more names, got \(\)"),
    ({"directions": "row"}, ValueError, "directions must be a sequence of one or more names, got 'row'"),
    ({"directions": ("diagonal",) * 4}, ValueError, "directions must be of row, column, .*, got 'diagonal'"),
    ({"directions": ("row",)}, ValueError, r"A must be \(K, D, N\) with K = 1, D = 2 .* got shape \(4, 2, 3\)"),
    ({"order": ORDER}, ValueError, "must be of row, row_reversed with an order, which has .* no columns, got 'column'"),
    ({"order": ORDER[0], "directions": ROWS * 2}, ValueError, r"order must be \(B, H \* W\) = \(1, 15\), got .*15,\)"),
    ({"order": ORDER.float(), "directions": ROWS * 2}, TypeError, "order must be integer, got torch.float32"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_bad_input_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        selective_scan_2d(**Case(3, 5).inputs(dtype=torch.float32) | change)


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="selective_scan_2d cannot run with backend='triton': its tensors are on"):
        selective_scan_2d(**Case(1, 1).inputs(), backend="triton")


def test_it_counts_its_work():
    assert KERNEL.name == "selective_scan_2d"
    assert selective_scan_2d_flops(2, 64, 32, 96, 16) == 9 * 2 * 4 * 96 * 64 * 32 * 16
    assert selective_scan_2d_bytes(1, 5, 7, 4, 3) == 4 * 35 * (6 * 4 + 8 * 3)
    assert selective_scan_2d_bytes(1, 5, 7, 4, 3, merge=False) == 4 * 35 * (9 * 4 + 8 * 3)
    backward = selective_scan_2d_bytes(1, 5, 7, 4, 3, directions=2, itemsize=2, backward=True)
    assert backward == 2 * 35 * ((3 + 6 + 2) * 4 + 12 * 3)
    assert selective_scan_2d_exponentials(1, 5, 7, 4, 3, directions=2, backward=True) == 2 * 2 * 35 * 4 * 3
