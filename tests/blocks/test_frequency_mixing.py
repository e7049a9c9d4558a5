"""Blocks on split maps and on spectra against their formulas, and what they are before they learn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from claritycore.blocks import (
    ElementwiseAttention,
    FreqBands,
    FreqFuse,
    FreqSep,
    FreqSplit2d,
    FrequencyCrossAttention,
    HighPass,
    RepConv2d,
    SpectralMix2d,
)
from tests.strategies import feature_maps, normal


def moved(block: nn.Module, scale: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.add_(scale * normal(tuple(parameter.shape), seed=number))
    return block.double().eval()


def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps that no split would give."""
    return x.flip(1), x.square()


# FreqFuse


@given(x=feature_maps(3, dtype=torch.float64))
def test_freq_fuse_without_a_gate_is_the_formula(x):
    block = moved(FreqFuse(3, gate=None, max_gain=0.8))
    low, high = parts(x)
    y = x.clone()
    for c in range(3):
        weights = block.low_weight[c].item(), 0.8 * math.tanh(block.high_weight[c].item())
        y[:, c] += weights[0] * low[:, c] + weights[1] * high[:, c]
    torch.testing.assert_close(block(x, (low, high)), y, rtol=0, atol=1e-12)


@given(x=feature_maps(2, dtype=torch.float64))
def test_freq_fuse_gates_every_pixel_and_channel(x):
    block = moved(FreqFuse(2))
    low, high = parts(x)
    both = torch.cat([low, high], dim=1)
    padded, deep = nn.functional.pad(both, [1] * 4), torch.zeros_like(both)
    for i in range(3):
        for j in range(3):
            tap = block.gate.dwconv.weight[:, 0, i, j, None, None]
            deep += tap * padded[..., i : i + x.shape[2], j : j + x.shape[3]]
    deep += block.gate.dwconv.bias[:, None, None]
    scores = (
        torch.einsum("oi,bihw->bohw", block.gate.conv.weight[..., 0, 0], deep) + block.gate.conv.bias[:, None, None]
    )
    gates = 1 / (1 + torch.exp(-scores))
    expected = x + block.low_weight[:, None, None] * gates[:, :2] * low
    expected += 0.5 * torch.tanh(block.high_weight)[:, None, None] * gates[:, 2:] * high
    torch.testing.assert_close(block(x, (low, high)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["conv", None, "attention"])
@given(x=feature_maps(4))
def test_a_fresh_freq_fuse_is_the_identity_and_can_learn(gate, x):
    block = FreqFuse(4, gate=FrequencyCrossAttention(4, 2) if gate == "attention" else gate)
    y = block(x, parts(x))
    assert torch.equal(y, x)
    (y - 1).square().sum().backward()
    assert all(weight.grad.abs().min() > 0 for weight in (block.low_weight, block.high_weight))


@pytest.mark.parametrize("gate", ["conv", None])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_gain_of_high_frequencies_is_bounded(gate, sign):
    block = FreqFuse(2, gate=gate, max_gain=0.25)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(1e4)
        block.high_weight.fill_(sign * 1e4)
        block.low_weight.zero_()
    x = normal((1, 2, 6, 7))
    change = block(torch.zeros_like(x), (x.abs(), x))
    torch.testing.assert_close(change, sign * 0.25 * x)


def test_bands_and_two_maps_are_the_same_to_freq_fuse():
    x, block = normal((2, 4, 5, 7)), moved(FreqFuse(4)).float()
    bands = FreqSplit2d(4, kind="haar")(x)
    assert torch.equal(block(x, bands), block(x, (bands.low, bands.high)))


# FreqSep


def test_freq_sep_is_split_paths_and_fusion():
    structure, texture = RepConv2d(4, kernel_size=5), ElementwiseAttention(4)
    block = moved(FreqSep(4, split=FreqSplit2d(4, kind="avgpool"), structure=structure, texture=texture))
    x = normal((2, 4, 9, 7), dtype=torch.float64)
    bands = block.split(x)
    low, high = structure(bands.low), texture(bands.high)
    torch.testing.assert_close(block(x), block.fuse(x, (low, high)), rtol=0, atol=0)
    assert (block(x) - block.fuse(x, (high, low))).abs().max() > 0.01


@given(x=feature_maps(4))
def test_a_fresh_freq_sep_is_the_identity_whatever_the_paths(x):
    assert torch.equal(FreqSep(4)(x), x)
    assert torch.equal(FreqSep(4, structure=nn.Conv2d(4, 4, 3, padding=1), texture=ElementwiseAttention(4))(x), x)


def test_freq_sep_hands_the_condition_on():
    x, condition = normal((2, 4, 8, 8)), normal((2, 3), seed=1)
    block = moved(FreqSep(4, split=FreqSplit2d(4, condition_channels=3))).float()
    assert (block(x, condition) - block(x, -condition)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="condition must be a vector of 3 for each map, got None"):
        block(x)


def test_freq_sep_hands_a_condition_to_the_texture_path():
    class Times(torch.nn.Module):
        def forward(self, high, factor=1.0):
            return factor * high

    x, block = normal((1, 4, 6, 6)), FreqSep(4, split=FreqSplit2d(4, kind="haar"), texture=Times())
    torch.nn.init.ones_(block.fuse.high_weight)
    low, high = block.split(x)[:2]
    torch.testing.assert_close(block(x, texture_condition=3.0), block.fuse(x, (low, 3 * high)))
    torch.testing.assert_close(block(x), block.fuse(x, (low, high)))


def test_freq_sep_composes_how_it_may_be_tiled():
    haar = FreqSplit2d(4, kind="haar")
    block = FreqSep(4, split=haar, structure=RepConv2d(4, kernel_size=9), texture=ElementwiseAttention(4))
    assert (block.tile_safe, block.receptive_radius, block.tile_multiple) == (True, 1 + 4 + 1, 2)
    assert not FreqSep(4).tile_safe
    assert not FreqSep(4, split=haar, structure=SpectralMix2d(4)).tile_safe
    assert not FreqSep(4, split=haar, texture=nn.InstanceNorm2d(4)).tile_safe  # it does not say
    assert FreqSep(4, split=haar, texture=nn.Conv2d(4, 4, 5, padding=2)).receptive_radius == 1 + 2 + 1
    attended = FreqFuse(4, gate=FrequencyCrossAttention(4, 2, window_size=6))
    assert FreqSep(4, split=FreqSplit2d(4, kind="laplacian", levels=2), fuse=attended).tile_multiple == 12
    assert (attended.tile_safe, attended.receptive_radius, attended.tile_multiple) == (True, 5, 6)


# SpectralMix2d


@given(x=feature_maps(2, dtype=torch.float64))
def test_spectral_mix_is_the_formula(x):
    block = moved(SpectralMix2d(2, expansion=2))
    height, width = x.shape[2:]
    spectrum = torch.fft.fft2(x, norm="ortho")[..., : width // 2 + 1]
    stacked = torch.cat([spectrum.real, spectrum.imag], dim=1)
    hidden = torch.einsum("oi,bihw->bohw", block.conv1.weight[..., 0, 0], stacked).clamp(min=0)
    real, imaginary = torch.einsum("oi,bihw->bohw", block.conv2.weight[..., 0, 0], hidden).chunk(2, dim=1)
    half = torch.complex(real, imaginary)
    # The real map nearest to it: each frequency meets the conjugate of its opposite.
    whole = torch.zeros_like(x, dtype=torch.complex128)
    for i in range(height):
        for j in range(width):
            if j <= width // 2:
                whole[..., i, j] = half[..., i, j]
            else:
                whole[..., i, j] = half[..., -i % height, -j % width].conj()
    for j in {0, *([width // 2] if width % 2 == 0 else [])}:
        opposite = whole[..., [-i % height for i in range(height)], j].conj()
        whole[..., j] = (whole[..., j] + opposite) / 2
    expected = torch.fft.ifft2(whole, norm="ortho")
    assert expected.imag.abs().max() < 1e-12
    torch.testing.assert_close(block(x), x + expected.real, rtol=0, atol=1e-12)


@given(x=feature_maps(2, dtype=torch.float64), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_a_repeated_map_gives_the_repeated_output(x, rows, columns):
    block = moved(SpectralMix2d(2))
    torch.testing.assert_close(
        block(x.repeat(1, 1, rows, columns)), block(x).repeat(1, 1, rows, columns), rtol=0, atol=1e-11
    )


@given(x=feature_maps(3), expansion=st.integers(1, 3))
def test_a_fresh_spectral_mix_is_the_identity_and_can_learn(x, expansion):
    block = SpectralMix2d(3, expansion=expansion)
    assert torch.equal(block(x), x)
    block(normal((1, 3, 6, 7))).square().sum().backward()
    assert block.conv2.weight.grad.abs().max() > 0


def test_spectral_mix_under_autocast_stays_wide():
    x, block = normal((1, 4, 9, 8)), moved(SpectralMix2d(4)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    assert torch.equal(y, block(x))


# HighPass


def neighbours(x: torch.Tensor, i: int, j: int) -> torch.Tensor:
    """The map moved, its border repeated."""
    rows = (torch.arange(x.shape[2]) + i).clamp(0, x.shape[2] - 1)
    columns = (torch.arange(x.shape[3]) + j).clamp(0, x.shape[3] - 1)
    return x[:, :, rows][..., columns]


@given(x=feature_maps(2, dtype=torch.float64))
def test_high_pass_is_the_formula(x):
    smooth = {-1: 1, 0: 2, 1: 1}
    down, across = (
        sum(
            weight * (neighbours(x, *((1, k) if rows else (k, 1))) - neighbours(x, *((-1, k) if rows else (k, -1))))
            for k, weight in smooth.items()
        )
        / 8
        for rows in (True, False)
    )
    expected = (down**2 + across**2 + 1e-6).sqrt() - 1e-3
    torch.testing.assert_close(HighPass(2).double()(x), expected, rtol=0, atol=1e-13)
    laplacian = 4 * x - sum(neighbours(x, *step) for step in ((0, 1), (1, 0), (0, -1), (-1, 0)))
    torch.testing.assert_close(HighPass(2, kind="laplacian")(x), laplacian, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel_size", [3, 5])
@given(x=feature_maps(2, dtype=torch.float64))
def test_the_learned_kernel_has_sum_zero(kernel_size, x):
    block, reach = HighPass(2, kind="learned", kernel_size=kernel_size).double(), kernel_size // 2
    offsets = range(-reach, reach + 1)
    mean = sum(neighbours(x, i, j) for i in offsets for j in offsets) / kernel_size**2
    torch.testing.assert_close(block(x), x - mean, rtol=0, atol=1e-13)
    moved(block)
    weight = block.weight - block.weight.mean((2, 3), keepdim=True)
    expected = sum(
        weight[:, 0, i + reach, j + reach, None, None] * neighbours(x, i, j) for i in offsets for j in offsets
    )
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["sobel", "laplacian", "learned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 5)])
def test_flat_maps_have_no_edges(kind, dtype, size):
    block = moved(HighPass(3, kind=kind)).to(dtype)
    y = block(torch.full((1, 3, *size), 0.3, dtype=dtype))
    assert y.abs().max() <= (2e-7 if kind == "learned" and dtype != torch.float64 else 1e-16)


def test_the_slope_of_a_ramp_is_its_gradient():
    ramp = torch.arange(9.0).mul(0.5).expand(1, 1, 7, 9)
    torch.testing.assert_close(HighPass(1)(ramp)[..., 1:-1], torch.full((1, 1, 7, 7), 0.5), rtol=0, atol=1.1e-3)
    torch.testing.assert_close(HighPass(1)(ramp.mT), HighPass(1)(ramp).mT)
    torch.testing.assert_close(HighPass(1)(-ramp), HighPass(1)(ramp))


def test_a_flat_map_has_a_finite_gradient():
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    HighPass(1)(x).sum().backward()
    assert x.grad.isfinite().all()


# FrequencyCrossAttention


def crossed(block, name: str, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """One direction, pixel by pixel."""
    part = getattr(block, f"to_{name}")
    other = {"low": "high", "high": "low"}[name]

    def normalised(norm, x):
        centred = x - x.mean(1, keepdim=True)
        return norm(x), centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()

    t, s = (
        normalised(getattr(block, f"norm_{n}"), x)[1] * getattr(block, f"norm_{n}").weight[:, None, None]
        + getattr(block, f"norm_{n}").bias[:, None, None]
        for n, x in ((name, target), (other, source))
    )
    heads, (wh, ww) = block.num_heads, block.window_size
    size, (batch, channels, height, width) = target.shape[1] // block.num_heads, target.shape
    q, kv = part.q(t.movedim(1, -1)), part.kv(s.movedim(1, -1))
    gates = 1 / (1 + torch.exp(-part.gate(t.movedim(1, -1))))
    table, y = part.position_bias(), torch.zeros_like(q)
    for b in range(batch):
        for head in range(heads):
            of = slice(head * size, (head + 1) * size)
            for i in range(height):
                for j in range(width):
                    window = [
                        (k, m)
                        for k in range(height)
                        for m in range(width)
                        if (k - block.shift[0]) // wh == (i - block.shift[0]) // wh
                        and (m - block.shift[1]) // ww == (j - block.shift[1]) // ww
                    ]
                    logits = torch.stack(
                        [
                            (q[b, i, j, of] * kv[b, k, m, of]).sum() / math.sqrt(size)
                            + table[(i - k + wh - 1) * (2 * ww - 1) + j - m + ww - 1, head]
                            for k, m in window
                        ]
                    )
                    values = torch.stack([kv[b, k, m, channels + of.start : channels + of.stop] for k, m in window])
                    y[b, i, j, of] = gates[b, i, j, head] * (logits.softmax(0)[:, None] * values).sum(0)
    return target + part.proj(y).movedim(-1, 1)


@pytest.mark.parametrize(("window", "shift"), [((2, 3), (1, 2)), ((3, 3), (0, 0)), ((8, 8), (4, 4))])
@torch.no_grad()
def test_cross_attention_is_the_loop_over_windows(window, shift):
    block = moved(FrequencyCrossAttention(4, 2, window_size=window, shift=shift), 0.7)
    low, high = normal((2, 4, 5, 4), dtype=torch.float64), normal((2, 4, 5, 4), dtype=torch.float64, seed=1)
    bands = block(FreqBands(low, high))
    torch.testing.assert_close(bands.low, crossed(block, "low", low, high), rtol=0, atol=1e-11)
    torch.testing.assert_close(bands.high, crossed(block, "high", high, low), rtol=0, atol=1e-11)


@given(x=feature_maps(4))
def test_a_fresh_cross_attention_is_the_identity_and_can_learn(x):
    low, high = parts(x)
    block = FrequencyCrossAttention(4, 2)
    bands = block((low, high))
    assert torch.equal(bands.low, low)
    assert torch.equal(bands.high, high)
    (bands.low.square().sum() + bands.high.sum()).backward()
    assert block.to_low.proj.weight.grad.abs().max() > 0
    assert block.to_high.proj.weight.grad.abs().max() > 0


def test_each_half_sees_the_other_within_its_window_alone():
    block = moved(FrequencyCrossAttention(4, 2, window_size=4))
    low, high = (normal((1, 4, 8, 8), dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    for half, own, other in ((0, low, high), (1, high, low)):
        gradients = torch.autograd.grad(block((low, high))[half][0, :, 2, 1].square().sum(), (own, other))
        window = torch.zeros(8, 8, dtype=torch.bool)
        window[:4, :4] = True
        assert torch.equal(gradients[1].abs().sum((0, 1)) != 0, window)
        alone = torch.zeros_like(window)
        alone[2, 1] = True
        assert torch.equal(gradients[0].abs().sum((0, 1)) != 0, alone)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cross_attention_keeps_the_memory_format(memory_format):
    x = normal((2, 4, 5, 7)).contiguous(memory_format=memory_format)
    assert all(b.is_contiguous(memory_format=memory_format) for b in FrequencyCrossAttention(4, 2)((x, x))[:2])


# All of them


BLOCKS = {
    "FreqFuse": (FreqFuse(4), lambda block, x: block(x, parts(x))),
    "FreqSep": (FreqSep(4), lambda block, x: block(x)),
    "SpectralMix2d": (SpectralMix2d(4), lambda block, x: block(x)),
    **{
        f"HighPass {kind}": (HighPass(4, kind=kind), lambda block, x: block(x))
        for kind in ("sobel", "laplacian", "learned")
    },
    "FrequencyCrossAttention": (
        FrequencyCrossAttention(4, 2, window_size=3),
        lambda block, x: torch.cat(block(parts(x))[:2], dim=1),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_vmap_keeps_calls_apart(name):
    block, call = BLOCKS[name]
    moved(block)
    x = normal((3, 2, 4, 5, 6), dtype=torch.float64)
    for calls in (x, x.movedim(2, 4).contiguous().movedim(4, 2)):
        got = torch.vmap(lambda maps: call(block, maps))(calls)
        torch.testing.assert_close(got, torch.stack([call(block, maps) for maps in x]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_no_maps_are_no_trouble(name):
    block, call = BLOCKS[name]
    x = torch.zeros(0, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    y = call(block.double(), x)
    assert y.shape[0] == 0
    y.sum().backward()
    assert x.grad.shape == x.shape


# Errors


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="gate must be one of conv, got 'cross'"):
        FreqFuse(4, gate="cross")
    with pytest.raises(TypeError, match="gate must be 'conv', a module or None, got 3"):
        FreqFuse(4, gate=3)
    for gain in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"max_gain must be above 0 and finite, got {gain}"):
            FreqFuse(4, max_gain=gain)
    with pytest.raises(ValueError, match="kind must be one of sobel, laplacian, learned, got 'scharr'"):
        HighPass(4, kind="scharr")
    with pytest.raises(ValueError, match="kernel_size must be 3 for kind 'sobel', got 5"):
        HighPass(4, kernel_size=5)
    with pytest.raises(ValueError, match="kernel_size must be at least 3, got 1"):
        HighPass(4, kind="learned", kernel_size=1)
    with pytest.raises(ValueError, match="kernel_size must be an odd integer of at least 1, got 4"):
        HighPass(4, kind="learned", kernel_size=4)
    with pytest.raises(ValueError, match="num_heads must divide the 4 channels, got 3"):
        FrequencyCrossAttention(4, 3)
    with pytest.raises(ValueError, match=r"shift must be less than window_size \(2, 2\), got \(2, 2\)"):
        FrequencyCrossAttention(4, 2, window_size=2, shift=2)
    with pytest.raises(ValueError, match="expansion must be an integer of at least 1, got 0"):
        SpectralMix2d(4, expansion=0)
    for build in (FreqFuse, FreqSep, SpectralMix2d, HighPass, lambda c: FrequencyCrossAttention(c, 1)):
        with pytest.raises(ValueError, match="channels must be an integer of at least 1, got 0"):
            build(0)


def test_bands_that_do_not_fit_raise():
    x, narrow = normal((1, 4, 5, 5)), normal((1, 4, 5, 4))
    for block in (lambda low, high: FreqFuse(4)(x, (low, high)), lambda *bands: FrequencyCrossAttention(4, 2)(bands)):
        with pytest.raises(ValueError, match=r"high must have the shape \(1, 4, 5, 5\), got \(1, 4, 5, 4\)"):
            block(x, narrow)
        with pytest.raises(TypeError, match=r"takes floating-point bands, got high in torch\.int64"):
            block(x, x.long())
    for bands, got in ((x, "Tensor"), ((x,), "tuple of 1"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"FreqFuse takes FreqBands, or low and high, got {got}"):
            FreqFuse(4)(x, bands)
        with pytest.raises(TypeError, match=f"FrequencyCrossAttention takes FreqBands, or low and high, got {got}"):
            FrequencyCrossAttention(4, 2)(bands)
    with pytest.raises(ValueError, match=r"low must have the shape \(1, 4, 5, 5\), got \(1, 4, 3, 3\)"):
        FreqSep(4, structure=nn.Conv2d(4, 4, 3))(x)
