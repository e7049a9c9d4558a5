"""The depthwise convolution as one operator: its contract, its checks, and what torch needs to know of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..dispatch import Backend, Kernel
from ..operand_rules import fold, refuse_second_derivative, those_wanted, under_autocast, unfold
from ..registration import operator
from .operands import SIGN_SUFFICES, Operands, check_operands
from .reference import depthwise_conv2d_reference

KERNEL = Kernel("depthwise_conv2d")
OVER_PIXELS = ("x",)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Convolve each channel with a kernel of its own, and activate what comes out.

    With taps counted from the middle of the kernel, and `x` zero beyond its borders,

    .. math::
        y_{c,h,w} = \phi\Big(b_c + \sum_{i,j} w_{c,i,j} \, x_{c,h+i,w+j}\Big).

    Made for kernels of 3 to 63 taps a side and for strips of 1 x k and k x 1; of a kernel larger than the map only the
    part is computed that meets a pixel. `y` has the memory format of `x`, dense where `x` is not; no layout is slow.
    Arithmetic is float64 where `x` is, else float32, and `y` is rounded once, after the activation; weight and bias may
    stay wider than `x`, as under autocast, which casts `x` alone. Results repeat bit for bit, and a pixel depends on
    nothing beyond its kernel. The choice of backend is fixed when a call is traced or exported.

    Shape:
        - x: ``(B, C, H, W)``
        - weight: ``(C, 1, kh, kw)``, both odd
        - bias: ``(C,)``
        - returns: ``(B, C, H, W)``, in the dtype of x

    Args:
        x: the feature map.
        weight: a kernel for each channel, as `nn.Conv2d(C, C, (kh, kw), groups=C)` holds it.
        bias: added to each channel.
        activation: "relu", "leaky_relu" (of slope 0.2), "gelu" (the exact one) or "silu"; None for none. Nothing of
            the size of `x` is kept for it.
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA tensors. Only the reference can be
            differentiated twice.

    Raises:
        TypeError: if an argument is not real and floating-point.
        ValueError: if shapes or devices do not fit each other, or no activation or backend has that name.
        RuntimeError: if the named backend cannot run here, or a result of "triton" or "torch" is differentiated twice.

    Source: Ding et al., Scaling Up Your Kernels to 31x31 (arXiv:2203.06717), section 3: why large depthwise kernels
        need code of their own.

    >>> x, weight = torch.randn(1, 8, 20, 30), torch.randn(8, 1, 17, 17)
    >>> depthwise_conv2d(x, weight, activation="gelu").shape
    torch.Size([1, 8, 20, 30])
    """
    operands = Operands(x, weight, bias)
    check_operands(operands, activation)
    form = KERNEL.choose(backend, *operands)
    if form == "reference":
        narrowed = under_autocast(operands._asdict(), OVER_PIXELS, x.device)
        return depthwise_conv2d_reference(**narrowed, activation=activation)
    return _convolution(*operands, activation, form)


def depthwise_conv2d_flops(
    batch: int, channels: int, height: int, width: int, kernel_height: int, kernel_width: int
) -> int:
    """Count the floating-point operations of one forward convolution, borders included as is usual: 2 for each tap.

    Each of the gradients of `x` and of the weight takes as many.
    """
    return 2 * batch * channels * height * width * kernel_height * kernel_width


def depthwise_conv2d_bytes(
    batch: int,
    channels: int,
    height: int,
    width: int,
    kernel_height: int,
    kernel_width: int,
    *,
    itemsize: int = 4,
    backward: bool = False,
) -> int:
    """Count the bytes that no convolution can avoid to move: x, weight and y, and with `backward` the gradients too."""
    maps, weights = (5, 3) if backward else (2, 1)
    return itemsize * channels * (maps * batch * height * width + weights * kernel_height * kernel_width)


@operator("depthwise_conv2d")
def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, form: str) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    return KERNEL.form(form).forward(Operands(x, weight, bias), activation)


@operator("depthwise_conv2d_backward")
def _convolution_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    grad_y: Tensor,
    activation: str | None,
    wanted: Sequence[bool],
    form: str,
) -> list[Tensor]:
    """Return those gradients of x, weight and bias that are wanted; `y` is there where its sign suffices."""
    operands = Operands(x, weight, bias)
    if x.numel() == 0:
        return [torch.zeros_like(v) for v in those_wanted(operands, wanted)]
    with torch.autocast(x.device.type, enabled=False):  # backward may run under it where forward did
        gradients = KERNEL.form(form).backward(operands, y, grad_y, activation, wanted)
    return [gradient for gradient in gradients if gradient is not None]


OPERANDS = len(Operands._fields)


@_convolution.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@_convolution_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    return [torch.empty_like(v) for v in those_wanted(inputs[:OPERANDS], inputs[-2])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.activation, ctx.form = inputs
    ctx.save_for_backward(*operands, output if ctx.activation in SIGN_SUFFICES else None)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:OPERANDS])
    gradients = iter(_convolution_backward(*ctx.saved_tensors, grad_y, ctx.activation, wanted, ctx.form))
    return *(next(gradients) if needed else None for needed in wanted), None, None


_convolution.register_autograd(_differentiate, setup_context=_save)
_convolution_backward.register_autograd(refuse_second_derivative("depthwise_conv2d"))
_convolution.register_autocast(Operands._fields, OVER_PIXELS)


# vmap folds its dimension into the channels: the gradients of each call's weight then stay apart.


@_convolution.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    operands = _folded(info.batch_size, dims, inputs, (1, 0, 0))
    return unfold(_convolution(*operands, *inputs[OPERANDS:]), 1, info.batch_size), 1


@_convolution_backward.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    tensors = _folded(info.batch_size, dims, inputs, (1, 0, 0, 1, 1))
    *_, wanted, _ = inputs
    gradients = _convolution_backward(*tensors, *inputs[len(tensors) :])
    axes = [axis for axis, needed in zip((1, 0, 0), wanted, strict=True) if needed]
    return [unfold(g, axis, info.batch_size) for g, axis in zip(gradients, axes, strict=True)], axes


def _folded(size: int, dims: Sequence[int | None], inputs: Sequence[Any], axes: Sequence[int]) -> list[Tensor | None]:
    return [None if x is None else fold(x, d, axis, size) for x, d, axis in zip(inputs, dims, axes, strict=False)]
