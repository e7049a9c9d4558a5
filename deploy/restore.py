"""Restoring a picture whole: colour by the net, grey and alpha with it, depth, profile and EXIF as they were."""

from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.checks import check_choice
from ..images import Picture, imresize
from ..nets.base import stated
from .tile import UNKNOWN_RADIUS, Progress, exact_overlap, restore_tiled

Alpha = Literal["bicubic", "model", "drop"]
# Pixels of the output that a net makes at once, the square of this side, unless another tile is asked for.
OUTPUT_SIDE = 2048
SMALLEST_DEFAULT_TILE = 64
# The most around a tile, unless asked for: a deep net sees hundreds of pixels far, but hardly. The shipped x4 net's
# radius of 65 is within it.
LARGEST_DEFAULT_OVERLAP = 72


class NonFiniteOutput(ValueError):
    """A net made NaN or infinity of a picture."""


def restore_picture(
    net: nn.Module,
    picture: Picture,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    batch: int = 1,
    alpha: Alpha = "bicubic",
    noise_seed: int | None = None,
    progress: Progress | None = None,
) -> Picture:
    """Restore a picture by a net of 3 or 1 image channels; depth, ICC profile and EXIF stay what they are.

    A net of 3 channels is given grey as three equal channels, and their mean is the grey that comes back; a net of 1
    channel restores the channels of RGB each by itself. Alpha is enlarged by `imresize`, or restored by the net as if
    it were grey, or dropped. Unless it is dropped, the colours of fully transparent pixels, which may be anything, are
    replaced by their surroundings before the net sees them: they would bleed into what can be seen. Values are clamped
    to [0, 1].

    A picture whose result has at most 2048 x 2048 pixels runs whole by default. A larger one runs in tiles, such that
    with what is read around it a tile is no larger than that: the net's receptive radius, at most 72 pixels. For a net
    that sees further the tiles fade into each other; ``overlap=net.receptive_radius`` makes them exact. So they do for
    one that sees the whole image (not ``tile_safe``), with 32 pixels around each; such tiles are never quite exact.

    Args:
        net: the net; pixels move to the device and dtype of its parameters.
        picture: what `read_image` gives.
        tile: largest side of a tile in input pixels; None chooses as described above.
        overlap: input pixels that are read around a tile; None chooses as described above.
        batch: how many tiles of equal size run at once.
        alpha: what becomes of alpha, "bicubic", "model" or "drop".
        noise_seed: of the noise that the net adds, the same in any tile, as `restore_tiled` takes it; alpha has none.
        progress: called with the pixels done and all pixels, after each run of the net.

    Returns:
        The restored picture, on the device of the given one.

    Raises:
        ValueError: if the net is not one of 1 or 3 channels that gives as many as it takes, an argument is none of
            those named, or the net's output holds NaN or infinity.
        RuntimeError: if memory runs out even with the smallest tiles.

    >>> net = nn.Upsample(scale_factor=2)
    >>> restore_picture(net, Picture(torch.rand(1, 1, 4, 6), depth=16)).pixels.shape
    torch.Size([1, 1, 8, 12])
    """
    check_choice("alpha", alpha, get_args(Alpha))
    tile, overlap = choose_tiles(net, picture, tile, overlap)

    def restored(image: Tensor, noise: int | None = None, progress: Progress | None = None) -> Tensor:
        given = _as_the_net_takes_it(net, image)
        output = restore_tiled(net, given, tile, overlap=overlap, batch=batch, noise_seed=noise, progress=progress)
        return _as_it_was(net, image, given, output)

    if picture.alpha is None or alpha == "drop":
        return replace(picture, pixels=restored(picture.pixels, noise_seed, progress), alpha=None)
    pixels = restored(spread(picture.pixels, picture.alpha), noise_seed, progress)
    if alpha == "model":
        return replace(picture, pixels=pixels, alpha=restored(picture.alpha))
    return replace(picture, pixels=pixels, alpha=enlarged(picture.alpha, pixels.shape[-1] // picture.alpha.shape[-1]))


def choose_tiles(
    net: nn.Module, picture: Picture, tile: int | None = None, overlap: int | None = None
) -> tuple[int, int]:
    """Choose tile and overlap where they are not given, as `restore_picture` describes.

    >>> choose_tiles(nn.ReLU(), Picture(torch.zeros(1, 3, 30, 40)))
    (40, 32)
    """
    height, width = picture.pixels.shape[-2:]
    scale = stated(net, "scale", 1)
    if overlap is None:
        exact = exact_overlap(net)
        overlap = UNKNOWN_RADIUS if exact is None else min(exact, LARGEST_DEFAULT_OVERLAP)
    if tile is None and height * width * scale**2 <= OUTPUT_SIDE**2:
        tile = max(height, width)
    return tile or max(SMALLEST_DEFAULT_TILE, OUTPUT_SIDE // scale - 2 * overlap), overlap


def enlarged(image: Tensor, scale: int) -> Tensor:
    """Enlarge bicubically, within [0, 1].

    >>> enlarged(torch.ones(1, 1, 2, 2), 2).shape
    torch.Size([1, 1, 4, 4])
    """
    return image if scale == 1 else imresize(image, scale, intermediate="float").clamp(0, 1)


def spread(pixels: Tensor, alpha: Tensor) -> Tensor:
    """Replace the colours of fully transparent pixels by those of their nearest visible surroundings.

    A pixel takes the colour of the smallest cell around it, of 2 x 2, 4 x 4, ... pixels, in which any is visible; that
    of a cell is the mean of its visible quarters.

    >>> spread(torch.tensor([[[[0.5, 0.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0, 0.0]]]]))
    tensor([[[[0.5000, 0.5000, 0.5000]]]])
    """
    visible = (alpha > 0).to(pixels)
    if visible.all() or not visible.any():
        return pixels
    share = F.avg_pool2d(visible, 2, ceil_mode=True)
    colour = F.avg_pool2d(pixels * visible, 2, ceil_mode=True) / share.where(share > 0, 1)
    around = spread(colour, share).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return pixels.where(visible > 0, around[..., : pixels.shape[2], : pixels.shape[3]])


def image_channels(net: nn.Module) -> int:
    """Say how many channels a net for pictures takes, 3 if it does not say.

    Raises:
        ValueError: if it takes neither 1 nor 3.

    >>> image_channels(nn.Conv2d(1, 1, 3))
    1
    """
    channels = stated(net, "in_channels", 3)
    if channels not in (1, 3):
        raise ValueError(f"{type(net).__name__} takes images of {channels} channels, and pictures have 1 or 3")
    return channels


def _as_the_net_takes_it(net: nn.Module, image: Tensor) -> Tensor:
    if image.shape[1] == image_channels(net):
        return image
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image.transpose(0, 1)


def _as_it_was(net: nn.Module, image: Tensor, given: Tensor, output: Tensor) -> Tensor:
    if output.shape[1] != given.shape[1]:
        raise ValueError(
            f"{type(net).__name__} makes {output.shape[1]} channels of {given.shape[1]}: a picture needs as many"
        )
    if not output.isfinite().all():
        raise NonFiniteOutput(f"{type(net).__name__} makes NaN or infinity of it in this dtype")
    if image.shape[1] < given.shape[1]:
        output = output.mean(1, keepdim=True)
    elif image.shape[1] > given.shape[1]:
        output = output.transpose(0, 1)
    return output.clamp(0, 1)
