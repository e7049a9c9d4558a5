"""Padding to a stride, and the shuffles between pixels and channels, against their definitions."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from claritycore.blocks.padding import pad_to_multiple, take
from claritycore.blocks.pixel_shuffle import pixel_shuffle, pixel_unshuffle
from tests.strategies import feature_maps, normal

MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@given(x=feature_maps(2), multiple=st.integers(1, 8))
def test_pads_below_and_on_the_right_by_reflection_and_then_by_the_far_edge(compiled, x, multiple):
    with mock.patch("torch.compiler.is_compiling", return_value=compiled):
        padded = pad_to_multiple(x, multiple)
    missing = [-side % multiple for side in x.shape[2:]]
    reflected = [min(pad, side - 1) for pad, side in zip(missing, x.shape[2:], strict=True)]
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), *((0, pad) for pad in reflected)], mode="reflect")
    beyond = [(0, pad - inside) for pad, inside in zip(missing, reflected, strict=True)]
    assert np.array_equal(padded.numpy(), np.pad(expected, [(0, 0), (0, 0), *beyond], mode="edge"))


def test_what_needs_no_padding_is_returned_itself():
    x = normal((1, 2, 4, 6))
    assert pad_to_multiple(x, 2) is x


def test_an_exported_program_pads_every_size():
    class Pad(torch.nn.Module):
        def forward(self, x):
            return pad_to_multiple(x, 4)

    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    for first in [(2, 3, 8, 12), (2, 3, 7, 9)]:
        program = torch.export.export(Pad(), (normal(first),), dynamic_shapes=(sizes,)).module()
        for shape in [(1, 3, 8, 8), (2, 3, 9, 16), (2, 3, 6, 30)]:
            assert torch.equal(program(normal(shape)), pad_to_multiple(normal(shape), 4))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("dim", [2, 3])
def test_taking_rows_and_columns_keeps_the_memory_format(memory_format, dim):
    x = normal((2, 3, 4, 5)).contiguous(memory_format=memory_format)
    index = torch.tensor([3, 0, 0, 1])
    taken = take(x, dim, index)
    assert torch.equal(taken, x.index_select(dim, index))
    assert taken.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@given(x=feature_maps(2), scale=st.integers(1, 4))
def test_shuffles_are_torchs_in_both_memory_formats(memory_format, x, scale):
    low = (
        x.repeat_interleave(scale**2, dim=1)
        .add(normal((1, 2 * scale**2, 1, 1)))
        .contiguous(memory_format=memory_format)
    )
    high = pixel_shuffle(low, scale)
    assert torch.equal(high, F.pixel_shuffle(low, scale))
    assert torch.equal(pixel_unshuffle(high, scale), low)
    if min(x.shape[2:]) > 1:
        assert high.is_contiguous(memory_format=memory_format)
        assert pixel_unshuffle(high, scale).is_contiguous(memory_format=memory_format)


def test_shuffles_are_single_operators_in_an_export():
    class There(torch.nn.Module):
        def forward(self, x):
            return pixel_unshuffle(pixel_shuffle(x, 2), 2)

    program = torch.export.export(There(), (normal((1, 4, 5, 7)),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.pixel_shuffle.default, torch.ops.aten.pixel_unshuffle.default]
