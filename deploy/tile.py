"""Running a net over an image in tiles: the same pixels in less memory."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..blocks import NoiseField
from ..blocks.checks import check_choice, check_not_negative, check_positive
from .canvas import Box, Canvas

Blend = Literal["auto", "crop", "linear"]
# Around the tiles of a net that does not say how far it sees.
UNKNOWN_RADIUS = 32
# Smaller tiles save nothing: by then the pixels around them are most of the work.
SMALLEST_TILE = 16
# How the allocators of the CPU (Linux, Windows), of Apple's GPUs and of CUDA's libraries say it.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")

Progress = Callable[[int, int], None]


def restore_tiled(
    net: nn.Module,
    image: Tensor,
    tile: int | tuple[int, int],
    *,
    overlap: int | None = None,
    blend: Blend = "auto",
    batch: int = 1,
    noise_seed: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Run a net over an image tile by tile; with the default overlap the result is that of the whole image.

    The image is cut into tiles of at most ``tile`` pixels a side; the net reads each with ``overlap`` pixels around it.
    Beyond the border of the image there are none, so that a tile there sees the border as the whole image has it. Tiles
    and overlap are rounded up to the net's ``tile_multiple``: its strides fall where they would without tiles.

    ``"crop"`` keeps the tile and drops what was read around it: exact, to rounding, for a ``tile_safe`` net and an
    overlap of at least its ``receptive_radius``. ``"linear"`` hides the seams of what cannot be exact: across each cut
    one tile fades into the next over as many pixels as the overlap has; the outer half of the overlap, which is the
    least true, is dropped. ``"auto"`` takes the first where it is exact, else the second.

    Runs in eval and inference mode, and leaves the net in the mode that it was in. Tiles move to the device and dtype
    of the net's parameters, results to those of the image. An image no larger than a tile runs whole. When memory runs
    out the batch is halved, then the tile, with a warning; tiles that are done stay.

    Shape: ``(B, C, H, W)`` -> ``(B, C', s H, s W)``, of the same dtype and device; s is found from the first tile.

    Args:
        net: any net that enlarges both sides by one whole factor; `RestorationNet` says what tiling needs to know.
        image: floating-point images, on any device.
        tile: largest side of a tile in input pixels, or (height, width).
        overlap: input pixels that are read around a tile; by default the net's receptive radius, and 32 where the net
            is not tile-safe or does not say.
        blend: "auto", "crop" or "linear", see above.
        batch: how many tiles of equal size run at once, each of all B images.
        noise_seed: of the noise of a net that takes one; each tile is told where it lies, so that a pixel has the noise
            that it has in the whole image. Then tiles run one at a time.
        progress: called with the pixels done and all pixels of an image, (done, H * W), after each run.

    Returns:
        The restored images.

    Raises:
        TypeError: if ``image`` is not floating point.
        ValueError: if ``image`` is not (B, C, H, W), ``tile`` or ``batch`` is no integer of at least 1, ``overlap``
            none of at least 0, ``blend`` unknown, or the net's output is not the input enlarged by a whole factor; if a
            ``noise_seed`` is out of range, given to a net that takes none, or with a ``batch`` above 1.
        RuntimeError: if memory runs out even with the smallest tiles.

    Warns:
        UserWarning: if a net that is not tile-safe, or does not say, runs in tiles; and when memory ran out.

    >>> net = nn.Conv2d(3, 3, 3, padding=1)
    >>> net.tile_safe, net.receptive_radius = True, 1
    >>> image = torch.rand(1, 3, 40, 30)
    >>> torch.allclose(restore_tiled(net, image, 16), net(image), atol=1e-6)
    True
    """
    tiling = _tiling(net, image, tile, overlap, blend, batch)
    if noise_seed is not None:
        _check_noise(net, noise_seed, batch)
    whole = Box(0, 0, *image.shape[-2:])
    pending, canvas, done = tiling.cut([whole], whole), None, 0
    with torch.inference_mode(), _evaluating(net):
        while pending or canvas is None:
            tiles, windows = tiling.take(pending, whole)
            restored = _attempt(net, image, windows, noise_seed)
            if restored is None:
                tiling.shrink(len(tiles))
                pending = tiling.cut([*pending, *tiles], whole)
                continue
            scale = _scale(net, windows[0], restored)
            if canvas is None:
                feather = tiling.overlap if tiling.feathers and windows != [whole] else 0
                canvas = Canvas(image, restored.shape[1], scale, feather)
            for box, window, part in zip(tiles, windows, restored.chunk(len(tiles)), strict=True):
                canvas.put(box, window, part)
            done += sum(box.area for box in tiles)
            if progress:
                progress(done, whole.area)
    return canvas.image()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell the errors by which Python, torch and its libraries say that memory ran out.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    True
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def exact_overlap(net: nn.Module) -> int | None:
    """Give the overlap from which on tiles are exact, a multiple of the net's; None where the net promises none.

    >>> exact_overlap(nn.Conv2d(3, 3, 3))
    """
    radius = getattr(net, "receptive_radius", None)
    if not getattr(net, "tile_safe", False) or radius is None:
        return None
    return _rounded_up(radius, getattr(net, "tile_multiple", 1))


@dataclass
class _Tiling:
    """How an image is cut; `shrink` makes it thriftier."""

    tile: tuple[int, int]
    overlap: int
    multiple: int
    feathers: bool
    batch: int
    doubt: str

    def cut(self, boxes: Sequence[Box], whole: Box) -> list[Box]:
        """Cut boxes into even tiles, those of equal windows one after the other."""
        tiles = [
            Box(top, left, min(top + height, box.bottom), min(left + width, box.right))
            for box in boxes
            for height, width in [tuple(map(self._even, box.size, self.tile))]
            for top in range(box.top, box.bottom, height)
            for left in range(box.left, box.right, width)
        ]
        if self.doubt and tiles != [whole]:
            warnings.warn(self.doubt, UserWarning, stacklevel=3)
            self.doubt = ""
        return sorted(tiles, key=lambda tile: tile.grown(self.overlap, whole).size)

    def take(self, pending: list[Box], whole: Box) -> tuple[list[Box], list[Box]]:
        """Take the next tiles with windows of equal size off the end of the list; return them and their windows."""
        tiles, windows = [], []
        while pending and len(tiles) < self.batch:
            window = pending[-1].grown(self.overlap, whole)
            if windows and window.size != windows[0].size:
                break
            tiles.append(pending.pop())
            windows.append(window)
        return tiles, windows

    def shrink(self, attempted: int) -> None:
        """Halve the batch that was attempted, or the tile where that was 1, and say so."""
        smallest = _rounded_up(SMALLEST_TILE, self.multiple)
        height, width = self.tile
        if attempted > 1:
            self.batch = attempted // 2
            thriftier = f"batches of {self.batch} tile(s)"
        elif max(self.tile) > smallest:
            halved = (max(smallest, _rounded_up(-(-side // 2), self.multiple)) for side in self.tile)
            height, width = map(min, self.tile, halved)
            self.tile = height, width
            thriftier = f"tiles of {width} x {height} pixels"
        else:
            raise RuntimeError(
                f"out of memory even with tiles of {width} x {height} pixels and {self.overlap} around each: "
                "give a smaller overlap, a smaller dtype or another device"
            )
        warnings.warn(f"out of memory: continuing with {thriftier}", UserWarning, stacklevel=3)

    def _even(self, length: int, side: int) -> int:
        """Give the side of as few tiles as possible, of nearly equal sizes."""
        count = -(-length // side)
        return _rounded_up(-(-length // count), self.multiple)


def _tiling(
    net: nn.Module, image: Tensor, tile: int | tuple[int, int], overlap: int | None, blend: str, batch: int
) -> _Tiling:
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point, got {image.dtype}")
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"image must be (B, C, H, W), none of them 0, got shape {tuple(image.shape)}")
    sides = tuple(tile) if isinstance(tile, tuple | list) else (tile, tile)
    if len(sides) != 2:
        raise ValueError(f"tile must be one side or (height, width), got {tile!r}")
    for side in sides:
        check_positive(tile=side)
    check_positive(batch=batch)
    if overlap is not None:
        check_not_negative(overlap=overlap)
    check_choice("blend", blend, get_args(Blend))
    multiple, exact = getattr(net, "tile_multiple", 1), exact_overlap(net)
    margin = _rounded_up((UNKNOWN_RADIUS if exact is None else exact) if overlap is None else overlap, multiple)
    within = zip(sides, image.shape[-2:], strict=True)
    height, width = (_rounded_up(min(side, length), multiple) for side, length in within)
    doubt = ""
    if exact is None:
        doubt = (
            f"{type(net).__name__} sees the whole image or does not say how far it sees: its tiles differ a little "
            "from the whole image, less with a larger overlap"
        )
    feathers = blend == "linear" or (blend == "auto" and (exact is None or margin < exact))
    return _Tiling((height, width), margin, multiple, feathers, batch, doubt)


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Set every module to eval, and each back to what it was; no `train` method that does more is called."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_noise(net: nn.Module, noise_seed: int, batch: int) -> None:
    NoiseField(noise_seed)  # raises for a number that is none
    taken = inspect.signature(net.forward).parameters.values()
    if not any(each.name == "noise_seed" or each.kind is each.VAR_KEYWORD for each in taken):
        raise ValueError(f"noise_seed must be None for {type(net).__name__}, which takes none")
    if batch > 1:
        raise ValueError(f"batch must be 1 with a noise_seed: each tile has a place of its own, got {batch}")


def _attempt(net: nn.Module, image: Tensor, windows: Sequence[Box], noise_seed: int | None) -> Tensor | None:
    """Run the net over windows of the image; None if memory runs out."""
    anchor = next((parameter for parameter in net.parameters() if parameter.is_floating_point()), image)
    noise = {}
    if noise_seed is not None:
        noise = {"noise_seed": NoiseField(noise_seed, offset=(windows[0].top, windows[0].left))}
    try:
        parts = [window.of(image) for window in windows]
        return net((parts[0] if len(parts) == 1 else torch.cat(parts)).to(anchor), **noise)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def _scale(net: nn.Module, window: Box, restored: Tensor) -> int:
    (height, width), size = window.size, tuple(restored.shape[-2:])
    scale = size[0] // height
    if scale < 1 or size != (scale * height, scale * width):
        raise ValueError(
            f"{type(net).__name__} must enlarge both sides by one whole factor to run in tiles, "
            f"but makes {size} of {window.size}"
        )
    return scale


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
