"""From the bytes of an image file to its samples: one function for TIFF, one for the other formats."""

import io
import logging
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .picture import EXIF_MARKS

if TYPE_CHECKING:
    from tifffile import TiffPage

ORIENTATION = 0x0112
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Channels of the TIFF colours that are read as they are, and of those that Pillow turns into grey or RGB.
TIFF_PLAIN = {"MINISBLACK": 1, "MINISWHITE": 1, "RGB": 3}
TIFF_CONVERTED = {"MINISBLACK": 1, "MINISWHITE": 1, "PALETTE": 1, "YCBCR": 3, "SEPARATED": 4}

# What tifffile logs of a damaged file is in the error's message; without a handler Python would also print it.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class Decoded(NamedTuple):
    """Samples as the file orders them, uint8 or uint16 (H, W, C) with alpha last, and what else was found."""

    samples: np.ndarray
    icc: bytes | None
    exif: bytes | None
    orientation: int


class Refused(ValueError):
    """A sound file that is not taken, as opposed to a damaged one."""


def decode(data: bytes, max_pixels: int) -> Decoded:
    """Decode a file of any format that is known here."""
    return _decode_tiff(data, max_pixels) if data[:4] in TIFF_SIGNATURES else _decode(data, max_pixels)


def too_large(max_pixels: int) -> str:
    """Say that an image is above the limit, and what to do."""
    return f"is above the limit of {max_pixels} pixels: give a larger max_pixels (--max-pixels) if you trust the file"


def _check(width: int, height: int, frames: int, max_pixels: int) -> None:
    if frames > 1:
        raise Refused(f"has {frames} frames or pages: save the one you want as a file of its own")
    if width * height > max_pixels:
        raise Refused(f"has {width} x {height} pixels and {too_large(max_pixels)}")


def _decode(data: bytes, max_pixels: int) -> Decoded:
    with _warnings_held():
        image = _open(data)
    _check(*image.size, getattr(image, "n_frames", 1), max_pixels)
    icc = image.info.get("icc_profile")
    image.load()  # the EXIF of a PNG may come after its pixels
    exif, orientation = _oriented(image.info.get("exif", b""))
    if isinstance(image, PngImageFile) and data[24] == 16:  # the depth in the header; Pillow cuts it to 8
        import imagecodecs

        samples = imagecodecs.png_decode(data)
        return Decoded(samples.reshape(*samples.shape[:2], -1), icc, exif, orientation)
    return Decoded(*_samples(image, icc), exif, orientation)


def _open(data: bytes) -> ImageFile:
    """Read the header. Pillow's `open` would try formats that are not tested here."""
    file = io.BytesIO(data)
    if data.startswith(PNG_SIGNATURE):
        return PngImageFile(file)
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(file)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile(file)
    if data.startswith(b"BM"):
        return BmpImageFile(file)
    raise Refused("is no image that can be read here: give a PNG, TIFF, JPEG, WebP or BMP file")


def upright_size(image: ImageFile, path: Path) -> tuple[int, int]:
    """Height and width of a picture as it will be read, of which only the head was."""
    if isinstance(image, TiffImageFile):  # whose size is that of before it is turned in some versions of Pillow alone
        width, height = image.tag_v2[256], image.tag_v2[257]
        orientation = image.tag_v2.get(ORIENTATION, 1)
    else:
        width, height = image.size
        png = isinstance(image, PngImageFile)
        _, orientation = _oriented(_exif_of_png(path) if png else image.info.get("exif", b""))
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _exif_of_png(path: Path) -> bytes:
    """Find the EXIF of a PNG, which may come after its pixels, without decoding them."""
    with path.open("rb") as file:
        file.seek(len(PNG_SIGNATURE))
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, io.SEEK_CUR)
    return b""


def _oriented(data: bytes) -> tuple[bytes | None, int]:
    """Give the EXIF block, made upright, and the orientation it had; a damaged block is dropped."""
    block, exif, orientation = data.removeprefix(b"Exif\0\0"), Image.Exif(), 1
    if block[:4] not in EXIF_MARKS:
        return None, orientation
    with _warnings_held() as caught:
        try:
            exif.load(block)
            orientation = exif.get(ORIENTATION, 1)
            if orientation != 1:
                exif[ORIENTATION] = 1
                block = exif.tobytes().removeprefix(b"Exif\0\0")
        except Exception:  # whatever Pillow says of bytes that it cannot make sense of
            return None, orientation
    return None if caught else block, orientation


@contextmanager
def _warnings_held() -> Iterator[list[warnings.WarningMessage]]:
    """List what Pillow warns of, as it does of damaged EXIF. One thread at a time: the filters are the process's."""
    with _holding, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


_holding = threading.Lock()


def _samples(image: Image.Image, icc: bytes | None) -> tuple[np.ndarray, bytes | None]:
    """Decode the 8-bit samples, as grey or RGB, with the profile that describes them."""
    image.load()
    if image.mode == "CMYK":
        return np.asarray(_cmyk_to_rgb(image, icc)), None
    grey, alpha = image.mode in ("1", "L", "LA"), image.has_transparency_data
    if not grey and image.mode not in ("P", "PA", "RGB", "RGBA", "YCbCr"):
        raise Refused(f"stores {image.mode} samples: convert it to grey or RGB of 8 or 16 bits")
    mode = {(True, False): "L", (True, True): "LA", (False, False): "RGB", (False, True): "RGBA"}[grey, alpha]
    samples = np.asarray(image if image.mode == mode else image.convert(mode))
    return samples.reshape(*samples.shape[:2], -1), icc


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc is None:
        return image.convert("RGB")
    try:
        rgb = ImageCms.profileToProfile(image, io.BytesIO(icc), ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise Refused(f"has a CMYK profile that cannot be used ({error}): convert it to RGB") from error
    return image.convert("RGB") if rgb is None else rgb


def _decode_tiff(data: bytes, max_pixels: int) -> Decoded:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        _check(page.imagewidth, page.imagelength, len(file.pages), max_pixels)
        _check_stored(page, len(data))
        icc, orientation = page.tags.valueof(34675), page.tags.valueof(ORIENTATION, default=1)
        colour, bits, count = _colour(page), page.bitspersample, page.samplesperpixel
        channels = TIFF_PLAIN.get(colour, 0)
        if channels and count - channels in (0, 1) and bits in (8, 16) and page.sampleformat == 1:
            return Decoded(_tiff_samples(page, channels), icc, None, orientation)
    if TIFF_CONVERTED.get(colour) != count or bits not in (1, 2, 4, 8) or page.sampleformat != 1:
        raise Refused(f"stores {count} samples of {bits} bits ({colour}): convert it to grey or RGB of 8 or 16 bits")
    samples, icc = _samples(TiffImageFile(io.BytesIO(data)), icc)  # turned upright by Pillow
    return Decoded(samples, icc, None, 1)


def _colour(page: "TiffPage") -> str:
    return getattr(page.photometric, "name", str(page.photometric))


def _check_stored(page: "TiffPage", size: int) -> None:
    """A strip or tile that is missing or out of the file would be decoded as zeros."""
    stored = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if not stored or any(not offset or not count or offset + count > size for offset, count in stored):
        raise ValueError("a strip or tile is not in the file")


def _tiff_samples(page: "TiffPage", channels: int) -> np.ndarray:
    samples = page.asarray()
    height, width, count = page.imagelength, page.imagewidth, page.samplesperpixel
    planar = page.planarconfig == 2
    samples = samples.reshape(count, height, width).transpose(1, 2, 0) if planar else samples.reshape(height, width, -1)
    top = np.iinfo(samples.dtype).max
    if _colour(page) == "MINISWHITE":
        samples = samples.copy()
        samples[..., :1] = top - samples[..., :1]
    if count > channels and page.extrasamples[:1] == (1,):  # premultiplied
        alpha = samples[..., -1:].astype(np.float64)
        colour = np.minimum(np.rint(samples[..., :-1] * (top / np.maximum(alpha, 1))), top)
        samples = np.concatenate([colour.astype(samples.dtype), samples[..., -1:]], axis=-1)
    return samples
