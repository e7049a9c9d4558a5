"""The noise field is right: Philox's published numbers, one law for all pixels, and the same crop by any way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from claritycore.kernels import noise_field
from claritycore.kernels.noise_field import fallback
from claritycore.kernels.noise_field.op import KERNEL
from claritycore.kernels.noise_field.reference import philox, words_reference
from tests.kernels.closeness import CPU

# Counter, key and result, as the authors of Philox publish them for testing ("kat_vectors" of Random123).
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        *((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = st.sampled_from([0, 1, 7, 2**32, 2**63 - 1])
OFFSETS = st.tuples(*[st.sampled_from([-5, -1, 0, 1, 2, 3, 4, 2**31 - 3])] * 2)


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_philox_gives_the_published_numbers(counter, key, words):
    a, b, c, d = (torch.tensor([word]) for word in counter)
    assert tuple(word.item() for word in philox((a, b, c, d), key)) == words


def by_loop(seed, layer, sample, y, x):
    """A number of the field, with integers and functions of Python."""
    a, b, c, d = x // 4 % 2**32, y % 2**32, sample, layer
    low, high = seed % 2**32, seed >> 32
    for _ in range(10):
        product_a, product_c = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = (product_c >> 32) ^ b ^ low, product_c % 2**32
        c, d = (product_a >> 32) ^ d ^ high, product_a % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    first, second = ((a, b), (c, d))[x % 4 // 2]
    radius, angle = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24)), 2 * math.pi * (second >> 8) / 2**24
    return radius * (math.sin(angle) if x % 2 else math.cos(angle))


@given(seed=SEEDS, layer=st.sampled_from([0, 3, 2**32 - 1]), offset=OFFSETS)
def test_each_number_is_that_of_its_place(seed, layer, offset):
    place = {"samples": [0, 2**32 - 1], "layer": layer, "offset": offset, "dtype": torch.float64}
    for backend in ("reference", "torch"):
        noise = noise_field(seed, (3, 6), backend=backend, **place)
        for b, i, j in np.ndindex(2, 3, 6):
            expected = by_loop(seed, layer, place["samples"][b], offset[0] + i, offset[1] + j)
            assert noise[b, 0, i, j].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def words_of(form, device, seed, offset, size=(3, 7)):
    place = torch.tensor([5, 2**32 - 1], device=device), seed, 2**32 - 2, size, offset
    return KERNEL.form(form).words(*place).cpu(), words_reference(
        *(x.cpu() if torch.is_tensor(x) else x for x in place)
    )


@given(seed=SEEDS, offset=OFFSETS)
def test_the_fallback_has_the_same_bits(seed, offset):
    words, expected = words_of("torch", CPU, seed, offset)
    assert torch.equal(words, by_group(expected, offset[1]))


def by_group(words, left):
    """The words of each group of four columns, once."""
    columns = [0, *(j for j in range(1, words.shape[-1]) if (left + j) % 4 == 0)]
    return words[..., columns]


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("offset", [(0, 0), (-1, -3), (2**31 - 1, 6), (4, 2**31 - 2)], ids=str)
def test_triton_has_the_same_bits(seed, offset, device):
    words, expected = words_of("triton", device, seed, offset)
    assert torch.equal(words, by_group(expected, offset[1]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 130)], ids=str)
def test_triton_agrees(dtype, tolerance, size, device):
    place = {"samples": [0, 4], "layer": 1, "offset": (2, -3)}
    noise = noise_field(1, size, backend="triton", dtype=dtype, device=device, **place)
    assert noise.dtype == dtype
    exact = noise_field(1, size, backend="reference", dtype=torch.float64, **place)
    assert (noise.cpu().double() - exact).abs().max() <= tolerance * 5


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)), offset=OFFSETS,
    top=st.integers(0, 9), left=st.integers(0, 9), backend=st.sampled_from(["reference", "torch"]),
)  # fmt: skip
def test_the_noise_of_a_crop_is_the_crop_of_the_noise(size, offset, top, left, backend):
    whole = noise_field(3, (size[0] + top, size[1] + left), samples=[0, 8, 1], offset=offset, backend=backend)
    at = offset[0] + top, offset[1] + left
    crop = noise_field(3, size, samples=[1, 8], offset=at, backend=backend)
    torch.testing.assert_close(crop, whole[[2, 1], :, top:, left:], rtol=0, atol=1e-6)


def test_tiles_make_the_whole():
    whole = noise_field(11, (50, 70), samples=[2])
    for y, x in np.ndindex(3, 4):
        top, left = 20 * y, 19 * x
        tile = noise_field(11, (min(20, 50 - top), min(19, 70 - left)), samples=[2], offset=(top, left))
        assert torch.allclose(tile, whole[:, :, top : top + 20, left : left + 19], rtol=0, atol=1e-6)


def test_rows_are_the_same_however_many_are_mixed_together(monkeypatch):
    whole = noise_field(11, (50, 70), samples=[2, 3])
    for places in (1, 60, 10**6):
        monkeypatch.setattr(fallback, "PLACES", places)
        assert torch.allclose(noise_field(11, (50, 70), samples=[2, 3]), whole, rtol=0, atol=1e-6)


def test_it_is_white_and_normal():
    noise = noise_field(0, (512, 512), samples=range(2), dtype=torch.float64)
    n = noise.numel()
    assert abs(noise.mean().item()) <= 4 / math.sqrt(n)
    assert abs(noise.var().item() - 1) <= 4 * math.sqrt(2 / n)
    assert abs((noise**4).mean().item() - 3) <= 4 * math.sqrt(96 / n)
    values = noise.flatten().sort().values
    expected = torch.special.ndtr(values)
    assert (expected - (torch.arange(n) + 0.5) / n).abs().max() <= 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov: 0.1 %
    neighbours = [noise[..., 1:] * noise[..., :-1], noise[..., 1:, :] * noise[..., :-1, :], noise[:1] * noise[1:]]
    neighbours += [noise[..., 2:] * noise[..., :-2], noise.square()[..., 1:] * noise[..., :-1]]
    for products in neighbours:
        assert abs(products.mean().item()) <= 4 * products.std().item() / math.sqrt(products.numel())


def test_seeds_layers_and_samples_have_noise_of_their_own():
    places = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    maps = [noise_field(seed, (64, 64), layer=layer, samples=[sample]).flatten() for seed, layer, sample in places]
    correlation = torch.corrcoef(torch.stack(maps)) - torch.eye(len(maps))
    assert correlation.abs().max() <= 4 / 64


def test_no_generator_is_touched():
    before = torch.get_rng_state()
    first = noise_field(1, (9, 9), samples=[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noise_field(1, (9, 9), samples=[0]), first)
