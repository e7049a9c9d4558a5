"""SS2D against its authors' form written by hand, pixel orders against explicit ones, and the gated residual."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from claritycore.blocks import SelectiveScan2d, SSMGlobalMixer
from claritycore.blocks import selective_scan as module
from claritycore.kernels.selective_scan import selective_scan_reference
from tests.strategies import normal

EXAMPLE = Path(__file__).parents[2] / "examples" / "scan_reach.py"
SIZES = [(5, 7), (7, 5), (1, 6), (6, 1), (1, 1)]
SUBSETS = [
    ("row",),
    ("column_reversed",),
    ("row", "column"),
    ("row_reversed", "row"),
    ("column_reversed", "row", "column"),
    ("row", "column", "row_reversed", "column_reversed"),
]


def pixel_order(direction, height, width):
    """The pixels in the order in which a direction comes to them."""
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    order = columns if direction.startswith("column") else rows
    return order[::-1] if direction.endswith("reversed") else order


def stirred(kind, *args, **options):
    """Build a block, the same for the same arguments, and move every parameter off its first value."""
    torch.manual_seed(0)
    block = kind(*args, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def before_the_scan(state, tokens):
    u, z = F.linear(tokens, state["in_proj.weight"]).chunk(2, dim=-1)
    weight, bias = state["conv2d.weight"], state["conv2d.bias"]
    u = F.conv2d(u.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return F.silu(u), z


def scan_by_hand(state, sequences):
    """The scans of sequences (B, K, D, L), each with the parameters of its own."""
    scans, inner, rank = state["dt_projs_weight"].shape
    parts = torch.einsum("bkdl,kcd->bkcl", sequences, state["x_proj_weight"])
    size = (parts.shape[2] - rank) // 2
    r, B, C = parts.split([rank, size, size], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", r, state["dt_projs_weight"]).flatten(1, 2)
    A, D, bias = -state["A_logs"].exp(), state["Ds"], state["dt_projs_bias"].flatten()
    y = selective_scan_reference(sequences.flatten(1, 2), delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
    return y.unflatten(1, (scans, inner))


def after_the_scan(state, y, z):
    y = F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], state["out_norm.weight"], state["out_norm.bias"])
    return F.linear(y * F.silu(z), state["out_proj.weight"])


def ss2d_by_hand(state, tokens):
    """SS2D as its authors build it: sequences by stack, transpose and flip, one long scan, and the way back."""
    height, width = tokens.shape[1:3]
    u, z = before_the_scan(state, tokens)
    both = torch.stack([u.flatten(2), u.transpose(2, 3).flatten(2)], dim=1)
    y = scan_by_hand(state, torch.cat([both, both.flip(-1)], dim=1))
    y = y[:, :2] + y[:, 2:].flip(-1)
    y = y[:, 0].unflatten(-1, (height, width)) + y[:, 1].unflatten(-1, (width, height)).transpose(2, 3)
    return after_the_scan(state, y, z)


def ss2d_by_orders(state, tokens, directions):
    """The same for any directions, a pixel at a time."""
    height, width = tokens.shape[1:3]
    u, z = before_the_scan(state, tokens)
    orders = [pixel_order(direction, height, width) for direction in directions]
    sequences = torch.stack([torch.stack([u[:, :, i, j] for i, j in order], -1) for order in orders], dim=1)
    scanned = scan_by_hand(state, sequences)
    y = torch.zeros_like(u)
    for k, order in enumerate(orders):
        for step, (i, j) in enumerate(order):
            y[:, :, i, j] += scanned[:, k, :, step]
    return after_the_scan(state, y, z)


# Against the peers


def test_state_dicts_of_the_peers_load_strictly():
    """The names and shapes of SS2D in VMamba and MambaIR, for 20 channels and the default options."""
    inner, rank, size = 40, 2, 16
    shapes = {
        "x_proj_weight": (4, rank + 2 * size, inner),
        "dt_projs_weight": (4, inner, rank),
        "dt_projs_bias": (4, inner),
        "A_logs": (4 * inner, size),
        "Ds": (4 * inner,),
        "in_proj.weight": (2 * inner, 20),
        "conv2d.weight": (inner, 1, 3, 3),
        "conv2d.bias": (inner,),
        "out_norm.weight": (inner,),
        "out_norm.bias": (inner,),
        "out_proj.weight": (20, inner),
    }
    state = {name: 0.2 * normal(shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    block = SelectiveScan2d(20)
    block.load_state_dict(state, strict=True)
    tokens = normal((2, 6, 5, 20))
    y = block(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, ss2d_by_hand(state, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_form_of_the_peers_and_so_are_its_gradients(size, dtype, tolerance):
    block = stirred(SelectiveScan2d, 6, d_state=5, dt_rank=3).to(dtype)
    state = {name: parameter.detach().clone().requires_grad_() for name, parameter in block.named_parameters()}
    tokens = normal((2, *size, 6), dtype=dtype).requires_grad_()
    upstream = normal((2, *size, 6), dtype=dtype, seed=1)
    y, expected = block(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), ss2d_by_hand(state, tokens)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(y, [tokens, *block.parameters()], upstream)
    by_hand = torch.autograd.grad(expected, [tokens, *state.values()], upstream)
    for name, gradient, right in zip(["tokens", *state], gradients, by_hand, strict=True):
        scale = max(1, right.abs().max().item())
        torch.testing.assert_close(gradient, right, rtol=0, atol=10 * tolerance * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("directions", SUBSETS, ids="-".join)
@pytest.mark.parametrize("d_conv", [1, 5])
def test_directions_are_scanned_in_the_order_given(directions, d_conv):
    block = stirred(SelectiveScan2d, 3, d_state=2, expand=1.5, d_conv=d_conv, directions=directions).double()
    assert block.d_inner == 4
    tokens = normal((2, 3, 4, 3), dtype=torch.float64)
    expected = ss2d_by_orders(block.state_dict(), tokens, directions)
    torch.testing.assert_close(block(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), expected, rtol=0, atol=1e-11)


def test_a_direction_has_its_parameters_wherever_it_stands():
    full = stirred(SelectiveScan2d, 4, d_state=3).double()
    order = [2, 0, 3, 1]
    turned = SelectiveScan2d(4, d_state=3, directions=[full.directions[k] for k in order]).double()
    state = full.state_dict()
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
        state[name] = state[name].unflatten(0, (4, -1))[order].flatten(0, 1)
    turned.load_state_dict(state)
    x = normal((1, 4, 5, 6), dtype=torch.float64)
    torch.testing.assert_close(turned(x), full(x), rtol=0, atol=1e-12)


# What a pixel sees


@pytest.mark.parametrize("directions", SUBSETS, ids="-".join)
def test_a_pixel_sees_exactly_the_pixels_before_it(directions):
    """By the gradient of every output pixel; the convolution is one pixel wide, so that only the scan reaches out."""
    height, width = 3, 4
    torch.manual_seed(0)
    block = SelectiveScan2d(2, d_state=2, d_conv=1, directions=directions).double()
    x = normal((1, 2, height, width), dtype=torch.float64).requires_grad_()
    y = block(x)
    for here in pixel_order("row", height, width):
        (gradient,) = torch.autograd.grad(y[0, :, *here] @ normal((2,), dtype=y.dtype), x, retain_graph=True)
        seen = {tuple(pixel) for pixel in gradient[0].abs().sum(0).nonzero().tolist()}
        orders = [pixel_order(direction, height, width) for direction in directions]
        assert seen == {pixel for order in orders for pixel in order[: order.index(here) + 1]}


@pytest.mark.parametrize("d_conv", [1, 3, 7])
def test_the_radius_is_that_of_the_convolution(d_conv):
    for block in (SelectiveScan2d(2, d_conv=d_conv), SSMGlobalMixer(2, d_conv=d_conv)):
        assert block.receptive_radius == d_conv // 2
        assert not block.tile_safe


def test_the_picture_of_it_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    spec = importlib.util.spec_from_file_location("scan_reach", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for name, value in {"SIDE": 5, "CHANNELS": 2, "IMAGES": 1, "BLOCKS": 1}.items():
        monkeypatch.setattr(example, name, value)
    counts = [int((example.reach(directions) > 0).sum()) for directions in example.PANELS.values()]
    assert counts == [15 + 4, 15 + 4 + 3, 25]  # what lies before the centre, and one pixel around by the convolution
    example.draw(tmp_path / "docs" / "reach.png")
    assert (tmp_path / "docs" / "reach.png").read_bytes().startswith(b"\x89PNG")


# First values


def test_first_values():
    torch.manual_seed(0)
    block = SelectiveScan2d(256, d_state=8)
    steps = F.softplus(block.dt_projs_bias.double()).log10()
    assert -3.001 < steps.min() < -2.98
    assert -1.02 < steps.max() < -0.999
    quarters = torch.quantile(steps.flatten(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quarters, torch.tensor([-2.5, -2.0, -1.5], dtype=torch.float64), rtol=0, atol=0.05)
    for weight, bound in ((block.dt_projs_weight, 16**-0.5), (block.x_proj_weight, 512**-0.5)):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    rates = torch.tensor([math.log(n) for n in range(1, 9)]).expand(4 * 512, 8)
    torch.testing.assert_close(block.A_logs.detach(), rates)
    assert (block.Ds == 1).all()
    assert block.dt_rank == 16
    assert SelectiveScan2d(17).dt_rank == 2


# Dtypes


@pytest.fixture
def operands(monkeypatch):
    """What the blocks hand to the scan, call by call."""
    calls, scan = [], module.selective_scan_2d

    def spy(*inputs, **options):
        names = ("x", "delta", "A", "B", "C", "D")
        calls.append(dict(zip(names, inputs, strict=True)) | options)
        return scan(*inputs, **options)

    monkeypatch.setattr(module, "selective_scan_2d", spy)
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_decays_skips_and_biases_are_at_least_float32(dtype, operands):
    block = stirred(SelectiveScan2d, 4, d_state=3).to(dtype)
    assert block(normal((1, 4, 3, 3), dtype=dtype)).dtype == dtype
    for name in ("A", "D", "delta_bias"):
        assert operands[0][name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert operands[0]["x"].dtype == operands[0]["delta"].dtype == dtype


def test_autocast_leaves_them_alone(operands):
    block = stirred(SelectiveScan2d, 4, d_state=3)
    exact = -block.A_logs.exp().unflatten(0, (4, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(normal((1, 4, 3, 3)))
    assert torch.equal(operands[0]["A"], exact)
    assert operands[0]["D"].dtype == operands[0]["delta_bias"].dtype == y.dtype == torch.float32
    assert operands[0]["x"].dtype == torch.bfloat16


def test_decay_rates_stay_negative(operands):
    block = SelectiveScan2d(4, d_state=3)
    with torch.no_grad():
        block.A_logs.uniform_(-60, 60)
    y = block(normal((1, 4, 5, 5)))
    assert (operands[0]["A"] < 0).all()
    assert y.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize(("kind", "options"), [(SelectiveScan2d, {}), (SSMGlobalMixer, {"gate": 1.0})])
def test_half_precision_is_close_to_float32(kind, options, dtype, tolerance):
    half = stirred(kind, 16, **options).to(dtype)
    x = normal((1, 16, 12, 17), dtype=dtype)
    exact = stirred(kind, 16, **options).to(dtype).float()(x.float())
    error = (half(x).float() - exact).abs().max() / exact.abs().max()
    assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 100.0])
def test_gradients_are_finite(dtype, magnitude):
    block = stirred(SSMGlobalMixer, 8, gate=0.5).to(dtype)
    x = (magnitude * normal((1, 8, 9, 11))).to(dtype).requires_grad_()
    block(x).float().square().mean().backward()
    for tensor in (x, *block.parameters()):
        assert tensor.grad.isfinite().all()


# The gated residual


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_mixer_is_the_identity(dtype):
    x = normal((2, 8, 6, 5), dtype=dtype)
    assert torch.equal(SSMGlobalMixer(8).to(dtype)(x), x)


def test_the_mixer_is_the_formula():
    block = stirred(SSMGlobalMixer, 6, d_state=3, expand=1, dt_rank=2).double()
    x = normal((2, 6, 5, 4), dtype=torch.float64)
    expected = x + block.gate.reshape(1, 6, 1, 1) * block.scan(block.norm(x))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-13)
    assert block.scan.directions == ("row", "column")
    assert (block.scan.d_inner, block.scan.d_state, block.scan.dt_rank) == (6, 3, 2)


def test_at_a_closed_gate_only_the_gate_learns_and_at_an_open_one_everything():
    x = normal((1, 8, 5, 4))
    for gate, learns in ((0.0, {"gate"}), (0.01, {name for name, _ in SSMGlobalMixer(8).named_parameters()})):
        torch.manual_seed(0)
        block = SSMGlobalMixer(8, gate=gate)
        (block(x) * normal((1, 8, 5, 4), seed=1)).sum().backward()
        assert {name for name, parameter in block.named_parameters() if (parameter.grad != 0).any()} == learns


# Refusals


@pytest.mark.parametrize("kind", [SelectiveScan2d, SSMGlobalMixer])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
        ({"d_state": 0}, "d_state must be an integer of at least 1, got 0"),
        ({"dt_rank": 0}, "dt_rank must be an integer of at least 1, got 0"),
        ({"dt_rank": "full"}, "dt_rank must be \"auto\" or a number, got 'full'"),
        ({"d_state": 257}, "d_state must be at most 256, got 257"),
        ({"expand": float("inf")}, "expand must leave at least 1 channel, got inf of 4 channels"),
        ({"expand": 0.2}, "expand must leave at least 1 channel, got 0.2 of 4 channels"),
        ({"d_conv": 4}, "d_conv must be an odd integer of at least 1, got 4"),
        ({"d_conv": -1}, "d_conv must be an odd integer of at least 1, got -1"),
        ({"directions": ()}, r"directions must be distinct ones of row, column, .*got \(\)"),
        ({"directions": ("row", "row")}, r"directions must be distinct ones of .*got \('row', 'row'\)"),
        ({"directions": ("diagonal",)}, r"directions must be distinct ones of .*got \('diagonal',\)"),
    ],
    ids=str,
)
def test_bad_arguments_raise(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"channels": 4} | options)


def test_repr():
    text = repr(SelectiveScan2d(8, directions=["column"]))
    assert "8, d_state=16, expand=2.0, dt_rank=1, d_conv=3, directions=('column',)" in text
