"""A convolution with a stride that is right in bfloat16 on every processor."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StridedConv2d(nn.Conv2d):
    """`nn.Conv2d`, but where oneDNN reads beyond the map.

    With torch 2.13 on processors with AMX, a strided bfloat16 convolution whose output is one pixel wide and five or
    more high returns what happened to lie in memory (up to 1e38). Two pixels of output are right, so such a map gets a
    stride more of zeros on its right, and the output is cut.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _in_bfloat16(input) or self._width(input) != 1:
            return super().forward(input)
        return super().forward(F.pad(input, (0, self.stride[1])))[..., :1]

    def _width(self, input: Tensor) -> int:
        reach = self.dilation[1] * (self.kernel_size[1] - 1)
        padding = self.padding[1] if isinstance(self.padding, tuple) else 0
        return (input.shape[3] + 2 * int(padding) - reach - 1) // self.stride[1] + 1


def _in_bfloat16(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return False
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16 or autocast
