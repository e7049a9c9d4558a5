"""What is measured of a net, against the formulas, and who measures it: one process or several."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import skimage.data
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from claritycore.blocks import BicubicUp
from claritycore.images import Picture, imresize, psnr, read_image, ssim, write_image
from claritycore.nets import RRDBNet, RRDBNetConfig
from claritycore.training.data import ImageFolder
from claritycore.training.degradations import Recipe, degrade
from claritycore.training.evaluation import Evaluation, Row
from claritycore.training.frechet import PATCH
from claritycore.training.stages import Downsample, Noise
from claritycore.training.validation import cropped, evaluate
from tests.small_nets import small_harmonic

SIDES = {"cat.png": (61, 83), "deep/coffee.png": (52, 49), "astronaut.png": (48, 64)}


class Bicubic(nn.Module):
    """MATLAB's bicubic as a net."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return imresize(x, self.scale, intermediate="float")


class Shifted(nn.Module):
    """Brighter by a constant."""

    def __init__(self, offset):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))

    def forward(self, x):
        return x + self.offset


def photo(name, height, width):
    pixels = getattr(skimage.data, Path(name).stem.replace("cat", "chelsea"))()[100 : 100 + height, 100 : 100 + width]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("photos")
    (place / "deep").mkdir()
    for name, size in SIDES.items():
        write_image(place / name, Picture(photo(name, *size)))
    return place


@pytest.fixture
def images(folder):
    return ImageFolder(folder)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = RRDBNet(RRDBNetConfig(scale=2, num_feat=4, num_block=1, num_grow_ch=2))
    nn.init.constant_(net.conv_last.bias, 0.5)
    return net


def in_bytes(image):
    return (image.detach().double().clamp(0, 1) * 255).round()


def luma(image):
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)[:, None, None]
    return 16 + (in_bytes(image) / 255 * weights).sum(1, keepdim=True)


# The figures


def test_super_resolution_is_measured_on_the_luma_inside_a_border(net, images):
    found = evaluate(net, images)
    assert [row.image for row in found.rows] == sorted(SIDES)
    for row in found.rows:
        clean = photo(row.image, *SIDES[row.image])
        height, width = (side // 2 * 2 for side in clean.shape[2:])
        clean = clean[..., :height, :width]
        low = imresize(clean, 0.5)
        for prefix, image in {"": net(low), "input_": imresize(low, 2, intermediate="float")}.items():
            a, b = (luma(x)[0, 0, 2:-2, 2:-2].numpy() for x in (image, clean))
            expected = peak_signal_noise_ratio(b, a, data_range=255)
            np.testing.assert_allclose(row.figures[f"{prefix}psnr"], expected, rtol=1e-6)
            expected = ssim(image, clean, crop_border=2, y_channel=True).item()
            np.testing.assert_allclose(row.figures[f"{prefix}ssim"], expected, rtol=1e-6)


def test_at_scale_1_all_channels_and_pixels_are_measured(images):
    found = evaluate(Shifted(0.1), images, recipes=["noise25"])
    assert len(found.rows) == len(images) > 0
    for number, row in enumerate(found.rows):
        clean = cropped(images[number], 1)
        noisy = degrade(clean, "noise25", [0]).image
        sigma = row.drawn["noise_sigma"]
        np.testing.assert_allclose(sigma, 25 / 255, rtol=1e-6)
        # Another draw of the same noise: near, and not equal.
        assert 0 < abs(row.figures["input_psnr"] - psnr(noisy, clean).item()) < 0.3
        assert row.figures["psnr"] < row.figures["input_psnr"]


def test_the_protocol_can_be_another(net, images):
    found = evaluate(net, images, crop_border=0, y_channel=False, max_images=1)
    clean = cropped(images[0], 2)
    (row,) = found.rows
    np.testing.assert_allclose(row.figures["psnr"], psnr(net(imresize(clean, 0.5)).detach(), clean).item(), rtol=1e-6)


@pytest.mark.parametrize("scale", [1, 2])
def test_low_frequencies_keep_an_offset_and_lose_a_checkerboard(scale, tmp_path):
    write_image(tmp_path / "grey.png", Picture(torch.full((1, 1, 64, 64), 100 / 255)))

    class Marked(nn.Module):
        def __init__(self, offset, checks):
            super().__init__()
            self.scale, self.offset, self.checks = scale, offset / 255, checks / 255

        def forward(self, x):
            x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
            row, column = torch.arange(x.shape[2])[:, None], torch.arange(x.shape[3])
            return x + self.offset + self.checks * (1 - 2 * ((row + column) % 2))

    def measured(offset, checks):
        return evaluate(Marked(offset, checks), ImageFolder(tmp_path), y_channel=False).rows[0].figures

    offset = measured(10, 0)
    expected = 20 * np.log10(255 / 10)
    np.testing.assert_allclose([offset["psnr"], offset["lf_psnr"]], expected, rtol=1e-6)
    checks = measured(0, 10)
    np.testing.assert_allclose(checks["psnr"], expected, rtol=1e-6)
    # The binomial kernel has no response to it at all: what is left comes from the border.
    assert checks["lf_psnr"] > checks["psnr"] + 20
    np.testing.assert_allclose(checks["hf_psnr"], expected, rtol=1e-3)
    assert offset["hf_psnr"] > 100
    assert measured(0, 0)["lf_psnr"] > 100


def test_low_frequencies_are_three_levels_of_the_binomial_pyramid(net, images):
    from scipy.ndimage import convolve1d

    def low(x):
        sizes = []
        for _ in range(3):
            sizes.append(x.shape)
            for axis in range(2):
                x = convolve1d(x, np.array([1, 4, 6, 4, 1]) / 16, axis, mode="nearest")
            x = x[::2, ::2]
        for height, width in reversed(sizes):
            for axis, size in enumerate((height, width)):
                padded = np.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(2)], mode="edge")
                y = np.zeros([2 * s if a == axis else s for a, s in enumerate(x.shape)])
                before, here, after = (np.take(padded, range(i, i + x.shape[axis]), axis) for i in range(3))
                y[tuple(slice(0, None, 2) if a == axis else slice(None) for a in range(2))] = (
                    before + 6 * here + after
                ) / 8
                y[tuple(slice(1, None, 2) if a == axis else slice(None) for a in range(2))] = (here + after) / 2
                x = np.take(y, range(size), axis)
        return x

    row = evaluate(net, images).rows[1]
    clean = cropped(images[1], 2)
    a, b = (luma(x)[0, 0, 2:-2, 2:-2].numpy() / 255 for x in (net(imresize(clean, 0.5)), clean))
    lost = a - b - low(a) + low(b)
    np.testing.assert_allclose(row.figures["lf_psnr"], -10 * np.log10(((low(a) - low(b)) ** 2).mean()), rtol=1e-5)
    np.testing.assert_allclose(row.figures["hf_psnr"], -10 * np.log10((lost**2).mean()), rtol=1e-5)


@pytest.mark.parametrize("scale", [1, 2])
def test_structure_alone_is_measured_at_half_the_size(scale, images):
    net = small_harmonic(scale=scale)
    (row, *_) = evaluate(net, images, recipes=["noise25"]).rows
    clean = cropped(images[row.number], scale)
    made = evaluate(net, images, recipes=["clean"]).rows[row.number].figures["structure_psnr"]
    degraded = degrade(clean, "clean", [0], scale=scale).image
    size = [side // 2 * 2 for side in degraded.shape[2:]]
    halves = [nn.functional.avg_pool2d(x, 2 * s) for x, s in ((degraded, 1), (clean, scale))]
    inside = [half[..., : size[0] // 2, : size[1] // 2] for half in halves]
    expected = psnr(inside[0], inside[1], depth=None).item()
    # At the border of an odd side the image is mirrored: a row of many.
    assert made == pytest.approx(expected, abs=0.3)
    assert row.figures["structure_psnr"] < min(made, 60)
    assert "structure_psnr" not in evaluate(small_harmonic(branches="none", scale=scale), images).rows[0].figures


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_nets(channels, folder):
    images = ImageFolder(folder, channels=channels)
    net = RRDBNet(RRDBNetConfig(channels, channels, scale=2, num_feat=4, num_block=1, num_grow_ch=2))
    row = evaluate(net, images).rows[0]
    clean = cropped(images[0], 2)
    restored = net(imresize(clean, 0.5)).detach().clamp(0, 1)
    expected = psnr(restored, clean, crop_border=2, y_channel=channels == 3).item()
    np.testing.assert_allclose(row.figures["psnr"], expected, rtol=1e-6)


class Brightness(nn.Module):
    """Stands for a learned distance: the difference of the means, in levels of 8 bits."""

    def forward(self, a, b):
        assert torch.equal(a * 255, (a * 255).round())
        return (a.mean() - b.mean()).abs() * 255


def test_a_learned_distance_is_of_what_would_be_written(images):
    found = evaluate(Shifted(0.1 / 255), images, lpips=Brightness())
    assert [row.figures["lpips"] for row in found.rows] == [0, 0, 0]
    found = evaluate(Shifted(-0.6 / 255), images, lpips=Brightness(), max_images=1)
    assert 0.9 < found.means()["clean"]["lpips"] < 1.01


class Means(nn.Module):
    """Stands for Inception: the means of the channels of the patches, and the square of the first."""

    def forward(self, x):
        means = x.mean((2, 3))
        return torch.cat([means, means[:, :1] ** 2], 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    place = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate([(520, 520), (300, 780), (40, 40), (256, 256)]):
        colours = torch.rand(1, 3, size[0] // 20 + 1, size[1] // 20 + 1, generator=generator)
        pixels = colours.repeat_interleave(20, 2).repeat_interleave(20, 3)[..., : size[0], : size[1]]
        write_image(place / f"{number}.png", Picture(pixels))
    return ImageFolder(place)


def test_patch_fid_is_over_the_patches_of_all_images(large):
    found = evaluate(Shifted(0.05), large, inception=Means())
    features = {0.0: [], 0.05: []}
    for number in (0, 1, 3):
        clean = cropped(large[number], 1)
        for offset, seen in features.items():
            image = in_bytes(clean + offset) / 255
            tops, lefts = (range(side // PATCH) for side in clean.shape[2:])
            corners = [(PATCH * i, PATCH * j) for i in tops for j in lefts]
            corners += [(128 + PATCH * i, 128 + PATCH * j) for i in tops[:-1] for j in lefts[:-1]]
            seen += [Means()(image[..., top : top + PATCH, left : left + PATCH])[0].numpy() for top, left in corners]
    a, b = (np.stack(seen) for seen in features.values())
    assert len(a) == 5 + 3 + 1
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    shared = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * shared
    np.testing.assert_allclose(found.means()["clean"]["patch_fid"], expected, rtol=1e-6)
    parts = [evaluate(Shifted(0.05), large, inception=Means(), rank=rank, processes=3) for rank in range(3)]
    merged = Evaluation.merge(parts)
    np.testing.assert_allclose(merged.means()["clean"]["patch_fid"], expected, rtol=1e-6)
    assert "patch_fid" in str(merged)


# Published figures


@pytest.mark.parametrize(("net", "expected"), [(Bicubic(4), 28.43), (BicubicUp(4), 28.63)])
def test_bicubic_on_set5(net, expected):
    place = os.environ.get("CLARITYCORE_DATA")
    if not place:
        pytest.skip("CLARITYCORE_DATA does not name a folder with the test images")
    net.scale = 4
    means = evaluate(net, ImageFolder(Path(place) / "set5" / "HR")).means()["clean"]
    assert round(means["psnr"], 2) == expected
    assert round(means["input_psnr"], 2) == 28.43
    assert round(means["input_ssim"], 4) == 0.8113


# What is drawn, and who measures


def test_a_draw_follows_from_seed_recipe_and_number_alone(net, images):
    def rows(recipes, **options):
        return {(row.recipe, row.number): row for row in evaluate(net, images, recipes=recipes, **options).rows}

    alone, among = rows(["joint"]), rows(["noise25", "joint", "clean"])
    assert {key: row for key, row in among.items() if key[0] == "joint"} == alone
    assert rows(["joint"], max_images=2) == {key: row for key, row in alone.items() if key[1] < 2}
    other = rows(["joint"], seed=1)
    assert not any(other[key].drawn == row.drawn for key, row in alone.items())
    sigmas = [row.drawn["noise_sigma"] for row in alone.values()]
    assert len(set(sigmas)) == 3


def test_recipes_and_images_do_not_share_their_noise(images):
    seen = []

    class Recorder(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    evaluate(Recorder(), images, recipes=["noise15", "noise25"])
    fields = [(x - cropped(images[place // 2], 1))[..., :40, :40].flatten() for place, x in enumerate(seen)]
    shared = torch.corrcoef(torch.stack(fields)) - torch.eye(6)
    assert shared.abs().max() < 0.1


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_several_processes_measure_what_one_does(net, images, processes):
    options = {"recipes": ["clean", "noise15", "jpeg40"]}
    whole = evaluate(net, images, **options)
    parts = [evaluate(net, images, **options, rank=rank, processes=processes) for rank in range(processes)]
    assert sorted(len(part.rows) for part in parts) == sorted(
        3 * len(range(rank, 3, processes)) for rank in range(processes)
    )
    merged = Evaluation.merge(reversed(parts))
    assert merged.means() == whole.means()
    assert Evaluation.merge(parts).rows == whole.rows
    assert [row.number for row in whole.rows] == [0, 1, 2] * 3


def test_parts_that_do_not_belong_together(net, images):
    found = evaluate(net, images, max_images=1)
    with pytest.raises(ValueError, match="one of these was measured twice"):
        Evaluation.merge([found, found])
    with pytest.raises(ValueError, match="of one scale can be merged, got scales 2, 4"):
        Evaluation.merge([found, Evaluation((found.rows[0]._replace(scale=4, number=1),))])


def test_the_net_and_the_generator_are_left_as_they_were(net, images):
    net.train()
    net.body[0].eval()
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    evaluate(net, images, recipes=["joint"], max_images=1)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_tiles_give_what_the_whole_image_gives(net, images):
    whole, tiled = (evaluate(net, images, tile=tile) for tile in (None, 16))
    for a, b in zip(whole.rows, tiled.rows, strict=True):
        np.testing.assert_allclose(a.figures["psnr"], b.figures["psnr"], rtol=1e-4)


def test_progress_is_told(net, images):
    told = []
    evaluate(net, images, recipes=["clean", "mild"], progress=lambda *numbers: told.append(numbers))
    assert told == [(done, 6) for done in range(1, 7)]


# Pairs


@pytest.fixture
def pairs(folder, tmp_path):
    """The photographs at half the size."""
    for name in SIDES:
        path = tmp_path / Path(name).with_suffix(".png")
        path.parent.mkdir(exist_ok=True)
        low = imresize(cropped(ImageFolder(folder)[sorted(SIDES).index(name)], 2), 0.5)
        write_image(path, Picture(low))
    return tmp_path


def test_pairs_take_the_place_of_recipes(net, images, pairs):
    found = evaluate(net, images, degraded=ImageFolder(pairs))
    clean = evaluate(net, images)
    assert found.recipes == ["pairs"]
    for a, b in zip(found.rows, clean.rows, strict=True):
        assert a.figures == b.figures
        assert a.drawn == {}


def test_pairs_that_do_not_match(net, images, pairs):
    (pairs / "cat.png").unlink()
    with pytest.raises(ValueError, match=r"1 of the images in .* have no partner; the first: .*cat\.png$"):
        evaluate(net, images, degraded=ImageFolder(pairs))


# What is told


def test_the_table_has_a_line_for_each_image_and_recipe_and_the_means(net, images):
    found = evaluate(net, images, recipes=["clean", "noise50"])
    lines = str(found).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:4] == ["recipe", "scale", "image", "psnr"]
    assert [line.split()[:3] for line in lines[1:4]] == [["clean", "2", name] for name in sorted(SIDES)]
    assert lines[4].split()[:5] == ["clean", "2", "mean", "of", "3"]
    assert lines[4].split()[5] == f"{found.means()['clean']['psnr']:.2f}"
    assert lines[8].split()[6] == f"{found.means()['noise50']['ssim']:.4f}"


def test_the_csv_file_has_the_figures_in_full(net, images, tmp_path):
    found = evaluate(net, images, recipes=["clean", "joint"])
    path = found.write_csv(tmp_path / "new" / "table.csv")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["image"] for line in lines] == [*sorted(SIDES), "mean of 3"] * 2
    assert {line["scale"] for line in lines} == {"2"}
    for line, row in zip([*lines[:3], *lines[4:7]], found.rows, strict=True):
        assert {name: float(line[name]) for name in row.figures} == row.figures
        assert line["noise_sigma"] == str(row.drawn.get("noise_sigma", ""))
    assert float(lines[7]["psnr"]) == found.means()["joint"]["psnr"]
    with pytest.raises(FileExistsError, match="exists"):
        found.write_csv(path)
    assert evaluate(net, images, max_images=1).write_csv(path, overwrite=True) == path
    assert len(path.read_text().splitlines()) == 3
    assert list(path.parent.iterdir()) == [path]


def test_nothing_measured():
    assert Evaluation(()).means() == {}
    assert str(Evaluation(())) == "recipe  scale  image"
    assert Evaluation.merge([]).rows == ()
    row = Row(0, "a.png", "clean", 4, {"psnr": float("inf")}, {})
    assert "inf" in str(Evaluation((row,)))


# What is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"recipes": []}, "recipes must be at least one, each once, got none"),
        ({"recipes": ["clean", "clean"]}, "recipes must be at least one, each once, got clean"),
        ({"recipes": ["cleen"]}, "there is no recipe 'cleen'; did you mean clean"),
        ({"max_images": 0}, "max_images must be"),
        ({"processes": 0}, "processes must be"),
        ({"rank": 2, "processes": 2}, "rank must be at least 0 and below processes, 2, got 2"),
        ({"inception": nn.Identity()}, r"at least 2 patches of 256 x 256 pixels, and .* has 0"),
        ({"crop_border": 19}, r"astronaut.png is too small to be measured: 49 x 49 pixels are needed .* got 64 x 48"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(net, images, options, told):
    with pytest.raises(ValueError, match=told):
        evaluate(net, images, **options, progress=lambda *numbers: pytest.fail("something was measured"))


def test_recipes_of_ones_own(net, images):
    recipe = Recipe("loud", (Downsample(), Noise(sigma=(0.5, 0.5))))
    assert evaluate(net, images, recipes=[recipe], max_images=1).recipes == ["loud"]


def test_a_net_that_makes_nan_is_named_with_the_picture(net, images):
    nn.init.constant_(net.conv_last.bias, float("nan"))
    with pytest.raises(ValueError, match=r"^astronaut.png: RRDBNet makes NaN"):
        evaluate(net, images)


def test_a_net_that_does_not_state_its_scale(images):
    with pytest.raises(ValueError, match="Upsample must enlarge by the scale that it states, 1"):
        evaluate(nn.Upsample(scale_factor=2), images)


def test_deep_files_are_measured_as_8_bits(tmp_path):
    clean = photo("cat.png", 48, 48)
    write_image(tmp_path / "deep.png", Picture((clean + 0.3 / 255).clamp(0, 1), depth=16))
    deep = read_image(tmp_path / "deep.png").pixels
    row = evaluate(Bicubic(2), ImageFolder(tmp_path)).rows[0]
    restored = imresize(imresize(deep, 0.5), 2, intermediate="float")
    np.testing.assert_allclose(
        row.figures["psnr"], psnr(restored, deep, crop_border=2, y_channel=True).item(), rtol=1e-6
    )
