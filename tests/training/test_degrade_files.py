"""Degrading files: what is written, what is said of it, and what is left alone."""

import json

import pytest
import torch
from PIL import Image

from claritycore.images import Picture, imresize, read_image, write_image
from claritycore.training.degradations import degrade
from claritycore.training.degrade_files import DegradeOptions, degrade_files

CPU = {"device": "cpu"}


def values(height, width, channels=3, seed=0):
    image = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return (255 * image).round() / 255


@pytest.fixture
def folder(tmp_path):
    """Three pictures: one in a folder below, one grey, one whose sides are no multiples of 4."""
    (tmp_path / "clean/below").mkdir(parents=True)
    write_image(tmp_path / "clean/a.png", Picture(values(16, 12)))
    write_image(tmp_path / "clean/b.png", Picture(values(9, 15, 1)))
    write_image(tmp_path / "clean/below/a.png", Picture(values(8, 8)))
    return tmp_path / "clean"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder(folder, tmp_path):
    told = []
    out = tmp_path / "out"
    report = degrade_files([folder], out, DegradeOptions(scale=4, recursive=True, **CPU), tell=told.append)
    assert [str(path.relative_to(out)) for path in report.written] == [
        *("a.png", "b.png", "below/a.png", "degradations.jsonl"),
    ]
    assert not report.failed
    assert len(told) == 3
    lines = lines_of(out / "degradations.jsonl")
    assert len({line["seed"] for line in lines}) == 3
    for line in lines:
        clean = read_image(line["source"]).pixels[..., : line["height"], : line["width"]]
        made, drawn = degrade(clean, line["recipe"], [line["seed"]], scale=line["scale"])
        assert torch.equal(read_image(line["target"]).pixels, made)
        scalars = {name: each.item() for name, each in drawn.items() if each.numel() == 1}
        assert scalars.items() <= line.items()
        assert line["order"] == drawn["order"][0].tolist()
        assert {name for name in drawn if name not in line} == {name for name in drawn if name.endswith("kernel")}
        assert {"noise", "noise_sigma", "jpeg_quality", "blur_sigma_x"} <= set(line)
    assert (lines[1]["width"], lines[1]["height"]) == (12, 8)


def test_a_file_alone_becomes_what_it_becomes_among_others(folder, tmp_path):
    options = DegradeOptions(scale=2, seed=5, **CPU)
    degrade_files([folder], tmp_path / "out", options)
    report = degrade_files([folder / "a.png"], tmp_path / "alone/one.tif", options)
    assert [path.name for path in report.written] == ["one.tif", "one.jsonl"]
    report = degrade_files([folder / "a.png", folder / "a.png"], tmp_path / "alone/twice.tif", options)
    assert [path.name for path in report.written] == ["twice.tif", "twice.jsonl"]
    among, alone = tmp_path / "out/a.png", tmp_path / "alone/one.tif"
    assert torch.equal(read_image(among).pixels, read_image(alone).pixels)
    other = DegradeOptions(scale=2, seed=6, overwrite=True, **CPU)
    degrade_files([folder / "a.png"], alone, other)
    assert not torch.equal(read_image(among).pixels, read_image(alone).pixels)
    assert len(lines_of(tmp_path / "alone/one.jsonl")) == 1


def test_nothing_is_overwritten_unasked(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "degradations.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"degradations.jsonl exists: give --overwrite to replace it"):
        degrade_files([folder], out, DegradeOptions(**CPU))
    assert [path.name for path in out.iterdir()] == ["degradations.jsonl"]
    (out / "degradations.jsonl").unlink()
    degrade_files([folder], out, DegradeOptions(**CPU))
    before = (out / "a.png").read_bytes()
    with pytest.raises(FileExistsError, match=r"a.png exists \(and 1 more\): give --overwrite"):
        degrade_files([folder], out, DegradeOptions(seed=1, **CPU))
    assert (out / "a.png").read_bytes() == before
    degrade_files([folder], out, DegradeOptions(seed=1, overwrite=True, **CPU))
    assert (out / "a.png").read_bytes() != before
    assert len(lines_of(out / "degradations.jsonl")) == 2


def test_what_a_picture_carries_stays(tmp_path):
    alpha = torch.linspace(0, 1, 12).expand(1, 1, 8, 12)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    picture = Picture(values(8, 12), alpha, depth=16, exif=exif.tobytes().removeprefix(b"Exif\0\0"))
    write_image(tmp_path / "a.png", picture)
    degrade_files([tmp_path / "a.png"], tmp_path / "out.png", DegradeOptions("noise25", scale=4, **CPU))
    degraded = read_image(tmp_path / "out.png")
    assert (degraded.depth, degraded.exif) == (16, picture.exif)
    expected = imresize(alpha, 0.25, intermediate="float").clamp(0, 1)
    torch.testing.assert_close(degraded.alpha, expected, rtol=0, atol=1e-4)


def test_one_that_fails_does_not_stop_the_others(folder, tmp_path):
    (folder / "broken.png").write_bytes(b"no picture")
    write_image(folder / "tiny.png", Picture(values(3, 9)))
    told = []
    report = degrade_files([folder], tmp_path / "out", DegradeOptions(scale=4, **CPU), note=told.append)
    assert [path.name for path in report.failed] == ["broken.png", "tiny.png"]
    assert "tiny.png has 9 x 3 pixels, which cannot be made 4 times smaller" in told[1]
    assert [path.name for path in report.written] == ["a.png", "b.png", "degradations.jsonl"]
    assert len(lines_of(tmp_path / "out/degradations.jsonl")) == 2
    with pytest.raises(ValueError, match=r"broken.png is no image"):
        degrade_files([folder / "broken.png"], tmp_path / "one.png", DegradeOptions(**CPU))
    assert not (tmp_path / "one.jsonl").exists()


def test_a_full_disk_ends_the_run(folder, tmp_path, monkeypatch):
    def full(path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("claritycore.training.degrade_files.write_image", full)
    report = degrade_files([folder], tmp_path / "out", DegradeOptions(**CPU))
    assert "No space left" in report.failed[folder / "a.png"]
    assert report.failed[folder / "b.png"] == "not tried: there was no room left to write to"
    assert not report.written


def test_the_format_is_png_unless_another_is_asked_for(tmp_path):
    write_image(tmp_path / "photo.jpg", Picture(values(8, 8)))
    degrade_files([tmp_path / "photo.jpg"], tmp_path / "a", DegradeOptions(**CPU))
    assert (tmp_path / "a/photo.png").exists()
    degrade_files([tmp_path / "photo.jpg"], tmp_path / "b", DegradeOptions(ext="WEBP", **CPU))
    assert (tmp_path / "b/photo.webp").exists()
    with pytest.raises(ValueError, match=r"out.jpg would be compressed once more"):
        degrade_files([tmp_path / "photo.jpg"], tmp_path / "out.jpg", DegradeOptions(**CPU))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"recipe": "stres"}, "there is no recipe 'stres'; did you mean stress"),
        ({"scale": 6}, "scale must be one of 1, 2, 3, 4, 8, got 6"),
        ({"ext": "jpg"}, "ext must be png, tif, webp or bmp, got '.jpg'"),
        ({"ext": "gif"}, "ext must be png, tif, webp or bmp, got '.gif'"),
    ],
)
def test_bad_options(options, told):
    with pytest.raises(ValueError, match=told):
        DegradeOptions(**options)


def test_bad_places(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        degrade_files([tmp_path / "nowhere"], tmp_path / "out", DegradeOptions(**CPU))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no PNG, TIFF, JPEG, WebP or BMP file there"):
        degrade_files([tmp_path / "empty"], tmp_path / "out", DegradeOptions(**CPU))
    with pytest.raises(ValueError, match="device 'abacus' cannot be used here"):
        degrade_files([folder], tmp_path / "out", DegradeOptions(device="abacus"))
