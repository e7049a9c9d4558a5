"""The selective scan as one operator: its contract, its checks, and what torch needs to know of it."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, Kernel
from ..operand_rules import fold, refuse_second_derivative, under_autocast, unfold
from ..registration import operator
from .operands import Operands, check_operands
from .reference import selective_scan_reference

KERNEL = Kernel("selective_scan")
OVER_TIME = ("u", "delta", "B", "C", "z")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Run a linear recurrence whose coefficients follow the input: the S6 scan of Mamba.

    With :math:`\Delta = \mathrm{softplus}(\texttt{delta} + \texttt{delta\_bias})` (softplus and bias where asked for),

    .. math::
        h_l = e^{\Delta_l A} \odot h_{l-1} + \Delta_l B_l u_l, \qquad
        y_l = (C_l \cdot h_l + D u_l) \, \mathrm{silu}(z_l).

    The first ten arguments are those of mamba_ssm's `selective_scan_fn`, in order and meaning. Memory for states is
    bounded, except in the reference: of L states one in 32 is kept, and backward recomputes the rest a stretch at a
    time. Results repeat bit for bit. A may be positive, but states can then overflow, and an overflow that meets a zero
    is NaN. `torch.func`'s grad, jvp and their like take the reference only.

    State and arithmetic are float64 where `u` is, else float32; half precision is for inputs and outputs only, and
    autocast casts u, delta, B, C and z alone. The choice of backend is fixed when a call is traced or exported.

    Shape:
        - u, delta, z: ``(B, D, L)``
        - A: ``(D, N)``, with N from 1 to 256
        - B, C: constant ``(D, N)``, or ``(B, N, L)``, or in G groups of channels ``(B, G, N, L)``
        - D, delta_bias: ``(D,)``
        - initial_state: ``(B, D, N)``
        - returns: y ``(B, D, L)``; with `return_last_state` also the last state ``(B, D, N)``

    Args:
        u: what is scanned.
        delta: the step sizes.
        A: the decay rates, real; negative in a trained model.
        B: how the input enters the state.
        C: how the state is read.
        D: weight of the input beside the state.
        z: gate of the output.
        delta_bias: added to `delta`.
        delta_softplus: whether softplus makes `delta` positive.
        return_last_state: whether the state after the last step comes back too; its gradient counts.
        initial_state: the state before the first step, zero by default. A scan of several pieces, each given the last
            state of the one before, equals one scan.
        reverse: scan from the last step to the first; the last state is then the one at step 0.
        out_dtype: dtype of y; by default that of `u`.
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA tensors. Only the reference can be
            differentiated twice.

    Raises:
        TypeError: if an argument is not real and floating-point.
        ValueError: if shapes, groups or devices do not fit each other, or no backend has that name.
        RuntimeError: if the named backend cannot run here, or a result of "triton" or "torch" is differentiated twice.

    Source: Gu and Dao, Mamba (arXiv:2312.00752), section 3.2 and algorithm 2.

    >>> u, delta = torch.randn(2, 8, 50), torch.rand(2, 8, 50)
    >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 50), torch.randn(2, 4, 50)
    >>> selective_scan(u, delta, A, B, C).shape
    torch.Size([2, 8, 50])
    """
    operands = Operands(u, delta, A, B, C, D, z, delta_bias, initial_state)
    check_operands(operands, out_dtype)
    form = KERNEL.choose(backend, *operands)
    if form == "reference":
        narrowed = under_autocast(operands._asdict(), OVER_TIME, u.device)
        options = {"delta_softplus": delta_softplus, "reverse": reverse, "out_dtype": out_dtype}
        return selective_scan_reference(**narrowed, **options, return_last_state=return_last_state)
    B, C = (x[:, None] if x.ndim == 3 else x for x in (B, C))
    y, last_state, _ = _scan(
        *(u, delta, A, B, C, D, z, delta_bias, initial_state), delta_softplus, reverse, out_dtype, form
    )
    return (y, last_state) if return_last_state else y


def selective_scan_flops(batch: int, channels: int, length: int, state: int) -> int:
    """Count the floating-point operations of one forward scan as VMamba does: 9 B D L N."""
    return 9 * batch * channels * length * state


def selective_scan_bytes(
    batch: int, channels: int, length: int, state: int, *, groups: int = 1, itemsize: int = 4, backward: bool = False
) -> int:
    """Count the bytes that no scan can avoid to move: u, delta, B, C and y, and with `backward` the gradients too."""
    per_channel, per_group = (8, 6) if backward else (3, 2)
    return itemsize * batch * length * (per_channel * channels + per_group * groups * state)


def selective_scan_exponentials(batch: int, channels: int, length: int, state: int, *, backward: bool = False) -> int:
    """Count the exponentials that a scan without stored states needs: B D L N, and with `backward` as many again."""
    return (2 if backward else 1) * batch * channels * length * state


@operator("selective_scan")
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    out_dtype: torch.dtype | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x = Operands(u, delta, A, B, C, D, z, delta_bias, initial_state)
    return KERNEL.form(form).forward(x, delta_softplus, reverse, out_dtype or u.dtype)


@operator("selective_scan_backward")
def _scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor,
    grad_last_state: Tensor,
    delta_softplus: bool,
    reverse: bool,
    form: str,
) -> list[Tensor]:
    """Return the gradients of the operands that are there."""
    x = Operands(u, delta, A, B, C, D, z, delta_bias, initial_state)
    gradients = KERNEL.form(form).backward(x, checkpoints, grad_y, grad_last_state, delta_softplus, reverse)
    return [gradient for gradient in gradients if gradient is not None]


OPERANDS = len(Operands._fields)


@_scan.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, out_dtype = Operands(*inputs[:OPERANDS]), inputs[-2]
    return x.outputs(out_dtype or x.u.dtype)


@_scan_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs[:OPERANDS] if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, ctx.delta_softplus, ctx.reverse, _, ctx.form = inputs
    ctx.save_for_backward(*operands, output[-1])
    ctx.mark_non_differentiable(output[-1])


def _differentiate(ctx: Any, grad_y: Tensor, grad_last_state: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = iter(_scan_backward(*saved, grad_y, grad_last_state, ctx.delta_softplus, ctx.reverse, ctx.form))
    return *(None if x is None else next(gradients) for x in saved[:OPERANDS]), None, None, None, None


_scan.register_autograd(_differentiate, setup_context=_save)
_scan_backward.register_autograd(refuse_second_derivative("selective_scan"))
_scan.register_autocast(Operands._fields, OVER_TIME)


# vmap folds its dimension into the channels, as more groups: the gradients of A, D and the bias then stay apart.


@_scan.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    operands = _fold_operands(info.batch_size, dims, inputs)
    y, last_state, checkpoints = _scan(*operands, *inputs[OPERANDS:])
    axes = (1, 1, 2)
    outputs = zip((y, last_state, checkpoints), axes, strict=True)
    return tuple(unfold(x, axis, info.batch_size) for x, axis in outputs), axes


@_scan_backward.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    operands = _fold_operands(info.batch_size, dims, inputs)
    checkpoints_and_gradients = zip(inputs[OPERANDS:], dims[OPERANDS:], (2, 1, 1), strict=False)
    rest = [fold(*each, info.batch_size) for each in checkpoints_and_gradients]
    gradients = _scan_backward(*operands, *rest, *inputs[OPERANDS + 3 :])
    axes = [_channel_axis(x) for x in operands if x is not None]
    return [unfold(x, axis, info.batch_size) for x, axis in zip(gradients, axes, strict=True)], axes


def _fold_operands(size: int, dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> list[Tensor | None]:
    def folded(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        return fold(x, dim, _channel_axis(x if dim is None else x.select(dim, 0)), size)

    return [folded(x, dim) for x, dim in zip(inputs[:OPERANDS], dims, strict=False)]


def _channel_axis(x: Tensor) -> int:
    """Which axis of an operand counts the channels, or their groups."""
    return 1 if x.ndim > 2 else 0
