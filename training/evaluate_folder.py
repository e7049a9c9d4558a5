"""Measuring a net on a folder, as `claritycore evaluate` asks for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..deploy.restore_files import find_device
from ..nets import AutoModel
from ..nets.base import scales_of
from .data import ImageFolder
from .degradations import find_recipe
from .evaluation import Evaluation
from .inception import Inception
from .perceptual import LPIPSLoss
from .validation import evaluate


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured, and on what.

    Args:
        model: a file of weights, the folder of a run, or the name of a shipped net.
        data: folder of clean images, with its sub-folders, but for those whose names have lr or lq as a word.
        degraded: folder of their degraded versions under the same names, instead of recipes.
        recipes: by which clean images are degraded: clean, mild, joint, stress, noise25, jpeg40 and others.
        scale: what the net's scale must be, or which of several; another is refused.
        seed: of what the recipes draw.
        max_images: measure the first so many.
        crop_border: pixels left out at each border; by default the scale, 0 at scale 1.
        y_channel: measure the luma; by default for super-resolution of colour.
        tile: largest side of a tile in input pixels, as in restore.
        device: cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu.
        lpips: file of LPIPS' linear heads, for LPIPS; needs the backbone too.
        backbone: file of the backbone's weights, VGG16 or AlexNet in torchvision's names.
        inception: file of the published FID Inception weights, for the FID of patches.
        csv: file for the table, figures in full and with what was drawn.
        overwrite: replace that file if it exists.

    Raises:
        FileExistsError: if the file for the table exists and `overwrite` is not set.
        ValueError: if a recipe is unknown, or heads are given without a backbone or the other way round.

    >>> EvaluateOptions(model="runs/spanx4", data="Set5").recipes
    ('clean',)
    """

    model: str
    data: str
    degraded: str | None = None
    recipes: tuple[str, ...] = ("clean",)
    scale: int | None = None
    seed: int = 0
    max_images: int | None = None
    crop_border: int | None = None
    y_channel: bool | None = None
    tile: int | None = None
    device: str = "auto"
    lpips: str | None = None
    backbone: str | None = None
    inception: str | None = None
    csv: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for recipe in self.recipes:
            find_recipe(recipe)
        if self.csv is not None and Path(self.csv).exists() and not self.overwrite:
            raise FileExistsError(f"{self.csv} exists: give --overwrite to replace it, or another name")
        if (self.lpips is None) != (self.backbone is None):
            raise ValueError("LPIPS needs both --lpips, its heads, and --backbone: give both files, or neither")


def evaluate_folder(
    options: EvaluateOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measure a net on a folder of images.

    Args:
        options: what, and on what.
        progress: called with the pictures done and all pictures, after each.
        note: called with a line on what is left out.

    Raises:
        FileNotFoundError: if a file or folder is not there.
        ValueError: if a file cannot be used, the net is of another scale, or as `evaluate` tells.
    """
    device = find_device(options.device)
    net = AutoModel.from_pretrained(options.model)
    if options.scale in scales_of(net.config):
        net = AutoModel.from_pretrained(options.model, scale=options.scale)
    net = net.eval().to(device)
    scale = getattr(net, "scale", 1)
    if options.scale not in (None, scale):
        raise ValueError(f"scale must be {scale}, by which the net enlarges, got {options.scale}")
    channels = getattr(net, "in_channels", 3)
    images = ImageFolder(options.data, channels=channels)
    for line in images.told():
        note(line)
    lpips = None
    if options.lpips is not None and options.backbone is not None:
        lpips = LPIPSLoss(weights=options.backbone, heads=options.lpips).to(device)
    with torch.inference_mode():
        return evaluate(
            net,
            images,
            recipes=options.recipes,
            degraded=ImageFolder(options.degraded, channels=channels, leave_out=()) if options.degraded else None,
            seed=options.seed,
            max_images=options.max_images,
            crop_border=options.crop_border,
            y_channel=options.y_channel,
            tile=options.tile,
            lpips=lpips,
            inception=Inception(options.inception).to(device) if options.inception else None,
            progress=progress,
        )
