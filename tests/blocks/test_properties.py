"""What every public block keeps, generated from its contract row."""

import copy
import io
import pickle
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from tests.contracts import CONTRACTS, Contract
from tests.strategies import feature_maps, normal

pytestmark = pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS.keys())

# Between two ways of computing the same, relative to the largest magnitude.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def assert_same(actual, expected, dtype=torch.float64):
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-3).item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@given(data=st.data())
def test_output_has_the_promised_shape_whatever_the_size(contract: Contract, data):
    x = data.draw(feature_maps(data.draw(st.sampled_from(contract.channels))))
    y = contract.make(x.shape[1])(x)
    assert tuple(y.shape) == contract.out_shape(tuple(x.shape))
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(data=st.data())
def test_dtype_is_kept_and_half_agrees_with_double(contract: Contract, dtype, data):
    x = data.draw(feature_maps(contract.channels[-1], dtype=dtype))
    y = contract.make(x.shape[1], dtype=dtype).eval()(x)
    assert y.dtype == dtype
    exact = contract.make(x.shape[1], dtype=dtype).double().eval()(x.double())
    assert_same(y, exact, dtype)


@given(data=st.data())
def test_autocast_agrees_and_keeps_half_inputs_half(contract: Contract, data):
    x = data.draw(feature_maps(contract.channels[-1]))
    block = contract.make(x.shape[1]).eval()
    exact = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide, half = block(x), block(x.bfloat16())
    assert wide.dtype in (torch.float32, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_same(wide, exact, torch.bfloat16)
    assert_same(half, exact, torch.bfloat16)


def test_runs_on_meta(contract: Contract):
    shape = (2, contract.channels[-1], 5, 7)
    y = contract.make(shape[1]).to("meta")(torch.empty(shape, device="meta"))
    assert (y.device.type, tuple(y.shape)) == ("meta", contract.out_shape(shape))


@given(data=st.data())
def test_every_parameter_and_the_input_get_a_finite_gradient_and_the_input_is_not_mutated(contract: Contract, data):
    x = data.draw(feature_maps(contract.channels[-1])).requires_grad_()
    assume(x[0, 0].numel() >= contract.pixels)
    block, before = contract.make(x.shape[1]).train(), x.detach().clone()
    y = block(x)
    (y * normal(tuple(y.shape), seed=1)).sum().backward()
    assert torch.equal(x, before)
    for name, tensor in [("input", x), *block.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert (tensor.grad != 0).any(), name


@given(data=st.data())
def test_samples_of_a_batch_do_not_see_each_other(contract: Contract, data):
    x = data.draw(feature_maps(contract.channels[-1], dtype=torch.float64))
    block = contract.make(x.shape[1], dtype=torch.float64).eval()
    other = normal(tuple(x.shape), dtype=torch.float64, seed=1)
    assert_same(block(torch.cat([x, other]))[: len(x)], block(x))


@given(data=st.data())
def test_channels_last_is_accepted_and_not_destroyed(contract: Contract, data):
    x = data.draw(feature_maps(contract.channels[-1], dtype=torch.float64))
    block = contract.make(x.shape[1], dtype=torch.float64).eval()
    y = block(x)
    last = block(x.contiguous(memory_format=torch.channels_last))
    assert_same(last, y)
    if min(x.shape[1:]) > 1:  # else one tensor is in both formats
        assert y.is_contiguous()
        assert last.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_gives_an_empty_batch(contract: Contract):
    shape = (0, contract.channels[-1], 5, 7)
    block, x = contract.make(shape[1]).train(), torch.empty(shape, requires_grad=True)
    y = block(x)
    assert tuple(y.shape) == contract.out_shape(shape)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_strided_views_are_accepted(contract: Contract):
    c = contract.channels[-1]
    wide = normal((2, 2 * c, 9, 14), dtype=torch.float64)
    block = contract.make(c, dtype=torch.float64).eval()
    view = wide[:, ::2, 1:, ::2]
    assert_same(block(view), block(view.contiguous()))


def test_state_dict_round_trip(contract: Contract):
    c = contract.channels[-1]
    x = normal((1, c, 5, 7))
    block, other = contract.make(c, seed=0).eval(), contract.make(c, seed=1).eval()
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x))


def test_deepcopy_and_pickle_share_nothing(contract: Contract):
    c = contract.channels[-1]
    x = normal((1, c, 5, 7))
    block = contract.make(c).eval()
    expected = block(x)
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), saved_and_loaded(block)]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    for twin in copies:
        assert torch.equal(twin(x), expected)


def saved_and_loaded(block: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@given(data=st.data())
def test_eval_is_bitwise_repeatable_and_leaves_the_input_and_the_global_generator_alone(contract: Contract, data):
    x = data.draw(feature_maps(contract.channels[-1]))
    block, before = contract.make(x.shape[1]).eval(), x.clone()
    state = torch.get_rng_state()
    assert torch.equal(block(x), block(x))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_compiles_as_one_graph(contract: Contract):
    c = contract.channels[-1]
    x = normal((1, c, 6, 9))
    block = contract.make(c).eval()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), block(x), torch.float32)


def test_exports_with_any_batch_height_and_width(contract: Contract):
    c = contract.channels[-1]
    block = contract.make(c).eval()
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(block, (normal((2, c, 8, 11)),), dynamic_shapes=(sizes,))
    shapes = [(2, c, 8, 11), (1, c, 5, 13), (3, c, 7, 2)]
    # Of a side that becomes 1 torch makes a program of its own.
    vectors = 1 in contract.out_shape(shapes[0])[2:]
    shapes = [s for s in shapes if (vectors or 1 not in contract.out_shape(s)[2:]) and min(s[2:]) > contract.stride]
    assert len(shapes) >= 2
    for shape in shapes:
        x = normal(shape)
        assert_same(program.module()(x), block(x), torch.float32)


def test_wrong_inputs_are_refused_by_the_block_itself(contract: Contract):
    c = contract.channels[-1]
    block = contract.make(c)
    name = type(block).__name__
    wanted = "any C" if contract.any_channels else f"C = {c} channels"
    shapes = [(c, 4, 4), (1, c, 0, 4), (1, c, 4, 0), *([] if contract.any_channels else [(1, c + 1, 4, 4)])]
    for shape in shapes:
        message = f"{name} takes (B, C, H, W) with {wanted} and H, W >= 1, got shape {shape}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            block(torch.zeros(shape))
    with pytest.raises(TypeError, match=rf"^{name} takes floating-point feature maps, got torch\.uint8$"):
        block(torch.zeros(1, c, 4, 4, dtype=torch.uint8))


def test_says_how_it_may_be_tiled(contract: Contract):
    block = contract.make(contract.channels[-1])
    assert block.tile_safe is contract.tile_safe
    assert isinstance(block.receptive_radius, int)
    assert isinstance(block.tile_multiple, int)


def test_prints_nothing_that_does_nothing(contract: Contract):
    printed = repr(contract.make(contract.channels[-1]))
    assert "ModuleList()" not in printed
    assert "(norm): Identity()" not in printed


def test_receptive_radius_is_exact(contract: Contract):
    if not contract.tile_safe:
        pytest.skip("reaches the whole map")
    c = contract.channels[-1]
    block = contract.make(c, dtype=torch.float64).eval()
    radius = block.receptive_radius
    cell = 12 // contract.out_shape((1, c, 12, 12))[-1] or 1  # input pixels that an output pixel stands for
    side = cell * (2 * radius + 5)
    x = normal((1, c, side, side), dtype=torch.float64).requires_grad_()
    y = block(x)
    scale = y.shape[-1] * cell // side
    middle = side // cell // 2
    centre = slice(scale * middle, scale * (middle + 1))
    (gradient,) = torch.autograd.grad((y[..., centre, centre] ** 2).sum(), x)
    touched = gradient.abs().sum((0, 1)).nonzero()
    reach = max(cell * middle - touched.min(), touched.max() - (cell * (middle + 1) - 1))
    assert reach == radius
