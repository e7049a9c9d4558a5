"""The modulated convolution: a style scales the map before one convolution, or the kernel, for each sample."""

from contextlib import nullcontext
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operand_rules import compute_dtype, under_autocast
from .operands import check_modulation, check_style
from .reference import modulated_conv2d_reference

Form = Literal["auto", "scale", "folded", "grouped", "reference"]


MANY_PIXELS = 2048
"""On one core with AVX-512 (torch 2.13, float32, 16 to 256 channels) "grouped" takes 0.7 to 0.97 of the time of "scale"
at 64 x 64, 0.5 to 0.95 with backward; at 32 x 32 0.94 to 1.16, at 16 x 16 1.2 to 1.6."""


class Modulation(NamedTuple):
    """A convolution by sample as one convolution of all: `y = out_scale * conv(x * in_scale, weight)`.

    Args:
        weight: the kernel, of which no output exceeds the map: ``(O, I, k, k)``, in the dtype of arithmetic.
        in_scale: the style, at most 1: ``(B, I)``.
        out_scale: demodulation, or what was taken from kernel and style: ``(B, O)``.
    """

    weight: Tensor
    in_scale: Tensor
    out_scale: Tensor


def modulate(weight: Tensor, style: Tensor, *, demodulate: bool = True, eps: float = 1e-8) -> Modulation:
    r"""Prepare a modulated convolution whose scales are applied around a convolution that all samples share.

    With :math:`\hat s = s / \max |s|` and :math:`\hat w_o = w_o / (\sqrt{I k k} \max |w_o|)`, so that half precision
    neither overflows nor vanishes, demodulation is a product of small matrices,
    :math:`d = (\hat s^2 \, Q^T + \epsilon \bar S)^{-1/2}` with :math:`Q_{oi} = \sum_{kl} \hat w_{oikl}^2`; no
    ``(B, O, I, k, k)`` tensor is made. Arithmetic is float64 where the weight is, else float32, also under autocast.

    Shape:
        - weight: ``(O, I, k, k)``
        - style: ``(B, I)``
        - returns: a `Modulation`

    Args:
        weight: the kernel.
        style: of each sample.
        demodulate: whether outputs are brought to the variance of the input.
        eps: see `modulated_conv2d`.

    Raises:
        TypeError: if an argument is not real and floating-point.
        ValueError: if the weight has another shape, the style another width than the weight has inputs, or eps is below
            0.

    Source: as for `modulated_conv2d`.

    >>> modulation = modulate(torch.randn(16, 8, 3, 3), torch.randn(2, 8))
    >>> modulation.in_scale.shape, modulation.out_scale.shape
    (torch.Size([2, 8]), torch.Size([2, 16]))
    """
    check_style(weight, style, eps)
    dtype = compute_dtype(weight)
    with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
        weight, style = weight.to(dtype), style.to(dtype)
        # As constants: with any of them the function is the same, and so are its derivatives.
        loudest = _largest(style.detach(), (1,))
        largest = _largest(weight.detach(), (1, 2, 3)) * weight[0].numel() ** 0.5
        weight, style = weight / largest, style / loudest
        if not demodulate:
            return Modulation(weight, style, loudest * largest.flatten())
        q = sums_of_squares(weight)
        power = style.square()
        expected = power.mean(1, keepdim=True) * q.sum(1)
        total = power @ q.mT + eps * expected
        return Modulation(weight, style, torch.where(expected > 0, total, 1).rsqrt())


def modulated_conv2d(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, eps: float = 1e-8, form: Form = "auto"
) -> Tensor:
    r"""Convolve each sample with the kernel scaled by its style, and bring what comes out to the variance it had.

    .. math::
        y_{bo} = d_{bo} \sum_i (w_{oi} s_{bi}) * x_{bi}, \qquad
        d_{bo} = \Big(\sum_{ikl} (w_{oikl} s_{bi})^2 + \epsilon \bar S_{bo}\Big)^{-1/2}, \qquad
        \bar S_{bo} = \frac{1}{I} \sum_i s_{bi}^2 \sum_{ikl} w_{oikl}^2,

    with zeros beyond the borders, stride 1, and :math:`d = 1` without demodulation. As :math:`\epsilon` counts in
    parts of what the sum would be were kernel and style independent, the scale of a style, or of a kernel, changes
    nothing. Styles and demodulation are float32 for half inputs, also under autocast, and the convolution sees a kernel
    and a style whose largest are 1 (`modulate`): of extreme ones neither overflows. Differentiable any number of times.

    The forms compute the same: "scale" scales the map, convolves all samples with one kernel, and scales again;
    "folded", of one sample, scales the kernel; "grouped" scales it for each sample, in a ``(B, O, I, k, k)`` tensor;
    "reference" is the formula.

    Shape:
        - x: ``(B, I, H, W)``, any H and W from 1 up
        - weight: ``(O, I, k, k)``, an odd k
        - style: ``(B, I)``
        - returns: ``(B, O, H, W)`` in the dtype of x

    Args:
        x: the feature map.
        weight: the kernel.
        style: of each sample.
        demodulate: as above.
        eps: as above.
        form: one of those above; "auto" takes "folded" for one sample whose maps are larger than the kernel, "grouped"
            on a CPU for large maps, and else "scale"; and "scale" while a call is compiled or exported: the kernel is
            then a constant, and scales join their neighbours.

    Raises:
        TypeError: if an argument is not real and floating-point.
        ValueError: if shapes or devices do not fit each other, eps is below 0, no form has that name, or "folded" gets
            several samples.

    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN (arXiv:1912.04958), section 2.2.

    >>> x, weight, style = torch.randn(2, 8, 5, 7), torch.randn(16, 8, 3, 3), torch.randn(2, 8)
    >>> y = modulated_conv2d(x, weight, style)
    >>> y.shape, torch.allclose(modulated_conv2d(x, weight, 100 * style), y, atol=1e-5)
    (torch.Size([2, 16, 5, 7]), True)
    """
    check_modulation(x, weight, style, eps)
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    if form == "folded" and x.shape[0] != 1:
        raise ValueError(f"form 'folded' takes one sample, got {x.shape[0]}")
    (x,) = under_autocast({"x": x}, ("x",), x.device).values() if not x.is_meta else (x,)
    if form == "reference":
        return modulated_conv2d_reference(x, weight, style, demodulate=demodulate, eps=eps)
    if form == "auto":
        form = _fastest(x, weight)
    kernel, in_scale, out_scale = modulate(
        weight.to(torch.promote_types(weight.dtype, compute_dtype(x))), style, demodulate=demodulate, eps=eps
    )
    padding = weight.shape[2] // 2
    if form == "scale" or x.shape[0] == 0:  # there are no groups of none
        y = F.conv2d(x * in_scale.to(x.dtype)[:, :, None, None], kernel.to(x.dtype), padding=padding)
        return (y * out_scale[:, :, None, None]).to(x.dtype)
    kernels = kernel * (out_scale[:, :, None] * in_scale[:, None])[..., None, None]
    return _grouped(x, kernels.to(x.dtype), padding)


def modulated_conv2d_flops(
    batch: int, in_channels: int, out_channels: int, height: int, width: int, kernel_size: int
) -> int:
    """Count the floating-point operations of the convolution and of the scales, demodulation included."""
    taps = kernel_size**2
    convolution = 2 * batch * out_channels * in_channels * height * width * taps
    scales = batch * (in_channels + out_channels) * height * width
    return convolution + scales + 2 * out_channels * in_channels * (taps + batch)


def _fastest(x: Tensor, weight: Tensor) -> Form:
    if torch.compiler.is_compiling():
        return "scale"
    pixels = x.shape[2] * x.shape[3]
    small_kernel = weight.numel() < pixels * sum(weight.shape[:2])  # than the maps that "scale" makes
    if x.shape[0] == 1:
        return "folded" if small_kernel else "scale"
    large = x.is_cpu and pixels >= MANY_PIXELS and x.dtype.itemsize >= 4 and x.is_contiguous()
    return "grouped" if large and small_kernel else "scale"


def sums_of_squares(weight: Tensor) -> Tensor:
    """Sum up the squares of each kernel's taps: (O, I, k, k) -> (O, I)."""
    if torch.is_grad_enabled() and weight.requires_grad:
        # On a CPU a sum over so few numbers takes twice as long as this product.
        return weight.square().flatten(2) @ weight.new_ones(weight[0, 0].numel())
    # One pass over the kernel, which writes nothing of its size; but at zero a norm has no second derivative.
    return torch.linalg.vector_norm(weight, dim=(2, 3)).square()


def _largest(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the largest magnitude, of zeros 1."""
    # On a CPU a norm of infinity takes ten times as long.
    largest = torch.maximum(x.amax(axes, keepdim=True), -x.amin(axes, keepdim=True))
    return torch.where(largest > 0, largest, 1)


def _grouped(x: Tensor, kernels: Tensor, padding: int) -> Tensor:
    """Convolve each sample with its own of the kernels (B, O, I, k, k): a group of channels each."""
    batch = x.shape[0]
    if batch == 1:
        return F.conv2d(x, kernels[0], padding=padding)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), padding=padding, groups=batch)
    return y.view(batch, -1, *y.shape[2:])
