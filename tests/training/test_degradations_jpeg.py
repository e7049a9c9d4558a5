"""JPEG on tensors: Pillow's encoder and decoder are the oracle, to the bit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, features
from skimage import data

from claritycore.images import psnr
from claritycore.training.jpeg import jpeg, straight, straight_floor
from tests.strategies import normal

# Another libjpeg than turbo may round its sums in another way.
TURBO = features.check("libjpeg_turbo")
PILLOW_SUBSAMPLING = {"4:4:4": 0, "4:2:0": 2}
SIZES = [(1, 1), (1, 40), (5, 3), (16, 16), (33, 47), (17, 4), (8, 200), (128, 128)]


def photo(name, height=128, width=128):
    """The middle of a photograph of scikit-image, uint8, with channels."""
    image = getattr(data, name)()
    top, left = image.shape[0] // 2 - height // 2, image.shape[1] // 2 - width // 2
    image = np.ascontiguousarray(image[max(top, 0) :, max(left, 0) :][:height, :width])
    return image if image.ndim == 3 else image[..., None]


def as_tensor(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255


def through_pillow(image, quality, subsampling):
    file = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
        file, "JPEG", quality=quality, subsampling=PILLOW_SUBSAMPLING[subsampling]
    )
    return as_tensor(np.asarray(Image.open(file)).reshape(image.shape))


def levels_apart(a, b):
    return (255 * (a - b)).abs().round()


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "camera"])
def test_equals_pillow_on_photographs(name, subsampling):
    image = photo(name)
    clean = as_tensor(image)
    for quality in (1, 10, 30, 40, 49, 50, 60, 75, 80, 90, 95, 100):
        ours, theirs = jpeg(clean, quality, subsampling=subsampling), through_pillow(image, quality, subsampling)
        assert levels_apart(ours, theirs).max() <= (0 if TURBO else 8)
        assert levels_apart(ours, theirs).mean() <= 0.2
        assert abs(psnr(ours, clean) - psnr(theirs, clean)).item() < (1e-6 if TURBO else 0.1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["coffee", "camera"])
def test_equals_pillow_at_any_size(name, size):
    image = photo(name, *size)
    for quality, subsampling in [(5, "4:2:0"), (35, "4:2:0"), (90, "4:2:0"), (35, "4:4:4")]:
        theirs = through_pillow(image, quality, subsampling)
        assert levels_apart(jpeg(as_tensor(image), quality, subsampling=subsampling), theirs).max() <= (
            0 if TURBO else 8
        )


def test_noise_and_flat_colours_equal_pillow():
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    flat = np.broadcast_to(generator.integers(0, 256, (5, 1, 3), dtype=np.uint8).repeat(8, 0), (40, 24, 3)).copy()
    extremes = 255 * generator.integers(0, 2, (48, 48, 3), dtype=np.uint8)
    for image in (noise, flat, extremes):
        for quality in (3, 30, 70, 98):
            theirs = through_pillow(image, quality, "4:2:0")
            assert levels_apart(jpeg(as_tensor(image), quality), theirs).max() <= (0 if TURBO else 12)


def test_each_sample_has_its_quality():
    batch = torch.cat([as_tensor(photo(name)) for name in ("astronaut", "coffee", "chelsea")])
    together = jpeg(batch, [10, 50, 95])
    for i, quality in enumerate((10, 50, 95)):
        assert torch.equal(together[i : i + 1], jpeg(batch[i : i + 1], quality))
    assert torch.equal(jpeg(batch, torch.tensor([10.0, 50.0, 95.0], dtype=torch.float64)), together)


def test_other_channels_are_compressed_each_as_grey():
    image = normal((2, 5, 20, 30)).sigmoid()
    together = jpeg(image, [20, 80])
    for channel in range(5):
        assert torch.equal(together[:, channel : channel + 1], jpeg(image[:, channel : channel + 1], [20, 80]))


def test_quality_between_whole_numbers_lies_between():
    clean = as_tensor(photo("coffee"))
    values = [psnr(jpeg(clean, quality), clean).item() for quality in (60, 60.5, 61)]
    assert values == sorted(values)
    assert values[0] < values[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_the_work_is_not_done_in_it(dtype):
    clean = as_tensor(photo("coffee")).to(dtype)
    compressed = jpeg(clean, 40)
    assert compressed.dtype == dtype
    assert torch.equal(compressed, jpeg(clean.double(), 40).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(jpeg(clean, 40), compressed)


def test_values_beyond_the_range_are_clamped_and_the_result_is_of_8_bits():
    wild = 3 * normal((1, 3, 24, 24))
    assert torch.equal(jpeg(wild, 50), jpeg(wild.clamp(0, 1), 50))
    levels = 255 * jpeg(wild, 50)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_gradients_follow_finite_differences_of_large_steps(subsampling):
    """Where rounding is small against a step, the step changes the result as the gradient says."""
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 64), torch.linspace(0, 2, 64), indexing="ij")
    direction = torch.stack([(rows + k).sin() * (columns + 2 * k).cos() for k in range(3)])[None].double()
    image = (0.5 + 0.1 * normal((1, 3, 64, 64), dtype=torch.float64)).requires_grad_()
    upstream = direction + 0.1 * normal((1, 3, 64, 64), dtype=torch.float64, seed=1)
    compressed = jpeg(image, 95, subsampling=subsampling)
    predicted = (torch.autograd.grad((compressed * upstream).sum(), image)[0] * direction).sum()
    with torch.no_grad():
        step = 0.05
        ends = [jpeg(image + sign * step * direction, 95, subsampling=subsampling) for sign in (1, -1)]
        measured = ((ends[0] - ends[1]) / (2 * step) * upstream).sum()
    assert abs(predicted / measured - 1) < 0.01


def test_flat_images_have_gradients():
    image = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    upstream = normal((1, 3, 16, 16))
    jpeg(image, 100, subsampling="4:4:4").backward(upstream)
    torch.testing.assert_close(image.grad, upstream, rtol=0, atol=0.01)


def test_straight_through_rounding():
    x = torch.tensor([0.3, -0.3, 2.0], requires_grad=True)
    y = straight_floor(x)
    assert y.tolist() == [0, -1, 2]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1, 1, 1]
    assert torch.autograd.grad(straight(x, torch.zeros(3)).sum(), x)[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ((torch.zeros(1, 3, 8, 8), 0), ValueError, "quality must be from 1 to 100, got 0"),
        ((torch.zeros(1, 3, 8, 8), 101), ValueError, "quality must be from 1 to 100, got 101"),
        ((torch.zeros(2, 3, 8, 8), [50, float("nan")]), ValueError, "quality must be from 1 to 100"),
        ((torch.zeros(2, 3, 8, 8), [50]), ValueError, "quality must be one number or 2, one for each image"),
        ((torch.zeros(3, 8, 8), 50), ValueError, r"image must be \(B, C, H, W\)"),
        ((torch.zeros(1, 3, 0, 8), 50), ValueError, r"image must be \(B, C, H, W\) with C, H, W >= 1"),
        ((torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 50), TypeError, "image must be floating point"),
    ],
)
def test_bad_arguments(arguments, error, told):
    with pytest.raises(error, match=told):
        jpeg(*arguments)
    with pytest.raises(ValueError, match="subsampling must be one of 4:2:0, 4:4:4, got '4:2:2'"):
        jpeg(torch.zeros(1, 3, 8, 8), 50, subsampling="4:2:2")
