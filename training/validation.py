"""Measuring a net: clean images are degraded, restored whole and compared."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..blocks.checks import check_positive
from ..deploy.restore import NonFiniteOutput, enlarged, restore_picture
from ..images import Picture, psnr, rgb_to_y, ssim
from ..images.metrics import SSIM_WINDOW
from ..images.reading import image_size
from ..nets import HARMONIC
from ..nets.base import stated
from .data import ImageFolder, check_pairs, mixed
from .degradations import Recipe, degrade, find_recipe
from .evaluation import Evaluation, Row, Seen, add_seen
from .frechet import patch_features, patch_places
from .pyramid import low_pass
from .routing import Routing, add_routing, watched_routers
from .supervision import structure_target

# What is left after so many halvings is called low-frequency: nothing finer than about 16 pixels.
LF_LEVELS = 3
PAIRS = "pairs"

Follow = Callable[[int, int], None]


@dataclass(frozen=True)
class _Protocol:
    """How two images are compared."""

    crop_border: int
    y_channel: bool
    lpips: nn.Module | None

    def figures(self, restored: Tensor, degraded: Tensor, clean: Tensor) -> dict[str, float]:
        figures: dict[str, float] = {}
        options = {"crop_border": self.crop_border, "y_channel": self.y_channel}
        by_bicubic = enlarged(degraded, clean.shape[-1] // degraded.shape[-1])
        for prefix, image in {"": restored, "input_": by_bicubic}.items():
            figures[f"{prefix}psnr"] = psnr(image, clean, **options).item()
            figures[f"{prefix}ssim"] = ssim(image, clean, **options).item()
            error = self._luma(image) - self._luma(clean)
            low = low_pass(error, LF_LEVELS)
            figures[f"{prefix}lf_psnr"], figures[f"{prefix}hf_psnr"] = _psnr_of(low), _psnr_of(error - low)
        if self.lpips is not None:
            anchor = next(self.lpips.parameters(), restored)
            figures["lpips"] = self.lpips(*(_rounded(image).to(anchor) for image in (restored, clean))).item()
        return figures

    def _luma(self, image: Tensor) -> Tensor:
        """What is compared: the luma or all channels, without the border."""
        image = _rounded(image).double()
        image = rgb_to_y(image) if self.y_channel else image
        height, width = (side - self.crop_border for side in image.shape[2:])
        return image[..., self.crop_border : height, self.crop_border : width]


def evaluate(
    net: nn.Module,
    images: ImageFolder,
    *,
    recipes: Sequence[str | Recipe] = ("clean",),
    degraded: ImageFolder | None = None,
    seed: int = 0,
    max_images: int | None = None,
    crop_border: int | None = None,
    y_channel: bool | None = None,
    tile: int | None = None,
    lpips: nn.Module | None = None,
    inception: nn.Module | None = None,
    rank: int = 0,
    processes: int = 1,
    progress: Follow | None = None,
) -> Evaluation:
    """Measure what a net makes of degraded images.

    Each image is cropped to a multiple of the net's scale and degraded by each recipe, by draws that follow from
    `seed`, the recipe and the number of the image alone; then it is restored as `restore_picture` does: whole, or in
    tiles where it is large, in eval mode, in which the net is not left. The figures:

    - ``psnr`` and ``ssim`` after rounding to 8 bits: of the luma without `scale` pixels at each border for
      super-resolution, of all channels and pixels at scale 1.
    - ``lf_psnr``, the integrity of low frequencies: the PSNR of the same pixels after both images went through the
      binomial pyramid, three halvings down and up again (`low_pass`), in which nothing finer than about 16 pixels is
      left.
    - ``hf_psnr``: the PSNR of what the pyramid takes away, edges and texture.
    - ``input_psnr``, ``input_ssim``, ``input_lf_psnr`` and ``input_hf_psnr``: the same of the degraded image, brought
      to size by MATLAB's bicubic.
    - ``structure_psnr``, of nets with a branch of low frequencies (`HARMONIC.structure`): the PSNR of what it makes of
      the image alone, at half the size, to the means of the original.
    - ``lpips``, if it is given, of all pixels; the less, the more alike.
    - ``patch_fid``, if `inception` is given, of each recipe: the Frechet inception distance between the patches of
      256 x 256 pixels of all restored and all original images. Its bias grows as their number falls, so that
      it can be compared for the same images only.
    - ``router_entropy``, ``router_utilisation`` and ``dead_experts``, of nets with routers (`TopKRouter`), over all
      images: how undecided they are, how evenly they use their experts, and how many of these get next to nothing.

    Args:
        net: any net that enlarges by a whole factor; images move to the device of its parameters.
        images: the clean images.
        recipes: names of recipes, or recipes.
        degraded: degraded images under the same names, which take the place of the recipes.
        seed: of what the recipes draw.
        max_images: measure the first so many.
        crop_border: pixels that PSNR and SSIM leave out on each side, if not as told above.
        y_channel: whether PSNR and SSIM are of the luma, if not as told above.
        tile: largest side of a tile in input pixels, if not as `restore_picture` chooses.
        lpips: an `LPIPSLoss`.
        inception: an `Inception`.
        rank: which of several processes this is; each measures its share, and `Evaluation.merge` puts all together.
        processes: how many there are.
        progress: called with the pictures done and all pictures of this process, after each.

    Raises:
        ValueError: if there is no recipe, or an unknown one, an image is too small for SSIM or without partner, the
            patches are less than two, the net makes NaN, or a number is out of its range.

    >>> import tempfile
    >>> from claritycore.images import write_image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_image(f"{folder}/grey.png", Picture(torch.full((1, 3, 32, 32), 128 / 255)))
    ...     found = evaluate(nn.Identity(), ImageFolder(folder))
    >>> found.means()["clean"]["ssim"]
    1.0
    """
    scale = stated(net, "scale", 1)
    inputs = _Inputs(recipes, degraded, scale, seed)
    if degraded is not None:
        check_pairs(images, degraded, scale)
    protocol = _Protocol(
        (scale if scale > 1 else 0) if crop_border is None else crop_border,
        (scale > 1 and images.channels == 3) if y_channel is None else y_channel,
        lpips,
    )
    numbers = _numbers(images, max_images, rank, processes)
    _check_sizes(images, max_images, scale, protocol.crop_border, with_patches=inception is not None)
    device = next(net.parameters(), torch.empty(0)).device
    rows: list[Row] = []
    seen: Seen = {}
    routed: Routing = {}
    with torch.no_grad(), watched_routers(net) as routing:
        for number in numbers:
            clean = cropped(images[number], scale).to(device)
            for recipe, image, drawn in inputs.of(clean, number):
                name = images.paths[number].relative_to(images.folder).as_posix()
                restored = _restored(net, image, name, tile)
                add_routing(routed, recipe, routing)
                routing.clear()
                if restored.shape != clean.shape:
                    raise ValueError(f"{type(net).__name__} must enlarge by the scale that it states, {scale}")
                figures = protocol.figures(restored, image, clean) | _structure_figures(net, image, clean, scale)
                rows.append(Row(number, name, recipe, scale, figures, drawn))
                if inception is not None and patch_places(*clean.shape[2:]):
                    sums = [patch_features(inception, _rounded(x)) for x in (restored, clean)]
                    add_seen(seen, recipe, sums[0], sums[1])
                if progress:
                    progress(len(rows), len(numbers) * len(inputs.labels))
    return Evaluation.merge([Evaluation(tuple(rows), seen, routed)])


class _Inputs:
    """Gives the degraded versions of an image: by recipes, or the one that a folder has."""

    def __init__(self, recipes: Sequence[str | Recipe], degraded: ImageFolder | None, scale: int, seed: int) -> None:
        found = [find_recipe(recipe) for recipe in recipes] if degraded is None else []
        self.recipes = {recipe.name: recipe for recipe in found}
        if len(self.recipes) < len(found) or (degraded is None and not found):
            raise ValueError(f"recipes must be at least one, each once, got {', '.join(self.recipes) or 'none'}")
        self.degraded, self.scale, self.seed = degraded, scale, seed
        self.labels = list(self.recipes) or [PAIRS]

    def of(self, clean: Tensor, number: int) -> Iterator[tuple[str, Tensor, dict[str, float]]]:
        """Yield recipe, image and what was drawn for it."""
        if self.degraded is not None:
            yield PAIRS, _as_float(self.degraded[number]).to(clean), {}
        for name, recipe in self.recipes.items():
            # The recipe's name, not its place: alone or among others, it draws the same.
            made = degrade(clean, recipe, [mixed(self.seed, zlib.crc32(name.encode()), number)], scale=self.scale)
            report = {key: float(value) for key, value in made.report.items() if key != "order" and value.numel() == 1}
            yield name, made.image, report


def cropped(image: Tensor, scale: int) -> Tensor:
    """An image of a folder as floating point (1, C, H, W) whose sides are multiples of the scale.

    >>> cropped(torch.full((3, 9, 6), 255, dtype=torch.uint8), 4).shape
    torch.Size([1, 3, 8, 4])
    """
    height, width = (side // scale * scale for side in image.shape[1:])
    return _as_float(image[:, :height, :width])


def side_by_side(net: nn.Module, image: Tensor, recipe: str, seed: int, scale: int) -> Tensor:
    """An image (C, H, W) degraded, restored and as it is: (1, C, H', 3 W'), cropped to a multiple of the scale."""
    clean = cropped(image, scale)
    degraded = degrade(clean, recipe, [seed], scale=scale).image
    restored = restore_picture(net, Picture(degraded.clamp(0, 1))).pixels
    nearest = degraded.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return torch.cat([nearest, restored, clean], dim=3)


def _as_float(image: Tensor) -> Tensor:
    return (image / 255 if image.dtype == torch.uint8 else image)[None]


def _rounded(image: Tensor) -> Tensor:
    """An image as the 8-bit file that would be written."""
    return image.clamp(0, 1).mul(255).round().div(255)


def _psnr_of(error: Tensor) -> float:
    return -10 * error.square().mean().log10().item()


def _restored(net: nn.Module, image: Tensor, name: str, tile: int | None) -> Tensor:
    try:
        return restore_picture(net, Picture(image), tile=tile).pixels
    except NonFiniteOutput as error:
        raise NonFiniteOutput(f"{name}: {error}") from error


def _structure_figures(net: nn.Module, image: Tensor, clean: Tensor, scale: int) -> dict[str, float]:
    if not isinstance(net, HARMONIC) or net.low_branch is None:
        return {}
    made = net.structure(image.to(next(net.parameters()))).to(clean)
    return {"structure_psnr": psnr(made, structure_target(clean, scale=scale), depth=None).item()}


def _numbers(images: ImageFolder, max_images: int | None, rank: int, processes: int) -> range:
    """The numbers of the images that one of several processes measures."""
    if max_images is not None:
        check_positive(max_images=max_images)
    check_positive(processes=processes)
    if not 0 <= rank < processes:
        raise ValueError(f"rank must be at least 0 and below processes, {processes}, got {rank}")
    return range(rank, min(len(images), max_images or len(images)), processes)


def _check_sizes(
    images: ImageFolder, max_images: int | None, scale: int, crop_border: int, *, with_patches: bool
) -> None:
    """Refuse what could not be measured before anything is."""
    least, patches = SSIM_WINDOW + 2 * crop_border, 0
    for path in images.paths[:max_images]:
        height, width = (side // scale * scale for side in image_size(path))
        if min(height, width) < least:
            told = f"{least} x {least} pixels are needed after cropping to a multiple of {scale}"
            raise ValueError(f"{path} is too small to be measured: {told}, got {width} x {height}")
        patches += len(patch_places(height, width))
    if with_patches and patches < 2:
        raise ValueError(f"patch FID needs at least 2 patches of 256 x 256 pixels, and {images.folder} has {patches}")
