"""What a block learns of the degradation: prompts, modulation by any condition, statistics of the surroundings."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.memory_format import in_format_of
from .checks import check_choice, check_feature_map, check_odd, check_positive
from .initialisation import fill
from .precision import at_least_float32

PromptForm = Literal["vector", "grid", "spatial"]


class FiLM(nn.Module):
    r"""Scale and shift each channel by numbers that follow from a condition.

    :math:`y_c = x_c \, (1 + \gamma_c) + \beta_c` with :math:`[\gamma, \beta] = W \, \mathrm{silu}(t) + b`. W and b
    start at zero: a fresh block is the identity, bit by bit.

    The condition is a vector for each image, or a map of any size, such as the codes of `KernelPrior` or a prompt:
    :math:`\gamma` and :math:`\beta` are computed where it has values, and interpolated bilinearly between these.

    Shape:
        - x: ``(B, C, H, W)``
        - condition: ``(B, D)`` or ``(B, D, h, w)``
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        condition_channels: width ``D`` of the condition.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, the input has another number of channels, or the condition another width or
            another number of images.

    Source:
        FiLM (arXiv:1709.07871), section 2; started at zero as in DiT (arXiv:2212.09748), section 3.2; maps as in SFT
        (arXiv:1804.02815), section 3.2.

    >>> x = torch.randn(2, 8, 5, 7)
    >>> FiLM(8, 16)(x, torch.randn(2, 16)).equal(x)
    True
    """

    tile_safe = True
    receptive_radius = 0
    tile_multiple = 1

    def __init__(self, channels: int, condition_channels: int) -> None:
        super().__init__()
        check_positive(channels=channels, condition_channels=condition_channels)
        self.channels, self.condition_channels = channels, condition_channels
        self.linear = nn.Linear(condition_channels, 2 * channels)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        self._check(condition, x)
        values = condition.to(self.linear.weight.dtype).movedim(1, -1)
        modulation = at_least_float32(self.linear(F.silu(values)).movedim(-1, 1))
        if condition.ndim == 2:
            modulation = modulation[..., None, None]
        elif condition.shape[2:] != x.shape[2:]:
            modulation = F.interpolate(modulation, x.shape[2:], mode="bilinear", align_corners=False)
        gamma, beta = modulation.chunk(2, dim=1)
        return in_format_of((x * (1 + gamma) + beta).to(x.dtype), x)

    def _check(self, condition: Tensor, x: Tensor) -> None:
        width = self.condition_channels
        if condition.ndim not in (2, 4) or condition.shape[:2] != (x.shape[0], width) or 0 in condition.shape[2:]:
            wanted = f"({x.shape[0]}, {width}) or ({x.shape[0]}, {width}, h, w)"
            raise ValueError(f"condition must be {wanted}, as many as maps, got shape {tuple(condition.shape)}")

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.condition_channels}"


class PromptGenerator(nn.Module):
    r"""Mix learned prompts by what the features look like: a description of the degradation that nobody has to give.

    .. math:: p = \sum_l w_l P_l, \qquad w = \mathrm{softmax}(f(x))

    - "vector": :math:`P_l` are D numbers, f is linear in the means of the map: for routers and `FiLM`.
    - "grid": :math:`P_l` are maps of D x S x S, mixed as before, interpolated to the size of x and convolved. It is the
      prompt of PromptIR, with the names and shapes of its `PromptGenBlock`. The grid is stretched with the map.
    - "spatial": :math:`P_l` are D numbers, f is a 3x3 convolution: each pixel has a prompt of its own, whatever the
      size of the map, and tiles get those of the whole.

    Prompts are never copied for the images of a batch. Means and softmax are float32 for half-precision inputs. It is
    `tile_safe` in the form "spatial" alone.

    Shape:
        ``(B, C, H, W)`` -> ``(B, D)`` for "vector", else ``(B, D, H, W)`` in the memory format of x; dtype kept.

    Args:
        channels: number of channels ``C``.
        prompt_channels: width ``D`` of a prompt.
        num_prompts: how many are learned.
        form: "vector", "grid" or "spatial".
        size: side ``S`` of the grid, "grid" alone.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``form`` is another word, ``size`` is given without "grid" or missing with it,
            or the input has another number of channels.

    Source:
        PromptIR (arXiv:2306.13090), section 3.2; "vector" and "spatial" are ours.

    >>> x = torch.randn(2, 8, 5, 7)
    >>> PromptGenerator(8, 16)(x).shape, PromptGenerator(8, 16, form="spatial")(x).shape
    (torch.Size([2, 16]), torch.Size([2, 16, 5, 7]))
    """

    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        prompt_channels: int,
        *,
        num_prompts: int = 5,
        form: PromptForm = "vector",
        size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, prompt_channels=prompt_channels, num_prompts=num_prompts)
        check_choice("form", form, get_args(PromptForm))
        if (size is not None) != (form == "grid"):
            raise ValueError(f'size must be given for form="grid", and for it alone, got {size} for {form!r}')
        self.channels, self.prompt_channels, self.form = channels, prompt_channels, form
        self.tile_safe, self.receptive_radius = form == "spatial", 1
        shape = (num_prompts, prompt_channels)
        if form == "grid":
            check_positive(size=size or 0)
            shape = (1, *shape, size or 0, size or 0)
            self.conv3x3 = nn.Conv2d(prompt_channels, prompt_channels, 3, padding=1, bias=False)
        self.prompt_param = nn.Parameter(torch.empty(shape))
        fill(self.prompt_param, nn.init.uniform_)
        if form == "spatial":
            self.conv = nn.Conv2d(channels, num_prompts, 3, padding=1)
        else:
            self.linear_layer = nn.Linear(channels, num_prompts)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        if self.form == "spatial":
            weights = at_least_float32(self.conv(x)).softmax(dim=1)
            prompt = torch.einsum("blhw,ld->bdhw", weights.to(x.dtype), self.prompt_param.to(x.dtype))
            return in_format_of(prompt, x)
        means = at_least_float32(x).mean((2, 3)).to(self.linear_layer.weight.dtype)
        weights = at_least_float32(self.linear_layer(means)).softmax(dim=1).to(x.dtype)
        if self.form == "vector":
            return (weights @ self.prompt_param.to(x.dtype)).to(x.dtype)
        prompt = torch.einsum("bl,ldhw->bdhw", weights, self.prompt_param[0].to(x.dtype)).to(x.dtype)
        prompt = F.interpolate(prompt, x.shape[2:], mode="bilinear", align_corners=False)
        return in_format_of(self.conv3x3(prompt).to(x.dtype), x)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.prompt_channels}, form={self.form!r}, prompts={tuple(self.prompt_param.shape)}"


class LocalStatistics(nn.Module):
    r"""Mean and variance of each channel around each pixel: how bright it is there, and how busy.

    .. math:: y = [m, \; \log(1 + v)], \qquad m = \mathrm{mean}_w x, \quad v = \mathrm{mean}_w (x - m)^2

    over a window of odd sides around the pixel, or what of it lies in the map. The variance is of differences to the
    window's own mean, first along columns and then along rows, where it is the mean of variances plus the variance of
    means: nothing cancels, as it does in :math:`E[x^2] - E[x]^2` where the mean is large, and nothing is negative.

    Computed in float32 for half-precision inputs. No parameters.

    Shape:
        ``(B, C, H, W)`` -> ``(B, 2 C, H, W)``, means first; dtype and memory format kept.

    Args:
        window_size: odd side of the window.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``window_size`` is even or < 1.

    Source:
        Variances of parts put together: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for
        Computing Sample Variances (1979).

    >>> LocalStatistics(3)(torch.tensor([[[[1000.0, 1002.0, 1001.0]]]]))[0, 1].expm1()
    tensor([[1.0000, 0.6667, 0.2500]])
    """

    tile_safe = True
    tile_multiple = 1

    def __init__(self, window_size: int = 7) -> None:
        super().__init__()
        check_odd(window_size=window_size)
        self.window_size = window_size
        self.receptive_radius = window_size // 2

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, None, self)
        mean, variance = at_least_float32(x), None
        for dim in (2, 3):
            mean, variance = _gathered_along(mean, variance, dim, self.receptive_radius)
        statistics = mean if variance is None else torch.cat([mean, variance.log1p()], dim=1)
        return in_format_of(statistics.to(x.dtype), x)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}"


def _gathered_along(mean: Tensor, variance: Tensor | None, dim: int, radius: int) -> tuple[Tensor, Tensor]:
    """Put the means and variances (none: zero) of the 2 r + 1 neighbours along an axis together."""
    size, rim = mean.shape[dim], (0, 0, radius, radius) if dim == 2 else (radius, radius)
    inside = F.pad(torch.ones_like(mean[:1, :1, :, :1] if dim == 2 else mean[:1, :1, :1]), rim)
    steps = range(2 * radius + 1)
    there, near = ([x.narrow(dim, step, size) for step in steps] for x in (inside, F.pad(mean, rim)))
    count = sum(there[1:], there[0])
    middle = sum(near[1:], near[0]) / count
    spread = torch.zeros_like(mean)
    for weight, value in zip(there, near, strict=True):
        difference = (value - middle) * weight
        spread = torch.addcmul(spread, difference, difference)
    if variance is not None:
        beside = F.pad(variance, rim)
        spread = sum((beside.narrow(dim, step, size) for step in steps), spread)
    return middle, spread / count
