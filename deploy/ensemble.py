"""Self-ensemble: the mean of what a net makes of an image turned and mirrored in every way."""

from itertools import product

import torch
from torch import Tensor, nn

from ..blocks.padding import pad_to_multiple
from ..kernels.operand_rules import compute_dtype
from ..nets.base import stated


class SelfEnsemble(nn.Module):
    r"""Average a net over the eight turns and mirrorings of its input: :math:`y = \frac18 \sum_g g^{-1} f(g x)`.

    Known as x8 or "+" in tables and as test-time augmentation elsewhere; eight times the work. The mean is taken in
    float32 (float64 in float64). It says of itself what tiling needs, so that `restore_tiled` takes it like the net;
    sizes are brought to the net's ``tile_multiple`` first, so that no turn moves the side on which the net would pad.

    Shape: ``(B, C, H, W)`` -> ``(B, C', s H, s W)``, as the net's.

    Args:
        net: a net that enlarges both sides by one whole factor.

    Source: Enhanced Deep Residual Networks (arXiv:1707.02921), section 3.3.

    >>> SelfEnsemble(nn.Conv2d(3, 3, 3, padding=1))(torch.rand(1, 3, 5, 7)).shape
    torch.Size([1, 3, 5, 7])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.tile_safe = getattr(net, "tile_safe", False)
        self.receptive_radius = getattr(net, "receptive_radius", None)
        self.tile_multiple = getattr(net, "tile_multiple", 1)
        self.in_channels, self.scale = stated(net, "in_channels", 3), stated(net, "scale", 1)

    def forward(self, image: Tensor) -> Tensor:
        padded = pad_to_multiple(image, self.tile_multiple)
        total = torch.zeros((), device=image.device)
        for turns, mirrored in product(range(4), (False, True)):
            total = total + self._turned(padded, turns, mirrored)
        scale = total.shape[-1] // padded.shape[-1]
        return (total[..., : scale * image.shape[-2], : scale * image.shape[-1]] / 8).to(image.dtype)

    def _turned(self, image: Tensor, turns: int, mirrored: bool) -> Tensor:
        x = image.rot90(turns, (2, 3))
        y = self.net(x.flip(3)).flip(3) if mirrored else self.net(x)
        return y.to(compute_dtype(y)).rot90(-turns, (2, 3))
