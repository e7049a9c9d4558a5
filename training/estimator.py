"""Training a `DegradationEstimator` alone: on images that a recipe degrades, towards what it drew."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..blocks import DegradationEstimate, DegradationEstimator
from ..blocks.checks import check_positive
from ..images.reading import image_size
from .batches import Batches
from .data import ImageFolder, Sample, TrainingSamples, mixed
from .degradations import Recipe, degrade, find_recipe
from .interruption import leave_signals_to_the_run
from .supervision import degradation_targets, estimate_losses
from .validation import cropped


def train_estimator(
    estimator: DegradationEstimator,
    images: ImageFolder,
    *,
    recipe: str | Recipe = "joint",
    steps: int = 10_000,
    batch_size: int = 16,
    patch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    follow: Callable[[int, float], None] = lambda step, loss: None,
) -> DegradationEstimator:
    """Train an estimator, in place, by Adam with a learning rate that falls to zero along a cosine.

    The loss is the mean absolute error of noise, blur and JPEG quality, in the units of
    `DegradationEstimate.condition`. It runs where the estimator is. For a net that has one among its parts, `train`
    does the same beside the loss of the image, once the net puts what it estimates into `Aux.degradation`.

    Args:
        estimator: what is trained, on its device.
        images: clean images.
        recipe: how they are degraded, with stages named noise, blur or jpeg; at scale 1.
        steps: of the optimiser.
        batch_size: crops of a step.
        patch_size: side of a crop.
        lr: learning rate at the start.
        seed: of the crops and of what degrades them.
        follow: called with the number of each step, from 1, and its loss.

    Returns:
        The estimator, in training mode as before or not.

    Raises:
        ValueError: if a number is < 1, ``lr`` is not positive and finite, images are smaller than a crop, or the recipe
            has none of the stages.
        RuntimeError: if a step gives NaN or infinity; the weights are those before it.

    >>> import tempfile
    >>> from ..images import Picture, write_image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_image(f"{folder}/image.png", Picture(torch.rand(1, 3, 40, 50)))
    ...     trained = train_estimator(DegradationEstimator(), ImageFolder(folder), steps=2, batch_size=2, patch_size=32)
    """
    check_positive(steps=steps, batch_size=batch_size, patch_size=patch_size)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    check_learnable(find_recipe(recipe))
    for path in images.paths:
        if min(size := image_size(path)) < patch_size:
            raise ValueError(
                f"patch_size must be at most that of the images, {size[1]} x {size[0]} for {path}, got {patch_size}"
            )
    device = next(estimator.parameters()).device
    samples = TrainingSamples(images, patch_size=patch_size, seed=seed)
    batches = DataLoader(samples, batch_sampler=Batches(batch_size, 0, steps), worker_init_fn=leave_signals_to_the_run)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, batch in enumerate(batches, start=1):
        loss = _loss(estimator, batch, recipe, device)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(estimator.parameters(), 1.0)
        if not (loss + norm).isfinite():
            raise RuntimeError(f"step {step} gave NaN or infinity: try a lower lr than {lr}")
        optimizer.step()
        schedule.step()
        follow(step, loss.item())
    return estimator


def check_learnable(recipe: Recipe) -> None:
    """Raise unless a recipe has a stage whose draws an estimator can be held against.

    >>> check_learnable(find_recipe("clean"))
    Traceback (most recent call last):
    ValueError: recipe must have a stage named noise, blur or jpeg, clean has downsample
    """
    names = [stage.name for stage in recipe.stages]
    if not set(names) & {"noise", "blur", "jpeg"}:
        raise ValueError(f"recipe must have a stage named noise, blur or jpeg, {recipe.name} has {', '.join(names)}")


def _loss(estimator: DegradationEstimator, batch: Sample, recipe: str | Recipe, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        degraded = degrade(batch.clean.to(device), recipe, torch.as_tensor(batch.seed))
    losses = estimate_losses(estimator(degraded.image), degradation_targets(degraded.report))
    return torch.stack(list(losses.values())).sum()


@torch.no_grad()
def evaluate_estimator(
    estimator: Callable[[torch.Tensor], DegradationEstimate],
    images: ImageFolder,
    *,
    recipe: str | Recipe = "joint",
    draws: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Mean absolute errors of noise, blur and quality over whole images, each degraded as often as `draws` says.

    Args:
        estimator: a module, which gets images on its device, or any function that says `DegradationEstimate` of them.
        images: clean images.
        recipe: how they are degraded.
        draws: degradations of each image.
        seed: what degrades them follows from it and from the number of the image alone.

    Returns:
        The errors by name, in the units of `DegradationEstimate`; those alone of which the recipe tells.

    Raises:
        ValueError: if ``draws`` is < 1, or the recipe has no stage named noise, blur or jpeg.

    >>> import tempfile
    >>> from ..images import Picture, write_image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_image(f"{folder}/image.png", Picture(torch.rand(1, 3, 40, 50)))
    ...     sorted(evaluate_estimator(DegradationEstimator(), ImageFolder(folder)))
    ['blur', 'noise', 'quality']
    """
    check_positive(draws=draws)
    check_learnable(find_recipe(recipe))
    device = next(estimator.parameters()).device if isinstance(estimator, nn.Module) else torch.device("cpu")
    errors = []
    for number in range(len(images)):
        clean = cropped(images[number], 1).to(device)
        for draw in range(draws):
            degraded = degrade(clean, recipe, [mixed(seed, 6, number, draw)])
            given, wanted = estimator(degraded.image), degradation_targets(degraded.report)
            errors.append((torch.stack(given) - torch.stack(wanted).to(given.noise)).abs()[:, 0])
    means = torch.stack(errors).nanmean(0).tolist()
    return {name: mean for name, mean in zip(DegradationEstimate._fields, means, strict=True) if mean == mean}
