"""Writing image files: atomically, and never over another without being asked."""

import difflib
import os
import secrets
import shutil
import struct
from pathlib import Path

from .encoding import FORMATS, Format
from .picture import Picture, without_batch

# Pixels that the encoders take: a JPEG file could have 65,535, but libjpeg stops at 65,500.
LARGEST_SIDE = {"JPEG": 65_500, "WebP": 16_383}


def write_image(
    path: str | os.PathLike[str],
    picture: Picture,
    *,
    depth: int | None = None,
    quality: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a picture as PNG, TIFF, JPEG, WebP or BMP, whichever the name's suffix says.

    Values are clamped to [0, 1], scaled and rounded, halves to even. Nothing is given up silently: 16 bits and alpha
    are refused where the format has no place for them. The ICC profile is embedded, except in BMP, which has no place
    for it, and a grey one in WebP, which stores grey as RGB. EXIF is embedded in PNG, JPEG and WebP; TIFF and BMP are
    written without it.

    The write is atomic: it goes to a temporary file beside its place, synchronised to disk and then moved there. An
    existing file stays as it is until then. With ``overwrite`` a symbolic link is followed: the file that it points to
    is replaced, and the link stays.

    Shape: ``picture.pixels`` is ``(1, 1, H, W)`` or ``(1, 3, H, W)``.

    Args:
        path: the file; its suffix is one of .png, .tif, .tiff, .jpg, .jpeg, .webp and .bmp.
        picture: what to write; a bare tensor is wrapped by ``Picture(tensor)``.
        depth: bits per sample, by default those of the picture. 16 for PNG and TIFF only.
        quality: 1 to 100, for JPEG (default 95; chroma is never subsampled) and WebP (default lossless).
        overwrite: replace an existing file.

    Raises:
        TypeError: if ``picture`` is not a `Picture`.
        ValueError: if the format is unknown or cannot hold the depth, the alpha, the size (JPEG: sides up to 65,500
            pixels, WebP: 16,383) or the EXIF, ``quality`` is out of range or given to a lossless format, or a value is
            not finite.
        FileExistsError: if the file exists and ``overwrite`` is False.
        FileNotFoundError: if its folder does not exist.
        IsADirectoryError: if it is a folder.

    Source: PNG (ISO/IEC 15948), TIFF 6.0.

    >>> import tempfile, torch
    >>> from claritycore.images import read_image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_image(f"{folder}/grey.png", Picture(torch.full((1, 1, 2, 3), 0.5)))
    ...     read_image(f"{folder}/grey.png").pixels[0, 0, 0, 0].mul(255).round().item()
    128.0
    """
    path = Path(path)
    if not isinstance(picture, Picture):
        raise TypeError(f"picture must be a Picture, got {type(picture).__name__}: wrap a tensor as Picture(tensor)")
    format = _format(path)
    depth = picture.depth if depth is None else depth
    _check(path, picture, format, depth, quality)
    place = Path(os.path.realpath(path)) if overwrite and path.is_symlink() else path
    _check_place(place, overwrite)
    values = without_batch(picture).detach().cpu().double().clamp(0, 1) * (2**depth - 1)
    samples = values.round().numpy().astype(f"u{depth // 8}", order="C")
    try:
        data = format.encode(samples, picture, quality)
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{path} cannot be written as {format.name}: {error}") from error
    _place(place, data, overwrite)


def _format(path: Path) -> Format:
    suffix = path.suffix.lower()
    if suffix in FORMATS:
        return FORMATS[suffix]
    nearest = difflib.get_close_matches(suffix, FORMATS, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}, got {suffix!r}{hint}")


def _check(path: Path, picture: Picture, format: Format, depth: int, quality: int | None) -> None:
    if depth not in (8, 16):
        raise ValueError(f"depth must be 8 or 16, got {depth!r}")
    if depth not in format.depths:
        raise ValueError(f"{path}: {format.name} cannot hold 16 bits; pass depth=8, or write PNG or TIFF")
    if picture.alpha is not None and not format.alpha:
        raise ValueError(
            f"{path}: {format.name} cannot hold alpha; write PNG, TIFF or WebP, or pass a picture with alpha=None"
        )
    height, width = picture.pixels.shape[-2:]
    if max(height, width) > LARGEST_SIDE.get(format.name, max(height, width)):
        raise ValueError(
            f"{path}: {format.name} holds sides of up to {LARGEST_SIDE[format.name]} pixels, "
            f"got {width} x {height}; write PNG or TIFF"
        )
    if quality is not None and not format.lossy:
        raise ValueError(f"{path}: {format.name} is lossless; leave quality out, or write JPEG or WebP")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality must be from 1 to 100, got {quality}")
    if not without_batch(picture).isfinite().all():
        raise ValueError(f"{path}: picture must hold finite values; found NaN or infinity")


def _check_place(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: create it before writing {path.name}")
    if not overwrite and os.path.lexists(path):
        raise _taken(path)


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists: pass overwrite=True to replace it, or give another name")


def _place(path: Path, data: bytes, overwrite: bool) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
        else:
            _move_to_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _move_to_new(temporary: Path, path: Path) -> None:
    """Move to a name that must not be taken, even by another process at this very moment."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise _taken(path) from None
    except OSError:  # a file system without hard links
        _move_to_claimed(temporary, path)


def _move_to_claimed(temporary: Path, path: Path) -> None:
    """Take the name by an empty file, which only one process can make, then replace that."""
    try:
        path.open("xb").close()
    except FileExistsError:
        raise _taken(path) from None
    try:
        temporary.replace(path)
    except BaseException:
        path.unlink()
        raise
