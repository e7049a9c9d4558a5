"""The selective scan over images as one operator: its contract, its checks, and what torch needs to know of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, Kernel
from ..operand_rules import refuse_second_derivative, under_autocast
from ..registration import operator
from ..selective_scan import selective_scan_exponentials, selective_scan_flops
from .operands import DIRECTIONS, Direction, Operands2d, check_operands
from .reference import selective_scan_2d_reference

KERNEL = Kernel("selective_scan_2d")
OVER_PIXELS = ("x", "delta", "B", "C")


def selective_scan_2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    directions: Sequence[Direction] = DIRECTIONS,
    merge: bool = True,
    order: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Scan an image along K directions, each with coefficients of its own, and add up what they give.

    Direction k visits the pixels in an order :math:`p_k(0), p_k(1), \ldots` and runs `selective_scan` along it: with
    :math:`\Delta = \mathrm{softplus}(\texttt{delta} + \texttt{delta\_bias})` (softplus and bias where asked for),

    .. math::
        h_l = e^{\Delta_{k,p} A_k} \odot h_{l-1} + \Delta_{k,p} B_{k,p} x_p, \qquad
        y_{k,p} = C_{k,p} \cdot h_l + D_k x_p, \qquad p = p_k(l),

    and the result is :math:`\sum_k y_k`. All tensors are channels-last and lie at pixel positions, whatever the
    direction. Rows run from the left, the upper first; columns from the top, the left first; reversed directions visit
    the same pixels from the end.

    State, arithmetic and the sum over directions are float64 where `x` is, else float32; half precision is for inputs
    and the output only, and autocast casts x, delta, B and C alone. Results repeat bit for bit. The choice of backend
    is fixed when a call is traced or exported.

    Shape:
        - x: ``(B, H, W, D)``
        - delta: ``(B, K, H, W, D)``
        - A: ``(K, D, N)``, with N from 1 to 256
        - B, C: ``(B, K, H, W, N)``
        - D, delta_bias: ``(K, D)``
        - order: ``(B, H * W)``
        - returns: ``(B, H, W, D)``, or ``(B, K, H, W, D)`` without `merge`

    Args:
        x: what is scanned.
        delta: the step sizes.
        A: the decay rates, real; negative in a trained model.
        B: how the input enters the state.
        C: how the state is read.
        D: weight of the input beside the state.
        delta_bias: added to `delta`.
        delta_softplus: whether softplus makes `delta` positive.
        directions: one or more of "row", "column", "row_reversed" and "column_reversed", in the order of K.
        merge: whether the directions are added up.
        order: a permutation of each image's pixels, which is not checked to be one (on a GPU, numbers beyond the
            image read and write elsewhere): step l of "row" visits pixel ``order[b, l]``, counted along rows, and
            "row_reversed" starts at its end. There are no columns then.
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA tensors. Only the reference can be
            differentiated twice.

    Raises:
        TypeError: if an argument is not real and floating-point, or `order` not integer.
        ValueError: if shapes, directions or devices do not fit each other, or no backend has that name.
        RuntimeError: if the named backend cannot run here, or a result of "triton" or "torch" is differentiated twice.

    Source: Liu et al., VMamba (arXiv:2401.10166), section 4.3; the order: Guo et al., MambaIRv2 (arXiv:2411.15269),
        section 3.3.

    >>> x, delta = torch.randn(1, 6, 5, 8), torch.rand(1, 4, 6, 5, 8)
    >>> A, B, C = -torch.rand(4, 8, 3), torch.randn(1, 4, 6, 5, 3), torch.randn(1, 4, 6, 5, 3)
    >>> selective_scan_2d(x, delta, A, B, C).shape
    torch.Size([1, 6, 5, 8])
    """
    operands = Operands2d(x, delta, A, B, C, D, delta_bias, order)
    check_operands(operands, directions)
    form = KERNEL.choose(backend, *operands)
    if form == "reference":
        narrowed = under_autocast(operands._asdict(), OVER_PIXELS, x.device)
        return selective_scan_2d_reference(
            **narrowed, delta_softplus=delta_softplus, directions=directions, merge=merge
        )
    codes = [DIRECTIONS.index(direction) for direction in directions]
    return _scan(*operands, codes, delta_softplus, merge, form)[0]


def selective_scan_2d_flops(
    batch: int, height: int, width: int, channels: int, state: int, *, directions: int = len(DIRECTIONS)
) -> int:
    """Count the floating-point operations of one forward scan as VMamba does: 9 B D H W N for each direction."""
    return selective_scan_flops(batch, directions * channels, height * width, state)


def selective_scan_2d_bytes(
    batch: int,
    height: int,
    width: int,
    channels: int,
    state: int,
    *,
    directions: int = len(DIRECTIONS),
    merge: bool = True,
    itemsize: int = 4,
    backward: bool = False,
) -> int:
    """Count the bytes that no scan can avoid to move: x, delta, B, C and y, and with `backward` the gradients too."""
    x_passes, delta_passes, y_passes = (3, 3, 2) if backward else (1, 1, 1)
    of_y = y_passes if merge else y_passes * directions
    per_pixel = (x_passes + delta_passes * directions + of_y) * channels + delta_passes * directions * 2 * state
    return itemsize * batch * height * width * per_pixel


def selective_scan_2d_exponentials(
    batch: int,
    height: int,
    width: int,
    channels: int,
    state: int,
    *,
    directions: int = len(DIRECTIONS),
    backward: bool = False,
) -> int:
    """Count the exponentials that a scan without stored states needs; with `backward` as many again."""
    return selective_scan_exponentials(batch, directions * channels, height * width, state, backward=backward)


@operator("selective_scan_2d")
def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: Tensor | None,
    directions: Sequence[int],
    delta_softplus: bool,
    merge: bool,
    form: str,
) -> tuple[Tensor, Tensor]:
    operands = Operands2d(x, delta, A, B, C, D, delta_bias, order)
    return KERNEL.form(form).forward(operands, directions, delta_softplus, merge)


@operator("selective_scan_2d_backward")
def _scan_backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor,
    directions: Sequence[int],
    delta_softplus: bool,
    merge: bool,
    form: str,
) -> list[Tensor]:
    """Return the gradients of the operands that are there, without the order."""
    operands = Operands2d(x, delta, A, B, C, D, delta_bias, order)
    gradients = KERNEL.form(form).backward(operands, directions, checkpoints, grad_y, delta_softplus, merge)
    return [gradient for gradient in gradients if gradient is not None]


OPERANDS = len(Operands2d._fields)
DIFFERENTIABLE = OPERANDS - 1  # all but the order


@_scan.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    x, merge = Operands2d(*inputs[:OPERANDS]), inputs[-2]
    return x.outputs(merge)


@_scan_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs[:DIFFERENTIABLE] if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[OPERANDS:]
    ctx.save_for_backward(*inputs[:OPERANDS], output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_y: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = iter(_scan_backward(*saved, grad_y, *ctx.options))
    none = [None] * (1 + len(ctx.options))  # the order and the options
    return *(None if x is None else next(gradients) for x in saved[:DIFFERENTIABLE]), *none


_scan.register_autograd(_differentiate, setup_context=_save)
_scan_backward.register_autograd(refuse_second_derivative("selective_scan_2d"))
_scan.register_autocast(Operands2d._fields, OVER_PIXELS)


# vmap is a loop: the calls may differ in A, whose gradients must stay apart, while all directions of one share x.


@_scan.register_vmap
def _(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return _each(_scan, info.batch_size, dims, inputs)


@_scan_backward.register_vmap
def _(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    outputs, axes = _each(_scan_backward, info.batch_size, dims, inputs)
    return list(outputs), list(axes)


def _each(
    op: Any, size: int, dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    def at(i: int) -> list[Any]:
        return [x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, dims, strict=True)]

    results = [op(*at(i)) for i in range(size)]
    outputs = tuple(torch.stack(each) for each in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)
