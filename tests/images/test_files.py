"""What is written is read again, by this package and by others."""

import io
import struct
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from claritycore.images import Picture, read_image, write_image

DEEP = (".png", ".tif", ".tiff")  # can hold 16 bits
CLEAR = (*DEEP, ".webp")  # can hold alpha
LOSSLESS = (*CLEAR, ".bmp")


def assert_same(picture, expected):
    assert torch.equal(picture.pixels, expected.pixels)
    assert (picture.alpha is None) == (expected.alpha is None)
    assert picture.alpha is None or torch.equal(picture.alpha, expected.alpha)
    assert (picture.depth, picture.icc, picture.exif) == (expected.depth, expected.icc, expected.exif)


def oracle(path):
    """The samples of a file by the library that is trusted with its kind."""
    data = Path(path).read_bytes()
    if data.startswith(b"\x89PNG"):
        samples = imagecodecs.png_decode(data)
    elif data[:2] in (b"II", b"MM"):
        samples = tifffile.imread(io.BytesIO(data))
    else:
        samples = np.asarray(Image.open(path))
    return samples.reshape(*samples.shape[:2], -1)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("suffix", LOSSLESS)
@settings(deadline=None, max_examples=25)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    alpha=st.booleans(),
    seed=st.integers(0, 99),
)
def test_lossless_round_trip(suffix, depth, channels, height, width, alpha, seed, random_picture, integers):
    channels = 3 if suffix == ".webp" else channels  # WebP has no grey
    depth = depth if suffix in DEEP else 8
    picture = random_picture(channels, height, width, alpha=alpha and suffix in CLEAR, depth=depth, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture" + suffix)
        write_image(path, picture)
        assert_same(read_image(path), picture)
        samples = oracle(path)
    assert samples.dtype == (np.uint16 if depth == 16 else np.uint8)
    np.testing.assert_array_equal(samples, integers(picture))


@pytest.mark.parametrize("suffix", [".PNG", ".Tif", ".jpg", ".JPEG", ".webp", ".bmp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_photograph_in_every_format(tmp_path, photo, suffix, channels):
    picture = Picture(photo[:, :channels])
    path = tmp_path / f"Büste 图像{suffix}"
    write_image(path, picture)
    again = read_image(str(path))
    assert again.depth == 8
    assert again.pixels.shape[1] == (3 if suffix == ".webp" else channels)
    tolerance = 0.1 if suffix.lower() in (".jpg", ".jpeg") else 0
    assert (again.pixels - picture.pixels).abs().max() <= tolerance


def test_webp_writes_grey_as_rgb(tmp_path, random_picture):
    for alpha in (False, True):
        picture = random_picture(1, 5, 7, alpha=alpha)
        write_image(tmp_path / "grey.webp", picture, overwrite=True)
        again = read_image(tmp_path / "grey.webp")
        assert torch.equal(again.pixels, picture.pixels.expand(1, 3, 5, 7))
        assert (again.alpha is None) is not alpha


def test_quality(tmp_path, photo):
    for suffix in (".jpg", ".webp"):
        for quality in (30, 90):
            write_image(tmp_path / f"{quality}{suffix}", Picture(photo), quality=quality)
        assert (tmp_path / f"30{suffix}").stat().st_size < (tmp_path / f"90{suffix}").stat().st_size
    write_image(tmp_path / "default.jpg", Picture(photo))
    with Image.open(tmp_path / "default.jpg") as image:
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # no chroma subsampling


@pytest.mark.parametrize("suffix", DEEP)
def test_values_are_clamped_and_rounded_half_to_even(tmp_path, suffix):
    for depth in (8, 16):
        halves = torch.tensor([-80, 0.5, 1.5, 2.5, 3.49, 3.51, 2.0**20], dtype=torch.float64)
        picture = Picture((halves / (2**depth - 1)).view(1, 1, 1, -1), depth=depth)
        write_image(tmp_path / f"{depth}{suffix}", picture)
        assert oracle(tmp_path / f"{depth}{suffix}").ravel().tolist() == [0, 0, 2, 2, 3, 4, 2**depth - 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_floating_point_is_written(tmp_path, dtype):
    picture = Picture(torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).to(dtype).requires_grad_(), depth=16)
    write_image(tmp_path / "a.png", picture)
    assert oracle(tmp_path / "a.png").ravel().tolist() == [0, 32768, 65535]


def test_depth_can_be_lowered_and_raised(tmp_path, random_picture, integers):
    deep = random_picture(3, 6, 5, alpha=True, depth=16)
    write_image(tmp_path / "low.webp", deep, depth=8)
    np.testing.assert_array_equal(oracle(tmp_path / "low.webp"), integers(deep, 8))
    shallow = random_picture(3, 6, 5)
    write_image(tmp_path / "high.tif", shallow, depth=16)
    np.testing.assert_array_equal(oracle(tmp_path / "high.tif"), integers(shallow) * 257)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("depth", [8, 16])
def test_profile_and_exif_travel(
    tmp_path, suffix, depth, channels, rgb_profile, grey_profile, make_exif, random_picture
):
    icc = grey_profile if channels == 1 else rgb_profile
    depth = depth if suffix in DEEP else 8
    picture = random_picture(channels, 9, 7, alpha=suffix in CLEAR, depth=depth, icc=icc, exif=make_exif())
    path = tmp_path / f"picture{suffix}"
    write_image(path, picture)
    again = read_image(path)
    assert again.icc == (None if suffix == ".webp" and channels == 1 else icc)
    if suffix == ".tif":  # has no place for EXIF here
        assert again.exif is None
        return
    assert again.exif == picture.exif
    assert_all_directories(loaded(again.exif))
    with Image.open(path) as image:
        assert_all_directories(image.getexif())


def assert_all_directories(exif):
    assert exif[0x010F] == "Camera maker"
    assert exif.get_ifd(0x8769)[0x9286] == b"ASCII\0\0\0a comment"
    assert exif.get_ifd(0x8769)[0xA434] == "A lens"
    assert float(exif.get_ifd(0x8769)[0x829A]) == 0.01
    assert [float(v) for v in exif.get_ifd(0x8825)[2]] == [48.0, 12.0, 30.5]


def loaded(block):
    exif = Image.Exif()
    exif.load(block)
    return exif


@pytest.mark.parametrize("depth", [8, 16])
def test_other_programs_find_profile_and_exif(tmp_path, depth, rgb_profile, make_exif, random_picture):
    picture = random_picture(3, 9, 7, depth=depth, icc=rgb_profile, exif=make_exif())
    write_image(tmp_path / "a.png", picture)
    write_image(tmp_path / "a.tif", picture)
    for name in ("a.png", "a.tif"):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert image.info["icc_profile"] == rgb_profile
            assert name == "a.tif" or image.getexif()[0x010F] == "Camera maker"
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == 1
        tags = {tag.code: tag.value for tag in file.pages.first.tags}
        assert tags[34675] == rgb_profile
        assert not {270, 305, 306} & set(tags)  # nothing is told of the picture that it did not say itself


@pytest.mark.parametrize("depth", [8, 16])
def test_exif_after_the_pixels_of_a_png(tmp_path, depth, make_exif, random_picture, integers):
    write_image(tmp_path / "a.png", random_picture(3, 4, 5, depth=depth))
    data, exif = (tmp_path / "a.png").read_bytes(), make_exif(6)
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    (tmp_path / "b.png").write_bytes(data[:-12] + chunk + data[-12:])  # before IEND
    picture = read_image(tmp_path / "b.png")
    np.testing.assert_array_equal(integers(picture), np.rot90(integers(read_image(tmp_path / "a.png")), -1))
    assert_all_directories(loaded(picture.exif))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_orientation_is_applied_and_reset(tmp_path, suffix, orientation, make_exif, random_picture, integers):
    image = Image.fromarray(integers(random_picture(3, 6, 9)).astype(np.uint8))
    path = tmp_path / f"turned{suffix}"
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100}}.get(suffix, {})
    image.save(path, exif=b"Exif\0\0" + make_exif(orientation), **options)
    picture = read_image(path)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(integers(picture), expected)
    if suffix == ".tif":
        assert picture.exif is None
    else:
        assert loaded(picture.exif)[0x0112] == 1
        assert_all_directories(loaded(picture.exif))
        assert orientation > 1 or picture.exif == make_exif(1)  # to the byte
    write_image(tmp_path / f"upright{suffix}", picture)
    np.testing.assert_array_equal(integers(read_image(tmp_path / f"upright{suffix}")).shape, expected.shape)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_16_bits_and_of_palettes(tmp_path, orientation, make_exif, random_picture, integers):
    deep = random_picture(3, 6, 9, depth=16, exif=make_exif(orientation))
    write_image(tmp_path / "a.png", deep)  # the block is written as it is given
    turns = [(0x0112, 3, 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", integers(deep).astype(np.uint16), photometric="rgb", extratags=turns)
    for name in ("a.png", "a.tif"):
        turned = ImageOps.exif_transpose(image_of(integers(deep)[..., 0], orientation))
        np.testing.assert_array_equal(integers(read_image(tmp_path / name))[..., 0], np.asarray(turned))
    grey = integers(random_picture(1, 6, 9))[..., 0]
    expected = np.asarray(ImageOps.exif_transpose(image_of(grey, orientation)))
    for compression in (None, "tiff_lzw"):
        palette = Image.fromarray(grey.astype(np.uint8)).convert("P")
        palette.save(tmp_path / "palette.tif", tiffinfo={0x0112: orientation}, compression=compression)
        picture = read_image(tmp_path / "palette.tif")
        assert picture.pixels.shape[1] == 3
        np.testing.assert_array_equal(integers(picture)[..., 1], expected)


def image_of(samples, orientation):
    image = Image.fromarray(samples.astype(np.int32))
    image.getexif()[0x0112] = orientation
    return image


@pytest.mark.parametrize("suffix", [*LOSSLESS, ".jpg"])
def test_damaged_exif_does_not_stop_a_picture_from_being_written(tmp_path, suffix, random_picture):
    picture = random_picture(3, 4, 5)
    for block in (b"II*\0", b"II*\0\xff\xff\xff\xff"):
        write_image(tmp_path / f"a{suffix}", replace(picture, exif=block), overwrite=True)
        again = read_image(tmp_path / f"a{suffix}")
        assert again.exif is None
        assert suffix == ".jpg" or torch.equal(again.pixels, picture.pixels)


def test_restoring_colour_and_alpha_and_writing_the_same_kind(tmp_path, rgb_profile, make_exif, random_picture):
    write_image(tmp_path / "a.png", random_picture(3, 4, 5, alpha=True, depth=16, icc=rgb_profile, exif=make_exif()))
    picture = read_image(tmp_path / "a.png")
    larger = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (picture.pixels, picture.alpha)]
    restored = replace(picture, pixels=larger[0], alpha=larger[1])
    write_image(tmp_path / "b.png", restored)
    assert_same(read_image(tmp_path / "b.png"), restored)
