"""The epilogue of a modulated convolution as one operator: its contract, and what torch needs to know of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, Kernel
from ..operand_rules import fold, those_wanted, unfold
from ..registration import operator
from .fallback import gradients_of, slope_of
from .operands import GAINS, Activation, Operands, check_epilogue
from .reference import noise_bias_act_reference

KERNEL = Kernel("modulated_conv")
OPERANDS = len(Operands._fields)


def noise_bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    demodulation: Tensor | None = None,
    *,
    activation: Activation = "lrelu",
    gain: float | None = None,
    clamp: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Demodulate a map, add noise and bias, activate, scale and clamp it: in one pass where Triton runs.

    .. math::
        y_{bchw} = \mathrm{clamp}\big(g \, \phi(d_{bc} \, x_{bchw} + a_c \, n_{bhw} + b_c), -m, m\big)

    Arithmetic is float64 where x is, else float32, also under autocast; x is kept for backward, and nothing else of its
    size. Results repeat bit for bit, gradients included. Memory format kept, dense where x is not. Differentiable any
    number of times: where a gradient is itself to be differentiated, it is computed by operations of torch.
    `torch.func`'s grad, jvp and their like take the reference only. The choice of backend is fixed when a call is
    traced or exported.

    Shape:
        - x: ``(B, C, H, W)``
        - bias: ``(C,)``
        - noise: ``(B, 1, H, W)``, or one for all, ``(1, 1, H, W)``
        - strength: ``()``, ``(1,)`` or ``(C,)``
        - demodulation: ``(B, C)``
        - returns: ``(B, C, H, W)`` in the dtype of x

    Args:
        x: what a convolution gives.
        bias: b; None for none, as for those that follow.
        noise: n, with a strength.
        strength: a, one for all channels or one for each.
        demodulation: d.
        activation: "lrelu" (of slope 0.2), "relu" or "linear".
        gain: g, above 0; None for what keeps the variance: the root of 2, of "linear" 1.
        clamp: m, above 0; None for no bound.
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA tensors.

    Raises:
        TypeError: if an operand is not real and floating-point.
        ValueError: if shapes or devices do not fit, noise comes without a strength or the reverse, a number is not
            above 0, or no activation or backend has that name.
        RuntimeError: if the named backend cannot run here.

    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN (arXiv:1912.04958), figure 2.

    >>> x, noise = torch.randn(2, 8, 5, 7), torch.randn(2, 1, 5, 7)
    >>> y = noise_bias_act(x, torch.zeros(8), noise, torch.tensor(0.0))
    >>> torch.allclose(y, 2**0.5 * torch.nn.functional.leaky_relu(x, 0.2))
    True
    """
    operands = Operands(x, bias, noise, strength, demodulation)
    check_epilogue(operands, activation, gain, clamp)
    form = KERNEL.choose(backend, *operands)
    gain = GAINS[activation] if gain is None else gain
    if form == "reference":
        return noise_bias_act_reference(operands, activation, gain, clamp)
    return _epilogue(*operands, activation, gain, clamp, form)


def noise_bias_act_flops(batch: int, channels: int, height: int, width: int) -> int:
    """Count the floating-point operations of one forward epilogue: 6 for each element, all operands there."""
    return 6 * batch * channels * height * width


def noise_bias_act_bytes(
    batch: int, channels: int, height: int, width: int, *, itemsize: int = 4, backward: bool = False
) -> int:
    """Count the bytes that no epilogue can avoid to move: x, y and noise; x and two gradients more with `backward`."""
    maps = 5 if backward else 2
    return itemsize * batch * height * width * (maps * channels + 1 + backward)


@operator("noise_bias_act")
def _epilogue(
    x: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    demodulation: Tensor | None,
    activation: str,
    gain: float,
    clamp: float | None,
    form: str,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    return KERNEL.form(form).forward(Operands(x, bias, noise, strength, demodulation), activation, gain, clamp)


@operator("noise_bias_act_backward")
def _epilogue_backward(
    x: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    demodulation: Tensor | None,
    grad: Tensor,
    activation: str,
    gain: float,
    clamp: float | None,
    wanted: Sequence[bool],
    form: str,
) -> list[Tensor]:
    """Return those gradients of the operands that are wanted."""
    operands = Operands(x, bias, noise, strength, demodulation)
    if x.numel() == 0:
        return [torch.zeros_like(v) for v in those_wanted(operands, wanted)]
    return operands.like(KERNEL.form(form).backward(operands, grad, activation, gain, clamp, wanted))


_epilogue.register_fake(lambda x, *_: torch.empty_like(x))
_epilogue_backward.register_fake(lambda *i: [torch.empty_like(v) for v in those_wanted(i[:OPERANDS], i[-2])])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:OPERANDS])
    ctx.options = inputs[OPERANDS:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands, (activation, gain, clamp, form) = Operands(*ctx.saved_tensors), ctx.options
    wanted = list(ctx.needs_input_grad[:OPERANDS])
    if torch.is_grad_enabled():
        named = _by_operations(operands, grad, activation, gain, clamp, wanted)
    else:
        every = _epilogue_backward(*operands, grad, activation, gain, clamp, wanted, form)
        named = dict(zip((n for n, needed in zip(Operands._fields, wanted, strict=True) if needed), every, strict=True))
    return *(named.get(name) for name in Operands._fields), None, None, None, None


def _by_operations(
    x: Operands, grad: Tensor, activation: str, gain: float, clamp: float | None, wanted: Sequence[bool]
) -> dict[str, Tensor]:
    """Differentiate by operations that can be differentiated again."""
    wide = x.wide()
    with torch.no_grad():  # whose slope is zero wherever it has one
        at = slope_of(wide, activation, gain, clamp)
    gradients = gradients_of(wide, grad.to(x.dtype) * at, wanted)
    named = x._asdict()
    return {name: g.reshape(named[name].shape).to(named[name].dtype) for name, g in gradients.items()}


_epilogue.register_autograd(_differentiate, setup_context=_save)


@_epilogue.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """Fold what vmap maps over into the batch, where every operand has it, else call by call."""
    size = info.batch_size
    options = inputs[OPERANDS:]
    if dims[1] is None and dims[3] is None:
        x, noise, demodulation = (None if inputs[i] is None else fold(inputs[i], dims[i], 0, size) for i in (0, 2, 4))
        if noise is not None and x is not None and noise.shape[0] != x.shape[0]:
            noise = noise.repeat_interleave(x.shape[0] // noise.shape[0], 0)
        return unfold(_epilogue(x, inputs[1], noise, inputs[3], demodulation, *options), 0, size), 0
    return torch.stack([_epilogue(*each, *options) for each in _calls(size, dims, inputs[:OPERANDS])]), 0


@_epilogue_backward.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    """Differentiate call by call: what each wants of an operand that all share stays apart."""
    tensors, options = inputs[: OPERANDS + 1], inputs[OPERANDS + 1 :]
    every = [_epilogue_backward(*each, *options) for each in _calls(info.batch_size, dims, tensors)]
    gradients = [torch.stack(values) for values in zip(*every, strict=True)]
    return gradients, [0] * len(gradients)


def _calls(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """Take the operands of each call apart."""
    each = list(zip(tensors, dims, strict=False))
    return [[x if x is None or dim is None else x.select(dim, i) for x, dim in each] for i in range(size)]


_epilogue.register_autocast()
