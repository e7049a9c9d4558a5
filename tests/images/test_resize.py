import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from claritycore.images import imresize

SET5 = ("baby", "bird", "butterfly", "head", "woman")


def cubic(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_column(values, scale):
    """The definition, one output at a time, over every input pixel that the kernel can reach."""
    stretch = min(scale, 1.0)
    out = []
    for j in range(1, math.ceil(len(values) * scale) + 1):
        u = j / scale + 0.5 * (1 - 1 / scale)
        reach = math.ceil(2 / stretch) + 1
        total = weight = 0.0
        for i in range(math.floor(u) - reach, math.ceil(u) + reach + 1):
            inside = i
            while not 1 <= inside <= len(values):  # mirrored, the edge pixel repeated
                inside = 1 - inside if inside < 1 else 2 * len(values) + 1 - inside
            w = cubic(stretch * (u - i))
            total += w * values[inside - 1]
            weight += w
        out.append(total / weight)
    return np.array(out)


def resize_loop(plane, scale, after=lambda x: x):
    rows = after(np.stack([resize_column(column, scale) for column in plane.T], axis=1))
    return after(np.stack([resize_column(row, scale) for row in rows], axis=0))


def to_bytes(x):
    return np.clip(np.floor(x + 0.5), 0, 255)


def read(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255


sizes = st.integers(1, 23)
scales = st.sampled_from([0.07, 0.25, 1 / 3, 0.4, 0.5, 0.77, 1.0, 1.3, 2.0, 3.0, 4.0])


@settings(deadline=None, max_examples=40)
@given(height=sizes, width=sizes, scale=scales, seed=st.integers(0, 99))
def test_float_equals_the_loop(height, width, scale, seed):
    plane = np.random.default_rng(seed).random((height, width))
    expected = resize_loop(plane, scale)
    resized = imresize(torch.from_numpy(plane)[None, None], scale, intermediate="float")
    np.testing.assert_allclose(resized[0, 0].numpy(), expected, atol=1e-13)


@settings(deadline=None, max_examples=40)
@given(height=sizes, width=sizes, scale=st.sampled_from([0.25, 0.5, 2.0, 4.0]), seed=st.integers(0, 99))
def test_uint8_equals_the_loop_rounded_after_each_axis(height, width, scale, seed):
    # At these scales every weight is a binary fraction, so that halves are exact and must be rounded upwards.
    plane = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(float)
    resized = imresize(torch.from_numpy(plane / 255)[None, None].float(), scale)
    np.testing.assert_array_equal((resized[0, 0] * 255).round().numpy(), resize_loop(plane, scale, to_bytes))


def test_halves_are_rounded_upwards():
    rows = np.random.default_rng(3).integers(0, 256, (3000, 8))
    exact = np.stack([resize_column(row, 0.5) for row in rows])
    halves = (exact % 1 == 0.5) & (exact > 0) & (exact < 255)
    assert halves.sum() > 20
    image = torch.from_numpy(np.repeat(rows[:, None, None], 2, axis=2)) / 255  # two equal rows: only the width counts
    resized = (imresize(image, 0.5) * 255).round()[:, 0, 0].numpy()
    np.testing.assert_array_equal(resized[halves], exact[halves] + 0.5)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
@pytest.mark.parametrize("name", SET5)
def test_reproduces_the_published_low_resolution_images_bit_for_bit(data_folder, name, factor):
    image = read(data_folder / f"set5/HR/{name}.png")
    expected = read(data_folder / f"set5/LR_bicubic/X{factor}/{name}x{factor}.png")
    height, width = (side // factor * factor for side in image.shape[2:])
    image = image[..., :height, :width]
    if factor < 8:
        small = imresize(image, 1 / factor)
    else:  # published from the float form
        small = (imresize(image, 1 / factor, intermediate="float").clamp(0, 1) * 255).round() / 255
    assert torch.equal(small, expected)


def test_the_two_intermediates_differ_by_rounding_only(photo):
    rounded = imresize(photo, 0.5)
    exact = imresize(photo, 0.5, intermediate="float")
    once = (exact.clamp(0, 1) * 255).round() / 255
    assert not torch.equal(rounded, once)
    assert (rounded - exact.clamp(0, 1)).abs().max() < 2 / 255
    torch.testing.assert_close(rounded * 255, (rounded * 255).round(), rtol=0, atol=1e-4)


def test_float_overshoots_and_uint8_clamps():
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1
    assert imresize(edge, 2, intermediate="float").max() > 1
    assert imresize(edge, 2, intermediate="float").min() < 0
    clamped = imresize(edge, 2)
    assert clamped.min() == 0
    assert clamped.max() == 1


def test_scale_one_is_the_identity(photo):
    assert torch.equal(imresize(photo, 1.0), photo)
    assert torch.equal(imresize(photo, 1.0, intermediate="float"), photo)


@pytest.mark.parametrize("factor", range(2, 33))
def test_a_multiple_of_the_factor_shrinks_to_the_quotient(factor):
    for quotient in (1, 7, 49, 151):
        assert imresize(torch.zeros(1, 1, factor * quotient, 1), 1 / factor).shape[2] == quotient


def test_samples_and_channels_are_apart(photo):
    batch = torch.cat([photo, photo.flip(3)])
    for intermediate in ("uint8", "float"):
        resized = imresize(batch, 1 / 3, intermediate=intermediate)
        assert torch.equal(resized[1:], imresize(batch[1:], 1 / 3, intermediate=intermediate))
        assert torch.equal(resized[:, 1:2], imresize(batch[:, 1:2], 1 / 3, intermediate=intermediate))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("intermediate", ["uint8", "float"])
def test_keeps_dtype_and_input(photo, dtype, intermediate):
    image = photo.to(dtype)
    before = image.clone()
    resized = imresize(image, 0.4, intermediate=intermediate)
    assert resized.dtype == dtype
    assert resized.shape == (1, 3, 48, 60)
    assert torch.equal(image, before)


def test_float_is_differentiable():
    image = torch.rand(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 0.6, intermediate="float"), image)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 1.7, intermediate="float"), image)


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf])
def test_refuses_a_scale(scale):
    with pytest.raises(ValueError, match="scale must be positive and finite, got"):
        imresize(torch.zeros(1, 1, 4, 4), scale)


def test_refuses_what_is_no_batch_of_images():
    with pytest.raises(ValueError, match=r"image must be \(B, C, H, W\) with H and W above 0, got shape \(3, 4, 4\)"):
        imresize(torch.zeros(3, 4, 4), 2)
    with pytest.raises(ValueError, match=r"got shape \(1, 3, 0, 4\)"):
        imresize(torch.zeros(1, 3, 0, 4), 2)
    with pytest.raises(TypeError, match=r"image must be floating point in \[0, 1\], got torch.uint8"):
        imresize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match='intermediate must be "uint8" or "float", got \'int\''):
        imresize(torch.zeros(1, 3, 4, 4), 2, intermediate="int")
