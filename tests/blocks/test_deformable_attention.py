"""Deformable attention against a loop over its samples, in the form that runs and in the one that is exported."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from claritycore.blocks import DeformableAttention2d
from claritycore.deploy import summarize
from tests.strategies import feature_maps, normal


@contextlib.contextmanager
def form(compiled: bool):
    """Take the gathers of compiled graphs in eager mode, or grid_sample."""
    with mock.patch("torch.compiler.is_compiling", return_value=compiled):
        yield


both_forms = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def stirred(block: DeformableAttention2d, strength: float = 0.5, seed: int = 0) -> DeformableAttention2d:
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.copy_(strength * normal(tuple(parameter.shape), dtype=torch.float64, seed=seed + number))
    return block.eval()


def offsets_by_hand(block: DeformableAttention2d, q: Tensor, i: int, j: int) -> list[float]:
    """Offsets of cell (i, j) for the channels of one group q (c, H, W): across and down, in cells."""
    conv, norm, _, last = block.conv_offset
    stride, size = conv.stride[0], conv.kernel_size[0]
    values = []
    for c in range(len(q)):
        value = conv.bias[c].item()
        for k in range(size):
            for m in range(size):
                row, column = i * stride + k - size // 2, j * stride + m - size // 2
                if 0 <= row < q.shape[1] and 0 <= column < q.shape[2]:
                    value += conv.weight[c, 0, k, m].item() * q[c, row, column].item()
        values.append(value)
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + norm.eps)
    affine = zip(values, norm.weight.tolist(), norm.bias.tolist(), strict=True)
    values = [(value - mean) / deviation * gamma + beta for value, gamma, beta in affine]
    values = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in values]
    sums = [sum(w * v for w, v in zip(row, values, strict=True)) for row in last.weight.flatten(1).tolist()]
    return [block.offset_range * math.tanh(value) for value in sums]


def lerp_2d(at, row: float, column: float) -> Tensor:
    """Interpolate between the values that `at` gives for whole numbers."""
    top, left = math.floor(row), math.floor(column)
    corners = [(top + a, left + b, abs(1 - a - row + top) * abs(1 - b - column + left)) for a in (0, 1) for b in (0, 1)]
    return sum(weight * at(i, j) for i, j, weight in corners if weight)


def bias_by_hand(block: DeformableAttention2d, down: float, across: float) -> Tensor:
    """What the MLP says of whole ways, interpolated."""

    def at(*way: int) -> Tensor:
        logarithms = [math.copysign(math.log2(1 + abs(side)), side) for side in way]
        return block.bias_mlp(torch.tensor(logarithms, dtype=torch.float64))

    return lerp_2d(at, down, across)


def attended_by_hand(block: DeformableAttention2d, x: Tensor, stride: int) -> Tensor:
    """One query after the other, in float64."""
    batch, channels, height, width = x.shape
    groups, heads = block.groups, block.num_heads
    inside, d = channels // groups, channels // heads
    q = block.proj_q(x)
    mixed = torch.zeros_like(x)
    rows, columns = -(-height // stride), -(-width // stride)
    for b in range(batch):
        places, samples = [], []
        for i in range(rows):
            for j in range(columns):
                sample = torch.empty(channels, dtype=torch.float64)
                for g in range(groups):
                    part = slice(g * inside, (g + 1) * inside)
                    across, down = offsets_by_hand(block, q[b, part], i, j)
                    row = min(max((i + 0.5 + down) * height / rows - 0.5, 0.0), height - 1.0)
                    column = min(max((j + 0.5 + across) * width / columns - 0.5, 0.0), width - 1.0)
                    sample[part] = lerp_2d(lambda r, c, own=x[b, part]: own[:, r, c], row, column)
                    places.append((row, column))
                samples.append(block.proj_kv.weight.flatten(1) @ sample + block.proj_kv.bias)
        for i, j in [(i, j) for i in range(height) for j in range(width)]:
            biases = [bias_by_hand(block, i - row, j - column) for row, column in places]
            for h in range(heads):
                part, group = slice(h * d, (h + 1) * d), h // (heads // groups)
                scores = [
                    q[b, part, i, j] @ kv[:channels][part] / math.sqrt(d) + biases[n * groups + group][h]
                    for n, kv in enumerate(samples)
                ]
                weights = torch.stack(scores).softmax(0)
                mixed[b, part, i, j] = sum(w * kv[channels:][part] for w, kv in zip(weights, samples, strict=True))
    return block.proj_out(mixed)


@both_forms
@pytest.mark.parametrize(
    ("heads", "groups", "stride", "kernel_size", "reach", "size"),
    [
        (1, 1, 1, 3, 2.0, (3, 4)),
        (4, 2, 1, 5, 0.7, (2, 3)),
        (2, 2, 2, 3, 1.0, (5, 4)),
        (2, 1, 3, 5, 3.0, (7, 5)),
        (2, 1, 4, 3, 2.0, (6, 1)),
        (2, 1, 1, 3, 2.0, (1, 1)),
    ],
)
def test_each_query_is_the_formula(compiled, heads, groups, stride, kernel_size, reach, size):
    block = DeformableAttention2d(
        8, num_heads=heads, groups=groups, stride=stride, kernel_size=kernel_size, offset_range=reach
    )
    stirred(block.double())
    x = normal((2, 8, *size), dtype=torch.float64, seed=3)
    with form(compiled), torch.no_grad():
        torch.testing.assert_close(block(x), attended_by_hand(block, x, stride), rtol=0, atol=1e-10)


@both_forms
@given(x=feature_maps(8, dtype=torch.float64))
def test_a_fresh_block_attends_to_every_pixel(compiled, x):
    torch.manual_seed(0)
    block = DeformableAttention2d(8, num_heads=2).double()
    with form(compiled), torch.no_grad():
        y = block(x)
    k, v = block.proj_kv(x).chunk(2, dim=1)
    q, k, v = (t.flatten(2).unflatten(1, (2, 4)) for t in (block.proj_q(x), k, v))
    pixels = [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]
    ways = torch.tensor([[(i - k, j - m) for k, m in pixels] for i, j in pixels], dtype=torch.float64)
    bias = block.bias_mlp(ways.sign() * (1 + ways.abs()).log2()).movedim(-1, 0)
    weights = (torch.einsum("bhcq,bhck->bhqk", q, k) / 2 + bias).softmax(-1)
    mixed = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)
    torch.testing.assert_close(y, block.proj_out(mixed), rtol=0, atol=1e-12)


@both_forms
@given(x=feature_maps(8), stride=st.integers(1, 4), strength=st.sampled_from([0.5, 1e3]))
def test_no_sample_lies_outside_the_map(compiled, x, stride, strength):
    """Of a map of ones every sample is one: of zeros beyond the border it would not be."""
    block = stirred(DeformableAttention2d(8, num_heads=4, groups=2, stride=stride, offset_range=50.0))
    with torch.no_grad():
        block.conv_offset[-1].weight.mul_(strength)
        places = block._places(block.proj_q(x))
        cells = -(-x.shape[2] // stride), -(-x.shape[3] // stride)
        assert places.shape == (len(x), 2, 2, *cells)
        for axis, side in ((0, x.shape[3]), (1, x.shape[2])):
            assert places[:, axis].min() >= 0
            assert places[:, axis].max() <= side - 1
        ones = torch.ones_like(x)
        with form(compiled):
            y = block(ones)
        v = block.proj_kv(ones).chunk(2, dim=1)[1]
        torch.testing.assert_close(y, block.proj_out(v), rtol=1e-5, atol=1e-5)


@both_forms
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spreads_and_reads_no_other_memory(compiled, value):
    block = stirred(DeformableAttention2d(8, num_heads=2))
    x = normal((2, 8, 4, 6))
    with torch.no_grad(), form(compiled):
        expected = block(x)[1]
        x[0] = value
        y = block(x)
    assert y[0].isnan().all()
    torch.testing.assert_close(y[1], expected)


@given(x=feature_maps(8, dtype=torch.float64), stride=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_forms_agree_in_outputs_and_gradients(x, stride, seed):
    block = stirred(DeformableAttention2d(8, num_heads=4, groups=2, stride=stride).double(), seed=seed)
    results = []
    for compiled in (False, True):
        leaf = x.detach().requires_grad_()
        with form(compiled):
            y = block(leaf)
        upstream = normal(tuple(y.shape), dtype=torch.float64)
        results.append((y, *torch.autograd.grad((y * upstream).sum(), [leaf, *block.parameters()])))
    for eager, gathered in zip(*results, strict=True):
        torch.testing.assert_close(eager, gathered, rtol=1e-8, atol=1e-8)


@both_forms
def test_gradients(compiled):
    block = stirred(DeformableAttention2d(4, num_heads=2, stride=2, kernel_size=3).double())
    x = normal((1, 4, 3, 4), dtype=torch.float64).requires_grad_()
    with form(compiled):
        assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *block.parameters()))


@both_forms
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
def test_places_are_float32_under_half(compiled, dtype, tolerance):
    """In bfloat16 a place near the end of 600 pixels would be 2 pixels off, and the bias that of another way."""
    block = stirred(DeformableAttention2d(8, num_heads=2, stride=8), strength=0.25).to(dtype)
    x = normal((1, 8, 1, 600), dtype=dtype)
    with torch.no_grad(), form(compiled):
        block.conv_offset[-1].weight.zero_()  # so that only the places of the grid are at stake
        y = block(x)
        expected = block.float()(x.float())
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance * expected.abs().max().item())
        with torch.autocast("cpu", dtype=dtype):
            y = block(x.float())
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_logits_may_be_scaled_from_outside():
    torch.manual_seed(0)
    block, x = DeformableAttention2d(8, num_heads=2, stride=2).double(), normal((2, 8, 6, 6), dtype=torch.float64)
    assert torch.equal(block(x, torch.ones(2, 2, dtype=torch.float64)), block(x))
    scale = torch.tensor([[2.0, 0.5], [1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    changed = block(x, scale)
    changed.square().sum().backward()
    assert scale.grad.abs().min() > 0
    # Offsets start at zero: the same factor on the query's projection, head by head, is the same attention.
    with torch.no_grad():
        for head in range(2):
            block.proj_q.weight[4 * head : 4 * head + 4] *= scale[0, head]
            block.proj_q.bias[4 * head : 4 * head + 4] *= scale[0, head]
    torch.testing.assert_close(changed[:1], block(x[:1]))
    with pytest.raises(ValueError, match=r"logit_scale must be \(B, num_heads\) = \(2, 2\), got shape \(2, 1\)"):
        block(x, torch.ones(2, 1))


def test_offsets_start_at_zero():
    block = DeformableAttention2d(8, num_heads=2, stride=3)
    places = block._places(normal((1, 8, 9, 7)))
    grid = [(i + 0.5) * 7 / 3 - 0.5 for i in range(3)]
    torch.testing.assert_close(places[0, 0, 0], torch.tensor(grid).expand(3, 3))
    torch.testing.assert_close(places[0, 1, 0], torch.tensor([1.0, 4.0, 7.0])[:, None].expand(3, 3))


def test_exports_without_grid_sample():
    program = torch.export.export(DeformableAttention2d(8).eval(), (normal((1, 8, 5, 7)),))
    assert not any("grid_sampler" in str(node.target) for node in program.graph.nodes)


def test_macs():
    heads, groups, pixels, samples = 4, 2, 9 * 7, 5 * 4
    block = DeformableAttention2d(8, num_heads=heads, groups=groups, stride=2)
    linear = pixels * 2 * 8 * 8 + samples * (2 * 8 * 8 + 8 * 25 + 8 * 2)
    attention = 2 * pixels * samples * 8
    sampled = 4 * (samples * 8 + pixels * samples * heads)
    mlp = 17 * 13 * (2 * 64 + 64 * heads)
    assert summarize(block, (1, 8, 9, 7)).macs == linear + attention + sampled + mlp


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="num_heads must divide the 8 channels, got 3"):
        DeformableAttention2d(8, num_heads=3)
    with pytest.raises(ValueError, match="num_heads must be a multiple of groups = 4, got 2"):
        DeformableAttention2d(8, num_heads=2, groups=4)
    with pytest.raises(ValueError, match="kernel_size must be an odd integer of at least 1, got 4"):
        DeformableAttention2d(8, kernel_size=4)
    for reach in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"offset_range must be positive and finite, got {reach}"):
            DeformableAttention2d(8, offset_range=reach)
    for name in ("channels", "num_heads", "groups", "stride"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            DeformableAttention2d(**{"channels": 8, name: 0})
    block = DeformableAttention2d(8, num_heads=4, groups=2, stride=3, kernel_size=7)
    assert "DeformableAttention2d(\n  8, num_heads=4, groups=2, offset_range=2.0\n" in repr(block)
    assert (block.receptive_radius, block.tile_multiple) == (3, 3)
