"""The stage that blurs, by kernels of many families."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..blocks.checks import check_choice, check_odd
from .blur_kernels import blur, gaussian_kernels, motion_kernels, plateau_kernels, sinc_kernels
from .stage import Draws, Range, Size, Stage, Values, check_range

FAMILIES = (
    *("iso", "aniso", "generalised-iso", "generalised-aniso", "plateau-iso", "plateau-aniso"),
    *("sinc", "motion"),
)
LEAST_CUTOFF = 1e-3
NUMBERS = ("sigma_x", "sigma_y", "theta", "beta", "cutoff", "length", "angle")
BENDS = 8


@dataclass(frozen=True, kw_only=True)
class Blur(Stage):
    """Blur by a kernel of a family that is drawn.

    Reported: ``family`` (a place in `FAMILIES`), ``size``, ``sigma_x``, ``sigma_y``, ``theta``, ``beta``, ``cutoff``,
    ``length``, ``angle``, 0 where they do not apply, and ``kernel``, the one that does nothing where there is no blur.

    Args:
        families: names from `FAMILIES`, with their shares.
        sizes: of the kernels, odd; one is drawn.
        sigma: standard deviations of Gaussians and plateaus, in pixels.
        generalised_beta: exponents of the generalised Gaussians, as often below 1 as above.
        plateau_beta: those of plateaus.
        cutoff: of sinc kernels, radians a pixel.
        wide_cutoff: the same for kernels of 13 pixels and more.
        length: of motion, in pixels.
        bend: standard deviation of the turns of motion, in radians, at each eighth of its path.
    """

    name: str = "blur"
    families: tuple[tuple[str, float], ...] = (("iso", 1.0),)
    sizes: tuple[int, ...] = (21,)
    sigma: Range = (0.0, 3.0)
    generalised_beta: Range = (0.5, 4.0)
    plateau_beta: Range = (1.0, 2.0)
    cutoff: Range = (math.pi / 3, math.pi)
    wide_cutoff: Range = (math.pi / 3, math.pi)
    length: Range = (5.0, 15.0)
    bend: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for family, share in self.families:
            check_choice("family", family, FAMILIES)
            check_range("share", (0, share), 0)
        if not any(share > 0 for _, share in self.families):
            raise ValueError(f"families must be at least one with a share above 0, got {self.families}")
        if not self.sizes:
            raise ValueError("sizes must be at least one, got none")
        for size in self.sizes:
            check_odd(size=size)
        for name in ("sigma", "generalised_beta", "plateau_beta", "cutoff", "wide_cutoff", "length"):
            check_range(name, getattr(self, name), LEAST_CUTOFF if "cutoff" in name else 0)

    def draw(self, draws: Draws) -> Values:
        family = self.families[draws.pick([share for _, share in self.families])][0]
        size = self.sizes[draws.pick([1.0] * len(self.sizes))]
        numbers: dict[str, float] = dict.fromkeys(NUMBERS, 0.0)
        if family == "sinc":
            numbers["cutoff"] = draws.uniform(self.cutoff if size < 13 else self.wide_cutoff)
        elif family == "motion":
            numbers |= {"length": draws.uniform(self.length), "angle": draws.uniform((-math.pi, math.pi))}
        else:
            numbers |= self.draw_gaussian(draws, family)
        kernel = self._kernel(family, size, numbers, draws)
        return {"family": FAMILIES.index(family), "size": size, **numbers, "kernel": kernel}

    def draw_gaussian(self, draws: Draws, family: str) -> dict[str, float]:
        """Draw the numbers of a Gaussian or plateau."""
        sigma_x = sigma_y = draws.uniform(self.sigma)
        theta, beta = 0.0, 1.0
        if family.endswith("aniso"):
            sigma_y, theta = draws.uniform(self.sigma), draws.uniform((-math.pi, math.pi))
        if not family.startswith(("iso", "aniso")):
            low, high = self.plateau_beta if family.startswith("plateau") else self.generalised_beta
            beta = draws.uniform((low, max(low, 1.0)) if draws.chance(0.5) else (min(high, 1.0), high))
        return {"sigma_x": sigma_x, "sigma_y": sigma_y, "theta": theta, "beta": beta}

    def _kernel(self, family: str, size: int, numbers: dict[str, float], draws: Draws) -> Tensor:
        given = {key: torch.tensor([value], dtype=torch.float64) for key, value in numbers.items()}
        side, support = max(self.sizes), torch.tensor([size])
        if family == "sinc":
            kernels = sinc_kernels(side, given["cutoff"], support=support)
        elif family == "motion":
            bends = self.bend * torch.from_numpy(draws.rng.standard_normal((1, BENDS)))
            kernels = motion_kernels(side, given["length"], given["angle"], bends)
        else:
            made = plateau_kernels if family.startswith("plateau") else gaussian_kernels
            of_shape = [given[key] for key in ("sigma_x", "sigma_y", "theta")]
            kernels = made(side, *of_shape, beta=given["beta"], support=support)
        return kernels[0].float()

    def absent(self, values: Values) -> Values:
        kernel = torch.zeros_like(values["kernel"])
        kernel[len(kernel) // 2, len(kernel) // 2] = 1
        return super().absent(values) | {"kernel": kernel}

    def plan(self, values: Values, size: Size, output: Size) -> Hashable:
        return values["size"] if FAMILIES[values["family"]] != "motion" else max(self.sizes)

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        rim = (max(self.sizes) - plan) // 2
        inside = slice(rim, max(self.sizes) - rim)
        return blur(image, values["kernel"][:, inside, inside])
