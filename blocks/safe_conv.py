"""A convolution that is right in bfloat16 on every processor."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SafeConv2d(nn.Conv2d):
    """`nn.Conv2d`, but where oneDNN (torch 2.13, processors with AMX) is wrong in bfloat16.

    - A strided convolution whose output is one pixel wide and five or more high returns what happened to lie in memory
      (up to 1e38). Two pixels of output are right, so such a map gets a stride more of zeros on its right, and the
      output is cut.
    - Of a dilated depthwise convolution of maps, or with weights, in `channels_last` the gradient of the weight is NaN
      or up to 1e35. Where it is wanted, such a convolution is computed in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _in_bfloat16(input):
            return super().forward(input)
        if max(self.stride) > 1 and self._width(input) == 1:
            y = super().forward(F.pad(input, (0, self.stride[1])))
            last = y.is_contiguous(memory_format=torch.channels_last)
            return y[..., :1].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        if self.groups > 1 and max(self.dilation) > 1 and torch.is_grad_enabled() and self.weight.requires_grad:
            with torch.autocast("cpu", enabled=False):
                bias = None if self.bias is None else self.bias.float()
                return self._conv_forward(input.float(), self.weight.float(), bias).bfloat16()
        return super().forward(input)

    def _width(self, input: Tensor) -> int:
        reach = self.dilation[1] * (self.kernel_size[1] - 1)
        padding = self.padding[1] if isinstance(self.padding, tuple) else 0
        return (input.shape[3] + 2 * int(padding) - reach - 1) // self.stride[1] + 1


def _in_bfloat16(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return False
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16 or autocast
