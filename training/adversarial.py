"""Adversarial losses: a discriminator learns to tell restored images from real ones, and the net to mislead it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.checks import check_choice, check_not_negative
from ..blocks.precision import at_least_float32
from .pixel_losses import check_images
from .pyramid import texture

Kind = Literal["vanilla", "hinge", "lsgan", "relativistic"]
KINDS = ("vanilla", "hinge", "lsgan", "relativistic")


def discriminator_objective(real: Tensor, fake: Tensor, kind: Kind) -> Tensor:
    r"""Give the loss of a discriminator with the logits `real` of real images and `fake` of restored ones.

    With r and f for the logits, bars for means over all of them, and :math:`\ell(x) = \log(1 + e^{-x})`:

    - "vanilla": :math:`\mathrm{mean}\,\ell(r) + \mathrm{mean}\,\ell(-f)`
    - "hinge": :math:`\mathrm{mean} \max(0, 1 - r) + \mathrm{mean} \max(0, 1 + f)`
    - "lsgan": :math:`\tfrac12 \mathrm{mean} (r - 1)^2 + \tfrac12 \mathrm{mean} f^2`
    - "relativistic": :math:`\mathrm{mean}\,\ell(r - \bar f) + \mathrm{mean}\,\ell(\bar r - f)`

    Shape:
        two of the same shape -> scalar, in float32 or wider.

    Raises:
        ValueError: if ``kind`` is another word.

    Source: vanilla: arXiv:1406.2661; hinge: arXiv:1705.02894; least squares: arXiv:1611.04076; relativistic average:
        arXiv:1807.00734.

    >>> discriminator_objective(torch.tensor([3.0]), torch.tensor([-0.5]), "hinge")
    tensor(0.5000)
    """
    check_choice("kind", kind, KINDS)
    r, f = at_least_float32(real), at_least_float32(fake)
    if kind == "hinge":
        return (1 - r).relu().mean() + (1 + f).relu().mean()
    if kind == "lsgan":
        return ((r - 1).square().mean() + f.square().mean()) / 2
    if kind == "relativistic":
        r, f = r - f.mean(), f - r.mean()
    return F.softplus(-r).mean() + F.softplus(f).mean()


def generator_objective(real: Tensor, fake: Tensor, kind: Kind) -> Tensor:
    r"""Give the loss of a net whose restored images have the logits `fake`; "relativistic" alone looks at `real`.

    With the signs of `discriminator_objective`:

    - "vanilla": :math:`\mathrm{mean}\,\ell(f)`, which does not saturate
    - "hinge": :math:`-\mathrm{mean} f`
    - "lsgan": :math:`\tfrac12 \mathrm{mean} (f - 1)^2`
    - "relativistic": :math:`\mathrm{mean}\,\ell(f - \bar r) + \mathrm{mean}\,\ell(\bar f - r)`

    Shape:
        two of the same shape -> scalar, in float32 or wider.

    Raises:
        ValueError: if ``kind`` is another word.

    Source: as `discriminator_objective`.

    >>> generator_objective(torch.tensor([3.0]), torch.tensor([-0.5]), "hinge")
    tensor(0.5000)
    """
    check_choice("kind", kind, KINDS)
    r, f = at_least_float32(real), at_least_float32(fake)
    if kind == "hinge":
        return -f.mean()
    if kind == "lsgan":
        return (f - 1).square().mean() / 2
    if kind == "relativistic":
        return F.softplus(r.mean() - f).mean() + F.softplus(r - f.mean()).mean()
    return F.softplus(-f).mean()


def feature_matching(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    r"""Give the distance of a discriminator's maps of restored images from those of real ones.

    :math:`\sum_i \mathrm{mean}(|F_i - R_i|)`; no gradient reaches the maps of the real images.

    Shape:
        two sequences of maps of the same shapes, at least one -> scalar, in float32 or wider.

    Source: pix2pixHD (arXiv:1711.11585), section 3.2.

    >>> feature_matching([torch.zeros(1, 8, 4, 4)], [torch.ones(1, 8, 4, 4)])
    tensor(1.)
    """
    pairs = zip(real, fake, strict=True)
    return torch.stack([(at_least_float32(f) - at_least_float32(r.detach())).abs().mean() for r, f in pairs]).sum()


class AdversarialLoss(nn.Module):
    """How little restored images mislead a discriminator; it holds that discriminator, and says how to train it.

    Called as the other losses are, it is the loss of the net: no gradient reaches the discriminator. With
    `discriminator_loss`, and an optimiser of its own over ``loss.discriminator.parameters()``, the discriminator takes
    its step. Images are cast to the dtype of its weights; under autocast it computes in the narrow dtype as any net.

    Shape:
        two of ``(B, C, H, W)`` -> scalar, in float32 or wider.

    Args:
        discriminator: makes logits of an image; `feature_matching` also asks it for ``features(image)``, a list of
            maps of which the last is the logits.
        kind: "vanilla", "hinge", "lsgan" or "relativistic", see `discriminator_objective`.
        high_pass: judge only what this many halvings lose of the images, on mid-grey; 0 judges the images.
        feature_matching: weight of the distance of the discriminator's maps (`feature_matching`) beside its verdict.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if ``kind`` is another word, a number negative, ``feature_matching`` is asked of a discriminator
            without ``features``, or the images are not ``(B, C, H, W)`` of one shape with at least one pixel.

    Source: ESRGAN (arXiv:1809.00219), section 3.2; Real-ESRGAN (arXiv:2107.10833), section 3.4.

    >>> loss = AdversarialLoss(nn.Conv2d(3, 1, 3), kind="hinge")
    >>> loss(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)).shape
    torch.Size([])
    >>> loss.discriminator_loss(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)).backward()
    """

    def __init__(
        self, discriminator: nn.Module, *, kind: Kind = "vanilla", high_pass: int = 0, feature_matching: float = 0.0
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_not_negative(high_pass=high_pass)
        if not (isinstance(feature_matching, int | float) and 0 <= feature_matching < math.inf):
            raise ValueError(f"feature_matching must be at least 0 and finite, got {feature_matching!r}")
        if feature_matching and not hasattr(discriminator, "features"):
            raise ValueError(f"feature_matching needs a discriminator with features(), got {discriminator!r}")
        self.discriminator = discriminator
        self.kind: Kind = kind
        self.high_pass = high_pass
        self.feature_matching = feature_matching

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        restored, target = check_images(restored, target, self)
        with _frozen(self.discriminator):
            if self.feature_matching:
                fake, real = self._maps(restored), self._maps(target.detach())
                loss = generator_objective(real[-1], fake[-1], self.kind)
                return loss + self.feature_matching * feature_matching(real[:-1], fake[:-1])
            fake = self._logits(restored)
            # Only the relativistic net cares how the discriminator judges real images.
            real = self._logits(target.detach()) if self.kind == "relativistic" else fake
            return generator_objective(real, fake, self.kind)

    def discriminator_loss(self, restored: Tensor, target: Tensor) -> Tensor:
        """Give the loss of the discriminator; no gradient reaches the net that restored the images.

        Raises:
            TypeError, ValueError: as for the loss itself.
        """
        restored, target = check_images(restored.detach(), target.detach(), self)
        return discriminator_objective(self._logits(target), self._logits(restored), self.kind)

    def _logits(self, image: Tensor) -> Tensor:
        return self.discriminator(self._view(image))

    def _maps(self, image: Tensor) -> list[Tensor]:
        return self.discriminator.features(self._view(image))  # pyright: ignore[reportCallIssue]

    def _view(self, image: Tensor) -> Tensor:
        weight = next(self.discriminator.parameters(), image)
        return texture(image, self.high_pass).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, high_pass={self.high_pass}, feature_matching={self.feature_matching}"


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients pass through a module without reaching its parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
