"""Reading image files whole: depth, alpha, profile and orientation, or a clear refusal."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import Decoded, Refused, decode, too_large, upright_size
from .picture import PROFILE_SPACES, Picture

# Pillow's usual limit, against files that unpack to far more than they weigh.
MAX_PIXELS = 89_478_485
ANY = 2**62


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a PNG, TIFF, JPEG, WebP or BMP file whole, at the bit depth that its header states.

    The content decides on the format, not the name. What becomes of it:

    - 16-bit PNG and TIFF keep 16 bits. Less than 8 bits, black and white included, become 8.
    - Grey stays one channel. A palette becomes RGB, and its transparency, or a PNG's transparent colour, becomes alpha.
      An extra sample of a TIFF is its alpha; a premultiplied one is divided out.
    - CMYK becomes RGB: in sRGB by its ICC profile, or by Pillow's plain formula where there is none. The profile is
      dropped then, as it does not describe RGB.
    - Orientation is applied, and reset to upright in the EXIF. All other EXIF of PNG, JPEG and WebP is kept, unless it
      is damaged; that of TIFF is not. A picture that had to be turned loses the EXIF thumbnail.
    - The ICC profile is kept if it can describe such pixels. XMP, text and resolution outside EXIF are not read.

    Of a JPEG that carries further pictures (depth, gain map, preview) the main one is read. No other file with several
    frames or pages is taken.

    Shape: ``pixels`` is ``(1, 1, H, W)`` or ``(1, 3, H, W)`` and ``alpha`` ``(1, 1, H, W)``, float32 in [0, 1].

    Args:
        path: the file.
        max_pixels: refuse more pixels than this, before any is decoded.

    Returns:
        The picture, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a folder.
        ValueError: if it is no regular file, empty, cut short, damaged, no image of these formats, too large, has
            several frames, or stores samples that do not fit 8 or 16 bits (floating point, CIELAB, 16-bit CMYK).

    Source: PNG (ISO/IEC 15948), TIFF 6.0, CIPA DC-008 (EXIF).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("LA", (3, 2)).save(f"{folder}/small.png")
    ...     picture = read_image(f"{folder}/small.png")
    >>> picture.pixels.shape, picture.alpha.shape, picture.depth
    (torch.Size([1, 1, 2, 3]), torch.Size([1, 1, 2, 3]), 8)
    """
    path = Path(path)
    _check_file(path)
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: fetch or export it again")
    try:
        with _pillow_allows(max_pixels):
            return _picture(decode(data, max_pixels))
    except (Refused, MemoryError) as error:
        raise type(error)(f"{path} {error}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} {too_large(max_pixels)}") from error
    except Exception as error:  # whatever a decoder says of bytes that it cannot make sense of
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch or export it again") from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Give height and width of the picture that `read_image` would read, from the head of the file where that says.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a folder.
        ValueError: if it is no regular file, no image of the formats that are read, or too large to be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (3, 2)).save(f"{folder}/small.png")
    ...     image_size(f"{folder}/small.png")
    (2, 3)
    """
    path = Path(path)
    _check_file(path)
    try:
        with _pillow_allows(ANY), Image.open(path, formats=("BMP", "JPEG", "PNG", "TIFF", "WEBP")) as image:
            height, width = upright_size(image, path)
    except Image.UnidentifiedImageError:  # a TIFF, perhaps, of a kind that Pillow does not know
        height, width = read_image(path).pixels.shape[-2:]
    if width * height > MAX_PIXELS:
        raise ValueError(f"{path} has {width} x {height} pixels, above the limit of {MAX_PIXELS}: cut it into parts")
    return height, width


def _check_file(path: Path) -> None:
    """Raise unless it is a file with an end: a pipe would be waited for, and a device read until memory is full."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of an image file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the path")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: give the path of an image file")


@contextmanager
def _pillow_allows(pixels: int) -> Iterator[None]:
    """Lift the limit that Pillow keeps for the whole process, where the caller asks for more than the usual one."""
    if pixels <= MAX_PIXELS:
        yield
        return
    with _lifting:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


_lifting = threading.Lock()


def _picture(decoded: Decoded) -> Picture:
    samples, icc, exif, orientation = decoded
    turn = int(orientation) - 1 if orientation in range(1, 9) else 0  # a damaged file may state anything
    samples = samples.swapaxes(0, 1) if turn >= 4 else samples
    # In the order of the standard: as it is, mirrored, turned by 180 degrees, upside down.
    flips = [(1, 1), (1, -1), (-1, -1), (-1, 1)]
    rows, columns = flips[turn % 4]
    depth = 8 * samples.dtype.itemsize
    image = torch.from_numpy(samples[::rows, ::columns].astype(np.float32).transpose(2, 0, 1).copy())[None]
    image /= 2**depth - 1
    channels = 1 if image.shape[1] < 3 else 3
    alpha: Tensor | None = image[:, channels:] if image.shape[1] > channels else None
    fits = icc is not None and icc[16:20] in PROFILE_SPACES[channels]
    return Picture(image[:, :channels], alpha, depth, icc if fits else None, exif)
