"""How files are restored: the flags of `claritycore restore`."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..blocks.checks import check_choice, check_not_negative, check_positive
from ..images.encoding import FORMATS
from ..images.reading import MAX_PIXELS
from .restore import Alpha

DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class RestoreOptions:
    """How files are restored.

    Args:
        scale: what the net's scale must be, or which of several; another is refused.
        tile: largest side of a tile in input pixels; by default pictures whose result has more than 2048 x 2048 pixels
            run in tiles.
        overlap: input pixels that are read around a tile; by default the net's receptive radius, at most 72, and 32 for
            a net that sees the whole image. From its radius on a net is exact, and slower.
        batch: how many tiles of equal size run at once.
        dtype: what the net computes in; where half precision gives NaN or infinity, float32 takes its place.
        device: cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu.
        alpha: enlarge transparency bicubically, restore it by the net, or drop it.
        suffix: added to the names in the output folder.
        ext: format in the output folder: png, tif, jpg, webp or bmp; by default that of each picture.
        depth: bits per sample, 8 or 16; by default those of each picture.
        quality: of JPEG (95 by default) and WebP (lossless by default), 1 to 100.
        noise_seed: of the noise that some nets add to texture if they are asked for it; by default there is none.
        tta: average over eight turns and mirrorings, at eight times the work.
        side_by_side: write also a comparison: the picture enlarged bicubically on the left, the result on the right.
        overwrite: replace files that exist.
        skip_existing: leave out pictures whose results exist: to go on where a run was stopped, or with new pictures.
        recursive: look into the folders of folders.
        max_pixels: refuse pictures of more pixels than this.

    Raises:
        ValueError: if a value is none of those named.

    >>> RestoreOptions(ext="PNG").ext
    '.png'
    """

    scale: int | None = None
    tile: int | None = None
    overlap: int | None = None
    batch: int = 1
    dtype: DType = "float32"
    device: str = "auto"
    alpha: Alpha = "bicubic"
    suffix: str = ""
    ext: str | None = None
    depth: Literal[8, 16] | None = None
    quality: int | None = None
    noise_seed: int | None = None
    tta: bool = False
    side_by_side: bool = False
    overwrite: bool = False
    skip_existing: bool = False
    recursive: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("scale", "tile", "batch", "max_pixels")}
        check_positive(**{name: value for name, value in given.items() if value is not None})
        if self.overlap is not None:
            check_not_negative(overlap=self.overlap)
        check_choice("dtype", self.dtype, get_args(DType))
        check_choice("alpha", self.alpha, get_args(Alpha))
        if self.noise_seed is not None and not 0 <= self.noise_seed < 2**63:
            raise ValueError(f"noise_seed must be from 0 to 2^63 - 1, got {self.noise_seed!r}")
        if self.noise_seed is not None and (self.tta or self.batch > 1):
            raise ValueError("noise_seed is for single tiles: leave out tta, whose mean blurs noise, and batch")
        if self.overwrite and self.skip_existing:
            raise ValueError("overwrite and skip_existing contradict each other: give one of them")
        if any(separator in self.suffix for separator in "/\\"):
            raise ValueError(f"suffix must be a part of a name, without / and \\, got {self.suffix!r}")
        if self.depth not in (None, 8, 16):
            raise ValueError(f"depth must be 8 or 16, got {self.depth!r}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, got {self.quality!r}")
        if self.ext is not None:
            ext = f".{self.ext.lower().lstrip('.')}"
            if ext not in FORMATS:
                raise ValueError(f"ext must be one of {', '.join(known[1:] for known in FORMATS)}, got {self.ext!r}")
            if self.quality is not None and not FORMATS[ext].lossy:
                raise ValueError(f"quality is of JPEG and WebP; leave it out for {FORMATS[ext].name}")
            object.__setattr__(self, "ext", ext)
