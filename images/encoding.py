"""From samples to the bytes of an image file, with the profile and EXIF that it can hold: one function a format."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .picture import Picture

Encoder = Callable[[np.ndarray, Picture, int | None], bytes]


class Format(NamedTuple):
    """What a format can hold, and how it is made; ``encode`` takes samples (H, W, C), picture and quality."""

    name: str
    encode: Encoder
    depths: tuple[int, ...] = (8,)
    alpha: bool = False
    lossy: bool = False


def _png(samples: np.ndarray, picture: Picture, quality: int | None) -> bytes:
    if samples.dtype == np.uint8:
        return _pillow("PNG", samples, picture.icc, picture.exif)
    import imagecodecs

    data = bytes(imagecodecs.png_encode(_squeezed(samples)))
    header = 8 + 25  # the signature and IHDR: profile and EXIF come between it and the pixels
    chunks = b""
    if picture.icc is not None:
        chunks += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
    if picture.exif is not None:
        chunks += _chunk(b"eXIf", picture.exif)
    return data[:header] + chunks + data[header:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _tiff(samples: np.ndarray, picture: Picture, quality: int | None) -> bytes:
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(
        file,
        _squeezed(samples),
        photometric="minisblack" if samples.shape[2] < 3 else "rgb",
        planarconfig="contig",
        extrasamples=None if picture.alpha is None else ["unassalpha"],
        compression="zlib",
        predictor=True,
        iccprofile=picture.icc,
        metadata=None,
        software=False,
    )
    return file.getvalue()


def _jpeg(samples: np.ndarray, picture: Picture, quality: int | None) -> bytes:
    return _pillow("JPEG", samples, picture.icc, picture.exif, quality=quality or 95, subsampling=0)


def _webp(samples: np.ndarray, picture: Picture, quality: int | None) -> bytes:
    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality}
    grey_profile = picture.icc is not None and picture.icc[16:20] == b"GRAY"
    icc = None if grey_profile else picture.icc
    # `exact` keeps the colour of fully transparent pixels.
    return _pillow("WEBP", samples, icc, picture.exif, exact=True, **options)


def _bmp(samples: np.ndarray, picture: Picture, quality: int | None) -> bytes:
    return _pillow("BMP", samples, None, None)


def _pillow(format: str, samples: np.ndarray, icc: bytes | None, exif: bytes | None, **options: Any) -> bytes:
    file = io.BytesIO()
    exif = b"" if exif is None else b"Exif\0\0" + exif
    Image.fromarray(_squeezed(samples)).save(file, format, icc_profile=icc, exif=exif, **options)
    return file.getvalue()


def _squeezed(samples: np.ndarray) -> np.ndarray:
    """Grey without alpha as (H, W), the shape that every library here takes it in."""
    return samples if samples.shape[2] > 1 else samples[..., 0]


FORMATS = {
    ".png": Format("PNG", _png, depths=(8, 16), alpha=True),
    ".tif": (_TIFF := Format("TIFF", _tiff, depths=(8, 16), alpha=True)),
    ".tiff": _TIFF,
    ".jpg": (_JPEG := Format("JPEG", _jpeg, lossy=True)),
    ".jpeg": _JPEG,
    ".webp": Format("WebP", _webp, alpha=True, lossy=True),
    ".bmp": Format("BMP", _bmp),
}
