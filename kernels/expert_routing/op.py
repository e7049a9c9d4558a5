"""The choice of experts as one operator: its contract, and what torch needs to know of it."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, Kernel
from ..operand_rules import fold, refuse_second_derivative, unfold
from ..registration import operator
from .operands import check_logits
from .reference import route_top_k_reference

KERNEL = Kernel("expert_routing")


def route_top_k(
    logits: Tensor, k: int, *, bias: Tensor | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Choose for each token the k experts of the largest logits, and weigh them.

    With :math:`p = \mathrm{softmax}(l)` and :math:`S` the experts with the k largest :math:`l_e`, or where there is a
    bias with the k largest :math:`p_e + b_e`,

    .. math::
        w_e = p_e \Big/ \sum_{i \in S} p_i \quad \text{for } k > 1, \qquad w_e = p_e \quad \text{for } k = 1,

    so that the router has a gradient with one expert too. Of equal scores the lowest index is chosen, whatever computes
    it; indices come with the largest score first. Arithmetic is float64 where logits are, else float32, also under
    autocast. Nothing is read on the host.

    A token with a logit that is NaN, or infinite, has weights that are all NaN, and so has what is computed with them:
    it is never routed as if nothing were wrong, though its indices are valid. A logit of minus infinity is allowed.

    Shape:
        - logits: ``(T, E)``
        - bias: ``(E,)``
        - returns: weights ``(T, k)`` in the dtype of logits, and indices ``(T, k)``, int64

    Args:
        logits: a score for each token and expert.
        k: how many experts a token gets.
        bias: added to the probabilities where experts are chosen, not where they are weighed: by it load is balanced
            without a loss. It has no gradient.
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA tensors. Only the reference can be
            differentiated twice.

    Raises:
        TypeError: if a tensor is not real and floating-point, or k not an integer.
        ValueError: if k is less than 1 or more than E, shapes or devices do not fit each other, the bias requires a
            gradient, or no backend has that name.
        RuntimeError: if the named backend cannot run here, or a result of "triton" or "torch" is differentiated twice.

    Source: Shazeer et al., Outrageously Large Neural Networks (arXiv:1701.06538), section 2.1; the bias: Wang et al.,
        Auxiliary-Loss-Free Load Balancing (arXiv:2408.15664), section 3.

    >>> weights, indices = route_top_k(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 2)
    >>> weights.tolist(), indices.tolist()
    ([[0.5, 0.5]], [[1, 3]])
    """
    check_logits(logits, k, bias)
    form = KERNEL.choose(backend, logits)
    if form == "reference":
        return route_top_k_reference(logits, k, bias)
    return _route(logits, bias, k, form)


def route_top_k_flops(tokens: int, experts: int, k: int) -> int:
    """Count the floating-point operations of one choice: four a logit for the softmax, and k comparisons."""
    return tokens * experts * (4 + k)


@operator("route_top_k")
def _route(logits: Tensor, bias: Tensor | None, k: int, form: str) -> tuple[Tensor, Tensor]:
    if logits.numel() == 0:
        return _empty_choice(logits, k)
    return KERNEL.form(form).route(logits, k, bias)


@operator("route_top_k_backward")
def _route_backward(logits: Tensor, indices: Tensor, grad: Tensor, form: str) -> Tensor:
    if logits.numel() == 0:
        return torch.empty_like(logits)
    return KERNEL.form(form).route_backward(logits, indices, grad)


def _empty_choice(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], k
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


_route.register_fake(lambda logits, bias, k, form: _empty_choice(logits, k))
_route_backward.register_fake(lambda logits, *_: torch.empty_like(logits))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, ctx.form = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _route_backward(*ctx.saved_tensors, grad, ctx.form), None, None, None


_route.register_autograd(_differentiate, setup_context=_save)
_route_backward.register_autograd(refuse_second_derivative("route_top_k"))
_route.register_autocast()


# vmap folds its dimension into the tokens, of which none sees another.


@_route.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    (logits, bias, k, form), size = inputs, info.batch_size
    if dims[1] is not None:  # a bias for each call
        calls = logits.expand(size, *logits.shape) if dims[0] is None else logits.movedim(dims[0], 0)
        results = [_route(call, b, k, form) for call, b in zip(calls, bias.movedim(dims[1], 0), strict=True)]
        weights, indices = (torch.stack(result) for result in zip(*results, strict=True))
    else:
        weights, indices = (unfold(v, 0, size) for v in _route(fold(logits, dims[0], 0, size), bias, k, form))
    return (weights, indices), (0, 0)


@_route_backward.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    tensors = (fold(x, dim, 0, info.batch_size) for x, dim in zip(inputs[:3], dims[:3], strict=True))
    return unfold(_route_backward(*tensors, inputs[3]), 0, info.batch_size), 0
