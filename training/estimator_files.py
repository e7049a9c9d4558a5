"""Training an estimator on a folder, as `claritycore train-estimator` asks for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..blocks import DegradationEstimator
from ..blocks.checks import check_positive
from ..deploy.restore_files import find_device
from ..nets import save_estimator
from .data import ImageFolder
from .degradations import find_recipe
from .estimator import check_learnable, evaluate_estimator, train_estimator

TOLD_EVERY = 100


@dataclass(frozen=True)
class EstimatorOptions:
    """How an estimator is trained, and on what.

    Args:
        data: folder of clean images, with its sub-folders, but for those whose names have lr or lq as a word.
        output: file for the estimator, ending in .safetensors.
        validation: folder of clean images; the mean errors on them are told at the end.
        recipe: how clean images are degraded: joint, stress, and others with stages named noise, blur or jpeg.
        steps: optimiser steps; about 5 a second on one core.
        batch_size: crops of a step.
        patch_size: side of a crop in pixels.
        lr: learning rate at the start.
        seed: of the start weights, the crops and what degrades them.
        draws: degradations of each image of validation.
        device: cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu.
        overwrite: replace the file if it exists.

    Raises:
        FileExistsError: if the file exists and `overwrite` is not set.
        ValueError: if a number is < 1, the recipe is unknown or has nothing to learn, or the file has another ending.

    >>> EstimatorOptions(data="photographs").recipe
    'joint'
    """

    data: str
    output: str = "estimator.safetensors"
    validation: str | None = None
    recipe: str = "joint"
    steps: int = 3000
    batch_size: int = 16
    patch_size: int = 128
    lr: float = 2e-3
    seed: int = 0
    draws: int = 5
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "patch_size", "draws")
        check_positive(**{name: getattr(self, name) for name in names})
        check_learnable(find_recipe(self.recipe))
        if Path(self.output).suffix != ".safetensors":
            raise ValueError(f"output must end in .safetensors, got {self.output}")
        if Path(self.output).exists() and not self.overwrite:
            raise FileExistsError(f"{self.output} exists: give --overwrite to replace it, or another name")


def train_estimator_on_folder(
    options: EstimatorOptions,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Train an estimator on the images of a folder, and write it to a file.

    Args:
        options: how, and on what.
        progress: called with the steps done and all steps, after each.
        tell: called with a line on the loss every hundred steps, and with one on the errors.

    Returns:
        The file, for `load_estimator`.

    Raises:
        FileNotFoundError: if a folder is not there.
        ValueError: if an image cannot be used, or as `train_estimator` tells.
        RuntimeError: if a step gives NaN or infinity.
    """
    torch.manual_seed(options.seed)
    estimator = DegradationEstimator().to(find_device(options.device))
    images = ImageFolder(options.data)
    validation = ImageFolder(options.validation) if options.validation else None
    losses: list[float] = []

    def follow(step: int, loss: float) -> None:
        losses.append(loss)
        progress(step, options.steps)
        if step % TOLD_EVERY == 0 or step == options.steps:
            told = losses[-TOLD_EVERY:]
            tell(f"step {step}: loss {sum(told) / len(told):.4f}")

    sizes = {"steps": options.steps, "batch_size": options.batch_size, "patch_size": options.patch_size}
    train_estimator(estimator, images, recipe=options.recipe, lr=options.lr, seed=options.seed, follow=follow, **sizes)
    path = save_estimator(estimator, options.output)
    if validation is not None:
        errors = evaluate_estimator(estimator, validation, recipe=options.recipe, draws=options.draws)
        tell("mean errors: " + ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))
    return path
