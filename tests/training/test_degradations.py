"""`degrade`: what a sample becomes depends on itself and its seed alone, and the report says what was done."""

import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

from claritycore.images import imresize
from claritycore.training import recipes as recipes_module
from claritycore.training.blur_kernels import blur
from claritycore.training.blur_stage import Blur
from claritycore.training.degradations import (
    SCALES,
    Degraded,
    Recipe,
    degrade,
    find_recipe,
    list_recipes,
    register_recipe,
)
from claritycore.training.jpeg import jpeg
from claritycore.training.stage import Stage
from claritycore.training.stages import CameraNoise, Downsample, Jpeg, Noise, Resize
from tests.strategies import normal
from tests.training.draws import fills

NAMES = (
    *("blur", "bsrgan", "camera", "clean", "jpeg10", "jpeg20", "jpeg30", "jpeg40", "joint", "mild", "motion"),
    *("noise15", "noise25", "noise50", "poisson", "real-esrgan", "stress"),
)


@pytest.fixture(autouse=True)
def registrations_end_with_the_test(monkeypatch):
    monkeypatch.setattr(recipes_module, "_RECIPES", dict(recipes_module._RECIPES))


def images(batch=3, channels=3, height=48, width=32, dtype=torch.float32):
    """Smooth colours with some texture, in [0, 1]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [(rows / (3 + b + c)).sin() * (columns / (5 + b)).cos() for b in range(batch) for c in range(channels)]
    texture = 0.1 * normal((batch, channels, height, width))
    return (0.5 + 0.3 * torch.stack(waves).view_as(texture) + texture).clamp(0, 1).to(dtype)


def same(a: Degraded, b: Degraded):
    return torch.equal(a.image, b.image) and all(torch.equal(a.report[name], b.report[name]) for name in a.report)


# What every recipe keeps


def test_the_recipes():
    assert set(NAMES) <= set(list_recipes())
    assert list_recipes() == sorted(list_recipes())


@pytest.mark.parametrize("name", NAMES)
def test_seeds_make_the_same_again_whatever_the_batch(name):
    clean, seeds = images(), [3, -7, 2**62]
    first = degrade(clean, name, seeds, scale=4)
    assert same(first, degrade(clean, name, torch.tensor(seeds), scale=4))
    backwards = degrade(clean.flip(0), name, seeds[::-1], scale=4)
    assert same(first, Degraded(backwards.image.flip(0), {key: v.flip(0) for key, v in backwards.report.items()}))
    for row, seed in enumerate(seeds):
        alone = degrade(clean[row : row + 1], name, [seed], scale=4)
        torch.testing.assert_close(alone.image[0], first.image[row], rtol=0, atol=1e-6)
        assert all(torch.equal(alone.report[key][0], first.report[key][row]) for key in first.report)
    if name not in ("clean", "blur") and not name.startswith("jpeg"):
        other = degrade(clean, name, [4, 5, 6], scale=4)
        assert not torch.equal(first.image, other.image)


def test_all_bits_of_a_seed_count():
    seeds = [5, 5 + 2**32, 5 + 2**62, -5]
    noise = degrade(torch.full((4, 1, 8, 8), 0.5), "noise25", seeds).image
    assert len({tuple(sample.flatten().tolist()) for sample in noise}) == 4


@pytest.mark.parametrize("name", NAMES)
def test_no_global_source_of_random_numbers_is_used(name):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    degrade(images(), name, [0, 1, 2], scale=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_scale_and_odd_size(name, scale):
    for height, width in [(1, 1), (3, 1), (5, 7)]:
        clean = images(2, 3, scale * height, scale * width)
        degraded = degrade(clean, name, [0, 1], scale=scale).image
        assert degraded.shape == (2, 3, height, width)
        assert degraded.isfinite().all()
        if find_recipe(name).rounded or name == "clean":
            assert degraded.min() >= 0
            assert degraded.max() <= 1
        if find_recipe(name).rounded:
            torch.testing.assert_close(255 * degraded, (255 * degraded).round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 12])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_channels(name, channels):
    degraded = degrade(images(2, channels, 12, 20), name, [0, 1], scale=4).image
    assert degraded.shape == (2, channels, 3, 5)
    assert degraded.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["joint", "poisson", "camera", "real-esrgan", "bsrgan"])
def test_dtype_is_kept_and_the_work_is_not_done_in_half(name, dtype):
    clean = images(dtype=dtype)
    degraded = degrade(clean, name, [0, 1, 2], scale=2).image
    assert degraded.dtype == dtype
    if dtype is not torch.float64:
        assert torch.equal(degraded, degrade(clean.float(), name, [0, 1, 2], scale=2).image.to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(degraded, degrade(clean, name, [0, 1, 2], scale=2).image)


@pytest.mark.parametrize("name", NAMES)
def test_reports_have_the_same_names_and_shapes_whatever_is_drawn(name):
    shapes = set()
    for seeds in ([0, 1], [2, 3], [4, 5], [6, 7]):
        report = degrade(images(2), name, seeds, scale=4).report
        shapes.add(tuple((key, tuple(values.shape), values.dtype) for key, values in report.items()))
        assert all(len(values) == 2 and values.isfinite().all() for values in report.values())
        assert report["order"].sort(1).values.tolist() == 2 * [list(range(len(find_recipe(name).stages)))]
        for stage in find_recipe(name).stages:
            assert report[stage.name].dtype == torch.bool
            kernel = report.get(f"{stage.name}_kernel")
            if kernel is not None:
                torch.testing.assert_close(kernel.sum((1, 2)), torch.ones(2))
    assert len(shapes) == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_absent_is_zero_and_its_kernel_does_nothing(name):
    count = 40
    report = degrade(torch.full((count, 3, 4, 4), 0.5), name, range(count), scale=4).report
    for stage in find_recipe(name).stages:
        absent = ~report[stage.name]
        for key, values in report.items():
            if key.startswith(f"{stage.name}_") and absent.any():
                if key.endswith("_kernel"):
                    middle = values.shape[1] // 2
                    assert (values[absent][:, middle, middle] == 1).all()
                    assert (values[absent].sum((1, 2)) == 1).all()
                else:
                    assert (values[absent] == 0).all()
        if 0 < stage.probability < 1 and stage.name != "halve":
            assert absent.any()
            assert report[stage.name].any()


def test_the_numbers_of_a_report_make_the_image_again():
    clean, seeds = images(24), range(24)
    degraded, report = degrade(clean, "joint", seeds, scale=4)
    quiet = ~report["noise"]
    assert 1 < quiet.sum() < 24
    for row in quiet.nonzero()[:, 0]:
        image = imresize(blur(clean[row][None], report["blur_kernel"][row][None]), 0.25, intermediate="float")
        if report["jpeg"][row]:
            image = jpeg(image, report["jpeg_quality"][row])
        image = (255 * image.clamp(0, 1)).round() / 255
        torch.testing.assert_close(degraded[row], image[0], rtol=0, atol=1e-6)


# Recipes against their definitions


@pytest.mark.parametrize("scale", SCALES)
def test_clean_is_matlabs_bicubic_and_nothing_at_scale_1(scale):
    clean = images(3, 3, 48, 24)
    made = degrade(clean, "clean", [0, 1, 2], scale=scale).image
    assert torch.equal(made, clean if scale == 1 else imresize(clean, 1 / scale))


@pytest.mark.skipif("CLARITYCORE_DATA" not in os.environ, reason="needs the test sets")
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_clean_makes_the_public_low_resolution_images(scale):
    folder = Path(os.environ["CLARITYCORE_DATA"]) / "set5"
    (path,) = (folder / "HR").glob("*butterfly*")
    (theirs,) = (folder / f"LR_bicubic/X{scale}").glob("*butterfly*")
    clean, expected = (torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1)[None] / 255 for p in (path, theirs))
    height, width = (side // scale * scale for side in clean.shape[2:])
    made = degrade(clean[..., :height, :width], "clean", [0], scale=scale).image
    assert torch.equal((255 * made).round(), (255 * expected).round())


@pytest.mark.parametrize("level", [15, 25, 50])
def test_noise_of_papers_is_neither_clamped_nor_rounded(level):
    clean = images(2, 3, 128, 128).mul(1.3).clamp(0, 1)
    noisy, report = degrade(clean, f"noise{level}", [0, 1])
    noise = noisy - clean
    assert noisy.min() < 0
    assert noisy.max() > 1
    assert abs(255 * noise.std() - level) < 0.01 * level
    assert stats.kstest(noise.flatten()[::7] * 255 / level, "norm").pvalue > 1e-4
    torch.testing.assert_close(report["noise_sigma"], torch.full((2,), level / 255))


@pytest.mark.parametrize("quality", [10, 20, 30, 40])
def test_jpeg_alone(quality):
    clean = images()
    assert torch.equal(degrade(clean, f"jpeg{quality}", [0, 1, 2]).image, jpeg(clean, quality))


def test_joint_draws_what_it_says():
    count = 800
    report = degrade(torch.full((count, 1, 1, 1), 0.5), "joint", range(count)).report
    for stage in ("blur", "noise", "jpeg"):
        assert abs(report[stage].float().mean() - 0.8) < 4 * math.sqrt(0.16 / count)
    assert fills(report["blur_sigma_x"][report["blur"]], 0, 1.5)
    assert fills(report["noise_sigma"][report["noise"]], 0, 30 / 255)
    quality = report["jpeg_quality"][report["jpeg"]]
    assert (quality.min(), quality.max()) == (40, 95)
    assert torch.equal(quality, quality.round())
    assert not report["noise_grey"].any()
    # Independent of each other: 300 samples have all, 6 have none.
    together = torch.stack([report[stage] for stage in ("blur", "noise", "jpeg")]).float()
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 0.15


def test_mild_is_one_level_of_noise_and_quality_95():
    report = degrade(images(), "mild", [0, 1, 2]).report
    torch.testing.assert_close(report["noise_sigma"], torch.full((3,), 1 / 255))
    assert report["jpeg_quality"].tolist() == 3 * [95]


def test_stress_is_heavier_than_joint():
    clean = images(40, 1, 16, 16)
    error = {
        name: ((degrade(clean, name, range(40)).image - clean) ** 2).mean() for name in ("mild", "joint", "stress")
    }
    assert error["mild"] < error["joint"] / 4
    assert error["joint"] < error["stress"] / 2


@pytest.mark.parametrize(
    ("name", "share"), [("joint", 0.2**3), ("photographs", 0.5**5), ("good-photographs", 0.75**3 * 0.25)]
)
def test_some_samples_stay_clean(name, share):
    clean = images(1, 3, 8, 8).expand(800, -1, -1, -1)
    image, report = degrade(clean, name, range(800))
    faults = [stage.name for stage in find_recipe(name).stages if stage.name != "downsample"]
    untouched = ~torch.stack([report[fault] for fault in faults]).any(0)
    # Within four standard deviations of as many draws.
    assert abs(untouched.float().mean() - share) < 4 * (share / 800) ** 0.5
    assert (image - clean)[untouched].abs().max() <= 0.5 / 255 + 1e-6


# Gradients


@pytest.mark.parametrize("name", ["mild", "joint", "stress", "noise25", "poisson", "blur", "real-esrgan"])
def test_gradients_reach_the_clean_image(name):
    recipe = find_recipe(name)
    if name in ("noise25", "poisson"):
        recipe = Recipe("differentiable", (Downsample(), *recipe.stages[1:]), recipe.rounded)
    clean = images(4).requires_grad_()
    degraded = degrade(clean, recipe, range(4), scale=2).image
    assert torch.equal(degraded, degrade(clean.detach(), recipe, range(4), scale=2).image)
    degraded.sum().backward()
    assert clean.grad.isfinite().all()
    # The sum of a shrunk image is a quarter of the sum, where nothing is clamped.
    assert (clean.grad.mean((1, 2, 3)) > 0.15).all()


def test_the_camera_gives_finite_gradients_even_at_black_and_white():
    clean = torch.tensor([0.0, 1.0, 0.5]).repeat(4)[None, None, None].expand(1, 3, 4, 12).clone().requires_grad_()
    degrade(clean, Recipe("raw", (CameraNoise(),)), [0]).image.sum().backward()
    assert clean.grad.isfinite().all()


# A recipe of one's own


@dataclass(frozen=True, kw_only=True)
class Fade(Stage):
    """Darken, as a stage of a user's own would."""

    name: str = "fade"

    def draw(self, draws):
        return {"share": draws.uniform((0.2, 0.4))}

    def apply(self, image, values, plan, rngs):
        return image * values["share"].to(image)[:, None, None, None]


def test_a_stage_and_a_recipe_of_ones_own():
    recipe = Recipe("faded", (Fade(probability=0.5), Downsample()), rounded=False)
    register_recipe(recipe)
    register_recipe(Recipe("faded", (Fade(probability=0.5), Downsample()), rounded=False))  # the same once more
    assert find_recipe("faded") is not recipe  # but equal
    assert find_recipe(recipe) is recipe
    assert "faded" in list_recipes()
    clean = torch.full((20, 1, 4, 4), 0.5)
    degraded, report = degrade(clean, "faded", range(20), scale=2)
    assert 0 < report["fade"].sum() < 20
    expected = torch.where(report["fade"], 0.5 * report["fade_share"], 0.5)
    torch.testing.assert_close(degraded[:, 0, 0, 0], expected)


def test_learned_degradations_can_be_stages():
    net = nn.Conv2d(1, 1, 3, padding=1)

    @dataclass(frozen=True, kw_only=True)
    class Learned(Stage):
        name: str = "learned"

        def apply(self, image, values, plan, rngs):
            return net(image)

    degrade(torch.rand(2, 1, 4, 4), Recipe("learned", (Learned(),)), [0, 1]).image.sum().backward()
    assert net.weight.grad.abs().sum() > 0


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"recipe": "jont"}, ValueError, "there is no recipe 'jont'; did you mean joint"),
        ({"scale": 5}, ValueError, "scale must be one of 1, 2, 3, 4, 8, got 5"),
        ({"scale": 3}, ValueError, "clean must have sides that are multiples of the scale, 3, got 8 x 8"),
        ({"seeds": [0]}, ValueError, "seeds must be as many as images, 2, got 1"),
        ({"seeds": torch.zeros(2)}, ValueError, r"seeds must be whole numbers, \(2,\), got torch.float32"),
        ({"seeds": torch.zeros(2, 1).long()}, ValueError, r"seeds must be whole numbers, \(2,\)"),
        ({"clean": torch.zeros(3, 8, 8)}, ValueError, r"image must be \(B, C, H, W\)"),
        ({"clean": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, TypeError, "must be floating point"),
        (
            {"recipe": Recipe("unshrunk", (Noise(),)), "scale": 2},
            ValueError,
            "recipe unshrunk must give 4 x 4 pixels at scale 2, it gave 8 x 8: it needs a Downsample",
        ),
    ],
)
def test_bad_arguments(arguments, error, told):
    given = {"clean": torch.zeros(2, 3, 8, 8), "recipe": "clean", "seeds": [0, 1]} | arguments
    with pytest.raises(error, match=told):
        degrade(**given)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: Jpeg(quality=(0, 50)), ValueError, "quality must be a range within 1 and 100, the lower bound first"),
        (lambda: Jpeg(quality=(90, 50)), ValueError, "the lower bound first, got 90 to 50"),
        (lambda: Jpeg(subsampling="4:1:1"), ValueError, "subsampling must be one of"),
        (lambda: Noise(sigma=(-0.1, 0.1)), ValueError, "sigma must be a range of at least 0"),
        (lambda: Noise(grey=0.7, correlated=0.6), ValueError, "correlated must be a range within 0 and 0.3"),
        (lambda: Noise(poisson=1.1), ValueError, "poisson must be a range within 0 and 1"),
        (lambda: Noise(probability=2.0), ValueError, "probability must be a range within 0 and 1"),
        (lambda: Noise(name="a_b"), ValueError, "name of a stage must be of letters and digits"),
        (lambda: Noise(name="order"), ValueError, "not 'order'"),
        (lambda: Blur(families=(("isotropic", 1.0),)), ValueError, "family must be one of iso, aniso"),
        (lambda: Blur(sizes=(8,)), ValueError, "size must be an odd integer"),
        (lambda: Blur(sigma=(3.0, 1.0)), ValueError, "sigma must be a range of at least 0"),
        (lambda: Resize(up=0.8, down=0.4), ValueError, "down must be a range within 0 and 0.2"),
        (lambda: Resize(modes=("matlab",)), ValueError, "mode must be one of area, bilinear, bicubic, nearest"),
        (lambda: Recipe("", ()), ValueError, "name of a recipe must not be empty"),
        (lambda: Recipe("twice", (Noise(), Noise())), ValueError, "stages of twice must have names that differ"),
        (lambda: register_recipe("joint"), TypeError, "recipe must be a Recipe, got str"),
        (lambda: register_recipe(Recipe("joint", ())), ValueError, "the recipe name 'joint' is taken"),
        (lambda: find_recipe("real-esrgam"), ValueError, "did you mean real-esrgan"),
        (lambda: Stage(name="none").apply(torch.zeros(1), {}, None, []), NotImplementedError, "does not override"),
    ],
)
def test_bad_recipes(make, error, told):
    with pytest.raises(error, match=told):
        make()


# Another device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_makes_the_same(name):
    clean, seeds = images(4, 3, 96, 64), range(4)
    cpu, gpu = degrade(clean, name, seeds, scale=4), degrade(clean.cuda(), name, seeds, scale=4)
    assert all(torch.equal(values, gpu.report[key].cpu()) for key, values in cpu.report.items())
    difference = (cpu.image - gpu.image.cpu()).abs()
    # A rounding on the way to 8 bits may fall the other way; JPEG spreads that over a block.
    assert (difference > 1e-4).float().mean() < 0.02
    assert difference.mean() < 1e-3


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Jpeg(quality=(50.2, 50.8)), "quality must be a range with a whole number in it"),
        (lambda: Blur(cutoff=(0.0, 1.0)), "cutoff must be a range of at least 0.001"),
        (lambda: Blur(wide_cutoff=(0.0, 1.0)), "wide_cutoff must be a range of at least 0.001"),
    ],
)
def test_numbers_that_no_draw_could_use_are_refused_at_once(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_seeds_are_not_rounded():
    with pytest.raises(TypeError):
        degrade(torch.rand(1, 3, 8, 8), "noise25", [0.5])
