"""Degrading images: each sample by numbers of its own, drawn from a seed of its own, and all of them reported."""

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..nets.base import SCALES
from .jpeg import check_image, straight
from .published import BSRGAN, REAL_ESRGAN
from .recipes import Recipe, find_recipe, list_recipes, register_recipe
from .stage import Draws, Values

__all__ = [
    "BSRGAN",
    "REAL_ESRGAN",
    "Degraded",
    "Recipe",
    "degrade",
    "find_recipe",
    "list_recipes",
    "register_recipe",
]


class Degraded(NamedTuple):
    """Degraded images, and what was drawn to make them.

    For each stage the report has its name, a boolean that says whether it happened, and its numbers, the names of which
    begin with that of the stage: ``report["noise"]``, ``report["noise_sigma"]``. Where a stage did not happen its
    numbers are 0 and its kernel is the one that does nothing. ``report["order"]`` has the places of the stages in the
    order in which they came. A recipe's report has the same names and shapes whatever is drawn.

    Shape: ``image`` is ``(B, C, H, W)``, and every tensor of the report ``(B, ...)``.

    >>> sorted(degrade(torch.rand(1, 3, 8, 8), "noise25", seeds=[0]).report)[:2]
    ['downsample', 'noise']
    """

    image: Tensor
    report: dict[str, Tensor]


def degrade(clean: Tensor, recipe: str | Recipe, seeds: Sequence[int] | Tensor, scale: int = 1) -> Degraded:
    """Degrade clean images by a recipe, each from a seed of its own.

    What becomes of a sample depends on the sample, the recipe, the scale and its seed alone: not on the batch around it
    and not on the device, beyond the rounding of sums; where the result is rounded to 8 bits, a difference in the last
    bit may become one level of a pixel. No global source of random numbers is used. Gradients flow through blur,
    resizing, noise, JPEG and the last rounding, not through `Downsample(rounded=True)`.

    Computed in float32, in float64 where the images are, whatever autocast says.

    Shape: ``clean`` ``(B, C, H, W)`` -> ``(B, C, H / scale, W / scale)``, of the same dtype and device.

    Args:
        clean: floating-point images in [0, 1], of any number of channels.
        recipe: a name that `list_recipes` has, or a recipe.
        seeds: as many whole numbers as images.
        scale: by which the images become smaller: 1, 2, 3, 4 or 8.

    Returns:
        The images and the report, on the device of the images.

    Raises:
        TypeError: if ``clean`` is not floating point.
        ValueError: if ``clean`` is not ``(B, C, H, W)`` with H and W multiples of the scale, there is no such recipe or
            scale, there are not as many seeds as images, or the recipe gives another size.

    >>> image, report = degrade(torch.rand(2, 3, 16, 24), "joint", seeds=[0, 1], scale=4)
    >>> image.shape, report["noise_sigma"].shape, report["blur_kernel"].shape
    (torch.Size([2, 3, 4, 6]), torch.Size([2]), torch.Size([2, 13, 13]))
    """
    check_image(clean)
    recipe, output = find_recipe(recipe), _output_size(clean, scale)
    samples = [_draw(recipe, Draws(seed, clean.shape[1], scale)) for seed in _as_list(seeds, len(clean))]
    columns = [_columns(samples, place) for place in range(len(recipe.stages))]
    images = list(clean.to(clean.dtype if clean.dtype == torch.float64 else torch.float32))
    with torch.autocast(clean.device.type, enabled=False):
        for step in range(len(recipe.stages)):
            _apply_step(recipe, step, images, samples, columns, output)
    for image in images:
        if tuple(image.shape[1:]) != output:
            raise ValueError(
                f"recipe {recipe.name} must give {output[0]} x {output[1]} pixels at scale {scale}, it gave "
                f"{image.shape[1]} x {image.shape[2]}: it needs a Downsample stage, or a Resize with of_output"
            )
    degraded = torch.stack(images) if images else clean.new_empty(0, clean.shape[1], *output)
    if recipe.rounded:
        degraded = degraded.clamp(0, 1)
        degraded = straight(degraded, (255 * degraded.detach()).round() / 255)
    report = _report(recipe, samples, columns)
    return Degraded(degraded.to(clean.dtype), {name: values.to(clean.device) for name, values in report.items()})


def _output_size(clean: Tensor, scale: int) -> tuple[int, int]:
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(map(str, SCALES))}, got {scale!r}")
    height, width = clean.shape[2:]
    if height % scale or width % scale:
        raise ValueError(f"clean must have sides that are multiples of the scale, {scale}, got {height} x {width}")
    return height // scale, width // scale


def _as_list(seeds: Sequence[int] | Tensor, batch: int) -> list[int]:
    if isinstance(seeds, Tensor):
        if seeds.is_floating_point() or seeds.ndim != 1:
            raise ValueError(f"seeds must be whole numbers, ({batch},), got {seeds.dtype} {tuple(seeds.shape)}")
        seeds = seeds.tolist()
    seeds = [operator.index(seed) for seed in seeds]
    if len(seeds) != batch:
        raise ValueError(f"seeds must be as many as images, {batch}, got {len(seeds)}")
    return seeds


class _Sample(NamedTuple):
    """What one sample drew: the places of the stages in their order; by place, what happens and its numbers."""

    order: Sequence[int]
    happens: list[bool]
    values: list[Values]
    rng: np.random.Generator


def _draw(recipe: Recipe, draws: Draws) -> _Sample:
    order = range(len(recipe.stages)) if recipe.order is None else recipe.order(draws)
    sample = _Sample(list(order), [], [], draws.rng)
    for stage in recipe.stages:
        happens = stage.happens(draws)
        values = stage.draw(draws)
        sample.happens.append(happens)
        sample.values.append(values if happens else stage.absent(values))
    return sample


def _columns(samples: Sequence[_Sample], place: int) -> dict[str, Tensor]:
    """The numbers of one stage, by name, over the samples."""
    rows = [sample.values[place] for sample in samples]
    return {key: _stacked([row[key] for row in rows]) for key in (rows[0] if rows else ())}


def _stacked(values: Sequence[Any]) -> Tensor:
    """One tensor of what the samples drew: booleans, whole numbers, and float32."""
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    stacked = torch.from_numpy(np.stack(values))
    return stacked.float() if stacked.is_floating_point() else stacked


def _report(recipe: Recipe, samples: Sequence[_Sample], columns: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    report = {"order": torch.tensor([sample.order for sample in samples], dtype=torch.int64)}
    for place, stage in enumerate(recipe.stages):
        report[stage.name] = torch.tensor([sample.happens[place] for sample in samples], dtype=torch.bool)
        report |= {f"{stage.name}_{key}": values for key, values in columns[place].items()}
    return report


def _apply_step(
    recipe: Recipe,
    step: int,
    images: list[Tensor],
    samples: Sequence[_Sample],
    columns: Sequence[dict[str, Tensor]],
    output: tuple[int, int],
) -> None:
    """Let each sample pass its next stage, those together that are of one size and have the same before them."""
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for row, (image, sample) in enumerate(zip(images, samples, strict=True)):
        place = sample.order[step]
        if sample.happens[place]:
            size = (image.shape[1], image.shape[2])
            plan = recipe.stages[place].plan(sample.values[place], size, output)
            groups[place, size, plan].append(row)
    for (place, _, plan), rows in groups.items():
        batch = torch.stack([images[row] for row in rows])
        values = {key: column[rows] for key, column in columns[place].items()}
        made = recipe.stages[place].apply(batch, values, plan, [samples[row].rng for row in rows])
        for row, image in zip(rows, made, strict=True):
            images[row] = image
