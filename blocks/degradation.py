"""How degraded an image is, by formulas and by what a small network sees, and which kernel blurred it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.memory_format import in_format_of
from .checks import check_feature_map, check_odd, check_positive
from .degradation_features import FAINTEST, fixed_features
from .padding import pad_to_multiple
from .precision import at_least_float32
from .safe_conv import SafeConv2d

# What stands for 1 within: images differ by about that much.
NOISE_UNIT, BLUR_UNIT = 0.1, 2.0
# By which details become about as large as the image.
DETAIL_GAIN = 8.0


class DegradationEstimate(NamedTuple):
    """What `DegradationEstimator` says of each image.

    Args:
        noise: standard deviation of white noise, of images in [0, 1]: (B,).
        blur: standard deviation of the blur kernel in pixels: (B,).
        quality: of JPEG over 100, and 1 for none: (B,).

    >>> DegradationEstimate(torch.tensor([0.1]), torch.tensor([2.0]), torch.tensor([0.5])).condition()
    tensor([[1.0000, 1.0000, 0.5000]])
    """

    noise: Tensor
    blur: Tensor
    quality: Tensor

    def condition(self) -> Tensor:
        """Put the numbers side by side, in units in which images differ by about 1: (B, 3), for `FiLM` and routers."""
        return torch.stack([self.noise / NOISE_UNIT, self.blur / BLUR_UNIT, self.quality], dim=1)

    @classmethod
    def of_logits(cls, logits: Tensor) -> "DegradationEstimate":
        """Make an estimate of any numbers (B, 3), such as what a layer says: two softplus, and a sigmoid.

        >>> DegradationEstimate.of_logits(torch.zeros(1, 3)).quality
        tensor([0.5000])
        """
        noise, blur, quality = at_least_float32(logits).unbind(1)
        return cls(NOISE_UNIT * F.softplus(noise), BLUR_UNIT * F.softplus(blur), quality.sigmoid())


class DegradationEstimator(nn.Module):
    r"""Estimate noise, blur and JPEG quality of images, from formulas and from what a small network sees.

    .. math:: [\sigma, b, q] = f([g, \mathrm{mean} \, h(x), \log \mathrm{std} \, h(x)])

    with g the logarithms of `immerkaer_sigma`, `haar_sigma`, `edge_width` and `blockiness`, h strided convolutions of
    the image and of its details, which are its difference to means of 3x3 pixels, and f a perceptron whose outputs are
    a softplus, twice, and a sigmoid. The formulas alone mistake texture for noise, and
    noise for sharpness; the network learns by how much (`claritycore.training.train_estimator`).

    Formulas and the statistics of h are float32 for half-precision inputs. It is not `tile_safe`: it has one answer for
    the whole image. Exported programs take images with sides longer than 2 to the number of convolutions, and than 2.

    Shape:
        ``(B, C, H, W)`` -> `DegradationEstimate` of ``(B,)`` each; dtype kept.

    Args:
        in_channels: number of channels ``C`` of the images.
        widths: channels after each convolution.
        hidden: width of the perceptron.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``widths`` is empty, or the input has another number of channels.

    Source:
        The combination is ours; the formulas are named at their functions. A network that estimates noise: CBDNet
        (arXiv:1807.04686), section 3.2; JPEG quality: FBCNN (arXiv:2109.14573), section 3.

    >>> DegradationEstimator()(torch.rand(2, 3, 16, 24)).noise.shape
    torch.Size([2])
    """

    tile_safe = False
    receptive_radius = 0
    tile_multiple = 1

    def __init__(self, in_channels: int = 3, *, widths: Sequence[int] = (24, 48, 64), hidden: int = 64) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, hidden=hidden, **{f"widths[{i}]": w for i, w in enumerate(widths)})
        if not widths:
            raise ValueError("widths must have at least one number, got none")
        self.in_channels = in_channels
        self.convs = nn.ModuleList(
            SafeConv2d(before, after, 3, stride=2, padding=1)
            for before, after in zip((2 * in_channels, *widths), widths, strict=False)
        )
        self.hidden = nn.Linear(4 + 2 * widths[-1], hidden)
        self.head = nn.Linear(hidden, 3)

    def forward(self, image: Tensor) -> DegradationEstimate:
        check_feature_map(image, self.in_channels, self)
        wide = at_least_float32(image)
        details = DETAIL_GAIN * (wide - F.avg_pool2d(wide, 3, stride=1, padding=1, count_include_pad=False))
        x = torch.cat([image, details.to(image.dtype)], dim=1)
        for conv in self.convs:
            x = F.gelu(conv(x))
        x = at_least_float32(x).flatten(2)
        mean = x.mean(2)
        spread = ((x - mean[..., None]).square().mean(2) + FAINTEST**2).log() / 2
        seen = torch.cat([fixed_features(image), mean, spread], dim=1)
        hidden = F.gelu(self.hidden(seen.to(self.hidden.weight.dtype)))
        estimate = DegradationEstimate.of_logits(self.head(hidden))
        return DegradationEstimate(*(value.to(image.dtype) for value in estimate))


class KernelPrior(nn.Module):
    r"""Describe the blur around each place by a few numbers, on a coarse grid: the condition for deblurring.

    .. math:: c = W_3 \, \mathrm{gelu}(W_2 * \mathrm{mean}_{cell} \, \mathrm{gelu}(W_1 * x))

    with 3x3 convolutions :math:`W_1` of the map and :math:`W_2` of its cells. Nothing is drawn at random, in training
    neither. With a `kernel_size`, `reconstruct` makes kernels of codes,

    .. math:: k = \mathrm{softmax}(W_k c + b_k)

    over all places of a kernel: logarithms of kernels are linear in the code, as those of Gaussians are in the inverse
    of their covariance. It is there to be supervised by the kernels that a degradation drew, which makes codes mean
    blur: put what it makes into `Aux.kernels`, and training does so. `forward` does not use it.

    Shape:
        ``(B, C, H, W)`` -> ``(B, N, ceil(H / cell), ceil(W / cell))``; dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        code_channels: numbers ``N`` of a code.
        cell: side of the cells in pixels.
        kernel_size: odd side of the kernels that codes stand for; None for no reconstruction.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``kernel_size`` is even, or the input has another number of channels.

    Source:
        Codes of few numbers that stand for kernels: IKC (arXiv:1904.03377), section 3.1; a kernel for each place, to
        guide a net: Fang et al., Self-Supervised Non-Uniform Kernel Estimation with Flow-Based Motion Prior for Blind
        Image Deblurring, CVPR (2023).

    >>> KernelPrior(16)(torch.randn(2, 16, 20, 33)).shape
    torch.Size([2, 8, 3, 5])
    >>> KernelPrior(16, kernel_size=21).reconstruct(torch.randn(2, 8)).shape
    torch.Size([2, 21, 21])
    """

    tile_safe = True

    def __init__(self, channels: int, *, code_channels: int = 8, cell: int = 8, kernel_size: int | None = None) -> None:
        super().__init__()
        check_positive(channels=channels, code_channels=code_channels, cell=cell)
        self.channels, self.code_channels, self.cell, self.kernel_size = channels, code_channels, cell, kernel_size
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.around = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.to_code = nn.Conv2d(2 * channels, code_channels, 1)
        if kernel_size is not None:
            check_odd(kernel_size=kernel_size)
            self.to_kernel = nn.Linear(code_channels, kernel_size**2)
            middle = torch.zeros(kernel_size**2)
            middle[kernel_size**2 // 2] = 4.0
            self.to_kernel.bias = nn.Parameter(middle)
        self.receptive_radius, self.tile_multiple = cell + 1, cell

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        cells = F.avg_pool2d(pad_to_multiple(F.gelu(self.conv(x)), self.cell), self.cell)
        return in_format_of(self.to_code(F.gelu(self.around(cells))).to(x.dtype), x)

    def reconstruct(self, code: Tensor) -> Tensor:
        """Make the kernel of each image from the mean of its codes, (B, N, h, w) or (B, N) -> (B, k, k); it sums to 1.

        Raises:
            RuntimeError: if the prior has no ``kernel_size``.
            TypeError: if the code is not floating point.
            ValueError: if the code has another width.
        """
        if self.kernel_size is None:
            raise RuntimeError("KernelPrior must have a kernel_size to reconstruct kernels, got None")
        if not code.is_floating_point():
            raise TypeError(f"code must be floating-point, got {code.dtype}")
        if code.ndim not in (2, 4) or code.shape[1] != self.code_channels:
            wanted = f"(B, {self.code_channels}) or (B, {self.code_channels}, h, w)"
            raise ValueError(f"code must be {wanted}, got shape {tuple(code.shape)}")
        mean = at_least_float32(code).flatten(2).mean(2) if code.ndim == 4 else code
        logits = at_least_float32(self.to_kernel(mean.to(self.to_kernel.weight.dtype)))
        return logits.softmax(1).unflatten(1, (self.kernel_size, self.kernel_size)).to(code.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, code_channels={self.code_channels}, cell={self.cell}, kernel_size={self.kernel_size}"
