"""The experts as one operator: its contract, and what torch needs to know of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..dispatch import Backend
from ..operand_rules import fold, refuse_second_derivative, under_autocast, unfold
from ..registration import operator
from .op import KERNEL
from .operands import DIFFERENTIABLE, Groups, Operands, check_operands, group_by_expert, in_range
from .reference import expert_mlp_reference

OVER_TOKENS = ("x",)


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    activation: Activation = "gelu",
    backend: Backend = "auto",
) -> Tensor:
    r"""Let each token be computed by the experts it chose, and by no other, and add up what they say.

    .. math::
        y_t = \sum_j g_{t,j} \, \Big(W^2_e \, \phi\big(W^1_e x_t + b^1_e\big) + b^2_e\Big), \qquad e = i_{t,j}

    Time and memory grow with k and not with the number of experts. An index of -1 is nobody: it adds nothing and costs
    nothing, whatever its weight. An expert that no token chose changes nothing, were it NaN, and has gradients of zero;
    so have all experts where there is no token.

    Arithmetic is float64 where `x` is, else float32 (products of half precision by tensor cores, summed in float32),
    and `y` is rounded once; weights and experts may stay wider than `x`, as under autocast, which casts `x` alone.
    Nothing of the size of the hidden layer is kept for backward. Results repeat bit for bit, gradients included:
    nothing is added up in an order that chance decides. "triton" reads nothing on the host; an index out of range,
    which "torch" and "reference" refuse, makes its token NaN there. The choice of backend is fixed when a call is
    traced or exported; the reference cannot be.

    Shape:
        - x: ``(T, C)``, any T from 0 up
        - weights, indices: ``(T, k)``
        - w1, b1: ``(E, H, C)`` and ``(E, H)``
        - w2, b2: ``(E, C, H)`` and ``(E, C)``
        - returns: ``(T, C)``, in the dtype of x

    Args:
        x: the tokens.
        weights: :math:`g`, as `route_top_k` returns them, or any others.
        indices: :math:`i`, int64, from -1 to E - 1.
        w1: the first layers, each as `nn.Linear(C, H)` holds its weight.
        b1: their biases.
        w2: the second layers.
        b2: their biases.
        activation: "relu", "leaky_relu" (of slope 0.2), "gelu" (the exact one) or "silu".
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA tensors. Only the reference can be
            differentiated twice.

    Raises:
        TypeError: if a tensor is not real and floating-point, or indices are not int64.
        ValueError: if shapes or devices do not fit each other, no activation or backend has that name, or an index is
            out of range.
        RuntimeError: if the named backend cannot run here, or a result of "triton" or "torch" is differentiated twice.

    Source: Tan et al., Scattered Mixture-of-Experts Implementation (arXiv:2403.08245), section 3: no padded copies of
        the tokens.

    >>> x, logits = torch.randn(10, 8), torch.randn(10, 4)
    >>> weights, indices = logits.softmax(-1).topk(2)
    >>> w1, b1, w2, b2 = torch.randn(4, 16, 8), torch.zeros(4, 16), torch.randn(4, 8, 16), torch.zeros(4, 8)
    >>> expert_mlp(x, weights, indices, w1, b1, w2, b2).shape
    torch.Size([10, 8])
    """
    operands = Operands(x, weights, indices, w1, b1, w2, b2)
    check_operands(operands, activation)
    form = KERNEL.choose(backend, *operands.differentiable.values())
    if form == "reference":
        narrowed = under_autocast(operands.differentiable, OVER_TOKENS, x.device, constant_axes=1)
        return expert_mlp_reference(**narrowed, indices=in_range(indices, len(w1)), activation=activation)
    return _experts(*operands, activation, form)[0]


def expert_mlp_flops(tokens: int, channels: int, hidden: int, k: int) -> int:
    """Count the floating-point operations of one forward call: 4 C H for each token and expert of it, whatever E.

    Backward takes 2.5 times as many: the first layer again, and four products of matrices.
    """
    return 4 * tokens * k * channels * hidden


def expert_mlp_bytes(
    tokens: int, channels: int, hidden: int, k: int, experts: int, *, itemsize: int = 4, backward: bool = False
) -> int:
    """Count the bytes that no call can avoid to move: x, y, experts, choices, and with `backward` the gradients too."""
    values = 2 * tokens * channels + tokens * k + experts * (2 * channels * hidden + channels + hidden)
    return 8 * tokens * k + itemsize * values * (2 if backward else 1)


@operator("expert_mlp")
def _experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: str,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and the order and the offsets of `Groups`."""
    operands = Operands(x, weights, indices, w1, b1, w2, b2)
    if x.numel() == 0:
        y, groups = torch.empty_like(x), group_by_expert(indices, len(w1))
    else:
        y, groups = KERNEL.form(form).forward(operands, activation)
    return y, groups.order, groups.offsets


@operator("expert_mlp_backward")
def _experts_backward(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    order: Tensor,
    offsets: Tensor,
    grad_y: Tensor,
    activation: str,
    wanted: Sequence[bool],
    form: str,
) -> list[Tensor]:
    """Return those gradients that are wanted, of the operands but the indices in their order."""
    operands = Operands(x, weights, indices, w1, b1, w2, b2)
    if x.numel() == 0:
        return [torch.zeros_like(v) for v in _wanted(operands, wanted)]
    with torch.autocast(x.device.type, enabled=False):  # backward may run under it where forward did
        gradients = KERNEL.form(form).backward(operands, Groups(order, offsets), grad_y, activation, wanted)
    return [gradient for gradient in gradients if gradient is not None]


OPERANDS = len(Operands._fields)


def _wanted(operands: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor]:
    differentiable = Operands(*operands).differentiable.values()
    return [v for v, needed in zip(differentiable, wanted, strict=True) if needed]


@_experts.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = Operands(*inputs[:OPERANDS])
    indices = x.indices
    return torch.empty_like(x.x), indices.new_empty(indices.numel()), indices.new_empty(len(x.w1) + 1)


@_experts_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    return [torch.empty_like(v) for v in _wanted(inputs[:OPERANDS], inputs[-2])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, ctx.activation, ctx.form = inputs
    ctx.save_for_backward(*operands, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad_y: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = dict(zip(Operands._fields, ctx.needs_input_grad, strict=False))
    wanted = [needed[name] for name in DIFFERENTIABLE]
    gradients = iter(_experts_backward(*ctx.saved_tensors, grad_y, ctx.activation, wanted, ctx.form))
    return *(next(gradients) if needed[name] else None for name in Operands._fields), None, None


_experts.register_autograd(_differentiate, setup_context=_save)
_experts_backward.register_autograd(refuse_second_derivative("expert_mlp"))
_experts.register_autocast(Operands._fields, OVER_TOKENS, constant_axes=1)


# vmap folds its dimension into the tokens, and into the experts: the gradients of each call's then stay apart.


@_experts.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    x = _folded(info.batch_size, dims, inputs)
    y, *groups = _experts(*x, *inputs[OPERANDS:])
    return (unfold(y, 0, info.batch_size), *groups), (0, None, None)


@_experts_backward.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    x = _folded(info.batch_size, dims, inputs)
    grad_y = fold(inputs[OPERANDS + 2], dims[OPERANDS + 2], 0, info.batch_size)
    groups = group_by_expert(x.indices, len(x.w1))  # of all calls together
    gradients = _experts_backward(*x, *groups, grad_y, *inputs[OPERANDS + 3 :])
    return [unfold(gradient, 0, info.batch_size) for gradient in gradients], [0] * len(gradients)


def _folded(size: int, dims: Sequence[int | None], inputs: Sequence[Any]) -> Operands:
    each = zip(inputs[:OPERANDS], dims[:OPERANDS], strict=True)
    x = Operands(*(fold(value, dim, 0, size) for value, dim in each))
    indices, experts = unfold(x.indices, 0, size), len(x.w1) // size
    first = experts * torch.arange(size, device=indices.device)[:, None, None]
    return x._replace(indices=torch.where(indices < 0, -1, indices + first).flatten(0, 1))
