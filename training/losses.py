"""The loss of a training run: a weighted sum of losses, each from the step on that it is meant for."""

import ast
import copy
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nets.registry import nearest
from .adversarial import AdversarialLoss, Kind
from .discriminators import UNetDiscriminator
from .frequency_losses import FFTLoss, FocalFrequencyLoss, LaplacianLoss
from .perceptual import LPIPSLoss, VGGLoss
from .pixel_losses import CharbonnierLoss, L1Loss, L2Loss, PSNRLoss, SSIMLoss


def _against_unet(
    *, kind: Kind, in_channels: int = 3, width: int = 64, high_pass: int = 0, feature_matching: float = 0.0
) -> AdversarialLoss:
    discriminator = UNetDiscriminator(in_channels, width)
    return AdversarialLoss(discriminator, kind=kind, high_pass=high_pass, feature_matching=feature_matching)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "l1": L1Loss,
    "l2": L2Loss,
    "charbonnier": CharbonnierLoss,
    "psnr": PSNRLoss,
    "ssim": SSIMLoss,
    "fft": FFTLoss,
    "hf": partial(FFTLoss, cutoff=0.25),  # high frequencies
    "lf": partial(LaplacianLoss, first=2),  # structure: all that is coarser than four pixels
    "laplacian": LaplacianLoss,
    "focal": FocalFrequencyLoss,
    "vgg": VGGLoss,
    "lpips": LPIPSLoss,
    "gan": partial(_against_unet, kind="vanilla"),
    "hinge": partial(_against_unet, kind="hinge"),
    "lsgan": partial(_against_unet, kind="lsgan"),
    "relativistic": partial(_against_unet, kind="relativistic"),
}

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
TERM = re.compile(
    rf"\s*(?:(?P<weight>{NUMBER})\s*\*\s*)?(?P<name>[A-Za-z]\w*)\s*(?:\((?P<options>[^()]*)\)\s*)?"
    r"(?:@\s*(?P<start>\d+)\s*(?::\s*(?P<ramp>\d+)\s*)?)?(?P<end>\+|$)"
)


@dataclass(frozen=True)
class LossTerm:
    """One loss of a weighted sum, and when it counts.

    Args:
        name: what its value is logged as.
        loss: takes two images and gives a scalar.
        weight: its factor in the sum.
        start: the first step, counted from 0, in which it counts.
        ramp: over how many steps its weight grows to the whole: that is reached in step ``start + ramp``.

    Raises:
        ValueError: if the weight is not positive and finite, or a number of steps is negative.

    >>> [LossTerm("l1", L1Loss(), start=2, ramp=1).factor(step) for step in range(5)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    name: str
    loss: nn.Module
    weight: float = 1.0
    start: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of {self.name} must be positive and finite, got {self.weight}")
        if self.start < 0 or self.ramp < 0:
            raise ValueError(f"start and ramp of {self.name} must be at least 0, got {self.start} and {self.ramp}")

    def factor(self, step: int) -> float:
        """Give what the loss is multiplied by in a step."""
        if step < self.start:
            return 0.0
        return self.weight * min((step - self.start + 1) / (self.ramp + 1), 1.0)


class WeightedLoss(nn.Module):
    r"""Weighted sum of losses, with the value of each: :math:`\sum_i \lambda_i(t) \, L_i(a, b)` in step t.

    Written as text, a sum is made of terms ``weight * name (option=value, ...) @ start : ramp``, of which only the
    name must be there: ``l1 + 0.1*fft(cutoff=0.25) + 0.05*ssim@5000:1000`` adds `SSIMLoss` from step 5000 on, growing
    to its weight for a thousand steps. Options are the arguments of the loss; words, such as the path of a file, go
    without quotes, and hold no comma or parenthesis. The names: l1, l2, charbonnier, psnr, ssim; fft, hf
    (``fft(cutoff=0.25)``), focal, laplacian, lf (``laplacian(first=2)``); vgg and lpips, with files of weights; gan,
    hinge, lsgan and relativistic, against a `UNetDiscriminator` with ``in_channels=3`` and ``width=64``.

    Shape:
        two of ``(B, C, H, W)``, and the number of the step -> a scalar, and a dict of scalars without gradient: the
        value of each term that has started, not weighted, by name. A name that comes again is numbered: vgg, vgg-2.

    Args:
        terms: the sum as text, or as a sequence of `LossTerm`.

    Raises:
        FileNotFoundError: if a file of weights is not there.
        TypeError: if ``terms`` is neither, or an image is not floating point.
        ValueError: if the text is no such sum, a name or an option is unknown, an option has a bad value, two terms
            share a name, no term starts in step 0, or two images do not fit each other or a loss.

    >>> loss = WeightedLoss("l1 + 0.5*l2@100")
    >>> image, target = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)
    >>> loss(image, target, step=0)
    (tensor(0.5000), {'l1': tensor(0.5000)})
    >>> loss(image, target, step=100)
    (tensor(0.6250), {'l1': tensor(0.5000), 'l2': tensor(0.2500)})
    """

    def __init__(self, terms: str | Sequence[LossTerm]) -> None:
        super().__init__()
        self.terms = tuple(_parsed(terms) if isinstance(terms, str) else terms)
        if not all(isinstance(term, LossTerm) for term in self.terms):
            raise TypeError(f"terms must be text or a sequence of LossTerm, got {terms!r}")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"terms must have different names, got {', '.join(names)}")
        if all(term.start > 0 for term in self.terms):
            starts = ", ".join(f"{term.name} in step {term.start}" for term in self.terms)
            raise ValueError(f"a term must start in step 0, got {starts or 'none'}")
        self.losses = nn.ModuleDict({term.name: term.loss for term in self.terms})

    def forward(self, restored: Tensor, target: Tensor, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        parts, values = [], {}
        for term in self.terms:
            if factor := term.factor(step):
                value = term.loss(restored, target)
                parts.append(factor * value)
                values[term.name] = value.detach()
        return torch.stack(parts).sum(), values

    def check(self, restored: tuple[int, int, int], target: tuple[int, int, int]) -> None:
        """Try every term, one that starts late too, on a pair of blank crops of the shapes (C, H, W) that are to come.

        Raises:
            ValueError: if a term does not take them; it says which.

        >>> WeightedLoss("l1 + hinge(width=4)").check((1, 16, 16), (1, 16, 16))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: loss hinge does not fit this run: UNetDiscriminator ... C = 3 ...
        """
        images = torch.zeros(1, *restored), torch.zeros(1, *target)
        for term in self.terms:
            with torch.no_grad():
                try:
                    copy.deepcopy(term.loss).eval()(*images)
                except (ValueError, TypeError, RuntimeError) as error:
                    raise ValueError(f"loss {term.name} does not fit this run: {error}") from error

    @property
    def adversarial(self) -> list[LossTerm]:
        """The terms whose loss is an `AdversarialLoss`: their discriminators are still to be trained."""
        return [term for term in self.terms if isinstance(term.loss, AdversarialLoss)]


def _parsed(text: str) -> list[LossTerm]:
    terms: list[LossTerm] = []
    seen: Counter[str] = Counter()
    place, more = 0, True
    while more:
        match = TERM.match(text, place)
        if match is None:
            raise ValueError(
                f"loss {text!r} must be a sum of terms such as 0.1*fft(cutoff=0.25)@5000:1000; "
                f"none starts at {text[place:].strip()!r}"
            )
        name = match["name"]
        seen[name] += 1
        label = name if seen[name] == 1 else f"{name}-{seen[name]}"
        loss = _made(name, match["options"] or "")
        terms.append(
            LossTerm(label, loss, float(match["weight"] or 1), int(match["start"] or 0), int(match["ramp"] or 0))
        )
        place, more = match.end(), match["end"] == "+"
    return terms


def _made(name: str, options: str) -> nn.Module:
    if name not in LOSSES:
        raise ValueError(f"there is no loss {name!r}{nearest(name, LOSSES)}")
    make = LOSSES[name]
    values: dict[str, Any] = {}
    for option in filter(None, map(str.strip, options.split(","))):
        key, _, value = (part.strip() for part in option.partition("="))
        known = inspect.signature(make).parameters
        if key not in known:
            raise ValueError(f"loss {name} has no option {key!r}{nearest(key, known)}")
        if not value or key in values:
            raise ValueError(f"option {key} of loss {name} must have one value, got {options!r}")
        values[key] = _value(value)
    try:
        return make(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {name}({options}): {error}") from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a word, or a path, whose ~ the quotes around the sum kept from the shell
        return str(Path(text).expanduser()) if text.startswith("~/") else text
