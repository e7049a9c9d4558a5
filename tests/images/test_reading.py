"""What is read from files that other programs wrote."""

import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from claritycore.images import read_image
from claritycore.images.reading import image_size


def test_a_dark_16_bit_file_stays_16_bit(tmp_path):
    samples = np.full((3, 4, 3), 7, np.uint16)  # no value above 255: only the header tells
    (tmp_path / "dark.png").write_bytes(imagecodecs.png_encode(samples))
    tifffile.imwrite(tmp_path / "dark.tif", samples, photometric="rgb")
    for name in ("dark.png", "dark.tif"):
        picture = read_image(tmp_path / name)
        assert picture.depth == 16
        assert torch.equal(picture.pixels, torch.full((1, 3, 3, 4), 7.0) / 65535)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_modes_that_pillow_writes(tmp_path, photo, mode, suffix, integers):
    image = Image.fromarray((photo[0] * 255).byte().permute(1, 2, 0).numpy()).resize((13, 11)).convert(mode)
    if suffix == ".bmp" and "A" in mode:
        pytest.skip("BMP has no alpha")
    image.save(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as stored:
        expected = stored.convert({"1": "L", "P": "RGB"}.get(mode, mode))
    picture = read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(integers(picture).squeeze(), np.asarray(expected))
    assert picture.pixels.shape[1] == (1 if mode in ("1", "L", "LA") else 3)
    assert (picture.alpha is not None) == ("A" in mode)
    assert picture.depth == 8


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_png_of_few_bits_spans_the_whole_range(tmp_path, bits, integers):
    top = 2**bits - 1
    row = np.array([0, top, 1, 0, top, 0, top, 0])
    packed = np.packbits(((row[:, None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8)).tobytes()
    (tmp_path / "a.png").write_bytes(make_png(8, 1, bits, 0, b"\0" + packed))
    assert integers(read_image(tmp_path / "a.png")).ravel().tolist() == (row * 255 // top).tolist()


def make_png(width, height, bits, colour, rows, *chunks, interlaced=0):
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))
    pieces = [header, *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in pieces)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_transparent_palette_becomes_alpha(tmp_path, integers):
    image = Image.new("P", (2, 2))
    image.putdata([0, 1, 2, 1])
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=bytes([255, 128, 0]))
    picture = read_image(tmp_path / "a.png")
    red, green, blue = [255, 0, 0, 255], [0, 255, 0, 128], [0, 0, 255, 0]
    assert integers(picture).tolist() == [[red, green], [blue, green]]


@pytest.mark.parametrize(("bits", "colour"), [(1, 0), (8, 0), (8, 2), (16, 0), (16, 2)])
def test_transparent_colour_of_a_png_becomes_alpha(tmp_path, bits, colour):
    channels = 1 if colour == 0 else 3
    top = 2**bits - 1
    pixels = np.array([[top] * channels, [0] * channels])
    row = bytes([0b10000000]) if bits == 1 else pixels.astype(f">u{bits // 8}").tobytes()
    transparent = struct.pack(f">{channels}H", *[top] * channels)
    (tmp_path / "a.png").write_bytes(make_png(2, 1, bits, colour, b"\0" + row, (b"tRNS", transparent)))
    picture = read_image(tmp_path / "a.png")
    assert picture.depth == max(bits, 8)
    assert picture.pixels.shape == (1, channels, 1, 2)
    assert picture.pixels[0, 0, 0].tolist() == [1, 0]
    assert picture.alpha is not None
    assert picture.alpha.ravel().tolist() == [0, 1]


def test_interlaced_16_bit_png(tmp_path, random_picture, integers):
    samples = integers(random_picture(3, 11, 13, depth=16))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + r.astype(">u2").tobytes() for y, x, dy, dx in passes for r in samples[y::dy, x::dx])
    (tmp_path / "a.png").write_bytes(make_png(13, 11, 16, 2, rows, interlaced=1))
    np.testing.assert_array_equal(integers(read_image(tmp_path / "a.png")), samples)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 3}, {"tile": (16, 16)}, {"byteorder": ">"}, {"bigtiff": True}])
def test_layouts_of_tiff(tmp_path, dtype, planar, compression, layout, random_picture, integers):
    samples = integers(random_picture(3, 19, 21, alpha=True, depth=8 * np.dtype(dtype).itemsize)).astype(dtype)
    stored = samples.transpose(2, 0, 1) if planar == "separate" else samples
    tifffile.imwrite(
        tmp_path / "a.tif",
        stored,
        photometric="rgb",
        planarconfig=planar,
        extrasamples=["unassalpha"],
        compression=compression,
        **layout,
    )
    np.testing.assert_array_equal(integers(read_image(tmp_path / "a.tif")), samples)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", "unspecified"])
def test_extra_sample_of_a_tiff_is_alpha(tmp_path, dtype, extra, integers):
    top = np.iinfo(dtype).max
    samples = np.array([[[top, top // 2], [top // 5, top // 5], [0, 0], [100, 200]]], dtype)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="minisblack", extrasamples=[extra], planarconfig="contig")
    picture = read_image(tmp_path / "a.tif")
    assert integers(picture)[..., 1].tolist() == samples[..., 1].tolist()
    expected = [top, top, 0, 100 * top / 200] if extra == "assocalpha" else samples[..., 0].ravel()
    np.testing.assert_allclose(integers(picture)[..., 0].ravel(), expected, atol=0.5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_where_white_is_zero(tmp_path, dtype, random_picture, integers):
    samples = integers(random_picture(1, 4, 5, depth=8 * np.dtype(dtype).itemsize))[..., 0].astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="miniswhite")
    np.testing.assert_array_equal(integers(read_image(tmp_path / "a.tif"))[..., 0], np.iinfo(dtype).max - samples)


def test_jpeg_inside_a_tiff(tmp_path, photo, integers):
    samples = (photo[0] * 255).byte().permute(1, 2, 0).numpy()
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="ycbcr", compression="jpeg")
    with Image.open(tmp_path / "a.tif") as image:
        np.testing.assert_array_equal(integers(read_image(tmp_path / "a.tif")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_becomes_rgb(tmp_path, suffix, cmyk_profile, integers):
    inks = Image.merge("CMYK", [Image.new("L", (8, 8), ink) for ink in (0, 255, 255, 0)])
    inks.save(tmp_path / f"plain{suffix}", **({"quality": 100} if suffix == ".jpg" else {}))
    picture = read_image(tmp_path / f"plain{suffix}")
    assert integers(picture)[0, 0].tolist() == [255, 0, 0]
    inks.save(tmp_path / f"profile{suffix}", icc_profile=cmyk_profile)
    picture = read_image(tmp_path / f"profile{suffix}")
    assert picture.icc is None
    red, green, blue = integers(picture)[0, 0]
    # Two inks leave a lightness of 1 - 2/3 * 0.8 = 0.467, which sRGB shows as a grey of about 111.
    assert max(red, green, blue) - min(red, green, blue) <= 3
    assert abs(int(red) - 111) <= 4


def test_a_profile_that_does_not_describe_the_pixels_is_dropped(tmp_path, photo, grey_profile, cmyk_profile):
    image = Image.fromarray((photo[0] * 255).byte().permute(1, 2, 0).numpy())
    for profile in (grey_profile, cmyk_profile, b"no profile"):
        image.save(tmp_path / "a.tif", icc_profile=profile)
        assert read_image(tmp_path / "a.tif").icc is None


def save_with_exif(path, depth, block):
    """A black picture of 3 x 2 pixels."""
    if depth == 16:
        path.write_bytes(make_png(3, 2, 16, 2, bytes(2 * 19), (b"eXIf", block)))
    else:
        Image.new("RGB", (3, 2)).save(path, exif=b"Exif\0\0" + block)


@pytest.mark.parametrize(("suffix", "depth"), [(".png", 8), (".png", 16), (".jpg", 8), (".webp", 8)])
def test_damaged_exif_is_dropped(tmp_path, suffix, depth, make_exif):
    path = tmp_path / f"a{suffix}"
    cut = [make_exif(1)[:length] for length in (4, 9, 40, 70)]
    # A directory out of the block, no EXIF at all, the mark of a BigTIFF, and blocks cut short.
    for block in (b"II*\0\xff\xff\0\0", b"nonsense", b"", b"II+\0\x08\0\0\0" + bytes(12), *cut):
        save_with_exif(path, depth, block)
        picture = read_image(path)
        assert picture.exif is None
        assert picture.pixels.shape == (1, 3, 2, 3)
    save_with_exif(path, depth, make_exif(6)[:-8])  # only the last value is cut: the picture is turned all the same
    picture = read_image(path)
    assert picture.exif is None
    assert picture.pixels.shape == (1, 3, 3, 2)


@pytest.mark.parametrize("depth", [8, 16])
def test_an_orientation_that_there_is_not_is_taken_as_upright(tmp_path, depth):
    for kind, value in ((3, b"\0\0"), (3, b"\x09\0"), (2, b"six\0")):
        block = b"II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, kind, 4 if kind == 2 else 1, value, 0)
        save_with_exif(tmp_path / "a.png", depth, block)
        assert read_image(tmp_path / "a.png").pixels.shape == (1, 3, 2, 3)


def test_the_content_decides_not_the_name(tmp_path, integers):
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert integers(read_image(tmp_path / "a.jpg"))[3, 4].tolist() == [1, 2, 3]


def test_main_picture_of_a_jpeg_that_carries_others(tmp_path):
    first, second = (Image.new("RGB", (16, 8), colour) for colour in ("white", "black"))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert torch.equal(read_image(tmp_path / "a.jpg").pixels, torch.ones(1, 3, 8, 16))


def test_published_images_are_read_as_pillow_reads_them(data_folder, integers):
    paths = [*data_folder.glob("set5/HR/*.png"), *data_folder.glob("classic5/*.bmp"), *data_folder.glob("train/1*.jpg")]
    assert len(paths) > 10
    for path in paths:
        with Image.open(path) as image:
            samples = np.asarray(image)
        np.testing.assert_array_equal(integers(read_image(path)).squeeze(), samples)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
def test_the_size_is_that_of_what_would_be_read(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (5, 3)).save(path, **({} if suffix == "bmp" else {"exif": exif}))
    assert image_size(path) == tuple(read_image(path).pixels.shape[-2:])


def test_the_size_is_told_by_the_head_alone(tmp_path):
    """Of a PNG too, whose EXIF may come after its pixels."""
    turned = struct.pack(">2sHIHHHII", b"MM", 42, 8, 1, 0x0112, 3, 1, 6 << 16)
    whole = make_png(5, 3, 8, 0, b"\0".join([b"", *[bytes(5)] * 3]))
    late = whole[:-12] + struct.pack(">I", len(turned)) + b"eXIf" + turned + bytes(4) + whole[-12:]
    path = tmp_path / "a.png"
    for data, expected in ((whole, (3, 5)), (late, (5, 3)), (whole[:45], (3, 5))):
        path.write_bytes(data)
        assert image_size(path) == expected


@pytest.mark.parametrize("side", [9_500, 14_000])
def test_a_picture_too_large_to_be_read_is_refused_by_its_head(tmp_path, side):
    path = tmp_path / "large.png"
    path.write_bytes(make_png(side, side, 8, 0, b""))
    with pytest.raises(ValueError, match=rf"large.png has {side} x {side} pixels, above the limit of 89478485: cut it"):
        image_size(path)
