"""Every file that cannot be read or written is refused by one sentence that names it."""

import contextlib
import io
import re
import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from claritycore.images import Picture, read_image, write_image


def encoded(suffix, depth=8, size=(23, 17), **options):
    """The bytes of a noisy RGB file, as other programs write it."""
    samples = np.random.default_rng(0).integers(0, 2**depth, (*size, 3)).astype(f"u{depth // 8}")
    file = io.BytesIO()
    if depth == 16 and suffix == ".png":
        return imagecodecs.png_encode(samples)
    if suffix == ".tif":
        tifffile.imwrite(file, samples, photometric="rgb", **options)
    else:
        kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}[suffix]
        Image.fromarray(samples).save(file, kind, **options)
    return file.getvalue()


KINDS = [
    (".png", 8, {}),
    (".png", 16, {}),
    (".jpg", 8, {}),
    (".jpg", 8, {"progressive": True}),
    (".webp", 8, {}),
    (".webp", 8, {"lossless": True}),
    (".bmp", 8, {}),
    *((".tif", depth, options) for depth in (8, 16) for options in ({}, {"compression": "zlib"}, {"rowsperstrip": 4})),
    (".tif", 8, {"compression": "jpeg"}),
]


@pytest.mark.filterwarnings("ignore")  # decoders warn of what they then refuse
@pytest.mark.parametrize(("suffix", "depth", "options"), KINDS, ids=str)
def test_a_file_cut_short_is_refused_or_was_complete(tmp_path, suffix, depth, options):
    data = encoded(suffix, depth, **options)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    whole = read_image(path)
    lengths = {*range(1, min(400, len(data)), 5), *range(1, len(data), 37), *range(len(data) - 30, len(data))}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        if len(data) - length < 25:  # perhaps only an end mark, a checksum or padding was lost
            with contextlib.suppress(ValueError):
                assert torch.equal(read_image(path).pixels, whole.pixels)
        else:
            with pytest.raises(ValueError, match=rf"^\S+a\{suffix} is (damaged or cut short|no image that can be).*$"):
                read_image(path)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_tiff_whose_strip_is_elsewhere_is_refused(tmp_path, depth):
    data = bytearray(encoded(".tif", depth))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        place = file.pages.first.tags[273].valueoffset
    for offset in (0, 10**6):
        struct.pack_into("<I", data, place, offset)
        (tmp_path / "a.tif").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tif is damaged or cut short \(a strip or tile is not in the file\)"):
            read_image(tmp_path / "a.tif")


def test_what_is_no_file_or_no_image(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png does not exist: check the path"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(IsADirectoryError, match="is a folder: give the path of an image file"):
        read_image(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"a\.png is empty: fetch or export it again"):
        read_image(tmp_path / "a.png")
    for data in (b"hello, world", b"GIF89a", b"\0"):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(ValueError, match="is no image that can be read here: give a PNG, TIFF, JPEG, WebP or BMP"):
            read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_several_frames_are_refused(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=rf"a\{suffix} has 3 frames or pages: save the one you want"):
        read_image(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(("suffix", "depth"), [(".png", 8), (".png", 16), (".tif", 16), (".jpg", 8), (".webp", 8)])
def test_too_many_pixels_are_refused_before_decoding(tmp_path, suffix, depth):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(suffix, depth))
    with pytest.raises(ValueError, match="has 17 x 23 pixels and is above the limit of 390 pixels: give a larger max"):
        read_image(path, max_pixels=390)
    assert read_image(path, max_pixels=391).pixels.shape == (1, 3, 23, 17)


def test_a_decompression_bomb_is_refused(tmp_path):
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    data = encoded(".png")
    (tmp_path / "a.png").write_bytes(data[:16] + header + struct.pack(">I", 0xFFFFFFFF) + data[33:])
    with pytest.raises(ValueError, match=r"a\.png (is damaged|has 50000 x 50000 pixels)"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".webp", ".tif"])
def test_max_pixels_also_lifts_the_limit_of_pillow(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    Image.new("P", (40, 30)).convert("RGB" if suffix == ".webp" else "P").save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # half of the file's pixels, where Pillow raises
    with pytest.raises(ValueError, match=r"is above the limit of .* pixels: give a larger max_pixels"):
        read_image(path)
    assert read_image(path, max_pixels=10**9).pixels.shape == (1, 3, 30, 40)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_samples_that_are_neither_8_nor_16_bits_are_refused(tmp_path):
    cases = [
        (np.zeros((4, 5, 3), np.float32), {"photometric": "rgb"}, r"stores 3 samples of 32 bits \(RGB\)"),
        (np.zeros((4, 5), np.uint32), {"photometric": "minisblack"}, "stores 1 samples of 32 bits"),
        (np.zeros((4, 5), np.int16), {"photometric": "minisblack"}, "stores 1 samples of 16 bits"),
        (np.zeros((4, 5, 4), np.uint16), {"photometric": "separated"}, r"stores 4 samples of 16 bits \(SEPARATED\)"),
        (np.zeros((4, 5, 3), np.uint8), {"photometric": "cielab"}, r"stores 3 samples of 8 bits \(CIELAB\)"),
        (np.zeros((4, 5, 6), np.uint8), {"photometric": "rgb", "planarconfig": "contig"}, "stores 6 samples of 8 bits"),
    ]
    for samples, options, message in cases:
        tifffile.imwrite(tmp_path / "a.tif", samples, **options)
        with pytest.raises(ValueError, match=rf"a\.tif {message}.*: convert it to grey or RGB of 8 or 16 bits"):
            read_image(tmp_path / "a.tif")


def test_a_cmyk_profile_that_cannot_be_used_is_refused(tmp_path):
    Image.new("CMYK", (4, 3)).save(tmp_path / "a.jpg", icc_profile=b"no profile")
    with pytest.raises(ValueError, match=r"a\.jpg has a CMYK profile that cannot be used .*: convert it to RGB"):
        read_image(tmp_path / "a.jpg")


def test_picture_refuses_what_no_file_holds(rgb_profile, grey_profile, cmyk_profile):
    pixels = torch.zeros(1, 3, 4, 5)
    for tensor in (pixels.byte(), pixels.numpy(), None):
        with pytest.raises(TypeError, match=r"pixels must be a floating-point tensor in \[0, 1\], got"):
            Picture(tensor)
    with pytest.raises(TypeError, match=r"alpha must be a floating-point tensor in \[0, 1\], got float"):
        Picture(pixels, 0.5)
    for shape in ((3, 4, 5), (2, 3, 4, 5), (1, 2, 4, 5), (1, 4, 4, 5), (1, 3, 0, 5)):
        with pytest.raises(ValueError, match=r"pixels must be \(1, 1, H, W\) or \(1, 3, H, W\), got shape"):
            Picture(torch.zeros(shape))
    for shape in ((1, 3, 4, 5), (1, 1, 5, 4)):
        with pytest.raises(ValueError, match=r"alpha must be \(1, 1, 4, 5\) like pixels, got"):
            Picture(pixels, torch.zeros(shape))
    with pytest.raises(ValueError, match="depth must be 8 or 16, got 12"):
        Picture(pixels, depth=12)
    for profile in (grey_profile, cmyk_profile, b""):
        with pytest.raises(ValueError, match=r"icc must describe pixels with 3 channel\(s\), got a profile of"):
            Picture(pixels, icc=profile)
    assert Picture(pixels[:, :1], icc=rgb_profile).icc  # what many programs make of RGB that they turn grey
    with pytest.raises(ValueError, match="exif must begin with its byte order mark"):
        Picture(pixels, exif=b"Exif\0\0II*\0")


def test_writing_refuses_what_the_format_cannot_hold(tmp_path):
    pixels = torch.zeros(1, 3, 4, 5)
    for suffix in (".jpg", ".webp", ".bmp"):
        with pytest.raises(
            ValueError, match=rf"a\{suffix}: .* cannot hold 16 bits; pass depth=8, or write PNG or TIFF"
        ):
            write_image(tmp_path / f"a{suffix}", Picture(pixels, depth=16))
        with pytest.raises(ValueError, match="cannot hold 16 bits"):
            write_image(tmp_path / f"a{suffix}", Picture(pixels), depth=16)
    for suffix in (".jpg", ".bmp"):
        with pytest.raises(ValueError, match=r"cannot hold alpha; write PNG, TIFF or WebP, or pass .* alpha=None"):
            write_image(tmp_path / f"a{suffix}", Picture(pixels, pixels[:, :1]))
    for suffix in (".png", ".tif", ".bmp"):
        with pytest.raises(ValueError, match="is lossless; leave quality out, or write JPEG or WebP"):
            write_image(tmp_path / f"a{suffix}", Picture(pixels), quality=90)
    for quality in (0, 101):
        with pytest.raises(ValueError, match=f"quality must be from 1 to 100, got {quality}"):
            write_image(tmp_path / "a.jpg", Picture(pixels), quality=quality)
    with pytest.raises(ValueError, match="depth must be 8 or 16, got 10"):
        write_image(tmp_path / "a.png", Picture(pixels), depth=10)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"a\.png: picture must hold finite values; found NaN or infinity"):
            write_image(tmp_path / "a.png", Picture(pixels + value))
        with pytest.raises(ValueError, match="picture must hold finite values"):
            write_image(tmp_path / "a.png", Picture(pixels, pixels[:, :1] + value))
    with pytest.raises(TypeError, match=r"picture must be a Picture, got Tensor: wrap a tensor as Picture\(tensor\)"):
        write_image(tmp_path / "a.png", pixels)
    assert not list(tmp_path.iterdir())


def test_writing_refuses_what_the_encoder_cannot_hold(tmp_path):
    for name, format, size, largest in [
        ("a.webp", "WebP", (1, 16_384), 16_383),
        ("a.jpg", "JPEG", (65_501, 1), 65_500),
        ("a.jpeg", "JPEG", (1, 70_000), 65_500),
    ]:
        message = f"{name}: {format} holds sides of up to {largest} pixels, got {size[1]} x {size[0]}; write PNG or"
        with pytest.raises(ValueError, match=re.escape(message)):
            write_image(tmp_path / name, Picture(torch.zeros(1, 1, *size)))
    with pytest.raises(ValueError, match=r"a\.jpg cannot be written as JPEG: "):
        write_image(tmp_path / "a.jpg", Picture(torch.zeros(1, 1, 1, 2), exif=b"II*\0" + bytes(70_000)))
    assert not list(tmp_path.iterdir())


def test_the_largest_sides_are_written(tmp_path):
    for name, size in [("a.webp", (1, 16_383)), ("a.jpg", (65_500, 1)), ("a.bmp", (1, 70_000))]:
        write_image(tmp_path / name, Picture(torch.zeros(1, 1, *size)))
        assert read_image(tmp_path / name).pixels.shape[-2:] == size


@pytest.mark.parametrize(
    ("name", "nearest"), [("a.pgn", ".png"), ("a.jpgg", ".jpg"), ("a.tifff", ".tiff"), ("a.heic", None), ("a", None)]
)
def test_an_unknown_suffix_is_answered_with_the_nearest(tmp_path, name, nearest):
    hint = rf"; did you mean \{nearest}\?$" if nearest else "'$"
    with pytest.raises(ValueError, match=rf"must end in one of \.png, \.tif, .*, \.bmp, got '.*{hint}"):
        write_image(tmp_path / name, Picture(torch.zeros(1, 1, 2, 2)))


def test_places_that_cannot_be_written(tmp_path):
    picture = Picture(torch.zeros(1, 1, 2, 2))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.png is a folder: give the path of a file in it"):
        write_image(tmp_path / "folder.png", picture, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder: create it before writing a\.png"):
        write_image(tmp_path / "nowhere" / "a.png", picture)
    write_image(tmp_path / "a.png", picture)
    with pytest.raises(
        FileExistsError, match=r"a\.png exists: pass overwrite=True to replace it, or give another name"
    ):
        write_image(tmp_path / "a.png", picture)
