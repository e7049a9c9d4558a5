"""What a net says besides the image, against what is known: what was drawn for its input, and the clean image."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks import DegradationEstimate
from ..blocks.padding import pad_to_multiple
from ..nets import Aux

Report = dict[str, Tensor]
TOLD = {"noise_sigma", "blur_kernel", "jpeg_quality"}
"""What reports have of the stages that an estimate is about."""


def degradation_targets(report: Report, *, scale: int = 1) -> DegradationEstimate:
    """What an estimator should have said, by the report of `degrade`; NaN where the report does not tell.

    It tells of recipes with single stages named noise, blur and jpeg; of noise what was drawn, which is more than is
    left where the recipe resizes after it, as bsrgan does. Of Poisson noise no standard deviation is known.
    Blur is the standard deviation of the drawn kernel, whatever its family, in pixels of the degraded image.

    Raises:
        ValueError: if the recipe has none of the three stages.

    >>> from .degradations import degrade
    >>> degradation_targets(degrade(torch.rand(1, 3, 16, 16), "jpeg10", [0]).report)
    DegradationEstimate(noise=tensor([nan]), blur=tensor([nan]), quality=tensor([0.1000]))
    """
    unknown = torch.full(report["order"].shape[:1], math.nan, device=report["order"].device)
    noise = blur = quality = unknown
    if "noise_sigma" in report:
        noise = torch.where(report["noise_poisson"] > 0, math.nan, report["noise_sigma"])
    if "blur_kernel" in report:
        blur = _width(report["blur_kernel"]) / scale
    if "jpeg_quality" in report:
        quality = torch.where(report["jpeg"], report["jpeg_quality"].to(unknown) / 100, 1.0)
    if not TOLD & report.keys():
        raise ValueError(f"recipe must have a stage named noise, blur or jpeg, its report has {', '.join(report)}")
    return DegradationEstimate(noise, blur, quality)


def _width(kernels: Tensor) -> Tensor:
    """Standard deviations of kernels (B, k, k) that sum to 1, averaged over the axes."""
    places = torch.arange(kernels.shape[-1], device=kernels.device).to(kernels.dtype)
    variance = torch.zeros(len(kernels), device=kernels.device)
    for dim in (1, 2):
        along = kernels.sum(dim)
        mean = (along * places).sum(1, keepdim=True)
        variance = variance + (along * (places - mean) ** 2).sum(1) / 2
    return variance.clamp(min=0).sqrt()  # a kernel with negative lobes may have none


def estimate_losses(estimate: DegradationEstimate, targets: DegradationEstimate) -> dict[str, Tensor]:
    """Mean absolute errors of each number, in the units of `DegradationEstimate.condition`, where the target is known.

    Where none is known the loss is zero, and still a function of the estimate: every process of a run has a gradient.

    >>> estimate = DegradationEstimate(*torch.tensor([[0.2], [2.0], [0.5]]))
    >>> estimate_losses(estimate, estimate._replace(noise=torch.tensor([0.1])))["noise"]
    tensor(1.)
    """
    given, wanted = estimate.condition().float(), targets.condition().to(estimate.noise.device)
    known = wanted.isfinite()
    errors = torch.where(known, (given - wanted.nan_to_num()).abs(), 0 * given)
    means = errors.sum(0) / known.sum(0).clamp(min=1)
    return dict(zip(DegradationEstimate._fields, means, strict=True))


def kernel_loss(kernels: Tensor, targets: Tensor) -> Tensor:
    """The mean over the images of the summed magnitudes of differences: 0 for the same kernels, 2 for disjoint ones.

    Shape: ``kernels`` ``(B, k, k)``, ``targets`` ``(B, n, n)`` with n <= k; they are surrounded by zeros.

    Raises:
        ValueError: if the targets are larger than the kernels.

    >>> kernel_loss(torch.full((1, 5, 5), 1 / 25), torch.full((1, 3, 3), 1 / 9))
    tensor(1.2800)
    """
    rim = (kernels.shape[-1] - targets.shape[-1]) // 2
    if rim < 0:
        least, given = targets.shape[-1], kernels.shape[-1]
        raise ValueError(f"kernel_size of the prior must be at least that of the recipe, {least}, got {given}")
    return (kernels.float() - F.pad(targets.to(kernels.device).float(), (rim,) * 4)).abs().sum((1, 2)).mean()


def structure_target(clean: Tensor, *, scale: int = 1) -> Tensor:
    """The means of a clean image that `Aux.structure` should be: half the size of what a net of that scale gets.

    >>> structure_target(torch.ones(1, 3, 12, 20), scale=2).shape
    torch.Size([1, 3, 3, 5])
    """
    return F.avg_pool2d(pad_to_multiple(clean, 2 * scale), 2 * scale)


def supervise(
    aux: Aux, report: Report | None, *, scale: int = 1, weight: float = 0.1, clean: Tensor | None = None
) -> None:
    """Add the losses of what a net said, `aux.degradation`, `aux.kernels` and `aux.structure`, to its own.

    Args:
        aux: of a net, as `net(image, return_aux=True)` gives it.
        report: of `degrade`; None for images that came in pairs, of which nothing is known, as of recipes that have
            none of the stages of `degradation_targets`.
        scale: by which the recipe made images smaller.
        weight: of all of these losses.
        clean: the clean images, against which the structure is held; without them it is not.

    >>> aux = Aux(kernels=torch.full((1, 3, 3), 1 / 9, requires_grad=True))
    >>> supervise(aux, {"order": torch.zeros(1, 1), "blur_kernel": torch.full((1, 3, 3), 1 / 9)})
    >>> aux.losses
    {'degradation.kernel': tensor(0., grad_fn=<MulBackward0>)}
    """
    losses: dict[str, Tensor] = {}
    if aux.degradation is not None:
        unknown = torch.full_like(aux.degradation.noise, math.nan)
        targets = DegradationEstimate(unknown, unknown, unknown)
        if report and TOLD & report.keys():
            targets = degradation_targets(report, scale=scale)
        losses |= estimate_losses(aux.degradation, targets)
    if aux.kernels is not None:
        drawn = (report or {}).get("blur_kernel")
        losses["kernel"] = 0 * aux.kernels.sum() if drawn is None else kernel_loss(aux.kernels, drawn)
    aux.losses |= {f"degradation.{name}": weight * loss for name, loss in losses.items()}
    if aux.structure is not None and clean is not None:
        error = aux.structure.float() - structure_target(clean, scale=scale)
        aux.losses["structure"] = weight * error.abs().mean()
