"""The stages that recipes are made of, beside blur: each draws numbers for one sample, and degrades many at once."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..blocks.checks import check_choice
from ..images import imresize
from .blur_kernels import sharpen
from .camera import Camera, draw_camera, through_camera
from .jpeg import SUBSAMPLINGS, jpeg
from .noise import correlated_noise, draw_covariance, gaussian_noise, poisson_noise
from .resizing import RESIZE_MODES, resize
from .stage import Draws, Range, Size, Stage, Values, check_range


@dataclass(frozen=True, kw_only=True)
class Sharpen(Stage):
    """Sharpen by the unsharp mask of Real-ESRGAN."""

    name: str = "sharpen"

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        return sharpen(image)


@dataclass(frozen=True, kw_only=True)
class Downsample(Stage):
    """Shrink by the scale with MATLAB's bicubic; at scale 1 nothing happens.

    Args:
        rounded: to 8 bits after each axis, as the low-resolution images of the public test sets are; no gradients pass.
    """

    name: str = "downsample"
    rounded: bool = False

    def plan(self, values: Values, size: Size, output: Size) -> Hashable:
        return output[0] / size[0]

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        return image if plan == 1 else imresize(image, plan, intermediate="uint8" if self.rounded else "float")


@dataclass(frozen=True, kw_only=True)
class Resize(Stage):
    """Resize by a factor that is drawn, in a mode that is drawn.

    Reported: ``factor`` and ``mode`` (a place in `RESIZE_MODES`).

    Args:
        up: the share of enlarging, by up to the upper bound of `factor`.
        down: the share of shrinking, by down to its lower bound; the rest keeps the size.
        factor: smallest and largest.
        modes: one is drawn.
        of_output: the factor is one of the size that the recipe ends with, not of the size at hand.
        clip: clamp to [0, 1].
    """

    name: str = "resize"
    up: float = 0.0
    down: float = 0.0
    factor: Range = (1.0, 1.0)
    modes: tuple[Literal["area", "bilinear", "bicubic", "nearest"], ...] = ("area", "bilinear", "bicubic")
    of_output: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("up", (0, self.up), 0, 1)
        check_range("down", (0, self.down), 0, 1 - self.up)
        check_range("factor", self.factor, 0)
        if not self.modes:
            raise ValueError("modes must be at least one, got none")
        for mode in self.modes:
            check_choice("mode", mode, RESIZE_MODES[:-1])

    def draw(self, draws: Draws) -> Values:
        way = draws.pick((self.up, self.down, max(0.0, 1 - self.up - self.down)))
        factor = draws.uniform(((1.0, self.factor[1]), (self.factor[0], 1.0), (1.0, 1.0))[way])
        mode = self.modes[draws.pick([1.0] * len(self.modes))]
        return {"factor": factor, "mode": RESIZE_MODES.index(mode)}

    def plan(self, values: Values, size: Size, output: Size) -> Hashable:
        height, width = output if self.of_output else size
        return max(1, int(height * values["factor"])), max(1, int(width * values["factor"])), values["mode"]

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        *size, mode = plan
        resized = resize(image, tuple(size), RESIZE_MODES[mode])
        return resized.clamp(0, 1) if self.clip else resized


@dataclass(frozen=True, kw_only=True)
class Noise(Stage):
    """Add Gaussian or Poisson noise.

    Reported: ``sigma``, the standard deviation of Gaussian noise, and ``poisson``, the factor of Poisson noise, each 0
    where it is the other; ``grey``; and ``covariance`` over the channels where noise may be correlated.

    Args:
        sigma: standard deviations.
        whole_levels: draw them as whole multiples of 1 / 255.
        poisson: the share of Poisson noise.
        factor: of Poisson noise.
        grey: the share of noise that is the same in all channels.
        correlated: the share of Gaussian noise that is correlated over the channels, as strong as BSRGAN's.
        clip: clamp to [0, 1].
    """

    name: str = "noise"
    sigma: Range = (0.0, 0.0)
    whole_levels: bool = False
    poisson: float = 0.0
    factor: Range = (1.0, 1.0)
    grey: float = 0.0
    correlated: float = 0.0
    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sigma", self.sigma, 0)
        check_range("factor", self.factor, 0)
        check_range("poisson", (0, self.poisson), 0, 1)
        check_range("grey", (0, self.grey), 0, 1)
        check_range("correlated", (0, self.correlated), 0, 1 - self.grey)

    def draw(self, draws: Draws) -> Values:
        poisson = draws.chance(self.poisson)
        kind = draws.pick((max(0.0, 1 - self.grey - self.correlated), self.grey, self.correlated))
        low, high = self.sigma
        sigma = (
            draws.whole((round(255 * low), round(255 * high))) / 255 if self.whole_levels else draws.uniform(self.sigma)
        )
        factor = draws.uniform(self.factor)
        values = {"sigma": 0.0 if poisson else sigma, "poisson": factor if poisson else 0.0, "grey": kind == 1}
        if self.correlated:
            covariance = np.zeros((draws.channels, draws.channels))
            if kind == 2 and not poisson:
                covariance = draw_covariance(draws.rng, draws.channels, self.sigma[1])
                values["sigma"] = math.sqrt(np.trace(covariance) / draws.channels)
            values["covariance"] = covariance
        return values

    def plan(self, values: Values, size: Size, output: Size) -> Hashable:
        if values["poisson"]:
            return "poisson"
        return "correlated" if self.correlated and values["covariance"].any() else "gaussian"

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        if plan == "poisson":
            noisy = poisson_noise(image, rngs, values["poisson"], grey=values["grey"])
        elif plan == "correlated":
            noisy = correlated_noise(image, rngs, values["covariance"])
        else:
            noisy = gaussian_noise(image, rngs, values["sigma"], grey=values["grey"])
        return noisy.clamp(0, 1) if self.clip else noisy


@dataclass(frozen=True, kw_only=True)
class CameraNoise(Stage):
    """See the image through the noisy sensor of a camera, as `through_camera` does; the camera is drawn.

    Reported: ``shot``, ``read``, ``brightness``, ``red_gain``, ``blue_gain`` and ``matrix``.
    """

    name: str = "camera"

    def draw(self, draws: Draws) -> Values:
        return draw_camera(draws.rng)

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        red, blue, brightness = values["red_gain"], values["blue_gain"], values["brightness"]
        gains = torch.stack([red * brightness, brightness, blue * brightness], 1)
        return through_camera(image, rngs, Camera(values["matrix"], gains, values["shot"], values["read"]))


@dataclass(frozen=True, kw_only=True)
class Jpeg(Stage):
    """Compress as JPEG.

    Reported: ``quality``.

    Args:
        quality: smallest and largest, from 1 to 100.
        whole: draw whole numbers, as files have.
        subsampling: of chroma, "4:2:0" or "4:4:4".
    """

    name: str = "jpeg"
    quality: Range = (30, 95)
    whole: bool = True
    subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("quality", self.quality, 1, 100)
        if self.whole and math.ceil(self.quality[0]) > math.floor(self.quality[1]):
            raise ValueError(f"quality must be a range with a whole number in it, got {self.quality}")
        check_choice("subsampling", self.subsampling, SUBSAMPLINGS)

    def draw(self, draws: Draws) -> Values:
        return {"quality": float(draws.whole(self.quality)) if self.whole else draws.uniform(self.quality)}

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        return jpeg(image, values["quality"], subsampling=self.subsampling)
