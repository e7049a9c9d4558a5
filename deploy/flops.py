"""FLOPs of the operations that the usual counters leave out: one table, for torch's counter and for fvcore."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..kernels.depthwise_conv2d import depthwise_conv2d_flops
from ..kernels.frequency_split import blur_split_flops, haar_split_flops
from ..kernels.selective_scan import selective_scan_flops
from ..kernels.selective_scan_2d import selective_scan_2d_flops
from ..kernels.window_attention import window_attention_flops
from ..kernels.window_attention.operands import Layout, Operands

Shape = tuple[int, ...]
# Flops of one call from the shapes of its tensors, as torch.utils.flop_counter calls it; a product and a sum are two.
Formula = Callable[..., int]


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scaled dot-product attention on (..., L, E), (..., S, E), (..., S, V): the scores, then their mean of values.

    >>> attention_flops((1, 2, 64, 8), (1, 2, 64, 8), (1, 2, 64, 8))
    262144
    """
    return 2 * torch.Size(query[:-1]).numel() * key[-2] * (query[-1] + value[-1])


def bilinear_flops(*_: Any, out_shape: Shape, **__: Any) -> int:
    """Bilinear interpolation: 4 products and sums for each output element."""
    return 8 * torch.Size(out_shape).numel()


def bicubic_flops(*_: Any, out_shape: Shape, **__: Any) -> int:
    """Bicubic interpolation: 16 products and sums for each output element."""
    return 32 * torch.Size(out_shape).numel()


def scan_flops(u: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::selective_scan`: 9 flops for each state and step, by the convention of VMamba."""
    batch, channels, length = u
    return selective_scan_flops(batch, channels, length, A[1])


def scan_2d_flops(x: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::selective_scan_2d`: the same for each direction."""
    batch, height, width, channels = x
    return selective_scan_2d_flops(batch, height, width, channels, A[2], directions=A[0])


def scan_backward_flops(u: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    """Backward of `claritycore::selective_scan`: about 22 flops for each state and step."""
    return scan_flops(u, delta, A) * 22 // 9


def scan_2d_backward_flops(x: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    """Backward of `claritycore::selective_scan_2d`."""
    return scan_2d_flops(x, delta, A) * 22 // 9


def depthwise_flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::depthwise_conv2d`: a product and a sum for each output element and tap."""
    return depthwise_conv2d_flops(*x, *weight[2:])


def depthwise_backward_flops(
    x: Shape,
    weight: Shape,
    bias: Shape | None,
    y: Shape | None,
    grad_y: Shape,
    activation: str | None,
    wanted: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """Backward of `claritycore::depthwise_conv2d`: as many for each gradient, and for what is recomputed."""
    return depthwise_flops(x, weight) * (sum(wanted[:2]) + (activation is not None and y is None))


def blur_flops(x: Shape, *inputs: Any, **__: Any) -> int:
    """`claritycore::blur_split` and its adjoint: a product and a sum for each tap along each side, and a difference."""
    batch, channels, height, width = x
    return blur_split_flops(batch, channels, height, width, sigma=max(inputs[-2]))


def haar_flops(x: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::haar_split`: 12 flops for 4 pixels."""
    batch, channels, height, width = x
    return haar_split_flops(batch, channels, height, width)


def haar_merge_flops(ll: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::haar_merge`: the same back."""
    batch, channels, height, width = ll
    return haar_split_flops(batch, channels, 2 * height, 2 * width)


def real_fourier_flops(x: Shape, dim: Sequence[int], *_: Any, out_shape: Shape, **__: Any) -> int:
    """A Fourier transform of real numbers, or back to them: 2.5 n log2 n for n of them.

    >>> real_fourier_flops((1, 8, 8), [1, 2], out_shape=(1, 8, 5))
    960
    """
    longer = x if x[dim[-1]] > out_shape[dim[-1]] else out_shape
    points = math.prod(longer[axis] for axis in dim)
    return round(2.5 * math.prod(longer) * math.log2(points))


def complex_fourier_flops(x: Shape, dim: Sequence[int], *_: Any, **__: Any) -> int:
    """A Fourier transform of complex numbers: 5 n log2 n.

    >>> complex_fourier_flops((1, 8, 8), [1, 2])
    1920
    """
    return round(5 * math.prod(x) * math.log2(math.prod(x[axis] for axis in dim)))


def window_flops(*inputs: Any, **_: Any) -> int:
    """`claritycore::window_attention`: the logits and the mean of values, for the keys that each query sees."""
    qkv, kv, _, _, tokens, *layout = inputs
    batch, height, width, channels = qkv
    channels //= 3 if kv is None else 1
    sizes = batch, height, width, channels
    return window_attention_flops(Layout(*layout[: len(Layout._fields)]), *sizes, tokens=tokens[1] if tokens else 0)


def window_backward_flops(*inputs: Any, **_: Any) -> int:
    """Backward of `claritycore::window_attention`: five products of matrices in the place of two."""
    operands, layout = inputs[: len(Operands._fields)], inputs[len(Operands._fields) + 3 :]
    return window_flops(*operands, *layout) * 5 // 2


def flop_formulas() -> dict[Any, Formula]:
    """The table, for `torch.utils.flop_counter.FlopCounterMode(custom_mapping=...)`.

    >>> flop_formulas()[torch.ops.aten.upsample_bicubic2d](out_shape=(1, 3, 8, 8))
    6144
    """
    aten = torch.ops.aten
    return {
        aten.scaled_dot_product_attention: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten.upsample_bilinear2d: bilinear_flops,
        aten.grid_sampler_2d: bilinear_flops,
        aten.upsample_bicubic2d: bicubic_flops,
        aten._fft_r2c: real_fourier_flops,
        aten._fft_c2r: real_fourier_flops,
        aten._fft_c2c: complex_fourier_flops,
        torch.ops.claritycore.blur_split: blur_flops,
        torch.ops.claritycore.blur_split_adjoint: blur_flops,
        torch.ops.claritycore.haar_split: haar_flops,
        torch.ops.claritycore.haar_merge: haar_merge_flops,
        torch.ops.claritycore.depthwise_conv2d: depthwise_flops,
        torch.ops.claritycore.depthwise_conv2d_backward: depthwise_backward_flops,
        torch.ops.claritycore.selective_scan: scan_flops,
        torch.ops.claritycore.selective_scan_2d: scan_2d_flops,
        torch.ops.claritycore.selective_scan_backward: scan_backward_flops,
        torch.ops.claritycore.selective_scan_2d_backward: scan_2d_backward_flops,
        torch.ops.claritycore.window_attention: window_flops,
        torch.ops.claritycore.window_attention_backward: window_backward_flops,
    }


def fvcore_handles() -> dict[str, Callable[[Iterable[Any], Iterable[Any]], int]]:
    """The same table for fvcore: `FlopCountAnalysis(...).set_op_handle(**fvcore_handles())` counts multiply-adds.

    >>> "aten::upsample_bicubic2d" in fvcore_handles()
    True
    """

    def handle(formula: Formula) -> Callable[[Iterable[Any], Iterable[Any]], int]:
        def count(inputs: Iterable[Any], outputs: Iterable[Any]) -> int:
            shapes = [value.type().sizes() if value.type().kind() == "TensorType" else None for value in inputs]
            out_shape = tuple(next(iter(outputs)).type().sizes())
            return formula(*shapes, out_shape=out_shape) // 2

        return count

    formulas: Mapping[Any, Formula] = flop_formulas()
    return {packet._qualified_op_name: handle(formula) for packet, formula in formulas.items()}
