"""A convolution that is fast on a CPU however wide its kernel and whatever its groups."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import depthwise_conv2d
from ..kernels.memory_format import channels_last
from ..kernels.processor import AVX2
from .rep_algebra import Size, spread
from .safe_conv import SafeConv2d

# On a CPU, torch is slow at kernels that span so many columns in groups of few channels: forward on contiguous maps,
# and, from `BROADER` on, at the gradient of the weight on any. Dilated ones are slow, too: as dense kernels, with zeros
# between the taps, they take a tenth of the time at 9x9 dilated by 2, forward and backward, and no more at 3x3 dilated
# by 7.
WIDE = 11 if AVX2 else 15
# So many depthwise convolutions take as long forward as one in groups of so many channels, and a third in training.
FEW = 4
# With AVX2 (Zen 3, torch 2.13) oneDNN has no fast form of a convolution over all channels that pads contiguous maps for
# so many columns: padded before, 11x11 to 17x17 take a fifth to a third of the time.
BROAD = 9
# Nor has it, from here on, one of the gradient of the weight on channels-last maps: it takes 20 to 30 times as long as
# on contiguous ones. Below it is the contiguous ones that take twice as long.
BROADER = 15


class SameConv2d(SafeConv2d):
    """A convolution that keeps clear of what oneDNN is slow at with wide kernels.

    Large depthwise ones take `claritycore.kernels.depthwise_conv2d`. Its padding is "same", or none where the map was
    padded before. `size` and `pads_itself` are what they are of a `Branch`.
    """

    @property
    def size(self) -> Size:
        rows, columns = ((size - 1) * d + 1 for size, d in zip(self.kernel_size, self.dilation, strict=True))
        return rows, columns

    @property
    def pads_itself(self) -> bool:
        return self.kernel_size == (1, 1) or self.padding != (0, 0)

    def forward(self, input: Tensor) -> Tensor:
        same = self.padding == (self.size[0] // 2, self.size[1] // 2) and self.stride == (1, 1)
        dense = self.dilation == (1, 1)
        if same and dense and self.groups == self.in_channels == self.out_channels > 1:
            return depthwise_conv2d(input, self.weight, self.bias)
        few = FEW if self.stride == (1, 1) else 1
        small_groups = self.groups > 1 and self.in_channels // self.groups <= few
        # An exported program is for other runtimes, whose convolutions have no such cliff.
        if small_groups and self.size[1] >= WIDE and input.is_cpu and not torch.compiler.is_exporting():
            last = input.stride(1) == 1  # of a view, too, that was cut from a larger map
            if self.size[1] >= BROADER or not last:
                format = torch.channels_last if last else torch.contiguous_format
                return self._forward_on_cpu(input).contiguous(memory_format=format)
        plain = input.is_cpu and input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        whole = dense and self.groups == 1 and self.stride == (1, 1) and self.kernel_size[1] >= BROAD
        if AVX2 and plain and whole and not torch.compiler.is_compiling():
            return self._forward_with_avx2(input)
        return super().forward(input)

    def _forward_with_avx2(self, x: Tensor) -> Tensor:
        given = last = x.stride(1) == 1
        if torch.is_grad_enabled() and (self.weight.requires_grad or x.requires_grad):
            last = self.kernel_size[1] < BROADER
            x = channels_last(x) if last else x.contiguous()
        if last:
            y = super().forward(x)
        else:
            rows, columns = map(int, self.padding)
            y = F.conv2d(F.pad(x, (columns, columns, rows, rows)), self.weight, self.bias)
        return channels_last(y) if given else y.contiguous()

    def _forward_on_cpu(self, x: Tensor) -> Tensor:
        weight = spread(self.weight, self.dilation)
        learns = torch.is_grad_enabled() and weight.requires_grad
        if self.groups == self.in_channels == self.out_channels and not learns:
            x = x.contiguous(memory_format=torch.channels_last)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)
        # What a group gives is the sum over its inputs: each is convolved for all the outputs of its group. To compute
        # what the stride drops, and the border, is less than torch takes for the gradient of the weight.
        inputs, outputs = weight.shape[1], self.out_channels // self.groups
        parts = (x[:, number::inputs] for number in range(inputs))
        parts = parts if outputs == 1 else (part.repeat_interleave(outputs, 1) for part in parts)
        y = depthwise_conv2d(next(parts), weight[:, :1], self.bias)
        for number, part in enumerate(parts, start=1):
            y = y + depthwise_conv2d(part, weight[:, number : number + 1])
        rows, columns = (size // 2 - padded for size, padded in zip(self.size, map(int, self.padding), strict=True))
        down, across = self.stride
        return y[:, :, rows : y.shape[2] - rows : down, columns : y.shape[3] - columns : across]
