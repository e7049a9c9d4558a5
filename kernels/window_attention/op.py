"""Window attention as one operator: its contract, its checks, and what torch needs to know of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, Kernel
from ..operand_rules import fold, refuse_second_derivative, those_wanted, under_autocast, unfold
from ..registration import operator
from .operands import Layout, Operands, check_operands
from .operands_heads import fold_heads, folded, parts_of, unfold_heads, with_heads_of_all
from .reference import attend

KERNEL = Kernel("window_attention")
OVER_PIXELS = ("qkv", "kv", "tokens")

Pair = int | Sequence[int]


def window_attention(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Pair,
    shift: Pair = 0,
    dilation: Pair = 1,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    cosine: bool = False,
    kv: Tensor | None = None,
    tokens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Let each pixel attend to the pixels of its window.

    For each head, and with :math:`W(i)` the pixels of the window that pixel i lies in,

    .. math::
        y_i = \sum_{j \in W(i)} \mathrm{softmax}_j\big(\lambda s \, q_i \cdot k_j + b_{i - j}\big) \, v_j.

    Windows begin at `shift` + n * `window_size` along each axis, and one at a border is as much of a window as lies in
    the map: nothing is rolled, padded or masked, and a window at the border sees no other border. This equals the
    cyclic shift with masks of Swin where that is defined, for the same table. With a `dilation` of n, every n-th pixel
    belongs together, and windows lie among these.

    Softmax and sums are float64 where `qkv` is, else float32; the result has its dtype. Memory does not grow with the
    number of logits. Results repeat bit for bit, gradients included. The choice of backend is fixed when a call is
    traced or exported.

    Shape:
        - qkv: ``(B, H, W, 3C)``: queries, keys and values of all heads; with `kv` ``(B, H, W, C)``, queries alone
        - bias_table: ``((2 Wh - 1)(2 Ww - 1), num_heads)``: row ``(dy + Wh - 1)(2 Ww - 1) + dx + Ww - 1`` is for a
          query dy below and dx to the right of the key, in steps of the dilation
        - logit_scale: ``(B, num_heads)``, ``(1, num_heads)`` or ``(num_heads,)``
        - kv: ``(B, H, W, 2C)``
        - tokens: ``(B, G, 2C)``
        - returns: ``(B, H, W, C)``

    Args:
        qkv: the map, projected.
        bias_table: added to the logits, by the offset of query and key: the `relative_position_bias_table` of Swin.
        num_heads: number of heads.
        window_size: height and width of windows, or one number for both.
        shift: where windows begin, from 0 to `window_size` - 1.
        dilation: distance of neighbours in a window.
        scale: s; by default ``(C / num_heads) ** -0.5``, and 1 with `cosine`.
        logit_scale: :math:`\lambda`, for each image and head.
        cosine: divide queries and keys by their lengths, as Swin V2 does.
        kv: keys and values of another map, as large.
        tokens: keys and values that every window sees besides its own, without bias.
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA tensors. Only the reference can be
            differentiated twice.

    Raises:
        TypeError: if a tensor is not real and floating-point.
        ValueError: if shapes, heads, windows, shifts or devices do not fit each other, or no backend has that name.
        RuntimeError: if the named backend cannot run here, or a result of "triton" or "torch" is differentiated twice.

    Source: Liu et al., Swin Transformer (arXiv:2103.14030), section 3.2; cosine logits: Swin Transformer V2
        (arXiv:2111.09883), section 3.2; dilated windows: MaxViT (arXiv:2204.01697), section 3.2.

    >>> qkv, table = torch.randn(1, 13, 10, 3 * 8), torch.randn(15 * 15, 2)
    >>> window_attention(qkv, table, num_heads=2, window_size=8, shift=4).shape
    torch.Size([1, 13, 10, 8])
    """
    window = _pair("window_size", window_size)
    layout = Layout(
        window, window, _pair("shift", shift), _pair("dilation", dilation), num_heads, scale or 0.0, cosine, False
    )
    return _attend(Operands(qkv, kv, bias_table, logit_scale, tokens), layout, scale, backend)


def overlapping_window_attention(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Pair,
    key_window_size: Pair,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    zero_border: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    r"""Let each pixel attend to a window larger than its own: the attention of HAT's overlapping cross-attention.

    As `window_attention`, but keys and values come from `key_window_size` pixels around the middle of the window, as
    far as these lie in the map.

    Shape:
        - qkv: ``(B, H, W, 3C)``
        - bias_table: ``((Wh + Kh - 1)(Ww + Kw - 1), num_heads)``: row ``(dy + Kh - 1)(Ww + Kw - 1) + dx + Kw - 1``,
          where dy is the row of the query in its window less that of the key in the window of keys, and dx likewise
        - returns: ``(B, H, W, C)``

    Args:
        qkv: the map, projected.
        bias_table: added to the logits.
        num_heads: number of heads.
        window_size: height and width of the windows of queries, or one number for both.
        key_window_size: those of the windows of keys: as large, or larger by an even number.
        scale: of the products; by default ``(C / num_heads) ** -0.5``.
        logit_scale: as for `window_attention`.
        zero_border: let pixels beyond the map count as keys and values of zeros, as HAT does.
        backend: as for `window_attention`.

    Raises:
        TypeError: if a tensor is not real and floating-point.
        ValueError: if shapes, heads, windows or devices do not fit each other, or no backend has that name.
        RuntimeError: if the named backend cannot run here, or a result of "triton" or "torch" is differentiated twice.

    Source: Chen et al., HAT (arXiv:2205.04437), section 3.2.

    >>> qkv = torch.randn(1, 13, 10, 3 * 8)
    >>> overlapping_window_attention(qkv, num_heads=2, window_size=4, key_window_size=6).shape
    torch.Size([1, 13, 10, 8])
    """
    window, keys = _pair("window_size", window_size), _pair("key_window_size", key_window_size)
    layout = Layout(window, keys, [0, 0], [1, 1], num_heads, scale or 0.0, False, zero_border)
    return _attend(Operands(qkv, None, bias_table, logit_scale, None), layout, scale, backend)


def _pair(name: str, value: Pair) -> list[int]:
    both = [value, value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    if len(both) != 2 or any(isinstance(v, bool) or not isinstance(v, int | torch.SymInt) for v in both):
        raise ValueError(f"{name} must be an integer or a pair of them, got {value!r}")
    return both


def _attend(x: Operands, layout: Layout, scale: float | None, backend: Backend) -> Tensor:
    scales = x.logit_scale
    if isinstance(scales, Tensor) and isinstance(x.qkv, Tensor) and (scales.ndim == 1 or scales.shape[:-1] == (1,)):
        x = x._replace(logit_scale=scales.expand(x.qkv.shape[0], -1))  # one for all images
    check_operands(x, layout)
    if scale is None:
        layout = layout._replace(scale=1.0 if layout.cosine else (x.channels // layout.num_heads) ** -0.5)
    form = KERNEL.choose(backend, *x)
    if form == "reference":
        return attend(Operands(**under_autocast(x._asdict(), OVER_PIXELS, x.qkv.device)), layout)
    return _attention(*x, *layout, form)[0]


@operator("window_attention")
def _attention(
    qkv: Tensor,
    kv: Tensor | None,
    bias_table: Tensor | None,
    logit_scale: Tensor | None,
    tokens: Tensor | None,
    window: Sequence[int],
    key_window: Sequence[int],
    shift: Sequence[int],
    dilation: Sequence[int],
    num_heads: int,
    scale: float,
    cosine: bool,
    zero_border: bool,
    form: str,
) -> tuple[Tensor, Tensor]:
    x = Operands(qkv, kv, bias_table, logit_scale, tokens)
    layout = Layout(window, key_window, shift, dilation, num_heads, scale, cosine, zero_border)
    if qkv.numel() == 0:
        return _empty_results(x, layout, form)
    return KERNEL.form(form).forward(x, layout)


@operator("window_attention_backward")
def _attention_backward(
    qkv: Tensor,
    kv: Tensor | None,
    bias_table: Tensor | None,
    logit_scale: Tensor | None,
    tokens: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    grad_y: Tensor,
    window: Sequence[int],
    key_window: Sequence[int],
    shift: Sequence[int],
    dilation: Sequence[int],
    num_heads: int,
    scale: float,
    cosine: bool,
    zero_border: bool,
    wanted: Sequence[bool],
    form: str,
) -> list[Tensor]:
    """Return those gradients that are wanted, of the operands in their order."""
    x = Operands(qkv, kv, bias_table, logit_scale, tokens)
    if qkv.numel() == 0:
        return [torch.zeros_like(v) for v in those_wanted(x, wanted)]
    layout = Layout(window, key_window, shift, dilation, num_heads, scale, cosine, zero_border)
    with torch.autocast(qkv.device.type, enabled=False):  # backward may run under it where forward did
        gradients = KERNEL.form(form).backward(x, layout, y, log_sum, grad_y, wanted)
    return [gradient for gradient in gradients if gradient is not None]


OPERANDS, LAYOUT = len(Operands._fields), len(Layout._fields)


def _empty_results(x: Operands, layout: Layout, form: str) -> tuple[Tensor, Tensor]:
    batch, height, width, _ = x.qkv.shape
    y = x.qkv.new_empty(batch, height, width, x.channels)
    kept = (batch, layout.num_heads, height, width) if form == "triton" else (0,)
    return y, x.qkv.new_empty(kept, dtype=x.dtype)


@_attention.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(Operands(*inputs[:OPERANDS]), Layout(*inputs[OPERANDS:-1]), inputs[-1])


@_attention_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    return [torch.empty_like(v) for v in those_wanted(inputs[:OPERANDS], inputs[-2])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *ctx.layout, ctx.form = inputs[OPERANDS:]
    ctx.save_for_backward(*inputs[:OPERANDS], *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_y: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:OPERANDS])
    gradients = iter(_attention_backward(*ctx.saved_tensors, grad_y, *ctx.layout, wanted, ctx.form))
    return *(next(gradients) if needed else None for needed in wanted), *(None for _ in ctx.layout), None


_attention.register_autograd(_differentiate, setup_context=_save)
_attention_backward.register_autograd(refuse_second_derivative("window_attention"))
_attention.register_autocast(Operands._fields, OVER_PIXELS)


# vmap folds its dimension into the heads: the gradients of each call's table then stay apart.


@_attention.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    size, form = info.batch_size, inputs[-1]
    operands = folded(size, dims, inputs[:OPERANDS])
    y, log_sum = _attention(*operands, *with_heads_of_all(size, inputs[OPERANDS:-1]), form)
    if form == "torch":  # which keeps no sums
        return (unfold_heads(y, 1, size), log_sum), (0, None)
    return (unfold_heads(y, 1, size), unfold(log_sum, 1, size)), (0, 1)


@_attention_backward.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    size, (y, log_sum, grad_y) = info.batch_size, inputs[OPERANDS : OPERANDS + 3]
    operands, (of_y, of_log_sum, of_grad) = inputs[:OPERANDS], dims[OPERANDS : OPERANDS + 3]
    *layout, wanted, form = inputs[OPERANDS + 3 :]
    results = fold_heads(y, of_y, 1, size), log_sum if form == "torch" else fold(log_sum, of_log_sum, 1, size)
    gradients = _attention_backward(
        *folded(size, dims, operands), *results, fold_heads(grad_y, of_grad, 1, size),
        *with_heads_of_all(size, layout), wanted, form,
    )  # fmt: skip
    parts = [n for n, x, needed in zip(parts_of(operands), operands, wanted, strict=True) if needed and x is not None]
    return [unfold_heads(g, n, size) for g, n in zip(gradients, parts, strict=True)], [0] * len(parts)
