"""What holds of window attention whatever its numbers: dtypes, layouts, reach, memory, repetition, Swin's own form."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from claritycore.kernels import window_attention
from claritycore.kernels.window_attention import fallback
from claritycore.kernels.window_attention.operands import Layout, Operands
from tests.kernels.closeness import CPU, error
from tests.kernels.test_window_attention import TENSORS, Case, assert_close, attend, run, tensors, wide

MIXED = Case(2, 4, (2, 3), (0, 2), heads=1, batch=2, tokens=2, logit_scale=True)
COSINE = Case(3, 3, (2, 3), (1, 0), heads=2, cosine=True, other_map=True, logit_scale=True)
ONE = Case(1, 2, (2, 2), (1, 1), heads=1, tokens=1, logit_scale=True)
OVERLAPPING = Case(3, 4, (2, 3), heads=1, beyond=(1, 2), zero_border=True)


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


@pytest.mark.parametrize("case", [ONE, COSINE, OVERLAPPING], ids=str)
def test_float64_stays_float64(form, case):
    backend, device = form
    results = run(case.inputs(device), backend)
    assert {value.dtype for value in results.values()} == {torch.float64}
    assert_close(results, run(case.inputs(), "reference"), 1e-13, 1e-13)


@pytest.mark.parametrize("case", [ONE, COSINE, OVERLAPPING], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_the_cast(form, dtype, case):
    backend, device = form
    inputs = case.inputs(device, torch.float32)
    half = inputs | {name: inputs[name].to(dtype) for name in ("qkv", "kv", "tokens") if inputs.get(name) is not None}
    results, truth = run(half, backend), run(wide(half), "reference")
    y_of_float = run(half | {name: value.float() for name, value in tensors(half).items()}, backend)["y"]
    assert results["y"].dtype == results["gradient of qkv"].dtype == dtype
    assert results["gradient of bias_table"].dtype == torch.float32
    # Triton multiplies matrices in half precision: the weights of values are rounded too.
    casts = 1.1 if backend == "torch" else 2.5
    assert error(results["y"], truth["y"]) <= casts * error(y_of_float.to(dtype), truth["y"])
    # The gradient of y arrives in half, too.
    assert_close(results, truth, 1e-2, 1e-2)
    everything = inputs | {name: value.to(dtype) for name, value in tensors(inputs).items()}
    results = run(everything, backend)
    assert {value.dtype for value in results.values()} == {dtype}
    assert_close(results, run(wide(everything), "reference"), 1e-2, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_logits_of_half_precision_stay_finite(form, dtype):
    backend, device = form
    inputs = ONE.inputs(device, torch.float32)
    inputs["qkv"] = inputs["qkv"].to(dtype) * 200  # products beyond the range of float16
    results = run(inputs, backend)
    assert all(value.isfinite().all() for value in results.values())
    assert error(results["y"], run(wide(inputs), "reference")["y"]) <= 1e-2


def views_of(inputs, device):
    """The same numbers with channels first, with gaps, and from the middle of larger tensors."""
    nan = float("nan")
    batch, height, width, channels = inputs["qkv"].shape
    empty = {
        "qkv": torch.full((batch, channels, height, width), nan, device=device).permute(0, 2, 3, 1),
        "bias_table": torch.full((2, *inputs["bias_table"].shape[::-1]), nan, device=device)[1].T,
    }
    if inputs.get("kv") is not None:
        empty["kv"] = torch.full((batch, height + 2, 3 * width, 2 * inputs["kv"].shape[-1]), nan, device=device)
        empty["kv"] = empty["kv"][:, 1:-1, ::3, 1::2]
    if inputs.get("tokens") is not None:
        empty["tokens"] = torch.full((*inputs["tokens"].shape[1:], 2 * batch), nan, device=device)[..., ::2]
        empty["tokens"] = empty["tokens"].permute(2, 0, 1)
    if inputs.get("logit_scale") is not None:
        empty["logit_scale"] = torch.full(inputs["logit_scale"].shape[::-1], nan, device=device).T
    for name, view in empty.items():
        view.copy_(inputs[name])
    return inputs | empty


@pytest.mark.parametrize("case", [MIXED, COSINE, OVERLAPPING], ids=str)
def test_views_are_accepted_and_left_alone(form, case):
    backend, device = form
    inputs = case.inputs(device, torch.float32)
    truth, views = run(inputs, backend), views_of(inputs, device)
    kept = {name: value.clone() for name, value in tensors(views).items()}
    leaves = {name: value.detach().requires_grad_() for name, value in tensors(views).items()}
    y = attend(**views | leaves, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    scattered = torch.empty(upstream.shape[::-1], device=device).permute(3, 2, 1, 0).copy_(upstream)
    gradients = torch.autograd.grad(y, list(leaves.values()), scattered)
    results = {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    assert_close(results, truth, 1e-6, 1e-6)
    assert all(torch.equal(views[name], kept[name]) for name in kept)
    y = attend(**inputs | leaves, backend=backend)
    expanded, dense = (torch.autograd.grad(y, leaves["qkv"], g, retain_graph=True)[0] for g in ones_like(y))
    assert error(expanded, dense) <= 1e-6


def ones_like(y):
    return torch.ones((), device=y.device).expand_as(y), torch.ones_like(y)


@pytest.mark.parametrize("case", [MIXED, COSINE, OVERLAPPING], ids=str)
def test_it_repeats_bit_for_bit(form, case):
    backend, device = form
    inputs = case.inputs(device, torch.float32)
    once, again = run(inputs, backend), run(inputs, backend)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_an_image_does_not_depend_on_its_batch(form):
    backend, device = form
    inputs = Case(4, 5, (2, 3), (1, 2), heads=1, batch=3, tokens=2, logit_scale=True).inputs(device, torch.float32)
    one = inputs | {name: inputs[name][1:2] for name in ("qkv", "tokens", "logit_scale")}
    assert error(attend(**one, backend=backend), attend(**inputs, backend=backend)[1:2]) <= 1e-6


REACHES = [
    *(Case(7, 6, (3, 2), (row, column), bias=False) for row in range(3) for column in range(2)),
    Case(4, 5, (6, 7), (2, 3)),  # windows larger than the map
    Case(4, 5, (6, 7)),
    Case(7, 8, (2, 3), (1, 2), (2, 3)),
    Case(6, 7, (3, 2), beyond=(1, 2)),
    Case(1, 1, (8, 8), (4, 4)),
]


def windows_along(length, window, shift, dilation):
    return [(pixel % dilation, (pixel // dilation - shift) // window) for pixel in range(length)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", REACHES, ids=str)
def test_the_gradient_of_a_pixel_ends_with_its_window(case, backend):
    inputs = case.inputs(CPU, torch.float32)
    inputs["qkv"].requires_grad_()
    y = attend(**inputs, backend=backend)
    each = [windows_along(*sizes) for sizes in zip(y.shape[1:3], case.window, case.shift, case.dilation, strict=True)]
    for row in range(case.height):
        for column in range(case.width):
            (gradient,) = torch.autograd.grad(y[0, row, column].sum(), inputs["qkv"], retain_graph=True)
            reached = gradient[0].abs().sum(-1) > 0
            seen = [torch.zeros(n, dtype=torch.bool) for n in y.shape[1:3]]
            for pixels, at, windows, window, beyond in zip(
                seen, (row, column), each, case.window, case.beyond or (0, 0), strict=True
            ):
                own = [i for i, name in enumerate(windows) if name == windows[at]]
                if beyond:
                    first = at // window * window
                    own = list(range(max(first - beyond, 0), min(first + window + beyond, len(pixels))))
                pixels[own] = True
            assert torch.equal(reached, seen[0][:, None] & seen[1])


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_nan_stays_in_its_window(backend, device):
    device = device if backend == "triton" else CPU
    inputs = Case(5, 6, (2, 3), (1, 2), heads=1).inputs(device, torch.float32)
    inputs["qkv"][0, 2, 3] = float("nan")
    y = attend(**inputs, backend=backend)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, 1:3, 2:5] = True
    assert torch.equal(y.isnan(), reached)
    inputs["qkv"].requires_grad_()
    (gradient,) = torch.autograd.grad(attend(**inputs, backend=backend).sum(), inputs["qkv"])
    assert not gradient.isnan()[0][~reached[0, ..., 0]].any()


@pytest.mark.parametrize("case", [ONE, OVERLAPPING], ids=str)
def test_each_gradient_can_be_had_alone(form, case):
    backend, device = form
    inputs = case.inputs(device, torch.float32)
    expected = run(inputs, backend)
    for name, value in tensors(inputs).items():
        leaf = value.clone().requires_grad_()
        y = attend(**inputs | {name: leaf}, backend=backend)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        assert torch.equal(torch.autograd.grad(y, leaf, upstream)[0], expected[f"gradient of {name}"])


@pytest.mark.parametrize("sizes", [(0, 3, 2), (1, 0, 2), (2, 3, 0)])
def test_nothing_gives_nothing(form, sizes):
    backend, device = form
    batch, *size = sizes
    for case in (
        Case(*size, (2, 2), (1, 1), batch=batch, tokens=2, logit_scale=True),
        Case(*size, (2, 2), beyond=(1, 1)),
    ):
        inputs = case.inputs(device, torch.float32)
        inputs |= {"qkv": inputs["qkv"].new_empty(batch, *size, 18)}
        results = run(inputs, backend)
        assert results["y"].shape == (batch, *size, 6)
        assert not any(value.any() for value in results.values())


def operands_of(case, device=CPU):
    inputs = case.inputs(device, torch.float32)
    keys = inputs.get("key_window_size", case.window)
    layout = Layout(
        *(case.window, keys, case.shift, case.dilation, case.heads, case.scale or 0.5, case.cosine, case.zero_border)
    )
    return Operands(*(inputs.get(name) for name in TENSORS)), layout


@pytest.mark.parametrize("case", [MIXED, COSINE, OVERLAPPING], ids=str)
def test_triton_reads_what_the_fallback_computed(case, device):
    """The results of one forward serve the other's backward, but for the sums that Triton keeps."""
    if device.type != "cpu":
        pytest.skip("one form on each device")
    fused = pytest.importorskip("claritycore.kernels.window_attention.fused")
    x, layout = operands_of(case)
    y, log_sum = fused.forward(x, layout)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    wanted = [value is not None for value in x]
    theirs = fallback.backward(x, layout, y, log_sum, upstream, wanted)
    own = fused.backward(x, layout, fallback.forward(x, layout)[0], log_sum, upstream, wanted)
    for got, want in zip(theirs, own, strict=True):
        assert (got is None and want is None) or error(got, want) <= 2e-6


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any op returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 64, (16, 16), (8, 8), heads=3, head_dim=4),
        Case(64, 64, (16, 16), (8, 8), heads=3, head_dim=4, bias=False, tokens=4),
        Case(64, 64, (16, 16), (8, 8), heads=3, head_dim=4, cosine=True, logit_scale=True),
    ],
    ids=str,
)
def test_forward_holds_no_logits(case):
    x, layout = operands_of(case)
    logits, bias = 3 * 64 * 64 * 256, 3 * 256 * 256
    with Largest() as largest:
        fallback.forward(x, layout)
    # As large as qkv, or as the bias of one window, which is no larger in a larger map.
    assert largest.numel <= max(x.qkv.numel(), bias if case.bias else 0) < logits / 10
    with Largest() as largest:
        q = x.qkv.new_zeros(16, 3, 256, 4)
        q @ q.mT
    assert largest.numel == logits, "it sees logits where there are any"


def test_triton_holds_no_logits(device):
    """In forward not even the bias of a window."""
    fused = pytest.importorskip("claritycore.kernels.window_attention.fused")
    x, layout = operands_of(Case(8, 16, (8, 8), heads=1, head_dim=4), device)
    with Largest() as largest:
        fused.forward(x, layout)
    assert largest.numel <= x.qkv.numel() * x.qkv.element_size() < 2 * 64 * 64  # the interpreter copies bytes


@pytest.mark.parametrize("piece", [2**20, 2**14])
def test_backward_of_the_fallback_holds_a_piece_of_the_logits(piece, monkeypatch):
    monkeypatch.setattr(fallback, "PIECE", piece)
    case = Case(128, 128, (8, 8), heads=2, head_dim=2)
    x, layout = operands_of(case)
    y, rest = fallback.forward(x, layout)
    with Largest() as largest:
        fallback.backward(x, layout, y, rest, torch.ones_like(y), [value is not None for value in x])
    row_of_windows = 2 * 16 * 64 * 64
    assert largest.numel <= max(1.01 * x.qkv.numel(), piece, row_of_windows) < 2 * 128 * 128 * 64


class Moves(TorchDispatchMode):
    """Lists the ops that copy or reorder what is as large as a map of queries, or of all that attention reads."""

    names = ("copy", "clone", "contiguous", "pad", "cat", "_to", "roll", "gather", "index")

    def __init__(self, *sizes):
        super().__init__()
        self.sizes, self.found = sizes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        moves = any(name in func.__name__ for name in self.names) and isinstance(out, torch.Tensor)
        if moves and out.is_floating_point() and out.numel() in self.sizes:
            self.found.append((func.__name__, tuple(out.shape)))
        return out


@pytest.mark.parametrize("case", [Case(5, 7, (2, 3), (1, 1), heads=1), COSINE], ids=str)
def test_triton_moves_no_feature_map(case, device):
    fused = pytest.importorskip("claritycore.kernels.window_attention.fused")
    x, layout = operands_of(case, device)
    x = x._replace(qkv=x.qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    sizes = [count * x.queries.numel() for count in (1, 2, 3)]
    with Moves(*sizes) as moves:
        y, log_sum = fused.forward(x, layout)
    assert moves.found == []
    x = x._replace(qkv=x.qkv.contiguous())
    with Moves(*sizes) as moves:
        fused.backward(x, layout, y, log_sum, torch.ones_like(y), [value is not None for value in x])
    assert moves.found == []
    with Moves(*sizes) as moves:
        x.qkv.clone()
    assert moves.found, "it sees no move where there is one"


def rolled_and_masked(qkv, table, heads, window, shift):
    """Swin's own form: roll, cut into windows, forbid what was not adjacent, put back, roll back."""
    batch, height, width, _ = qkv.shape
    (rows, columns), (down, across) = window, shift
    regions = torch.zeros(height, width)
    for number, (along_rows, along_columns) in enumerate(
        (a, b)
        for a in (slice(0, height - rows), slice(height - rows, height - down), slice(height - down, height))
        for b in (slice(0, width - columns), slice(width - columns, width - across), slice(width - across, width))
    ):
        regions[along_rows, along_columns] = number

    def cut(x):
        x = x.unflatten(1, (height // rows, rows)).unflatten(3, (width // columns, columns))
        return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(0, 2)

    shifted = cut(torch.roll(qkv, (-down, -across), (1, 2)))
    q, k, v = shifted.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    i, j = i.flatten(), j.flatten()
    index = (i[:, None] - i + rows - 1) * (2 * columns - 1) + j[:, None] - j + columns - 1
    logits = q @ k.mT * q.shape[-1] ** -0.5 + table[index].permute(2, 0, 1)
    numbers = cut(regions[None, ..., None])[..., 0].repeat(batch, 1)
    mask = (numbers[:, :, None] != numbers[:, None])[:, None]
    y = (logits.masked_fill(mask, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = y.unflatten(0, (batch, height // rows, width // columns)).unflatten(3, (rows, columns))
    y = y.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    return torch.roll(y, (down, across), (1, 2))


@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (2, 1), (0, 3)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_it_equals_the_cyclic_shift_with_masks(backend, shift):
    """A cyclic shift by s begins windows at s; where it is zero, its masks forbid nothing."""
    inputs = Case(9, 12, (3, 4), shift, batch=2).inputs()
    qkv, table = (inputs[name].requires_grad_() for name in ("qkv", "bias_table"))
    y = window_attention(qkv, table, num_heads=2, window_size=(3, 4), shift=shift, backend=backend)
    expected = rolled_and_masked(qkv, table, 2, (3, 4), shift)
    assert error(y, expected) <= 1e-13
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    for got, want in zip(*(torch.autograd.grad(x, (qkv, table), upstream) for x in (y, expected)), strict=True):
        assert error(got, want) <= 1e-13
