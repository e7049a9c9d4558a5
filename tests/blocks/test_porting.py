"""Weights of other programs' blocks: with them ours compute what those do, to rounding in float64."""

import re

import pytest
import torch

from claritycore import blocks
from claritycore.blocks import BLOCK_SOURCES, BlockSource, convert_block_state
from tests.blocks.attention_by_hand import stirred
from tests.blocks.published_attention import PUBLISHED, TimmV2, TorchvisionV2
from tests.strategies import normal

CHANNELS, HEADS = 60, 3
EVEN = {"hat-ocab": (4, 8)}
CASES = [
    (source, window, shift)
    for source in BLOCK_SOURCES
    for window in EVEN.get(source, (4, 7))
    for shift in ((0,) if source == "hat-ocab" else (0, window // 2))
]


def ours(source: str, window: int, shift: int) -> torch.nn.Module:
    """The block that the table of sources names."""
    names = {"C": CHANNELS, "heads": HEADS, "W": window, "S": shift}
    return eval(BLOCK_SOURCES[source].target, vars(blocks) | names).double().eval()


def theirs(source: str, window: int, shift: int) -> torch.nn.Module:
    block = stirred(PUBLISHED[source](CHANNELS, HEADS, window, shift), strength=0.2)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "relative_position" in name:
                parameter.mul_(5)  # to a deviation of 1: a bias near zero would fit in any order
    return block


def test_every_source_has_its_definition_here():
    assert set(PUBLISHED) == set(BLOCK_SOURCES)
    assert all(isinstance(source, BlockSource) for source in BLOCK_SOURCES.values())
    assert all(source in convert_block_state.__doc__ for source in BLOCK_SOURCES)


@pytest.mark.parametrize(("source", "window", "shift"), CASES)
def test_with_their_weights_our_block_computes_theirs(source, window, shift):
    block, other = ours(source, window, shift), theirs(source, window, shift)
    state = other.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    block.load_state_dict(convert_block_state(state, source), strict=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items()), "their state dict was changed"
    x = normal((2, CHANNELS, 2 * window, 3 * window), dtype=torch.float64, seed=1)
    with torch.no_grad():
        expected = other(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-10)
        if source not in ("hat", "hat-ocab"):  # those see further than their window
            ragged = block(x[..., : 3 * window - 1])  # ours goes on at other sizes: whole windows are as before
            whole = slice(0, 2 * window + shift)
            torch.testing.assert_close(ragged[..., whole], expected[..., whole], rtol=0, atol=1e-10)


@pytest.mark.parametrize("source", BLOCK_SOURCES)
def test_gradients_reach_every_converted_tensor(source):
    block = ours(source, 4, 0)
    block.load_state_dict(convert_block_state(theirs(source, 4, 0).state_dict(), source))
    x = normal((1, CHANNELS, 5, 7), dtype=torch.float64)
    (block(x) * normal(tuple(x.shape), dtype=torch.float64, seed=1)).sum().backward()
    assert all((parameter.grad != 0).any() for parameter in block.parameters())


@pytest.mark.parametrize("source", BLOCK_SOURCES)
@pytest.mark.parametrize("name", ["attn.lambda", "norm3.weight", "attn.relative_position_bias_table_1"])
def test_a_tensor_without_a_place_is_refused(source, name):
    state = theirs(source, 4, 0).state_dict() | {name: torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"^'{re.escape(name)}' is no tensor of a block of {source}: known are "):
        convert_block_state(state, source)


@pytest.mark.parametrize("source", BLOCK_SOURCES)
def test_a_prefix_that_was_not_cut_is_named(source):
    state = {f"layers.0.blocks.1.{name}": tensor for name, tensor in theirs(source, 4, 0).state_dict().items()}
    with pytest.raises(ValueError, match=rf"is no tensor of a block of {source}: cut 'layers.0.blocks.1.' from all"):
        convert_block_state(state, source)


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r"^source must be one of swin, swinir, .*, hat-ocab, got 'esc'$"):
        convert_block_state({}, "esc")


@pytest.mark.parametrize("rows", [120, 440, 36])
def test_a_table_of_another_overlap_is_refused(rows):
    state = theirs("hat-ocab", 4, 0).state_dict() | {"relative_position_bias_table": torch.zeros(rows, HEADS)}
    with pytest.raises(ValueError, match=rf"must have \(W \+ K - 1\)\^2 rows for K = 1\.5 W, got {rows}$"):
        convert_block_state(state, "hat-ocab")


@pytest.mark.parametrize("source", BLOCK_SOURCES)
def test_what_is_missing_is_told_by_the_strict_load(source):
    state = theirs(source, 4, 0).state_dict()
    for name in [name for name in state if not name.endswith(BLOCK_SOURCES[source].unused or "-")]:
        rest = {key: tensor for key, tensor in state.items() if key != name}
        with pytest.raises(RuntimeError, match="Missing key"):
            ours(source, 4, 0).load_state_dict(convert_block_state(rest, source))


@pytest.mark.parametrize(("source", "kind"), [("timm-v2", TimmV2), ("torchvision-v2", TorchvisionV2)])
def test_the_second_version_without_biases(source, kind):
    other = theirs(source, 4, 2)
    biases = ["attn.q_bias", "attn.v_bias"] if kind is TimmV2 else ["attn.qkv.bias"]
    with torch.no_grad():
        for name in biases:
            other.get_parameter(name).zero_()
    state = {name: tensor for name, tensor in other.state_dict().items() if name not in biases}
    attention = blocks.WindowAttention2d(
        CHANNELS, HEADS, window_size=4, shift=2, bias="cpb", cosine=True, qkv_bias=False
    )
    block = blocks.SwinBlock(CHANNELS, attention, post_norm=True).double().eval()
    block.load_state_dict(convert_block_state(state, source))
    x = normal((1, CHANNELS, 8, 8), dtype=torch.float64)
    torch.testing.assert_close(block(x), other(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), rtol=0, atol=1e-10)
