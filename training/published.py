"""The degradations of Real-ESRGAN and BSRGAN, with the parameters that their authors published.

Wang et al., Real-ESRGAN (arXiv:2107.10833), and the options of its x4 training. Zhang et al., Designing a Practical
Degradation Model for Deep Blind Image Super-Resolution (arXiv:2103.14006), and its synthesis code. Where both draw once
for a batch, each sample has draws of its own here.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images import imresize
from .blur_kernels import blur, gaussian_kernels
from .blur_stage import Blur
from .recipes import Recipe, register_recipe
from .resizing import RESIZE_MODES, resize
from .stage import Draws, Size, Stage, Values
from .stages import CameraNoise, Jpeg, Noise, Resize, Sharpen

# Real-ESRGAN

FAMILY_SHARES = (
    ("iso", 0.45),
    ("aniso", 0.25),
    ("generalised-iso", 0.12),
    ("generalised-aniso", 0.03),
    ("plateau-iso", 0.12),
    ("plateau-aniso", 0.03),
)
SINC_SHARE = 0.1
SIZES = tuple(range(7, 22, 2))


def _esrgan_blur(name: str, sigma: tuple[float, float], probability: float = 1.0) -> Blur:
    others = tuple((family, (1 - SINC_SHARE) * share) for family, share in FAMILY_SHARES)
    return Blur(
        name=name,
        probability=probability,
        families=(*others, ("sinc", SINC_SHARE)),
        sizes=SIZES,
        sigma=sigma,
        generalised_beta=(0.5, 4.0),
        plateau_beta=(1.0, 2.0),
        cutoff=(math.pi / 3, math.pi),
        wide_cutoff=(math.pi / 5, math.pi),
    )


def _esrgan_noise(name: str, largest: float, factor: float) -> Noise:
    sigma = (1 / 255, largest / 255)
    return Noise(name=name, sigma=sigma, poisson=0.5, factor=(0.05, factor), grey=0.4, clip=True)


def _esrgan_order(draws: Draws) -> list[int]:
    """At the end either the final size and sinc, then JPEG, or JPEG before both."""
    return [*range(8), *((8, 9, 10) if draws.chance(0.5) else (10, 8, 9))]


REAL_ESRGAN = Recipe(
    "real-esrgan",
    (
        Sharpen(),
        _esrgan_blur("blur1", (0.2, 3.0)),
        Resize(name="resize1", up=0.2, down=0.7, factor=(0.15, 1.5)),
        _esrgan_noise("noise1", 30, 3.0),
        Jpeg(name="jpeg1", quality=(30, 95), whole=False),
        _esrgan_blur("blur2", (0.2, 1.5), probability=0.8),
        Resize(name="resize2", up=0.3, down=0.4, factor=(0.3, 1.2), of_output=True),
        _esrgan_noise("noise2", 25, 2.5),
        Resize(name="resize3", of_output=True),
        Blur(name="sinc", probability=0.8, families=(("sinc", 1.0),), sizes=SIZES),
        Jpeg(name="jpeg2", quality=(30, 95), whole=False),
    ),
    order=_esrgan_order,
)

# BSRGAN

MODES = ("bilinear", "bicubic", "area")


@dataclass(frozen=True, kw_only=True)
class Halve(Stage):
    """Halve images of scale 4 now and then, before all else; what follows then degrades for scale 2.

    Reported: ``mode`` (a place in `RESIZE_MODES`).
    """

    name: str = "halve"
    probability: float = 0.25

    def happens(self, draws: Draws) -> bool:
        happens = super().happens(draws) and draws.scale == 4
        if happens:
            draws.scale = 2
        return happens

    def draw(self, draws: Draws) -> Values:
        mode = "matlab" if draws.chance(0.5) else MODES[draws.pick([1.0] * len(MODES))]
        return {"mode": RESIZE_MODES.index(mode)}

    def plan(self, values: Values, size: Size, output: Size) -> Hashable:
        return RESIZE_MODES[values["mode"]]

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        height, width = image.shape[2:]
        if plan == "matlab":
            return imresize(image, 0.5, intermediate="float").clamp(0, 1)
        return resize(image, (height // 2, width // 2), plan).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class ScaledBlur(Blur):
    """Blur by Gaussians whose width follows the scale: anisotropic ones by their variances."""

    families: tuple[tuple[str, float], ...] = (("aniso", 0.5), ("iso", 0.5))
    sizes: tuple[int, ...] = tuple(range(7, 26, 2))

    def draw_gaussian(self, draws: Draws, family: str) -> dict[str, float]:
        if family == "iso":
            sigma = draws.uniform((0.0, 2.0 + 0.2 * draws.scale))
            return {"sigma_x": sigma, "sigma_y": sigma, "theta": 0.0, "beta": 1.0}
        sigma_x, sigma_y = (math.sqrt(draws.uniform((0.0, 4.0 + draws.scale))) for _ in range(2))
        return {"sigma_x": sigma_x, "sigma_y": sigma_y, "theta": draws.uniform((0.0, math.pi)), "beta": 1.0}


@dataclass(frozen=True, kw_only=True)
class Shrink(Stage):
    """Shrink at random: by a factor of up to twice the scale, or by a Gaussian and every so many pixels.

    Reported: ``factor`` and ``mode`` (a place in `RESIZE_MODES`, "nearest" where pixels are taken), ``sigma`` and
    ``kernel``, the one that does nothing where there is no Gaussian.
    """

    name: str = "shrink"
    by_factor: float = 0.75
    size: int = 25

    def draw(self, draws: Draws) -> Values:
        by_factor, scale = draws.chance(self.by_factor), draws.scale
        factor, sigma = draws.uniform((1.0, 2.0 * scale)), draws.uniform((0.1, 0.6 * scale))
        mode = MODES[draws.pick([1.0] * len(MODES))]
        if by_factor:
            values = {"factor": factor, "sigma": 0.0, "mode": RESIZE_MODES.index(mode)}
        else:
            values = {"factor": float(scale), "sigma": sigma, "mode": RESIZE_MODES.index("nearest")}
        # Centred on the cell of which the first pixel is taken.
        shift = torch.tensor([0.0 if by_factor else (scale - 1) / 2])
        kernel = gaussian_kernels(self.size, torch.tensor([values["sigma"]]), shift=shift)[0].float()
        return values | {"kernel": kernel}

    def plan(self, values: Values, size: Size, output: Size) -> Hashable:
        mode, factor = RESIZE_MODES[values["mode"]], values["factor"]
        if mode == "nearest":
            return mode, int(factor)
        return mode, tuple(max(1, int(side / factor)) for side in size)

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        mode, to = plan
        if mode == "nearest":
            return blur(image, values["kernel"])[..., ::to, ::to].clamp(0, 1)
        return resize(image, to, mode).clamp(0, 1)


def _bsrgan_order(draws: Draws) -> list[int]:
    """All but the first and the last in any order, except that the random shrinking comes before the final one."""
    places = [1 + int(place) for place in draws.rng.permutation(7)]
    first, second = sorted((places.index(3), places.index(4)))
    places[first], places[second] = 3, 4
    return [0, *places, 8]


BSRGAN = Recipe(
    "bsrgan",
    (
        Halve(),
        ScaledBlur(name="blur1"),
        ScaledBlur(name="blur2"),
        Shrink(),
        Resize(of_output=True, modes=MODES, clip=True),
        Noise(sigma=(2 / 255, 25 / 255), whole_levels=True, grey=0.4, correlated=0.2, clip=True),
        Jpeg(name="jpeg1", probability=0.9, quality=(30, 95)),
        CameraNoise(probability=0.25),
        Jpeg(name="jpeg2", quality=(30, 95)),
    ),
    order=_bsrgan_order,
)

for _recipe in (REAL_ESRGAN, BSRGAN):
    register_recipe(_recipe)
