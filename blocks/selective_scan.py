"""Long-range mixing in linear time: a selective scan (S6) over the rows and columns of a feature map."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.memory_format import in_format_of
from ..kernels.selective_scan import LARGEST_STATE
from ..kernels.selective_scan_2d import DIRECTIONS, Direction, selective_scan_2d
from .checks import check_feature_map, check_odd, check_positive
from .initialisation import fill
from .norm import RMSNorm2d
from .precision import at_least_float32

# The step sizes that a scan starts with spread evenly over this range, in the logarithm.
FIRST_STEPS = (1e-3, 1e-1)


class SelectiveScan2d(nn.Module):
    r"""Mix all pixels of a feature map by selective scans along its rows and columns: the SS2D of VMamba.

    .. math::
        [u, z] = W_{in} x, \qquad \hat u = \mathrm{silu}(\mathrm{conv}(u)), \qquad
        y = W_{out} \, (\mathrm{LN}(\textstyle\sum_k \mathrm{S6}_k(\hat u)) \odot \mathrm{silu}(z))

    Each direction k is an order of the pixels and a scan over it, with a step size and projections that follow the
    input: :math:`[r, B, C] = W_k \hat u`, :math:`\Delta = \mathrm{softplus}(V_k r + b_k)`,
    :math:`A = -e^{A_{log}}`, then :math:`h \leftarrow e^{\Delta A} \odot h + \Delta B \hat u` from pixel to pixel and
    :math:`\mathrm{S6}_k(\hat u) = C \cdot h + D \odot \hat u`. With both orders and their reversals every pixel sees
    the whole map, at a cost linear in H W.

    Steps, states and sums are float32 for half-precision inputs, and A, D and the bias of the steps are used in float32
    whatever the dtype of the module. Parameters have the names and shapes of MambaIR and of VMamba's first layout,
    whose SS2D state dicts load with ``strict=True``; their tokens ``(B, H, W, C)`` are the same map in channels-last
    memory.

    It is not `tile_safe`: `receptive_radius` is that of the convolution alone, the least overlap that tiles need.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        d_state: numbers ``N`` that the state of a channel has.
        expand: the scan runs over ``int(expand * C)`` channels.
        dt_rank: rank ``R`` of the projection to the step sizes; "auto" is C / 16, rounded up.
        d_conv: odd size of the depthwise convolution before the scan.
        directions: the orders of the scans, out of "row", "column", "row_reversed" and "column_reversed". Parameters
            lie in the order given here.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1 or ``d_conv`` even, ``dt_rank`` is another word, ``directions`` are none, unknown
            or not distinct, or the input has another number of channels.

    Source:
        VMamba (arXiv:2401.10166), section 4.2; MambaIR (arXiv:2402.15648), its 2D Selective Scan Module; first values
        from Mamba (arXiv:2312.00752), section 3.6.

    >>> SelectiveScan2d(8, d_state=4)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = False
    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        expand: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        d_conv: int = 3,
        directions: Sequence[Direction] = DIRECTIONS,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, d_state=d_state)
        check_odd(d_conv=d_conv)
        if d_state > LARGEST_STATE:
            raise ValueError(f"d_state must be at most {LARGEST_STATE}, got {d_state}")
        if not (math.isfinite(expand) and expand * channels >= 1):
            raise ValueError(f"expand must leave at least 1 channel, got {expand} of {channels} channels")
        self.channels = channels
        self.expand, self.d_conv = expand, d_conv
        self.d_inner = int(expand * channels)
        self.d_state = d_state
        self.dt_rank = _rank(dt_rank, channels)
        self.directions = tuple(directions)
        check_positive(dt_rank=self.dt_rank)
        if not self.directions or len(set(self.directions) & set(DIRECTIONS)) < len(self.directions):
            raise ValueError(f"directions must be distinct ones of {', '.join(DIRECTIONS)}, got {self.directions}")
        self.receptive_radius = d_conv // 2

        scans, inner = len(self.directions), self.d_inner
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(scans, self.dt_rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(scans, inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(scans, inner))
        self.A_logs = nn.Parameter(torch.empty(scans * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(scans * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        u, z = self.in_proj(x.permute(0, 2, 3, 1)).chunk(2, dim=-1)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        delta, B, C = self._project(u)
        scans = (len(self.directions), self.d_inner)
        A = -torch.exp(at_least_float32(self.A_logs)).unflatten(0, scans)
        D = at_least_float32(self.Ds).unflatten(0, scans)
        bias = at_least_float32(self.dt_projs_bias)
        y = selective_scan_2d(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, directions=self.directions)
        y = self.out_proj(self.out_norm(y) * F.silu(z)).permute(0, 3, 1, 2).to(x.dtype)
        return in_format_of(y, x)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each direction makes of u (B, H, W, D): steps (B, K, H, W, D), B and C (B, K, H, W, N).

        The projections are taken where the pixels lie, once for all directions: no activation is brought in order.
        """
        parts = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, self.x_proj_weight.shape[:2])
        r, B, C = parts.movedim(3, 1).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = r.flatten(2, 3) @ self.dt_projs_weight.mT
        return delta.unflatten(2, u.shape[1:3]), B, C

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for layer in (self.in_proj, self.conv2d, self.out_norm, self.out_proj):
            layer.reset_parameters()
        for weight, fan_in in ((self.x_proj_weight, self.d_inner), (self.dt_projs_weight, self.dt_rank)):
            fill(weight, nn.init.uniform_, a=-(fan_in**-0.5), b=fan_in**-0.5)
        fill(self.dt_projs_bias, _draw_steps)
        fill(self.A_logs, lambda a: a.copy_(torch.arange(1, self.d_state + 1).log().expand_as(a)))
        self.Ds.fill_(1)

    def extra_repr(self) -> str:
        sizes = f"{self.channels}, d_state={self.d_state}, expand={self.expand}, dt_rank={self.dt_rank}"
        return f"{sizes}, d_conv={self.d_conv}, directions={self.directions}"


class SSMGlobalMixer(nn.Module):
    r"""Add to each pixel what scans along the rows and along the columns bring it, through a gate that starts closed.

    :math:`y = x + g \odot \mathrm{SS2D}(\mathrm{RMSNorm}(x))` with a learned gate :math:`g` of one number a channel,
    beside the gate :math:`\mathrm{silu}(z)` of the scan that follows the input. It starts at `gate`: at 0 a fresh block
    is the identity, exactly, so that it can be put anywhere into a trained net, and a deep stack of it starts as
    stable as no block at all. While the gate is 0 only the gate learns; that is one step of the optimizer.

    One scan along the rows and one along the columns, the default, bring a pixel what lies before it in either order.
    With the reversed directions too it sees the whole map, at twice the cost.

    It is not `tile_safe`: `receptive_radius` is that of the convolution alone, the least overlap that tiles need.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        d_state: as in `SelectiveScan2d`, like the next four.
        expand: the scan runs over ``int(expand * C)`` channels.
        dt_rank: rank of the projection to the step sizes.
        d_conv: odd size of the depthwise convolution before the scan.
        directions: the orders of the scans.
        gate: first value of the gate. Something like 0.01 lets every parameter learn from the first step on.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: as `SelectiveScan2d`.

    Source:
        Residual and norm before it as in Mamba (arXiv:2312.00752), section 3.4, with RMSNorm (arXiv:1910.07467); the
        gate is that of ReZero (arXiv:2003.04887), section 3, one a channel as in CaiT (arXiv:2103.17239), section 2.

    >>> SSMGlobalMixer(8, d_state=4)(torch.ones(1, 8, 1, 2)).equal(torch.ones(1, 8, 1, 2))
    True
    """

    tile_safe = False
    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        expand: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        d_conv: int = 3,
        directions: Sequence[Direction] = ("row", "column"),
        gate: float = 0.0,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.norm = RMSNorm2d(channels)
        self.scan = SelectiveScan2d(
            channels, d_state=d_state, expand=expand, dt_rank=dt_rank, d_conv=d_conv, directions=directions
        )
        self.receptive_radius = self.scan.receptive_radius
        self.gate = nn.Parameter(torch.full((channels,), float(gate)))

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        gate = self.gate.to(x.dtype)[:, None, None]
        return torch.addcmul(x, gate, self.scan(self.norm(x)))


def _draw_steps(bias: Tensor) -> None:
    """Fill with numbers whose softplus is a step that a scan may start with."""
    steps = bias.uniform_(*map(math.log, FIRST_STEPS)).exp()
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))


def _rank(dt_rank: int | str, channels: int) -> int:
    if isinstance(dt_rank, str):
        if dt_rank != "auto":
            raise ValueError(f'dt_rank must be "auto" or a number, got {dt_rank!r}')
        return math.ceil(channels / 16)
    return dt_rank
