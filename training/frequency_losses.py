"""Losses of two images by frequency: over the Fourier spectrum, and over the levels of a Laplacian pyramid."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..blocks.checks import check_choice, check_positive
from ..blocks.pyramid import laplacian_pyramid
from .pixel_losses import ImageLoss


class FFTLoss(ImageLoss):
    r"""Mean absolute error of the Fourier spectra, all of them or their high frequencies.

    With the unitary transform :math:`F` of each channel, the mean over all frequencies f of

    .. math::
        w_f \, \big| |F a|_f - |F b|_f \big| \;\text{("magnitude")}, \quad
        w_f \, |F a - F b|_f \;\text{("complex")}.

    The magnitude is blind to where things are, so it stands beside a loss of pixels and never alone. w is 1, or with
    a cutoff c the high-pass :math:`1 - \exp(-(r / c)^2 / 2)`, with r the distance from zero frequency and 1 that of
    Nyquist on an axis; it is zero at zero frequency.

    Shape:
        two of ``(B, C, H, W)`` -> scalar.

    Args:
        form: "magnitude" or "complex".
        cutoff: the cutoff ``c`` of the high-pass; None weighs all frequencies alike.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if ``form`` is another word, ``cutoff`` not positive and finite, or the images are not
            ``(B, C, H, W)`` of one shape with at least one pixel.

    Source: "complex", but for the factor of the transform: MIMO-UNet (arXiv:2108.05054), section 3.4, there the sum of
        the errors of real and imaginary part.

    >>> FFTLoss()(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    tensor(0.2500)
    >>> FFTLoss(cutoff=0.25)(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    tensor(0.)
    """

    def __init__(self, form: Literal["magnitude", "complex"] = "magnitude", *, cutoff: float | None = None) -> None:
        super().__init__()
        check_choice("form", form, ("magnitude", "complex"))
        if cutoff is not None and not (isinstance(cutoff, int | float) and 0 < cutoff < math.inf):
            raise ValueError(f"cutoff must be positive and finite, got {cutoff!r}")
        self.form = form
        self.cutoff = cutoff

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        if self.form == "complex":
            error = spectrum(restored - target).abs()
        else:
            error = (spectrum(restored).abs() - spectrum(target).abs()).abs()
        if self.cutoff is not None:
            error = error * _high_frequencies(restored, self.cutoff)
        return _mean_of_spectrum(error, restored.shape[3])

    def extra_repr(self) -> str:
        return f"form={self.form!r}, cutoff={self.cutoff}"


class FocalFrequencyLoss(ImageLoss):
    r"""Mean squared error of the Fourier spectra, with most weight where the error is largest.

    With the error :math:`D = F (a - b)` of the unitary transform of each channel, the mean over all frequencies of
    :math:`w_f |D_f|^2` with :math:`w_f = |D_f|^\alpha / \max_g |D_g|^\alpha`, which is a constant to the gradient.
    With alpha 0 it is the `L2Loss`.

    Shape:
        two of ``(B, C, H, W)`` -> scalar.

    Args:
        alpha: how far the weight follows the error.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if ``alpha`` is negative or not finite, or the images are not ``(B, C, H, W)`` of one shape with
            at least one pixel.

    Source: Focal frequency loss (arXiv:2012.12821), section 3.2, over whole images.

    >>> FocalFrequencyLoss()(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    tensor(1.)
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if not (isinstance(alpha, int | float) and 0 <= alpha < math.inf):
            raise ValueError(f"alpha must be at least 0 and finite, got {alpha!r}")
        self.alpha = alpha

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        power = torch.view_as_real(spectrum(restored - target)).square().sum(-1)
        # The largest first: a power of small errors would vanish in float32.
        largest = power.detach().amax((2, 3), keepdim=True)
        weight = (power.detach() / largest.clamp_min(torch.finfo(power.dtype).tiny)).pow(self.alpha / 2)
        return _mean_of_spectrum(weight * power, restored.shape[3])

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class LaplacianLoss(ImageLoss):
    r"""Mean absolute error of each level of the Laplacian pyramids, summed over the levels.

    :math:`\sum_j \mathrm{mean}(|L_j(a) - L_j(b)|)` over the bands :math:`L_0` (finest) to :math:`L_{n-1}` and what
    is left after n halvings. For sides that are multiples of :math:`2^n` it is
    :math:`\sum_j 4^j \|L_j(a) - L_j(b)\|_1` over the number of pixels.

    Without the finest levels (``first`` above 0) it compares structure and leaves texture free.

    Shape:
        two of ``(B, C, H, W)`` -> scalar.

    Args:
        levels: number ``n`` of halvings; a side that has become one pixel stays so.
        first: the finest level that counts; n leaves only what the halvings do.

    Raises:
        TypeError: if an image is not floating point.
        ValueError: if ``levels`` is < 1, ``first`` is not from 0 to ``levels``, or the images are not
            ``(B, C, H, W)`` of one shape with at least one pixel.

    Source: Ling and Okada, Diffusion distance for histogram comparison, 2006, as in GLO (arXiv:1707.05776),
        section 3.2; the pyramid: Burt and Adelson, The Laplacian pyramid as a compact image code, 1983.

    >>> LaplacianLoss()(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32))
    tensor(1.)
    """

    def __init__(self, levels: int = 5, *, first: int = 0) -> None:
        super().__init__()
        check_positive(levels=levels)
        if type(first) is not int or not 0 <= first <= levels:
            raise ValueError(f"first must be an integer from 0 to levels, {levels}, got {first!r}")
        self.levels = levels
        self.first = first

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        bands = laplacian_pyramid(restored - target, self.levels)  # the pyramid is linear
        return torch.stack([band.abs().mean() for band in bands[self.first :]]).sum()

    def extra_repr(self) -> str:
        return f"levels={self.levels}, first={self.first}"


def spectrum(image: Tensor) -> Tensor:
    """Transform each channel unitarily; of the columns only the W // 2 + 1 that determine a real image's others.

    >>> spectrum(torch.ones(1, 3, 4, 5)).shape
    torch.Size([1, 3, 4, 3])
    """
    return torch.fft.rfft2(image, norm="ortho")


def _high_frequencies(image: Tensor, cutoff: float) -> Tensor:
    height, width = image.shape[2:]
    vertical = torch.fft.fftfreq(height, device=image.device, dtype=image.dtype)[:, None]
    horizontal = torch.fft.rfftfreq(width, device=image.device, dtype=image.dtype)
    squared_distance = 4 * (vertical.square() + horizontal.square())
    return -torch.expm1(squared_distance / (-2 * cutoff**2))


def _mean_of_spectrum(values: Tensor, width: int) -> Tensor:
    """Mean over all frequencies of what is known of half of them: the columns between zero and Nyquist count twice."""
    twice = values[..., 1 : (width + 1) // 2]
    return (values.sum() + twice.sum()) / (values[..., 0].numel() * width)
