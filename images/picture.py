"""What an image file holds, in the form that a restorer works on."""

from dataclasses import dataclass

import torch
from torch import Tensor

# The colour spaces, as an ICC profile names them, that may describe pixels of 1 and of 3 channels.
PROFILE_SPACES = {1: (b"GRAY", b"RGB "), 3: (b"RGB ",)}
# The byte order marks, little and big endian, that an EXIF block begins with.
EXIF_MARKS = (b"II*\0", b"MM\0*")


@dataclass(frozen=True, eq=False)
class Picture:
    """Hold the pixels of an image and all that is needed to write the same kind of file again.

    Colour and alpha are apart, because a net restores colour and a resampler may do for alpha. To restore a file:
    ``dataclasses.replace(picture, pixels=net(picture.pixels), alpha=...)``.

    Shape: ``pixels`` is ``(1, 1, H, W)``, grey, or ``(1, 3, H, W)``, RGB; ``alpha`` is ``(1, 1, H, W)``.

    Args:
        pixels: floating point in [0, 1]; not premultiplied by alpha.
        alpha: opacity in [0, 1], or None for an opaque picture.
        depth: bits per sample of the file, 8 or 16.
        icc: the ICC profile that says what colours the pixels are, or None (sRGB is meant then).
        exif: the EXIF block, from its byte order mark on, or None.

    Raises:
        TypeError: if ``pixels`` or ``alpha`` is not a floating-point tensor.
        ValueError: if a shape or the depth is another, alpha has another size than the pixels, or ``icc`` is not a
            profile of pixels with so many channels (a grey one does not describe RGB), or ``exif`` is no EXIF.

    Source: the image files of PNG (ISO/IEC 15948) and TIFF 6.0, as far as restoration needs them.

    >>> Picture(torch.zeros(1, 3, 4, 6), depth=16).alpha is None
    True
    """

    pixels: Tensor
    alpha: Tensor | None = None
    depth: int = 8
    icc: bytes | None = None
    exif: bytes | None = None

    def __post_init__(self) -> None:
        given = {"pixels": self.pixels} if self.alpha is None else {"pixels": self.pixels, "alpha": self.alpha}
        for name, tensor in given.items():
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a floating-point tensor in [0, 1], got {kind}")
        shape = tuple(self.pixels.shape)
        if len(shape) != 4 or shape[0] != 1 or shape[1] not in (1, 3) or 0 in shape:
            raise ValueError(f"pixels must be (1, 1, H, W) or (1, 3, H, W), got shape {shape}")
        if self.alpha is not None and tuple(self.alpha.shape) != (1, 1, *shape[2:]):
            raise ValueError(f"alpha must be (1, 1, {shape[2]}, {shape[3]}) like pixels, got {tuple(self.alpha.shape)}")
        if self.depth not in (8, 16):
            raise ValueError(f"depth must be 8 or 16, got {self.depth!r}")
        if self.icc is not None and self.icc[16:20] not in PROFILE_SPACES[shape[1]]:
            raise ValueError(
                f"icc must describe pixels with {shape[1]} channel(s), got a profile of {self.icc[16:20]!r}: "
                "pass icc=None or a profile that fits"
            )
        if self.exif is not None and self.exif[:4] not in EXIF_MARKS:
            raise ValueError(f"exif must begin with its byte order mark, II*\\0 or MM\\0*, got {self.exif[:6]!r}")


def without_batch(picture: Picture) -> Tensor:
    """Give colour and alpha as one tensor (H, W, C), the order of a file."""
    parts = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha.to(picture.pixels)]
    return torch.cat(parts, dim=1)[0].permute(1, 2, 0)
