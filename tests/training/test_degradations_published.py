"""The recipes of Real-ESRGAN and BSRGAN draw what their authors published."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from claritycore.training.blur_kernels import blur
from claritycore.training.blur_stage import FAMILIES
from claritycore.training.degradations import BSRGAN, REAL_ESRGAN, degrade
from claritycore.training.resizing import RESIZE_MODES
from claritycore.training.stage import Draws
from tests.training.draws import fills


def drawn(stage, count, *, scale=4, channels=3):
    """Columns of what a stage draws for many samples, as the sample's first draws."""
    rows = [stage.draw(Draws(seed, channels, scale)) for seed in range(count)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0] if name not in ("kernel", "covariance")}


def stage_of(recipe, name):
    return next(stage for stage in recipe.stages if stage.name == name)


def test_blur_of_real_esrgan():
    for name, largest in (("blur1", 3.0), ("blur2", 1.5)):
        values = drawn(stage_of(REAL_ESRGAN, name), 4000)
        shares = dict(zip(FAMILIES, np.bincount(values["family"], minlength=8) / 4000, strict=True))
        expected = {"iso": 0.405, "aniso": 0.225, "generalised-iso": 0.108, "generalised-aniso": 0.027}
        expected |= {"plateau-iso": 0.108, "plateau-aniso": 0.027, "sinc": 0.1, "motion": 0}
        for family, share in expected.items():
            assert abs(shares[family] - share) <= 4 * math.sqrt(share * (1 - share) / 4000)
        assert sorted(set(values["size"])) == [7, 9, 11, 13, 15, 17, 19, 21]
        in_family = {family: values["family"] == place for place, family in enumerate(FAMILIES)}
        assert fills(values["sigma_x"][~in_family["sinc"]], 0.2, largest)
        aniso = in_family["aniso"] | in_family["plateau-aniso"] | in_family["generalised-aniso"]
        assert fills(values["sigma_y"][aniso], 0.2, largest)
        assert fills(values["theta"][aniso], -math.pi, math.pi)
        for family, low, high in (("generalised-iso", 0.5, 4.0), ("plateau-iso", 1.0, 2.0)):
            beta = values["beta"][in_family[family]]
            assert abs((beta <= 1).mean() - 0.5) < 0.12
            assert low <= beta.min() <= beta.max() <= high
            assert fills(beta[beta > 1], 1, high)
        small = in_family["sinc"] & (values["size"] < 13)
        large = in_family["sinc"] & (values["size"] >= 13)
        assert fills(values["cutoff"][small], math.pi / 3, math.pi)
        assert fills(values["cutoff"][large], math.pi / 5, math.pi)
    assert stage_of(REAL_ESRGAN, "blur2").probability == 0.8
    assert stage_of(REAL_ESRGAN, "sinc").probability == 0.8


def test_kernels_smaller_than_the_largest_are_applied_whole():
    """Samples with kernels of one size are blurred by that part of the reported kernels alone."""
    image = torch.rand(1, 1, 30, 30, generator=torch.Generator().manual_seed(0))
    stage = stage_of(REAL_ESRGAN, "blur1")
    for seed in range(60):
        values = stage.draw(Draws(seed))
        kernel = values["kernel"][None]
        plan = stage.plan(values, (30, 30), (30, 30))
        torch.testing.assert_close(stage.apply(image, {"kernel": kernel}, plan, []), blur(image, kernel))


@pytest.mark.parametrize(
    ("name", "up", "down", "low", "high"), [("resize1", 0.2, 0.7, 0.15, 1.5), ("resize2", 0.3, 0.4, 0.3, 1.2)]
)
def test_resizing_of_real_esrgan(name, up, down, low, high):
    values = drawn(stage_of(REAL_ESRGAN, name), 3000)
    factor = values["factor"]
    assert abs((factor > 1).mean() - up) < 0.035
    assert abs((factor < 1).mean() - down) < 0.035
    assert fills(factor[factor > 1], 1, high)
    assert fills(factor[factor < 1], low, 1)
    assert {RESIZE_MODES[mode] for mode in values["mode"]} == {"area", "bilinear", "bicubic"}


@pytest.mark.parametrize(("name", "sigma", "factor"), [("noise1", 30, 3.0), ("noise2", 25, 2.5)])
def test_noise_of_real_esrgan(name, sigma, factor):
    values = drawn(stage_of(REAL_ESRGAN, name), 3000)
    poisson = values["poisson"] > 0
    assert abs(poisson.mean() - 0.5) < 0.04
    assert abs(values["grey"].mean() - 0.4) < 0.04
    assert fills(255 * values["sigma"][~poisson], 1, sigma)
    assert fills(values["poisson"][poisson], 0.05, factor)
    assert (values["sigma"][poisson] == 0).all()


def test_order_and_quality_of_real_esrgan():
    report = degrade(torch.full((200, 1, 4, 4), 0.5), REAL_ESRGAN, range(200), scale=4).report
    names = [stage.name for stage in REAL_ESRGAN.stages]
    orders = [tuple(names[place] for place in order) for order in report["order"].tolist()]
    start = ("sharpen", "blur1", "resize1", "noise1", "jpeg1", "blur2", "resize2", "noise2")
    assert set(orders) == {(*start, "resize3", "sinc", "jpeg2"), (*start, "jpeg2", "resize3", "sinc")}
    assert abs(sum(order[-1] == "jpeg2" for order in orders) - 100) < 29
    for name in ("jpeg1", "jpeg2"):
        assert fills(report[f"{name}_quality"], 30, 95)


def test_blur_of_bsrgan():
    for scale in (2, 4):
        values = drawn(stage_of(BSRGAN, "blur1"), 2000, scale=scale)
        aniso = values["family"] == FAMILIES.index("aniso")
        assert abs(aniso.mean() - 0.5) < 0.05
        assert sorted(set(values["size"])) == list(range(7, 26, 2))
        assert fills(values["sigma_x"][aniso] ** 2, 0, 4 + scale)
        assert fills(values["sigma_y"][aniso] ** 2, 0, 4 + scale)
        assert fills(values["theta"][aniso], 0, math.pi)
        assert fills(values["sigma_x"][~aniso], 0, 2 + 0.2 * scale)


def test_shrinking_of_bsrgan():
    values = drawn(stage_of(BSRGAN, "shrink"), 2000, scale=4)
    taken = values["mode"] == RESIZE_MODES.index("nearest")
    assert abs(taken.mean() - 0.25) < 0.04
    assert fills(values["factor"][~taken], 1, 8)
    assert (values["factor"][taken] == 4).all()
    assert fills(values["sigma"][taken], 0.1, 2.4)


def test_taking_pixels_keeps_the_picture_in_its_place():
    """A slope, shrunk so: each result is the mean of its cell, not its first pixel."""
    slope = torch.arange(64.0).expand(1, 1, 64, 64) / 64
    shrink = stage_of(BSRGAN, "shrink")
    for seed in range(40):
        values = shrink.draw(Draws(seed, 1, 4))
        if values["sigma"] == 0:
            continue
        plan = shrink.plan(values, (64, 64), (16, 16))
        shrunk = shrink.apply(slope, {"kernel": values["kernel"][None]}, plan, [])
        expected = slope[..., ::4, ::4] + 1.5 / 64
        torch.testing.assert_close(shrunk[..., 4:-4, 4:-4], expected[..., 4:-4, 4:-4], rtol=0, atol=2e-2 / 64)


def test_noise_of_bsrgan():
    stage = stage_of(BSRGAN, "noise")
    values = drawn(stage, 3000)
    correlated = np.array([stage.draw(Draws(seed, 3))["covariance"].any() for seed in range(3000)])
    assert abs(values["grey"].mean() - 0.4) < 0.04
    assert abs(correlated.mean() - 0.2) < 0.03
    levels = 255 * values["sigma"][~correlated]
    assert sorted(set(levels.round().astype(int))) == list(range(2, 26))
    assert np.allclose(levels, levels.round())
    assert (255 * values["sigma"][correlated]).max() <= 25


def test_order_of_bsrgan_and_what_happens_how_often():
    count = 600
    report = degrade(torch.full((count, 3, 4, 4), 0.5), BSRGAN, range(count), scale=4).report
    order = report["order"]
    names = [stage.name for stage in BSRGAN.stages]
    assert (order[:, 0] == names.index("halve")).all()
    assert (order[:, -1] == names.index("jpeg2")).all()
    place = order.argsort(1)
    assert (place[:, names.index("shrink")] < place[:, names.index("resize")]).all()
    # Each of the others is as often in each of the seven places between.
    for name in ("blur1", "blur2", "noise", "jpeg1", "camera"):
        counts = torch.bincount(place[:, names.index(name)], minlength=9)[1:8]
        assert stats.chisquare(counts).pvalue > 1e-4
    for name, share in (("halve", 0.25), ("jpeg1", 0.9), ("camera", 0.25)):
        assert abs(report[name].float().mean() - share) < 4 * math.sqrt(share * (1 - share) / count)
    modes = report["halve_mode"][report["halve"]]
    assert abs((modes == RESIZE_MODES.index("matlab")).float().mean() - 0.5) < 0.17
    quality = report["jpeg2_quality"]
    assert (quality.min(), quality.max()) == (30, 95)
    # What follows a halving degrades for scale 2.
    assert report["shrink_factor"][report["halve"]].max() <= 4
    assert report["shrink_factor"][~report["halve"]].max() > 4
    assert not degrade(torch.full((50, 1, 8, 8), 0.5), BSRGAN, range(50), scale=8).report["halve"].any()
