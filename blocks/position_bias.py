"""Position bias of window attention: a number for each offset of query and key, and how it is found."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .checks import check_choice
from .initialisation import fill

PositionBias = Literal["table", "cpb", "dynamic"]


class TableBias(nn.Module):
    """Hold a learned number for each offset and head: the `relative_position_bias_table` of Swin.

    Shape:
        returns: ``((Wh + Kh - 1)(Ww + Kw - 1), num_heads)``, as `claritycore.kernels.window_attention` takes it

    Args:
        num_heads: number of heads.
        window_size: height and width of the windows of queries.
        key_window_size: those of the windows of keys; None for the same.

    Source:
        Swin Transformer (arXiv:2103.14030), section 3.2.

    >>> TableBias(2, (8, 8))().shape
    torch.Size([225, 2])
    """

    def __init__(
        self, num_heads: int, window_size: tuple[int, int], *, key_window_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        sides = (w + k - 1 for w, k in zip(window_size, key_window_size or window_size, strict=True))
        self.relative_position_bias_table = nn.Parameter(torch.empty(math.prod(sides), num_heads))
        self.reset_parameters()

    def forward(self) -> Tensor:
        return self.relative_position_bias_table

    def reset_parameters(self) -> None:
        fill(self.relative_position_bias_table, nn.init.trunc_normal_, std=0.02)


class ContinuousBias(nn.Module):
    r"""Compute the bias of an offset by a small network from its logarithm: the continuous position bias of Swin V2.

    :math:`b = 16 \, \sigma(W_2 \, \mathrm{relu}(W_1 \hat o + b_1))` with
    :math:`\hat o = \mathrm{sign}(o) \log_2(1 + 8 |o| / (W - 1)) / 3` for offsets o up to W - 1 (of larger windows of
    keys, to (W + K) / 2 - 1, which then takes its place), so that another window size takes the same weights.

    Shape:
        returns: ``((Wh + Kh - 1)(Ww + Kw - 1), num_heads)``

    Args:
        num_heads: number of heads.
        window_size: height and width of the windows of queries.
        key_window_size: those of the windows of keys; None for the same.
        pretrained_window_size: W in the place of `window_size`, where weights were trained with other windows.

    Source:
        Swin Transformer V2 (arXiv:2111.09883), section 3.3.

    >>> ContinuousBias(2, (8, 8))().shape
    torch.Size([225, 2])
    """

    def __init__(
        self,
        num_heads: int,
        window_size: tuple[int, int],
        *,
        key_window_size: tuple[int, int] | None = None,
        pretrained_window_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.window_size, self.key_window_size = window_size, key_window_size or window_size
        self.pretrained_window_size = pretrained_window_size
        first = nn.Linear(2, 512)
        self.cpb_mlp = nn.Sequential(first, nn.ReLU(), nn.Linear(512, num_heads, bias=False))

    def forward(self) -> Tensor:
        offsets = _offsets(self.window_size, self.key_window_size, next(self.cpb_mlp.parameters()))
        trained = self.pretrained_window_size
        farthest = offsets.amax(0) if trained is None else offsets.new_tensor(trained) - 1
        scaled = 8 * offsets / farthest.clamp(min=1)
        return 16 * torch.sigmoid(self.cpb_mlp(torch.sign(scaled) * torch.log2(1 + scaled.abs()) / 3))


class DynamicBias(nn.Module):
    r"""Compute the bias of an offset by a small network from the offset itself: the dynamic bias of CrossFormer.

    Linear to p numbers, then three times layer norm, ReLU and linear, the last to the heads.

    Shape:
        returns: ``((Wh + Kh - 1)(Ww + Kw - 1), num_heads)``

    Args:
        num_heads: number of heads.
        window_size: height and width of the windows of queries.
        key_window_size: those of the windows of keys; None for the same.
        hidden: p.

    Source:
        CrossFormer (arXiv:2108.00154), section 3.3.

    >>> DynamicBias(2, (8, 8))().shape
    torch.Size([225, 2])
    """

    def __init__(
        self,
        num_heads: int,
        window_size: tuple[int, int],
        *,
        key_window_size: tuple[int, int] | None = None,
        hidden: int = 16,
    ) -> None:
        super().__init__()
        self.window_size, self.key_window_size = window_size, key_window_size or window_size
        self.pos_proj = nn.Linear(2, hidden)
        self.pos1, self.pos2 = (
            nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, hidden)) for _ in range(2)
        )
        # What is added to all keys alike changes no softmax: no bias.
        self.pos3 = nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, num_heads, bias=False))

    def forward(self) -> Tensor:
        offsets = _offsets(self.window_size, self.key_window_size, self.pos_proj.weight)
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


BIASES: dict[str, type[nn.Module]] = {"table": TableBias, "cpb": ContinuousBias, "dynamic": DynamicBias}


def position_bias(
    kind: PositionBias | nn.Module | None,
    num_heads: int,
    window_size: tuple[int, int],
    key_window_size: tuple[int, int] | None = None,
) -> nn.Module | None:
    """Make the position bias of a kind; none for None, and a module is one already."""
    if kind is None or isinstance(kind, nn.Module):
        return kind
    check_choice("bias", kind, get_args(PositionBias))
    return BIASES[kind](num_heads, window_size, key_window_size=key_window_size)


def _offsets(window: tuple[int, int], keys: tuple[int, int], like: Tensor) -> Tensor:
    """List the offsets (dy, dx) in the order of the table: (offsets, 2)."""
    rows, columns = (
        torch.arange(w + k - 1, device=like.device, dtype=like.dtype) - (w + k - 2) // 2
        for w, k in zip(window, keys, strict=True)
    )
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
