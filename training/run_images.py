"""The images of a run: what it trains on and what it validates on, checked before the first step."""

import math
import random
from collections.abc import Callable
from pathlib import Path

from ..images.metrics import SSIM_WINDOW
from ..nets import BaseConfig
from ..nets.base import scales_of
from .data import CACHE_BYTES, ImageFolder, TrainingSamples, mixed
from .engine import number_of_workers
from .image_files import HELD_OUT, LOW_RESOLUTION, TRAINING
from .recipes import Recipe, find_recipe
from .settings import INPUT_PATCH, TrainingSettings
from .stages import Downsample


def images_of(
    config: BaseConfig, settings: TrainingSettings, tell: Callable[[str], None]
) -> tuple[TrainingSamples, ImageFolder | None]:
    """Find the images of a run.

    Of `data` the sub-folders are left out whose names say that they are degraded (lr, lq) or held out (valid, val,
    test), and of `validation` the degraded ones and those for training: so a data set can be given whole. Validation
    images are decoded here once, so that none stops the run hours later; training images are too many for that.

    Args:
        config: of the net.
        settings: of the run.
        tell: called with a line on whatever is left out.

    Raises:
        FileNotFoundError: if a folder does not exist; it names the flag.
        ValueError: if a folder holds no image, or one that cannot be used and may not be skipped; or as
            `TrainingSamples` tells.
    """
    for flag in ("data", "degraded", "validation"):
        folder = getattr(settings, flag)
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: give --{flag} FOLDER")
    scale, patch_size = getattr(config, "scale", 1), patch_size_of(config, settings)
    options = {"channels": getattr(config, "in_channels", 3), "skip_unusable": settings.skip_unusable}
    kept = {**options, "cache_bytes": CACHE_BYTES // max(number_of_workers(settings), 1)}
    clean = ImageFolder(settings.data, at_least=patch_size, leave_out=(*LOW_RESOLUTION, *HELD_OUT), **kept)
    degraded = ImageFolder(settings.degraded, leave_out=(), **kept) if settings.degraded else None
    validation = None
    if settings.validation:
        least, others = SSIM_WINDOW + 2 * scale, (*LOW_RESOLUTION, *TRAINING)
        validation = ImageFolder(settings.validation, at_least=least, leave_out=others, whole=True, **options)
    for folder in (clean, degraded, validation):
        for line in folder.told() if folder else ():
            tell(line)
    if len(scales := scales_of(config)) > 1:
        listed = ", ".join(map(str, scales))
        if degraded:
            raise ValueError(f"degraded must be left out for a net of the scales {listed}: give --recipe")
        if patch_size % math.lcm(*scales):
            raise ValueError(f"patch_size must be a multiple of each of the scales {listed}, got {patch_size}")
    options = {"patch_size": patch_size, "scale": scale, "shrink": settings.shrink, "seed": settings.seed}
    return TrainingSamples(clean, degraded, **options), validation


def recipe_of(config: BaseConfig, settings: TrainingSettings, tell: Callable[[str], None]) -> Recipe:
    """Find the recipe of a run, and see that those of its validation are there too.

    Args:
        config: of the net.
        settings: of the run.
        tell: called with a line on recipes that have no effect.

    Raises:
        ValueError: if there is no recipe of such a name, or one for validation comes twice.
    """
    recipe, names = find_recipe(settings.recipe), settings.validation_recipes
    for name in names:
        find_recipe(name)
    if len(set(names)) < len(names):
        raise ValueError(f"validation_recipes must name each recipe once, got {', '.join(names)}")
    if names and not settings.validation:
        tell("--validation-recipes has no effect: give --validation FOLDER too")
    shrinks = all(isinstance(stage, Downsample) for stage in recipe.stages)
    if shrinks and getattr(config, "scale", 1) == 1 and not settings.degraded:
        tell(f"{recipe.name} degrades nothing at scale 1: give --recipe")
    return recipe


def patch_size_of(config: BaseConfig, settings: TrainingSettings) -> int:
    """Side of a crop in clean pixels."""
    side = INPUT_PATCH * max(scales := scales_of(config))
    return settings.patch_size or side - side % math.lcm(*scales)


def scale_of_step(config: BaseConfig, settings: TrainingSettings, step: int) -> int:
    """The scale that a step trains: one of the net's at random, the same in all processes and when resumed.

    >>> from claritycore.nets import AutoConfig
    >>> config = AutoConfig.from_name("swin-unet-tiny", scale=2, scales=(2, 4))
    >>> sorted({scale_of_step(config, TrainingSettings(), step) for step in range(8)})
    [2, 4]
    """
    return random.Random(mixed(settings.seed, 6, step)).choice(scales_of(config))


def crop_shapes(config: BaseConfig, settings: TrainingSettings) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes (C, H, W) of a crop as the net restores it, and of the clean one.

    >>> from claritycore.nets import AutoConfig
    >>> crop_shapes(AutoConfig.from_name("span", scale=2), TrainingSettings())
    ((3, 128, 128), (3, 128, 128))
    """
    side, channels = patch_size_of(config, settings), getattr(config, "in_channels", 3)
    return (getattr(config, "out_channels", channels), side, side), (channels, side, side)
