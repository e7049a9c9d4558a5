"""Training samples: crops of image files, each a pure function of the run's seed and of its number in the run.

So a run that is resumed needs no state of its loader, and however many workers or processes there are, they see the
same samples.
"""

import logging
import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..images import read_image, rgb_to_y
from ..images.reading import image_size
from .image_files import LOW_RESOLUTION, image_files, obstacle

CACHE_BYTES = 4 << 30
MASK = (1 << 64) - 1
logger = logging.getLogger(__name__)


def mixed(*numbers: int) -> int:
    """One number of 63 bits from several, as far apart for close ones as for any (splitmix64).

    >>> mixed(0, 1) == mixed(0, 1), mixed(0, 1) == mixed(1, 0)
    (True, False)
    """
    state = 0
    for number in numbers:
        state = (state ^ (number & MASK)) + 0x9E3779B97F4A7C15 & MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state >> 1


class Sample(NamedTuple):
    """One training sample, or a batch of them.

    Shape:
        ``clean`` is ``(C, P, P)``; ``degraded`` is ``(C, P / s, P / s)``, or empty where it is still to be made from
        ``clean`` and ``seed``.
    """

    clean: Tensor
    degraded: Tensor
    seed: int | Tensor


class ImageFolder:
    """The image files of a folder and its sub-folders; what was decoded is kept while there is room for it.

    Args:
        folder: where the files are.
        channels: 3 makes grey images RGB, 1 makes colour images grey by their luma; other numbers are not read.
        at_least: smallest side in pixels that an image may have.
        leave_out: sub-folders with one of these words in their names are left out; by default lr and lq, by which data
            sets name their degraded images. `left_out` counts what was.
        whole: decode every file once, to see whether it is whole; by default only its head is read before it is used.
        skip_unusable: leave out images that cannot be read or are too small; by default they are refused.
        cache_bytes: how much decoded data each process keeps.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no image file, or one that is unusable and may not be skipped.

    >>> ImageFolder("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: there is no folder nowhere
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        channels: int = 3,
        at_least: int = 1,
        leave_out: Sequence[str] = LOW_RESOLUTION,
        whole: bool = False,
        skip_unusable: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.folder, self.channels, self.cache_bytes = Path(folder), channels, cache_bytes
        self.skip_unusable = skip_unusable
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3: image files have no more, got {channels}")
        found, self.left_out = image_files(self.folder, leave_out)
        self.unusable = {path: why for path in found if (why := obstacle(path, at_least, whole=whole))}
        self.paths = [path for path in found if path not in self.unusable]
        if self.unusable and not (skip_unusable and self.paths):
            path, why = next(iter(self.unusable.items()))
            counted = f"{len(self.unusable)} of {len(found)} images in {self.folder} cannot be used"
            raise ValueError(f"{counted}; the first: {path} {why}")
        self._decoded: OrderedDict[Path, Tensor] = OrderedDict()
        self._held = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Image (C, H, W): uint8, or float32 in [0, 1] where the file has 16 bits.

        Raises:
            ValueError: if the file turns out to be damaged.
        """
        path = self.paths[index]
        if path in self._decoded:
            self._decoded.move_to_end(path)
            return self._decoded[path]
        picture = read_image(path)
        pixels = picture.pixels[0]
        if self.channels == 3:
            pixels = pixels.expand(3, -1, -1)
        elif len(pixels) == 3:
            pixels = rgb_to_y(pixels[None])[0]
        image = (pixels * 255).round().byte() if picture.depth == 8 else pixels
        self._keep(path, image.contiguous())
        return image

    def told(self) -> list[str]:
        """What was left out, a line for each reason."""
        lines = []
        if self.left_out:
            counted = f"{sum(self.left_out.values())} images of {self.folder} are left out"
            lines.append(f"{counted} by the names of their folders: {', '.join(self.left_out)}")
        first = [f"{path} {why}" for path, why in self.unusable.items()][:1]
        return lines + [f"{len(self.unusable)} images of {self.folder} are left out, the first: {one}" for one in first]

    def _keep(self, path: Path, image: Tensor) -> None:
        self._decoded[path] = image
        self._held += image.nbytes
        while self._held > self.cache_bytes and len(self._decoded) > 1:
            self._held -= self._decoded.popitem(last=False)[1].nbytes


class TrainingSamples(Dataset[Sample]):
    """Random crops by number: image, place, turn and seed follow from the run's seed and the number alone.

    Every image comes once in as many samples as there are images, in an order that differs from round to round.

    Args:
        clean: the images.
        degraded: their degraded versions in the same order, of 1 / `scale` the size; without, each sample has a seed
            from which to make one.
        patch_size: side of a crop in clean pixels.
        scale: by how much the degraded image is smaller.
        shrink: a crop is taken larger and made smaller by a factor drawn between this and 1: more scales, sharper
            pictures, and less of what JPEG left in them.
        seed: of the run.

    Raises:
        ValueError: if `patch_size` is no multiple of `scale`, `shrink` is not in (0, 1], or below 1 with pairs, or the
            pairs do not match.

    >>> import tempfile
    >>> from ..images import Picture, write_image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_image(f"{folder}/image.png", Picture(torch.rand(1, 3, 40, 50)))
    ...     TrainingSamples(ImageFolder(folder), patch_size=32, scale=4)[7].clean.shape
    torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        clean: ImageFolder,
        degraded: ImageFolder | None = None,
        *,
        patch_size: int,
        scale: int = 1,
        shrink: float = 1.0,
        seed: int = 0,
    ) -> None:
        if patch_size < scale or patch_size % scale:
            raise ValueError(f"patch_size must be a multiple of the scale {scale}, got {patch_size}")
        if not 0 < shrink <= 1 or (degraded is not None and shrink < 1):
            raise ValueError(f"shrink must be in (0, 1], and 1 for pairs, got {shrink}")
        if degraded is not None:
            check_pairs(clean, degraded, scale)
        self.clean, self.degraded = clean, degraded
        self.patch_size, self.scale, self.shrink, self.seed = patch_size, scale, shrink, seed
        self._round, self._order, self._damaged = -1, [], set()

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, number: int) -> Sample:
        """Sample of that number.

        Raises:
            ValueError: if an image is smaller than a crop: `at_least` of `ImageFolder` would have found it.
        """
        index, image = self._readable(self._image_of(number))
        if min(image.shape[1:]) < self.patch_size:
            _, height, width = image.shape
            raise ValueError(
                f"{self.clean.paths[index]} is {width} x {height}, smaller than patch_size {self.patch_size}"
            )
        draw = random.Random(mixed(self.seed, 1, number))
        side, scale = self.patch_size // self.scale, self.scale  # in pixels of the small image, for pairs to match
        if self.shrink < 1:  # there is no small one: any side and any place will do
            side, scale = min(round(self.patch_size / draw.uniform(self.shrink, 1)), *image.shape[1:]), 1
        top, left = (draw.randint(0, size // scale - side) for size in image.shape[1:])
        turn = draw.randrange(8)
        clean = _turned(_cropped(image, scale * top, scale * left, scale * side), turn)
        clean = _shrunk(clean, self.patch_size) if self.shrink < 1 else clean
        degraded = clean.new_empty(0)
        if self.degraded is not None:
            degraded = _turned(_cropped(self.degraded[index], top, left, side), turn)
        return Sample(clean, degraded, mixed(self.seed, 2, number))

    def _readable(self, index: int) -> tuple[int, Tensor]:
        """The image of that index, or the next one that can be decoded where those that cannot may be skipped."""
        for _ in range(len(self.clean)):
            try:
                if self.degraded is not None:
                    self.degraded[index]
                return index, self.clean[index]
            except ValueError as error:
                if not self.clean.skip_unusable:
                    raise
                if index not in self._damaged:
                    logger.warning("left out: %s", error)
                self._damaged.add(index)
                index = (index + 1) % len(self.clean)
        raise ValueError(f"none of the images in {self.clean.folder} can be decoded")

    def _image_of(self, number: int) -> int:
        count = len(self.clean)
        if number // count != self._round:
            self._round = number // count
            self._order = list(range(count))
            random.Random(mixed(self.seed, 0, self._round)).shuffle(self._order)
        return self._order[number % count]


def check_pairs(clean: ImageFolder, degraded: ImageFolder, scale: int) -> None:
    """Bring the degraded images into the order of the clean ones, whose names they share, but for an ending as in x4.

    Raises:
        ValueError: if one has no partner or several, or is not of 1 / `scale` its size.
    """

    def stems(folder: ImageFolder, paths: Iterable[Path], ending: str = "") -> dict[Path, Path]:
        found: dict[Path, Path] = {}
        for path in paths:
            stem = path.relative_to(folder.folder).with_suffix("")
            first = found.setdefault(stem.with_name(stem.name.removesuffix(ending)), path)
            if first != path:
                raise ValueError(f"{first} and {path} would both be the partner of one image: keep one of them")
        return found

    # 0001x4.png is the usual name of what is a quarter of 0001.png.
    ending = f"x{scale}" if scale > 1 else ""
    # With an image that may be skipped goes its partner.
    skipped = stems(clean, clean.unusable).keys() | stems(degraded, degraded.unusable, ending).keys()
    ours = {stem: path for stem, path in stems(clean, clean.paths).items() if stem not in skipped}
    theirs = {stem: path for stem, path in stems(degraded, degraded.paths, ending).items() if stem not in skipped}
    if alone := ours.keys() ^ theirs.keys():
        firsts = " and ".join(str(side[min(alone & side.keys())]) for side in (ours, theirs) if alone & side.keys())
        told = f"{len(alone)} of the images in {clean.folder} and {degraded.folder} have no partner"
        raise ValueError(f"{told}; the first: {firsts}")
    for stem, path in ours.items():
        wanted = tuple(size // scale for size in image_size(path))
        if (found := image_size(theirs[stem])) != wanted:
            told = f"is {found[1]} x {found[0]}, and {wanted[1]} x {wanted[0]} fit {path.name} at scale {scale}"
            raise ValueError(f"{theirs[stem]} {told}")
    clean.paths, degraded.paths = list(ours.values()), [theirs[stem] for stem in ours]


def _cropped(image: Tensor, top: int, left: int, side: int) -> Tensor:
    crop = image[:, top : top + side, left : left + side]
    return crop / 255 if crop.dtype == torch.uint8 else crop


def _shrunk(image: Tensor, side: int) -> Tensor:
    """As the 8-bit file of that side."""
    image = F.interpolate(image[None], size=(side, side), mode="bicubic", antialias=True)[0]
    return image.clamp(0, 1).mul(255).round().div(255)


def _turned(image: Tensor, turn: int) -> Tensor:
    """One of the eight turns and mirrorings of a square."""
    image = image.flip(2) if turn & 1 else image
    image = image.flip(1) if turn & 2 else image
    return (image.transpose(1, 2) if turn & 4 else image).contiguous()
