"""CrossAttention2d against a loop over pixels and heads in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from claritycore.blocks import CrossAttention2d, GatedFFN
from claritycore.deploy import summarize
from tests.strategies import feature_maps, normal


def shaken(**options):
    torch.manual_seed(0)
    block = CrossAttention2d(4, 3, num_heads=2, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    return block


def by_hand(block, x, tokens, mask):
    y = x.clone()
    keys, values = block.kv(tokens).chunk(2, dim=2)
    for b in range(x.shape[0]):
        count = [i for i in range(tokens.shape[1]) if mask is None or mask[b, i]]
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                pixel = x[b, :, i, j]
                normed = (pixel - pixel.mean()) / (pixel.var(unbiased=False) + block.norm.eps).sqrt()
                query = block.q(normed * block.norm.weight + block.norm.bias)
                found = []
                for head in (slice(0, 2), slice(2, 4)):
                    scores = [(query[head] @ keys[b, t, head] / math.sqrt(2)).exp() for t in count]
                    found.append(sum(s * values[b, t, head] for s, t in zip(scores, count, strict=True)) / sum(scores))
                y[b, :, i, j] += block.proj(torch.cat(found))
    return y


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@given(x=feature_maps(4, dtype=torch.float64, sides=st.integers(1, 4)), length=st.integers(1, 5))
def test_it_is_the_formula(masked, bias, x, length):
    block, tokens = shaken(qkv_bias=bias), normal((x.shape[0], length, 3), dtype=torch.float64, seed=1)
    mask = None
    if masked:
        mask = normal((x.shape[0], length), seed=2) > 0
        mask[:, -1] = True
    torch.testing.assert_close(block(x, tokens, mask), by_hand(block, x, tokens, mask), rtol=1e-9, atol=1e-9)


@given(x=feature_maps(4), length=st.integers(1, 5))
def test_a_fresh_one_changes_nothing_bit_by_bit(x, length):
    attention, block = CrossAttention2d(4, 3, num_heads=2), GatedFFN(4)
    tokens = normal((x.shape[0], length, 3))
    assert torch.equal(block(attention(x, tokens)), block(x))
    assert torch.equal(attention(block(x), tokens, torch.ones(x.shape[0], length, dtype=torch.bool)), block(x))


def test_masked_tokens_do_not_matter_and_neither_does_the_order():
    block, x, tokens = shaken(), normal((2, 4, 3, 5)).double(), normal((2, 4, 3)).double()
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    other = torch.where(mask[..., None], tokens, 1e3)
    expected = block(x, tokens, mask)
    torch.testing.assert_close(block(x, other, mask), expected)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(block(x, tokens[:, order], mask[:, order]), expected)
    torch.testing.assert_close(block(x[1:], tokens[1:, :1]), expected[1:])


def test_no_masked_token_gets_a_gradient():
    block, x, tokens = shaken(), normal((1, 4, 3, 5)).double(), normal((1, 3, 3)).double().requires_grad_()
    block(x, tokens, torch.tensor([[True, False, True]])).square().sum().backward()
    assert (tokens.grad.abs().sum((0, 2)) > 0).tolist() == [True, False, True]


def test_a_row_without_a_token_is_refused_and_finite_where_nobody_can_look():
    block, x, tokens = shaken(), normal((2, 4, 3, 5)).double(), normal((2, 3, 3)).double()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    with pytest.raises(ValueError, match="mask must let a token of each image count, none does in row 1"):
        block(x, tokens, mask)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    everything = torch.tensor([[True, False, True], [True, True, True]])
    torch.testing.assert_close(compiled(x, tokens, mask), block(x, tokens, everything))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_images_and_their_masks():
    block, x, tokens = shaken(), normal((2, 4, 3, 5)).double(), normal((2, 3, 3)).double()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    mapped = torch.vmap(lambda *image: block(*(part[None] for part in image))[0])(x, tokens, mask)
    torch.testing.assert_close(mapped, block(x, tokens, mask))


def test_bad_arguments_raise():
    block, x = CrossAttention2d(4, 3), torch.zeros(2, 4, 3, 5)
    for shape in [(2, 3), (1, 4, 3), (2, 4, 4), (2, 0, 3)]:
        with pytest.raises(ValueError, match=r"tokens must be \(2, L, 3\) with L >= 1, got shape"):
            block(x, torch.zeros(shape))
    tokens = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"mask must be \(2, 4\), as the tokens, got shape \(2, 3\)"):
        block(x, tokens, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be boolean, true for the tokens that count, got torch\.int64"):
        block(x, tokens, torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_heads must divide the 4 channels, got 3"):
        CrossAttention2d(4, 3, num_heads=3)
    with pytest.raises(ValueError, match="token_channels must be an integer of at least 1, got 0"):
        CrossAttention2d(4, 0)
    assert "CrossAttention2d(\n  4, 3, num_heads=1\n" in repr(block)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_mask(dtype):
    block, x, tokens = shaken(), normal((2, 4, 9, 5)).to(dtype), normal((2, 4, 3)).to(dtype)
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    exact = block(x.double(), tokens.double(), mask)
    y = block.to(dtype)(x, tokens, mask)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 0.04 * exact.abs().max()


class OnOneToken(CrossAttention2d):
    def forward(self, x):
        return super().forward(x, x.new_zeros(len(x), 7, self.token_channels))


def test_macs():
    macs = 15 * (2 * 8**2) + 7 * 2 * 8 * 3 + 2 * 15 * 7 * 8
    assert summarize(OnOneToken(8, 3, num_heads=2), (2, 8, 3, 5)).macs == 2 * macs
