"""Experts of a mixture: small blocks, each good at one thing, that say how far they see."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.memory_format import in_format_of
from .checks import check_feature_map, check_odd, check_positive
from .padding import pad_same


class Expert(nn.Module):
    r"""Base of the experts: a map in, a map out, and a `halo` of pixels that each output pixel sees to every side.

    A subclass has `valid`, which takes a map that is larger by `halo` on each side and pads nothing; `forward` mirrors
    the map by as much and calls it. So an expert computes the same for a window, given with its halo, as for the whole
    map. An expert that sees more than its halo, such as a mean of the map, has the halo None: `MoE2d` then routes whole
    images to it, and no windows. `tile_multiple` is the side of the cells, counted from the corner of the map, that an
    expert cuts it into; windows are multiples of it.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``; of `valid`: ``(B, C, H + 2 halo, W + 2 halo)`` -> ``(B, C, H, W)``

    Args:
        channels: number of channels ``C``.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, or the input has another number of channels.

    >>> class Edges(Expert):
    ...     halo = 1
    ...     def valid(self, x):
    ...         return x[..., 1:-1, 1:-1] - nn.functional.avg_pool2d(x, 3, stride=1)
    >>> Edges(8)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    halo: int | None = 0
    tile_multiple: int = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.channels = channels

    @property
    def tile_safe(self) -> bool:
        """Whether an output pixel sees no further than `receptive_radius`."""
        return self.halo is not None

    @property
    def receptive_radius(self) -> int:
        """How far an output pixel sees: its halo, or the cell that it lies in."""
        return max(self.halo or 0, self.tile_multiple - 1)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        halo = self.halo or 0
        return in_format_of(self.valid(pad_same(x, (halo, halo), "reflect")), x).to(x.dtype)

    def valid(self, x: Tensor) -> Tensor:
        """(N, C, H + 2 halo, W + 2 halo) -> (N, C, H, W)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.channels}, halo={self.halo}"


class PointwiseExpert(Expert):
    r"""A network for each pixel: :math:`y = W_2 \, \mathrm{gelu}(W_1 x + b_1) + b_2`.

    It is what `MoE2d` routes at level "token", where the weights of all experts are stacked.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        mlp_ratio: channels in between, in multiples of C, rounded down.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, no channel is left in between, or the input has another number of channels.

    Source:
        The feed-forward network of Attention Is All You Need (arXiv:1706.03762), section 3.3.

    >>> PointwiseExpert(8)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    def __init__(self, channels: int, *, mlp_ratio: float = 2.0) -> None:
        super().__init__(channels)
        hidden = int(channels * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio must leave a channel of {channels}, got {mlp_ratio}")
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def valid(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class ConvExpert(Expert):
    r"""Local texture by a large kernel: :math:`y = W_2 \, \mathrm{gelu}(W_1 (k *_{dw} x))`.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        kernel_size: odd side of the depthwise kernel; half of it is the halo.
        mlp_ratio: channels in between, in multiples of C, rounded down.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``kernel_size`` is even, no channel is left in between, or the input has another
            number of channels.

    Source:
        ConvNeXt (arXiv:2201.03545), section 2, without its norm.

    >>> ConvExpert(8).halo
    3
    """

    def __init__(self, channels: int, *, kernel_size: int = 7, mlp_ratio: float = 2.0) -> None:
        super().__init__(channels)
        check_odd(kernel_size=kernel_size)
        self.halo = kernel_size // 2
        self.dwconv = nn.Conv2d(channels, channels, kernel_size, groups=channels)
        self.mlp = PointwiseExpert(channels, mlp_ratio=mlp_ratio)

    def valid(self, x: Tensor) -> Tensor:
        return self.mlp.valid(self.dwconv(x))


class DetailExpert(Expert):
    r"""Fine detail, pixel by pixel: :math:`y = W_2 * \mathrm{gelu}(W_1 * x)` with full 3x3 kernels. Its halo is 2.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, or the input has another number of channels.

    Source:
        The residual branch of EDSR (arXiv:1707.02921), section 3.1.

    >>> DetailExpert(8)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    halo = 2

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3)
        self.conv2 = nn.Conv2d(channels, channels, 3)

    def valid(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.conv1(x)))


class TextureExpert(Expert):
    r"""Repeated patterns: one view of the neighbourhood gates another, :math:`y = W_o (\mathrm{gelu}(a) \odot b)`.

    :math:`[a, b] = k *_{dw} (W_i x)` with a depthwise kernel of side `kernel_size`.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        kernel_size: odd side of the kernel; half of it is the halo.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``kernel_size`` is even, or the input has another number of channels.

    Source:
        The gated network of Restormer (arXiv:2111.09881), section 3.2, with a larger kernel.

    >>> TextureExpert(8).halo
    2
    """

    def __init__(self, channels: int, *, kernel_size: int = 5) -> None:
        super().__init__(channels)
        check_odd(kernel_size=kernel_size)
        self.halo = kernel_size // 2
        self.project_in = nn.Conv2d(channels, 2 * channels, 1)
        self.dwconv = nn.Conv2d(2 * channels, 2 * channels, kernel_size, groups=2 * channels)
        self.project_out = nn.Conv2d(channels, channels, 1)

    def valid(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


def cut(x: Tensor, border: int) -> Tensor:
    """Leave out a border of pixels.

    >>> cut(torch.zeros(1, 1, 5, 7), 2).shape
    torch.Size([1, 1, 1, 3])
    """
    return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border] if border else x
