"""The scan over images is right: every form against a loop over pixels in float64, outputs and all gradients.

Errors are relative to the largest value of the truth.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from claritycore.kernels.selective_scan import selective_scan
from claritycore.kernels.selective_scan_2d import fallback, selective_scan_2d, selective_scan_2d_reference
from claritycore.kernels.selective_scan_2d.operands import DIRECTIONS, Operands2d
from tests.kernels.closeness import CPU, GRADIENT_ERROR, OUTPUT_ERROR, assert_close, error

OVER_PIXELS = ("x", "delta", "B", "C")
ROWS, CROSS = ("row", "row_reversed"), ("column", "row_reversed")


@dataclass(frozen=True)
class Case:
    """One combination of sizes and options."""

    height: int
    width: int
    directions: tuple[str, ...] = DIRECTIONS
    batch: int = 1
    channels: int = 2
    state: int = 3
    D: bool = True
    bias: bool = True
    softplus: bool = True
    merge: bool = True
    order: bool = False

    def inputs(self, device=CPU, dtype=torch.float64):
        """The arguments of one call; the same numbers whatever the device and dtype."""
        generator = torch.Generator().manual_seed(0)
        image, ways = (self.height, self.width), len(self.directions)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        delta = draw(self.batch, ways, *image, self.channels)
        order = [torch.randperm(self.height * self.width, generator=generator) for _ in range(self.batch)]
        return {
            "x": draw(self.batch, *image, self.channels),
            "delta": delta if self.softplus else delta.abs() / 2,
            "A": -draw(ways, self.channels, self.state).exp(),
            "B": draw(self.batch, ways, *image, self.state),
            "C": draw(self.batch, ways, *image, self.state),
            "D": draw(ways, self.channels) if self.D else None,
            "delta_bias": (draw(ways, self.channels) - 1 if self.softplus else draw(ways, self.channels).abs() / 4)
            if self.bias
            else None,
            "order": torch.stack(order).to(device) if self.order else None,
            "delta_softplus": self.softplus,
            "directions": self.directions,
            "merge": self.merge,
        }


def cases(sides, batches=(1, 2)):
    flag = st.booleans()
    directions = st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=4).map(tuple)
    rows = st.lists(st.sampled_from(ROWS), min_size=1, max_size=3).map(tuple)
    return st.booleans().flatmap(
        lambda order: st.builds(
            Case,
            height=sides,
            width=sides,
            directions=rows if order else directions,
            order=st.just(order),
            batch=st.sampled_from(batches),
            channels=st.integers(1, 3),
            state=st.integers(1, 5),
            **dict.fromkeys(("D", "bias", "softplus", "merge"), flag),
        )
    )


def tensors(inputs):
    """The differentiable inputs, by name."""
    return {name: v for name, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def run(inputs, backend):
    """y and the gradient of every input, by name."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors(inputs).items()}
    y = selective_scan_2d(**inputs | leaves, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def wide(inputs):
    return {k: v.cpu().double() if k in tensors(inputs) else v for k, v in inputs.items()}


def assert_right(case, backend, device):
    assert_close(run(case.inputs(device, torch.float32), backend), run(case.inputs(), "reference"))


def path(direction, height, width, order):
    """The pixels in the order of their visit, written out."""
    pixels = [(i, j) for i in range(height) for j in range(width)]
    if order is not None:
        pixels = [pixels[p] for p in order]
    elif direction.startswith("column"):
        pixels = [(i, j) for j in range(width) for i in range(height)]
    return pixels[::-1] if direction.endswith("reversed") else pixels


def loop(x, delta, A, B, C, D, delta_bias, order, delta_softplus, directions, merge):
    """The formula, pixel by pixel."""
    x, delta, A, B, C, D, delta_bias = (None if v is None else v.numpy() for v in (x, delta, A, B, C, D, delta_bias))
    y = np.zeros(delta.shape)
    for b, k in np.ndindex(len(x), len(directions)):
        state = np.zeros(A.shape[1:])
        for i, j in path(directions[k], *x.shape[1:3], None if order is None else order[b].tolist()):
            at = b, k, i, j
            step = delta[at] + (0 if delta_bias is None else delta_bias[k])
            step = np.logaddexp(0, step) if delta_softplus else step
            state = np.exp(step[:, None] * A[k]) * state + step[:, None] * B[at] * x[b, i, j][:, None]
            y[at] = state @ C[at] + (0 if D is None else D[k] * x[b, i, j])
    return torch.from_numpy(y.sum(1) if merge else y)


@given(case=cases(st.integers(1, 6)))
def test_the_reference_is_the_formula(case):
    assert error(selective_scan_2d_reference(**case.inputs()), loop(**case.inputs())) <= 1e-13


@given(case=cases(st.integers(1, 13)))
def test_the_fallback_agrees(case):
    assert_right(case, "torch", CPU)


@settings(max_examples=settings.default.max_examples // 3)
@given(case=cases(st.integers(1, 4), batches=(1,)))
def test_triton_agrees(case, device):
    assert_right(case, "triton", device)


SEAMS = [
    Case(7, 11, channels=1, state=2),  # several chunks, which end inside a row
    Case(1, 1),
    Case(1, 9, directions=("column", "row_reversed")),
    Case(9, 1, directions=("column_reversed", "row")),
    Case(2, 3, channels=35, state=16, directions=("column", "column")),  # more channels than a program holds
    Case(3, 2, channels=1, state=200, directions=("column_reversed",)),
    Case(5, 7, channels=2, batch=2, directions=ROWS, order=True, merge=False),
]


@pytest.mark.parametrize("case", SEAMS, ids=str)
def test_every_form_agrees_at_the_seams(case, form):
    assert_right(case, *form)


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


def test_a_row_is_the_scan_of_the_pixels_in_memory(form):
    backend, device = form
    inputs = Case(3, 5, directions=("row",)).inputs(device, torch.float32)
    x, delta, B, C = (inputs[name].flatten(-3, -2).squeeze(1).transpose(1, 2) for name in OVER_PIXELS)
    per_channel = {name: inputs[name][0] for name in ("D", "delta_bias")}
    y = selective_scan(x, delta, inputs["A"][0], B, C, **per_channel, delta_softplus=True)
    assert error(selective_scan_2d(**inputs, backend=backend).flatten(1, 2), y.transpose(1, 2)) <= 1e-6


def test_columns_are_the_rows_of_the_transposed_image(form):
    backend, device = form
    inputs = Case(4, 3, directions=("column", "column_reversed"), merge=False).inputs(device, torch.float32)
    turned = {name: inputs[name].transpose(-3, -2) for name in OVER_PIXELS}
    columns = selective_scan_2d(**inputs, backend=backend)
    rows = selective_scan_2d(**inputs | turned | {"directions": ROWS}, backend=backend)
    assert error(columns, rows.transpose(-3, -2)) <= 1e-6


def test_merging_is_the_sum(form):
    backend, device = form
    inputs = Case(3, 4).inputs(device, torch.float32)
    apart = selective_scan_2d(**inputs | {"merge": False}, backend=backend)
    assert error(selective_scan_2d(**inputs, backend=backend), apart.sum(1)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_order_of_all_pixels_in_turn_is_a_row(form, dtype):
    backend, device = form
    inputs = Case(3, 4, batch=2, directions=ROWS).inputs(device, torch.float32)
    order = torch.arange(12, dtype=dtype, device=device).expand(2, -1)
    expected, results = run(inputs, backend), run(inputs | {"order": order}, backend)
    assert_close(results, expected, 1e-6, 1e-6)


def test_an_order_may_be_any_permutation(form):
    backend, device = form
    inputs = Case(4, 3, batch=2, directions=("row",)).inputs(device, torch.float32)
    order = inputs["order"] = Case(4, 3, batch=2, order=True).inputs(device)["order"]
    images = torch.arange(2, device=device)[:, None]
    sorted_ = {name: inputs[name].flatten(-3, -2).squeeze(1) for name in OVER_PIXELS}
    sorted_ = {name: value[images, order].view(inputs[name].shape) for name, value in sorted_.items()}
    y = selective_scan_2d(**inputs | sorted_ | {"order": None}, backend=backend).flatten(1, 2)
    assert error(selective_scan_2d(**inputs, backend=backend).flatten(1, 2)[images, order], y) <= 1e-6


def test_float64_stays_float64(form):
    backend, device = form
    case = Case(5, 7, directions=CROSS, channels=1)
    results = run(case.inputs(device), backend)
    assert {value.dtype for value in results.values()} == {torch.float64}
    assert_close(results, run(case.inputs(), "reference"), 1e-13, 1e-12)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_the_cast(form, dtype, merge):
    backend, device = form
    inputs = Case(4, 5, directions=CROSS, merge=merge).inputs(device, torch.float32)
    half = {name: value.to(dtype) if name in OVER_PIXELS else value for name, value in inputs.items()}
    widened = {name: value.float() if name in OVER_PIXELS else value for name, value in half.items()}
    results, cast = run(half, backend), run(widened, backend)
    truth = run(wide(half), "reference")
    assert results["y"].dtype == results["gradient of x"].dtype == results["gradient of B"].dtype == dtype
    assert results["gradient of A"].dtype == torch.float32
    assert error(results["y"], truth["y"]) <= 1.1 * error(cast["y"].to(dtype), truth["y"])
    # The gradient of y arrives in half, too; beyond that the gradients are those of float32.
    assert_close(results, truth, 1e-2, 1e-2)


def test_views_are_accepted_and_left_alone(form):
    backend, device = form
    inputs = Case(2, 3, directions=CROSS, batch=2, channels=4).inputs(device, torch.float32)
    truth = run(inputs, backend)
    views = dict(inputs)
    for name, value in tensors(inputs).items():  # each lies in a buffer twice as long, its axes in another order
        buffer = value.new_full((2 * value.shape[1], *value.shape[:1], *value.shape[2:]), float("nan"))[::2]
        views[name] = buffer.movedim(0, 1).copy_(value)
    first = inputs["x"].permute(0, 3, 1, 2).contiguous()  # a feature map, channels first
    for x in (views["x"], first.permute(0, 2, 3, 1)):
        views["x"] = x
        kept = {name: value.clone() for name, value in tensors(views).items()}
        leaves = {name: value.detach().requires_grad_() for name, value in tensors(views).items()}
        y = selective_scan_2d(**views | leaves, backend=backend)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
        results = {"y": y} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        assert_close(results, truth, 1e-6, 1e-6)
        assert all(torch.equal(views[name], kept[name]) for name in kept)


def test_gradients_repeat_bit_for_bit(form):
    backend, device = form
    inputs = Case(5, 7, directions=CROSS).inputs(device, torch.float32)
    once, again = run(inputs, backend), run(inputs, backend)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_an_image_does_not_depend_on_its_batch(form):
    backend, device = form
    inputs = Case(5, 7, directions=CROSS, batch=2, channels=1).inputs(device, torch.float32)
    single = {name: value[1:] if name in OVER_PIXELS else value for name, value in inputs.items()}
    y, alone = selective_scan_2d(**inputs, backend=backend), selective_scan_2d(**single, backend=backend)
    assert error(alone, y[1:]) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 3, 2), (1, 0, 2)])
def test_nothing_gives_nothing(form, shape):
    backend, device = form
    inputs = Case(*shape[1:]).inputs(device, torch.float32)
    inputs |= {name: inputs[name][: shape[0]] for name in OVER_PIXELS}
    results = run(inputs, backend)
    assert results["y"].shape == (*shape, 2)
    assert not results["gradient of A"].any()


def test_forms_read_each_others_checkpoints(device):
    if device.type != "cpu":
        pytest.skip("one form on each device")
    inputs = Case(5, 7, directions=CROSS).inputs(dtype=torch.float32)
    operands = Operands2d(*(inputs[name] for name in Operands2d._fields))
    fused = pytest.importorskip("claritycore.kernels.selective_scan_2d.fused")
    codes = [1, 2]
    for forward, backward in ((fallback, fused), (fused, fallback)):
        y, checkpoints = forward.forward(operands, codes, True, True)
        theirs = backward.backward(operands, codes, checkpoints, y, True, True)
        own = forward.backward(operands, codes, checkpoints, y, True, True)
        for got, want in zip(theirs[:-1], own[:-1], strict=True):
            assert error(got, want) <= GRADIENT_ERROR


class Moves(TorchDispatchMode):
    """Lists the ops that copy or reorder floating-point numbers; the interpreter itself copies bytes."""

    names = ("copy", "clone", "contiguous", "index", "gather", "scatter", "flip", "cat", "stack", "repeat", "roll")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        moves = any(name in func.__name__ for name in self.names)
        if moves and isinstance(out, torch.Tensor) and out.is_floating_point():
            self.found.append((func.__name__, tuple(out.shape)))
        return out


@pytest.mark.parametrize("order", [False, True])
def test_triton_moves_no_activation(device, order):
    fused = pytest.importorskip("claritycore.kernels.selective_scan_2d.fused")
    case = Case(5, 7, channels=4, state=2, directions=ROWS if order else CROSS, order=order)
    inputs = case.inputs(device, torch.float32)
    inputs["x"] = inputs["x"].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    operands, codes = Operands2d(*(inputs[name] for name in Operands2d._fields)), [0, 2] if order else [1, 2]
    with Moves() as moves:
        y, checkpoints = fused.forward(operands, codes, True, True)
        fused.backward(operands, codes, checkpoints, y, True, True)
    assert moves.found == []
    # B and C may be slices of one projection, too.
    parts = torch.cat([inputs["B"], inputs["C"]], dim=-1).permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
    B, C = parts.chunk(2, dim=-1)
    with Moves() as moves:
        assert torch.equal(fused.forward(operands._replace(B=B, C=C), codes, True, True)[0], y)
    assert moves.found == []
    with Moves() as moves:
        fallback.forward(operands, codes, True, True)
    assert moves.found, "it sees no move where there are some"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_holds_no_copy_of_an_activation(device):
    inputs = Case(128, 128, channels=64, state=2).inputs(device, torch.float32)
    selective_scan_2d(**inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = selective_scan_2d(**inputs)
    held = torch.cuda.max_memory_allocated() - before
    apart = y.numel() * y.element_size() * len(DIRECTIONS)  # what the directions give, before it is added up
    assert held <= y.numel() * y.element_size() + 1.3 * apart  # the checkpoints of two states, once in 32 steps


def test_wrong_numbers_would_be_seen():
    inputs = Case(3, 4).inputs()
    wrong = inputs | {"directions": ("column", "row", "row_reversed", "column_reversed")}
    assert error(selective_scan_2d(**wrong), loop(**inputs)) > 1e3 * OUTPUT_ERROR
