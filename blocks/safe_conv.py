"""A convolution that is right in bfloat16 on every processor, and learns dilated kernels at the speed of dense ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rep_algebra import spread

# On a CPU, oneDNN is slow at the gradient of a dilated depthwise kernel for maps in `channels_last`. As dense kernels,
# with zeros between the taps, 3x3 dilated by 2 and 4 and 5x5 dilated by 2 train in 0.23 to 0.79 of the time (AMD EPYC
# with AVX2, torch 2.13); 3x3 dilated by 7 takes longer so, and so do all where nothing is learned.
DENSE = 9


class SafeConv2d(nn.Conv2d):
    """`nn.Conv2d`, but where oneDNN is slow at learning, or wrong in bfloat16 (torch 2.13, processors with AMX).

    - A strided convolution whose output is one pixel wide and five or more high returns what happened to lie in memory
      (up to 1e38). Two pixels of output are right, so such a map gets a stride more of zeros on its right, and the
      output is cut.
    - Of a dilated depthwise convolution of maps, or with weights, in `channels_last` the gradient of the weight is NaN
      or up to 1e35. Where it is wanted, small such kernels are made dense, which is faster too, and a convolution with
      larger ones is computed in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or input.device.type != "cpu":
            return super().forward(input)
        bfloat16 = _in_bfloat16(input)
        if bfloat16 and max(self.stride) > 1 and self._width(input) == 1:
            y = super().forward(F.pad(input, (0, self.stride[1])))
            last = y.is_contiguous(memory_format=torch.channels_last)
            return y[..., :1].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        if self._learns_slowly(input):
            weight = spread(self.weight, self.dilation)
            return F.conv2d(input, weight, self.bias, self.stride, self.padding, groups=self.groups)
        if bfloat16 and self.groups > 1 and self._learns_dilated():
            with torch.autocast("cpu", enabled=False):
                bias = None if self.bias is None else self.bias.float()
                return self._conv_forward(input.float(), self.weight.float(), bias).bfloat16()
        return super().forward(input)

    def _learns_dilated(self) -> bool:
        return max(self.dilation) > 1 and torch.is_grad_enabled() and self.weight.requires_grad

    def _learns_slowly(self, input: Tensor) -> bool:
        depthwise = self.groups == self.in_channels == self.out_channels > 1
        spans = ((size - 1) * d + 1 for size, d in zip(self.kernel_size, self.dilation, strict=True))
        slow = depthwise and self._learns_dilated() and input.stride(1) == 1
        return slow and max(spans) <= DENSE and self.padding_mode == "zeros"

    def _width(self, input: Tensor) -> int:
        reach = self.dilation[1] * (self.kernel_size[1] - 1)
        padding = self.padding[1] if isinstance(self.padding, tuple) else 0
        return (input.shape[3] + 2 * int(padding) - reach - 1) // self.stride[1] + 1


def _in_bfloat16(x: Tensor) -> bool:
    if x.dtype == torch.float64:
        return False
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16 or autocast
